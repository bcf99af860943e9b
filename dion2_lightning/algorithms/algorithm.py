"""What every algorithm says of itself: its settings, the state of a parameter, and how a step is taken.

The optimizer, checkpoints, checks and statistics ask these objects and name no algorithm.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dion2_lightning.algorithms.hyperparameters import (
    Check,
    SharedSettings,
    check_values,
    checks_of,
    defaults_of,
    flag,
)
from dion2_lightning.distributed.overlap import WaitingStep
from dion2_lightning.kernels import fused
from dion2_lightning.kernels.device_numbers import DeviceNumber, Number
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.selection import Selection
from dion2_lightning.matrices.layout import Layouts, is_dtensor, local, local_shape, moved, placed
from dion2_lightning.matrices.splits import WHOLE, blocks_of, check_splits, misfit
from dion2_lightning.matrices.views import Observed, Source, matrices_of

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

Orthonormalize = Callable[[Tensor], Tensor]

STORAGE: Final[dict[str, tuple[Any, Check]]] = {
    "batched": (False, flag),
    "transposed": (False, flag),
    "convolution": (False, flag),
    "splits": (WHOLE, check_splits),
}
"""Entries of a group that say how its matrices are stored, with their defaults and checks."""

WORKING_SHARE: Final = 0.15
"""Working memory of a step, as a share of the weights' bytes."""

MIN_WORKING_MEMORY: Final = 2**28
"""And at least so much: small models are stepped in one turn."""


class Observer(Protocol):
    """What receives the events of a step; see :class:`~dion2_lightning.SelectionTracker`.

    Attributes:
        wants_results: Whether it wants norms, and the other methods than :meth:`selected` to be called, in this step.
    """

    wants_results: bool

    def begin_step(self) -> None:
        """Called before a step."""

    def end_step(self) -> None:
        """Called after a step that did not fail."""

    def selected(self, source: Source, indices: Tensor, norms: Tensor | None) -> None:
        """Called with the selected slices (count, k) and the norms of all slices (count, n), the same on every rank.

        The norms may be None where it does not want them.
        """

    def orthonormalized(self, source: Source, result: Tensor) -> None:
        """Called with whole orthonormal submatrices (count, k, m), on the rank that computed them."""

    def normalized(self, source: Source, variance: Tensor) -> None:
        """Called with the variances of all neurons (count, out), the same on every rank that holds their matrices."""

    def moved(self, source: Source, change: Tensor) -> None:
        """Called with what is added to this rank's part of some selected slices."""

    def projected(
        self,
        sources: Sequence[Source],
        counts: Sequence[int],
        energies: Tensor,
        captured: Tensor,
        norms: Tensor,
        grams: Tensor,
        squares: Tensor,
        is_taken: Tensor | None,
    ) -> None:
        """Called after updates P Q^T of one rank r, the same on every rank that holds parts of the matrices.

        Args:
            sources: Which matrices they are, in the order of the tensors below.
            counts: How many each has.
            energies: Squared Frobenius norms of the momenta B, (matrices,); means where replicas differ in B.
            captured: Squared Frobenius norms of B^T P, the same.
            norms: Of the columns of R = B^T P, (matrices, r).
            grams: Z^T Z of Z = [Q before the step, Q after it], (matrices, 2 r, 2 r). A column of Q after the step has
                the direction of R's, unless that is zero up to rounding.
            squares: Sums of the squares of what is added to the weights, (matrices,).
            is_taken: Boolean: whether the step is taken, 0-d, or by which of the matrices, (matrices,); None where all
                take it for certain.
        """


