"""Dion2 (arXiv 2512.16928), and Muon at fraction 1: the update, one function on one page.

    M    <- M + G                              accumulate
    K    <- the k slices of M with the largest L1 norms
    S    <- M[K]                               or G[K] + mu M[K] with nesterov
    M[K] <- mu M[K]                            only what is selected decays
    O    <- U V^T of S = U Sigma V^T           orthonormalize
    O    <- O, its neurons normalized          where normalize_neurons says so: neurons.py
    X    <- (1 - lr weight_decay) X            every entry
    X[K] <- X[K] - lr scale O                  only what is selected moves

A slice is a row or a column of the matrix, along its shorter axis unless told otherwise. Here every matrix is whole on
this rank; dion2_shared.py does the same for matrices that several ranks share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dion2_lightning.algorithms import neurons
from dion2_lightning.algorithms.algorithm import (
    Algorithm,
    Member,
    StateTensor,
    StepContext,
    StepWork,
)
from dion2_lightning.algorithms.dion2_shared import update_shared
from dion2_lightning.algorithms.hyperparameters import (
    DType,
    MatrixSettings,
    SharedSettings,
    decay_rate,
    dtype,
    setting,
    share,
)
from dion2_lightning.algorithms.learning_rates import update_scale
from dion2_lightning.algorithms.matrix_update import (
    MatrixUpdate,
    SelectedSlices,
    count_step,
    draw_bits,
    runs,
    stack_alike,
    within_memory,
)
from dion2_lightning.algorithms.passes import (
    accumulate_and_sum,
    apply,
    in_cache,
    leave_idle,
    polar_factors,
    record_selection,
    select,
    show_results,
    shrink,
    take,
)
from dion2_lightning.algorithms.shared import split_by_ranks
from dion2_lightning.kernels.orthonormalize import default_dtype
from dion2_lightning.kernels.precision import has_float64
from dion2_lightning.kernels.rounding import HALF_PRECISION
from dion2_lightning.kernels.selection import selected_count
from dion2_lightning.matrices.views import Matrices, Observed, matrices_of


@dataclass(kw_only=True)
class SlicedSettings(MatrixSettings):
    """The hyperparameters of Dion2 and Dion3."""

    fraction: float = setting(
        0.25, "Share of each matrix's slices to select, in (0, 1]; k = max(1, ceil(fraction n)) of n.", share
    )
    nesterov: bool = setting(
        False,
        "Orthonormalize G + momentum M of the selected slices instead of M, as torch.optim.Muon does by default. Which "
        "slices are selected does not change.",
    )
    neuron_beta: float = setting(
        0.95,
        "Decay rate, in [0, 1), of the neurons' variances: of Dion3 and NorMuon, and of Dion2 with normalize_neurons.",
        decay_rate,
    )
    orthonormalize_dtype: DType | None = setting(
        None,
        "Precision of the orthonormalization. None chooses what the hardware multiplies fastest: bfloat16 on GPUs and "
        "CPUs built for it (NVIDIA's from compute capability 8.0 on), else float32.",
        dtype,
    )
    state_dtype: DType | None = setting(
        None,
        "Precision of the momentum. None: float32 for bfloat16 and float16 parameters, else the parameter's own.",
        dtype,
    )


@dataclass(kw_only=True)
class Dion2Settings(SlicedSettings):
    """The hyperparameters of Dion2."""

    select: Literal["shorter", "output"] = setting(
        "shorter",
        '"shorter" selects along the shorter axis of (out, in), output slices at a tie; "output" always selects output '
        "slices.",
    )
    normalize_neurons: bool = setting(
        False,
        "Divide the orthonormal update of each neuron, an output of the matrix, by its running root mean square, as "
        'NorMuon does (arXiv 2510.05491). With select="output" this is Dion3.',
    )


class Dion2Algorithm(Algorithm):
    """Orthonormalizes the largest slices of the momentum."""

    name: ClassVar[str] = "dion2"
    settings: ClassVar[type[SharedSettings]] = Dion2Settings
    needs_matrices: ClassVar[bool] = True
    orthonormalizes: ClassVar[bool] = True
    shaped_state: ClassVar[str | None] = "momentum"
    state_by_setting: ClassVar[frozenset[str]] = frozenset({"variance"})

    def select(self, group: Mapping[str, Any]) -> str:
        """Return from which axis a group's slices are selected."""
        return str(group["select"])

    def normalizes_neurons(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group's neurons are normalized."""
        return bool(group["normalize_neurons"])

    def check_parameter(self, parameter: Tensor, label: str, group: Mapping[str, Any]) -> None:
        """Raise an error about what is no matrix, or asks for a precision that its device lacks."""
        for name in ("orthonormalize_dtype", "state_dtype"):
            if group[name] == "float64" and not has_float64(parameter.device):
                raise ValueError(
                    f"{label} is on {parameter.device.type!r}, which has no float64, and {name} is 'float64'; choose "
                    "'float32', or None, the default"
                )
        super().check_parameter(parameter, label, group)

    def shares_replicas(self, asked: bool | None) -> bool:
        """Return whether they share norms, at least: always, unless they are told not to."""
        return asked is not False

    def observed(self, parameter: Tensor, group: Mapping[str, Any]) -> list[Observed]:
        """Return a parameter's matrices, block by block, the axis of the slices, and how many a step selects."""
        return [self._observed(matrices, group) for matrices in matrices_of(parameter, group)]

    def _observed(self, matrices: Matrices, group: Mapping[str, Any]) -> Observed:
        axis = matrices.selection_axis(self.select(group))
        return Observed(matrices, axis, selected_count(matrices.slices_along(axis), group["fraction"]))

    def continues(self, other: Algorithm) -> bool:
        """Return whether it is one that keeps this momentum, whatever it makes of it."""
        return isinstance(other, Dion2Algorithm)

    def agreement(self, parameter: Tensor, group: Mapping[str, Any]) -> object:
        """Return the precision of the orthonormalization, which may depend on the hardware."""
        return _orthonormalization_dtype(parameter, group)

    def state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Return the momentum, the number of steps, on which random bits depend, and variances where there are some."""
        asked = group["state_dtype"]
        own = torch.float32 if parameter.dtype in HALF_PRECISION else parameter.dtype
        state = {
            "momentum": StateTensor.like(parameter, own if asked is None else getattr(torch, asked)),
            "step": StateTensor((), torch.float32, parameter.device),
        }
        if self.normalizes_neurons(group):
            state["variance"] = neurons.variance_of(parameter, matrices_of(parameter, group))
        return state

    def updates_of(self, member: Member, context: StepContext) -> list[MatrixUpdate]:
        """Read a parameter and its settings, as they are now: its matrices, block by block."""
        parameter, group = member.parameter, member.group
        updates: list[MatrixUpdate] = []
        lr, weight_decay = context.number(group["lr"]), context.number(group["weight_decay"])
        for matrices, axis, selected, _ in self.observed(parameter, group):
            slices, rule = matrices.slices_along(axis), group["adjust_lr_fn"]
            scale = update_scale(matrices.shape, slices, selected, rule, group["scale_lr_by_fraction"])
            updates += MatrixUpdate.of(
                member,
                context,
                matrices=matrices,
                axis=axis,
                selected=selected,
                momentum_factor=context.number(group["momentum"]),
                step_size=lr * scale,
                shrink=1.0 - lr * weight_decay,
                dtype=_orthonormalization_dtype(parameter, group),
                nesterov=group["nesterov"],
                neuron_beta=group["neuron_beta"] if self.normalizes_neurons(group) else None,
            )
        return updates

    def step(self, members: Sequence[Member], context: StepContext) -> StepWork:
        """Plan a step: the matrices of this rank alone, and those that it shares."""
        updates = [update for member in members for update in self.updates_of(member, context)]
        unshared, shared = split_by_ranks(updates, context.share_replicas)
        present = [update for update in unshared if update.has_gradient]
        return StepWork([update_shared(part, context) for part in shared], [partial(update_alone, present, context)])


def update_alone(updates: Sequence[MatrixUpdate], context: StepContext) -> None:
    """Take one step on matrices that are whole on this rank and have a gradient, as many at a time as memory allows."""
    draw_bits(updates)
    for run in runs(updates, context):
        update_run(run, context)
    count_step(updates)


def update_run(run: Sequence[MatrixUpdate], context: StepContext) -> None:
    """Go down the box with some of them."""
    wants_norms = context.observer is not None and context.observer.wants_results
    run = stack_alike(run)
    sums = accumulate_and_sum(run, context.working_memory, not wants_norms)
    leave_idle(run)
    selected = select(run, sums)
    slices = [SelectedSlices(update, update.places(K)) for update, (K, _) in zip(run, selected, strict=True)]
    for some in within_memory(slices, context):
        update_slices(some, context)
    for update, (indices, norms) in zip(run, selected, strict=True):
        record_selection(update, indices, norms, context)
        update.write_back()


def update_slices(slices: Sequence[SelectedSlices], context: StepContext) -> None:
    """Go down the box from S on, with what is selected."""
    results = polar_factors(take(slices), [each.update for each in slices], context)
    of_results = dict(zip(slices, results, strict=True))
    normalized = {each: of_results[each] for each in slices if each.update.neuron_beta is not None}
    factors = neurons.factors(neurons.square_sums(normalized), context)
    show_results(of_results, context)
    for some in in_cache(slices):
        shrink([each.update for each in some if each.first == 0])
        apply(some, [of_results[each] for each in some], [factors.get(each) for each in some], context)


def _orthonormalization_dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The precision that a group asks for, or else the fastest of the parameter's device."""
    asked = group["orthonormalize_dtype"]
    return default_dtype(parameter.device) if asked is None else getattr(torch, asked)
