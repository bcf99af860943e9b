"""Dion (arXiv 2504.05295): an orthonormal update of low rank, with error feedback; the update on one page.

    B <- M + G                                 (long, short): long rows, transposed where out < in
    P <- orth(B Q)                             (long, r): a QR, one step of a power iteration
    R <- B^T P                                 (short, r)
    M <- B - (1 - mu) P R^T                    only what is applied decays
    Q <- the columns of R, each divided by its norm
    X <- (1 - lr weight_decay) X - lr scale P Q^T

Here every matrix is whole on this rank; dion_shared.py does the same for matrices that several ranks share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import (
    Algorithm,
    Member,
    StateTensor,
    StepContext,
    StepWork,
)
from dion2_lightning.algorithms.dion_shared import update_shared
from dion2_lightning.algorithms.hyperparameters import (
    MatrixSettings,
    SharedSettings,
    positive_integer,
    setting,
    share,
)
from dion2_lightning.algorithms.low_rank import (
    LowRankUpdate,
    apply,
    batches,
    column_norms,
    entry_of,
    is_compressed,
    left_products,
    long_axis,
    orthonormal,
    rank_of,
    right_factor,
    right_products,
    state_dtype,
)
from dion2_lightning.algorithms.matrix_update import count_step, draw_bits
from dion2_lightning.algorithms.passes import accumulate, leave_idle
from dion2_lightning.algorithms.projections import Projections
from dion2_lightning.algorithms.shared import split_by_ranks
from dion2_lightning.matrices.views import Observed, matrices_of


@dataclass(kw_only=True)
class DionSettings(MatrixSettings):
    """The hyperparameters of Dion."""

    rank_fraction: float = setting(
        0.25, "Dion's rank, as a share of each matrix's shorter axis, in (0, 1]; r = ceil(rank_fraction n).", share
    )
    rank_multiple_of: int = setting(
        1, "Dion's rank is rounded up to a multiple of this, at most to the shorter axis.", positive_integer
    )
    qr: Literal["auto", "qr", "rcqr"] = setting(
        "auto",
        'How Dion orthonormalizes the columns of P: "qr", by an exact QR; "rcqr", by a randomized Cholesky QR, which '
        'is made of products; "auto", by the latter where ranks hold different rows of P, else by the former.',
    )
    sync: Literal["full", "compressed"] = setting(
        "full",
        'What replicas average, as under DDP and HSDP: "full", the gradients, as their framework does; "compressed", '
        "P and R of Dion's matrices instead, where these are smaller. Replicas then have momenta of their own, which "
        "synchronize() averages for a checkpoint.",
    )


class DionAlgorithm(Algorithm):
    """Updates matrices by an orthonormal matrix of low rank."""

    name: ClassVar[str] = "dion"
    settings: ClassVar[type[SharedSettings]] = DionSettings
    needs_matrices: ClassVar[bool] = True
    shaped_state: ClassVar[str | None] = "momentum"
    state_by_setting: ClassVar[frozenset[str]] = frozenset({"Q"})
    state_by_replica: ClassVar[frozenset[str]] = frozenset({"momentum"})
    settings_of_run: ClassVar[frozenset[str]] = Algorithm.settings_of_run | {"sync"}

    def shares_replicas(self, asked: bool | None) -> bool:
        """Return whether they share products and QRs, which they do where they are told to."""
        return asked is True

    def compresses(self, group: Mapping[str, Any]) -> bool:
        """Return whether replicas are to average P and R."""
        return bool(group["sync"] == "compressed")

    def is_compressed(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Return whether they do: where P and R are smaller than the gradient."""
        return is_compressed(parameter, group)

    def why_not_captured(self, group: Mapping[str, Any]) -> str | None:
        """Return that the host reads whether a randomized QR has failed."""
        if group["qr"] != "rcqr":
            return None
        return "with qr='rcqr' the host reads whether a matrix needs an exact QR; use qr='auto' or 'qr'"

    def state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Return momentum and Q, in float32 at least, and the number of steps, on which random bits depend."""
        return {
            "momentum": StateTensor.like(parameter, state_dtype(parameter)),
            **{entry_of(each): right_factor(parameter, each, group) for each in matrices_of(parameter, group)},
            "step": StateTensor((), torch.float32, parameter.device),
        }

    def observed(self, parameter: Tensor, group: Mapping[str, Any]) -> list[Observed]:
        """Return a parameter's matrices, block by block, their shorter axis, and the rank of the update."""
        return [
            Observed(matrices, 1 - long_axis(matrices), selected=0, rank=rank_of(matrices, group))
            for matrices in matrices_of(parameter, group)
        ]

    def step(self, members: Sequence[Member], context: StepContext) -> StepWork:
        """Plan a step: the matrices of this rank alone, and those that it shares."""
        updates = [update for member in members for update in LowRankUpdate.read(member, context)]
        unshared, shared = split_by_ranks(updates, context.share_replicas)
        present = [update for update in unshared if update.has_gradient]
        return StepWork([update_shared(part, context) for part in shared], [partial(update_alone, present, context)])


def update_alone(updates: Sequence[LowRankUpdate], context: StepContext) -> None:
    """Take one step on matrices that are whole on this rank and have a gradient, equal shapes together."""
    draw_bits(updates)
    for batch in batches(updates, context):
        accumulate(batch, context.working_memory)
        leave_idle(batch)
        projections = Projections.wanted(batch, context)
        left = orthonormal(left_products(batch), batch[0], context)
        right = right_products(batch, left)
        norms = column_norms(right)
        apply(batch, left, right, norms, right, context)
        if projections is not None:
            projections.show(projections.sums(right), norms)
    count_step(updates)