class StateTensor(NamedTuple):
    """A tensor of a parameter's state: before the first step zeros, unless it says otherwise.

    Attributes:
        shape: Of the whole tensor, on all ranks together.
        dtype: Its precision.
        device: Where it is.
        placements: How it is placed on the parameter's mesh; None for a plain tensor, which every rank has whole.
        fill: Fills the new tensor, of which each rank has its part, given the parameter's name; None leaves zeros.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    placements: tuple[Any, ...] | None = None
    fill: Callable[[Tensor, str], None] | None = None

    @classmethod
    def like(cls, parameter: Any, dtype: torch.dtype | None = None) -> "StateTensor":
        """Return one with the shape and the placements of the parameter, and its dtype unless another is given."""
        placements = tuple(parameter.placements) if is_dtensor(parameter) else None
        return cls(tuple(parameter.shape), dtype or parameter.dtype, parameter.device, placements)

    def start_for(self, parameter: Any, name: str) -> Tensor:
        """Create the tensor, for the parameter given to :meth:`Algorithm.state`; its name is :attr:`Member.name`."""
        if self.fill is None:
            return self.zeros_for(parameter)
        tensor = self._replace(device=parameter.device).zeros_for(parameter)  # wherever it is kept, the same numbers
        self.fill(tensor, name)
        return moved(tensor, self.device, self.dtype)

    def zeros_for(self, parameter: Any) -> Tensor:
        """Create a zero tensor of this shape and placement."""
        # DTensor's own functions would do, but they make tensors on the mesh's type of device, not where CPU offload
        # wants them, and torch 2.15 takes 0.1 s to plan them on a mesh of three dimensions, for every shape anew.
        if self.shape == tuple(parameter.shape) and self.placements == getattr(parameter, "placements", None):
            return placed(torch.zeros_like(local(parameter), dtype=self.dtype, device=self.device), parameter)
        if self.placements is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        part = local_shape(self.shape, parameter, self.placements)
        zeros = torch.zeros(part, dtype=self.dtype, device=self.device)
        return placed(zeros, parameter, self.placements, self.shape)


class Member(NamedTuple):
    """A parameter in a step.

    Attributes:
        parameter: With or without a gradient.
        state: Its state, complete.
        group: Its settings.
        label: Its name for error messages.
        name: Its name without the prefixes of wrappers, or without one its place in its group: the same whatever the
            layout.
    """

    parameter: Tensor
    state: dict[str, Tensor]
    group: Mapping[str, Any]
    label: str
    name: str


def default_working_memory(held: int) -> int:
    """Return how many bytes a step may take beside state and gradients, given the bytes of weights on a rank."""
    return max(int(WORKING_SHARE * held), MIN_WORKING_MEMORY)


@dataclass
class StepContext:
    """What is the same for all parameters of a step.

    Attributes:
        settings_checksum: Of the settings of all groups, in [0, 2^32); see :meth:`Algorithm.step`.
        orthonormalize: Replaces the package's orthonormalization; None for none.
        process_group: The ranks that hold replicas of the plain parameters, and of all parameters where gradients are
            not averaged; None where no others do.
        share_replicas: Whether ranks that hold replicas share the work on them; None where it pays.
        working_memory: How many bytes a step may take beside state and gradients, or what one matrix needs.
        kernels: What goes over the memory of matrices: "torch", operations of torch; "triton", kernels of Triton;
            "auto", the latter on CUDA devices that have them.
        fused_devices: Whether kernels of Triton do, by device: filled in by :meth:`fuses_on`.
        observer: What receives the events of the step; None for none.
        selections: What is selected, by parameter and block: filled in by the step.
        fallbacks: How often a faster way has failed and a slower one was taken, by the name of the faster one.
        layouts: The layouts that were read in this step, and what was found from them.
        gates: By device, what decides there whether the step is taken. Where there is one, an algorithm must change
            neither weights nor state while it is closed.
        device_numbers: Rates that are tensors, as numbers of the update.
    """

    settings_checksum: int = 0
    orthonormalize: Orthonormalize | None = None
    process_group: "ProcessGroup | None" = None
    share_replicas: bool | None = None
    working_memory: int = 2**28
    kernels: Literal["auto", "torch", "triton"] = "auto"
    fused_devices: dict[torch.device, bool] = field(default_factory=dict)
    observer: Observer | None = None
    selections: dict[tuple[Tensor, str], Selection] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    layouts: Layouts = field(default_factory=dict)
    gates: Mapping[torch.device, Gate] = field(default_factory=dict)
    device_numbers: dict[Tensor, DeviceNumber] = field(default_factory=dict)

    def number(self, rate: float | Tensor) -> Number:
        """Return a rate of a group as a number to calculate with; the same one for the same tensor."""
        if not isinstance(rate, Tensor):
            return rate
        if rate not in self.device_numbers:
            self.device_numbers[rate] = DeviceNumber(rate)
        return self.device_numbers[rate]

    def fuses_on(self, device: torch.device) -> bool:
        """Return whether kernels of Triton go over the memory of matrices on a device."""
        if device not in self.fused_devices:
            takes = fused.are_default(device) if self.kernels == "auto" else self.kernels == "triton"
            self.fused_devices[device] = takes
        return self.fused_devices[device]


class StepWork(NamedTuple):
    """A step of one algorithm, planned and not begun.

    Attributes:
        waiting: The parts that wait for other ranks.
        local: The parts that do not; each is done while the others wait.
    """

    waiting: Sequence[WaitingStep] = ()
    local: Sequence[Callable[[], None]] = ()


class Algorithm(ABC):
    """One algorithm; the object has no state of its own.

    Attributes:
        name: What a group's ``algorithm`` says.
        settings: Its hyperparameters.
        needs_matrices: Whether it updates matrices, or parameters of any shape.
        orthonormalizes: Whether a callable can replace its orthonormalization.
        shaped_state: An entry of the state that has the parameter's shape, by which a step notices that it was resized;
            none, unless an algorithm says so.
        state_by_setting: Entries that come and go with settings, and mean another thing under others. Those of a
            block have its name in brackets behind.
        state_by_replica: Entries that differ between replicas of a parameter that is compressed.
        settings_of_run: Settings about how a run is executed, not about the result: a checkpoint does not replace them.
    """

    name: ClassVar[str]
    settings: ClassVar[type[SharedSettings]]
    needs_matrices: ClassVar[bool] = False
    orthonormalizes: ClassVar[bool] = False
    shaped_state: ClassVar[str | None] = None
    state_by_setting: ClassVar[frozenset[str]] = frozenset()
    state_by_replica: ClassVar[frozenset[str]] = frozenset()
    settings_of_run: ClassVar[frozenset[str]] = frozenset({"capturable"})

    def entries(self) -> dict[str, Any]:
        """Return the entries of a group that say how its parameters are stored, with their defaults."""
        return {name: default for name, (default, _) in STORAGE.items()} if self.needs_matrices else {}

    def defaults(self) -> dict[str, Any]:
        """Return what a group holds when it says nothing: settings and entries."""
        return {**defaults_of(self.settings), **self.entries()}

    def check_settings(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Raise an error about values that a setting or an entry cannot have; see :func:`check_values`."""
        of_storage = {name: STORAGE[name][1] for name in self.entries()}
        check_values(values, {**checks_of(self.settings), **of_storage}, prefix)

    def check_parameter(self, parameter: Tensor, label: str, group: Mapping[str, Any]) -> None:
        """Raise an error about a parameter that cannot be updated, when it is added, and before every step.

        Between the two it may have been moved or sharded.

        Args:
            parameter: Dense and real.
            label: Its name for error messages.
            group: Complete.
        """
        if self.needs_matrices:
            check_matrix(parameter, label, group, self.name)

    def observed(self, parameter: Tensor, group: Mapping[str, Any]) -> Sequence[Observed]:
        """Return what statistics observe of a parameter, block by block; nothing, unless an algorithm says so."""
        return ()

    def depends_on_settings(self, entry: str) -> bool:
        """Return whether an entry of the state is one of :attr:`state_by_setting`."""
        return entry.partition("[")[0] in self.state_by_setting

    def continues(self, other: "Algorithm") -> bool:
        """Return whether it can go on with another algorithm's state, all but what depends on settings."""
        return self is other

    def agreement(self, parameter: Tensor, group: Mapping[str, Any]) -> object:
        """Return what ranks that share a parameter must have in common besides the settings."""
        return None

    def shares_replicas(self, asked: bool | None) -> bool:
        """Return whether replicas share work on its matrices, or may, given what ``share_replicas`` asks for."""
        return False

    def compresses(self, group: Mapping[str, Any]) -> bool:
        """Return whether replicas of a group's parameters are to send less than their gradients."""
        return False

    def is_compressed(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Return whether replicas of a parameter do send less, so that its gradient is not averaged over them."""
        return False

    def why_not_captured(self, group: Mapping[str, Any]) -> str | None:
        """Return why a CUDA graph cannot hold a step of a group on one rank, and what to do; None if it can."""
        return None

    @abstractmethod
    def state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Return what the state of a parameter consists of."""

    @abstractmethod
    def step(self, members: Sequence[Member], context: StepContext) -> StepWork:
        """Plan a step. Nothing may change before the work is done.

        Where ranks talk to each other in it, their first message has to be that of
        :func:`~dion2_lightning.distributed.collectives.sum_over_ranks`, with ``context.settings_checksum`` or a
        checksum that contains it, and :func:`~dion2_lightning.distributed.collectives.refuse_disagreement` has to see
        its header before the sizes of other messages follow from settings. After the first step nothing else notices
        that the settings of ranks have drifted apart.

        Args:
            members: All parameters of its groups that require gradients, the same ones in the same order on every rank,
                also those without a gradient here.
            context: Of the step.
        """


def check_matrix(parameter: Tensor, label: str, group: Mapping[str, Any], algorithm: str) -> None:
    """Raise an error where a parameter is no matrix, or no stack of matrices in a group that is ``batched``."""
    if parameter.numel() == 0:
        raise ValueError(f"{label} has no entries, so there is no matrix to update; leave it out")
    is_batched, is_convolution, shape = group["batched"], group["convolution"], tuple(parameter.shape)
    if is_batched and is_convolution:
        raise ValueError(f"{label} cannot be batched and a convolution; leave one of both out of its group")
    if parameter.ndim in ((3, 4, 5) if is_convolution else (3,) if is_batched else (2,)):
        rows, columns = (shape[0], math.prod(shape[1:])) if is_convolution else shape[-2:]
        size = (columns, rows) if group["transposed"] else (rows, columns)
        wrong = _misfit_of_kernel(parameter, group) if is_convolution and group["splits"] != WHOLE else None
        wrong = wrong or misfit(group["splits"], size, may_repeat=not is_convolution)
        if wrong is None and is_batched and any(block.matrices > 1 for block in blocks_of(group["splits"])):
            wrong = "a stack of matrices cannot be split into stacks; give blocks of one matrix each"
        if wrong is not None:
            raise ValueError(f"{label} is not what its splits say: {wrong}")
        return
    form, hint = "a matrix", ""
    if is_convolution:
        form = "the kernel of a convolution (out, in, taps, ...)"
    elif is_batched:
        form = "a stack of matrices (count, rows, columns)"
        counts = [count for count in (8, 4, 2) if parameter.ndim == 2 and shape[0] % count == 0 and shape[0] > count]
        if counts:
            text = f"expert {counts[0]}*{shape[0] // counts[0]}"
            hint = f"; where its rows are those of several, say so: splits={text!r} for {counts[0]}"
    elif parameter.ndim == 3:
        hint = "; for a stack of matrices set batched=True in its group, for a convolution convolution=True"
    elif parameter.ndim > 3:
        hint = "; for a convolution set convolution=True in its group"
    raise ValueError(
        f"{label} is not {form}, which algorithm {algorithm!r} needs; put it into a group with algorithm='adamw', or "
        f"let build_optimizer(model, lr=...) split the model{hint}"
    )


def _misfit_of_kernel(parameter: Tensor, group: Mapping[str, Any]) -> str | None:
    """Return why a kernel cannot be split so, and what would do; None if it can."""
    first, *_ = matrices_of(parameter, group)
    if first.block is not None and first.blocks_are_rows and first.block.repeats == 1:
        return None
    side, text = ("inputs", "group 4*8 along inputs") if group["transposed"] else ("outputs", "group 4*8")
    return f"{group['splits']!r} is not made of its first axis, its {side}; groups of it are, as in {text!r}"
