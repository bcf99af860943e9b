"""What an observer is told of an update of low rank: sums over B, R and Q, which ranks add up where they share them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.low_rank import EPS, LowRankUpdate, present_columns
from dion2_lightning.kernels.precision import sum_dtype


class Projections:
    """The updates of a batch in a step whose results an observer wants; made before B and Q change.

    Attributes:
        energies: This rank's summand of the squared Frobenius norms of B, (batch,).
        q: This rank's part of Q before the step, (batch, short, r).
    """

    def __init__(self, batch: Sequence[LowRankUpdate], context: StepContext) -> None:
        self._batch, self._context = batch, context
        dtype = sum_dtype(batch[0].device)
        # Row by row in their memory order, which takes a CPU a fifth of the time or less; rows in their own precision.
        momenta = [each.momentum if each.momentum.stride(-1) == 1 else each.momentum.mT for each in batch]
        norms = [torch.linalg.vector_norm(momentum, dim=2).to(dtype) for momentum in momenta]
        self.energies = torch.cat([each.square().sum(1) for each in norms])
        self.q = torch.cat([update.q for update in batch])

    @classmethod
    def wanted(cls, batch: Sequence[LowRankUpdate], context: StepContext) -> "Projections | None":
        """Return those of a batch whose B is complete; None where no observer wants results of the step."""
        observer = context.observer
        return cls(batch, context) if observer is not None and observer.wants_results else None

    def sums(self, right: Tensor) -> Tensor:
        """Return this rank's summand of what :meth:`show` takes, (batch, 2 + 4 r^2), once Q is that after the step.

        ``right`` is this rank's part of R = B^T P. Of the summand, the first two numbers are squared norms of B and R.
        """
        both = torch.cat([self.q, torch.cat([update.q for update in self._batch])], dim=-1).to(self.energies.dtype)
        if not self._batch[0].counts_columns:
            both, right = both.narrow(1, 0, 0), right.narrow(1, 0, 0)
        grams = both.mT @ both
        captured = torch.linalg.vector_norm(right.flatten(1), dim=1, dtype=both.dtype).square()
        return torch.cat([self.energies.unsqueeze(1), captured.unsqueeze(1), grams.flatten(1)], dim=1)

    def show(self, sums: Tensor, norms: Tensor) -> None:
        """Send the observer its event, given the sums over the ranks, and the norms of R's columns (batch, 1, r)."""
        first, observer = self._batch[0], self._context.observer
        assert observer is not None
        energies, captured, entries = sums.split([1, 1, sums.shape[1] - 2], dim=1)
        # P Q^T has the Frobenius norm of Q; a column with NaN is not one of zeros.
        lengths = torch.where(present_columns(norms, first) | norms.isnan(), norms / (norms + EPS), 0.0)
        counts = [update.count for update in self._batch]
        squares = [
            (each.square().sum((1, 2), keepdim=True) * update.number(update.step_size, 0.0, each) ** 2).flatten()
            for update, each in zip(self._batch, lengths.split(counts), strict=True)
        ]
        observer.projected(
            [update.source for update in self._batch],
            counts,
            energies.squeeze(1),
            captured.squeeze(1),
            norms.squeeze(1),
            entries.unflatten(1, (2 * first.rank, 2 * first.rank)),
            torch.cat(squares),
            _taken(self._batch),
        )


def _taken(batch: Sequence[LowRankUpdate]) -> Tensor | None:
    """Whether the step is taken, 0-d, or by which matrices (batch,); None where it is for certain, by all."""
    if all(update.active is None for update in batch):
        return None if batch[0].gate is None else batch[0].gate.is_open
    certain = torch.ones((), dtype=torch.bool, device=batch[0].device)
    flags = [certain if update.own_gate is None else update.own_gate.is_open for update in batch]
    return torch.cat([each.expand(update.count, 1, 1) for each, update in zip(flags, batch, strict=True)]).flatten()
