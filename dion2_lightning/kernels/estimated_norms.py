"""Estimates of the slices' norms, which are faster on a CPU, and select the same as norms do."""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.kernels.selection import block_by_block, largest
from dion2_lightning.kernels.stacks import runs_along

ESTIMATED_BLOCK: Final = 2**19
"""Entries that a CPU sums at once where it estimates, as only chunks are summed in float64."""

CHUNK: Final = 32
"""Entries of a slice that an estimate of its sum adds up in float32."""

MIN_ESTIMATED: Final = 2**16
"""Entries of a matrix from which on estimates are faster: deciding by them takes a dozen small operations."""

LARGEST_ESTIMATE: Final = 3e38
"""Norms over it may be infinite in float32."""

ESTIMATE_ERROR: Final = (CHUNK + 8) * 2.0**-24
"""An estimate's largest error, relative to the sum: CHUNK - 1 roundings of float32, and a margin for float64's."""


def can_estimate_sums(slices: Tensor) -> bool:
    """Return whether :func:`estimate_slice_sums` takes such slices, and is faster: in float32, on a CPU, not few."""
    is_large = slices.numel() >= MIN_ESTIMATED * max(1, slices.shape[0])
    return is_large and slices.device.type == "cpu" and slices.dtype == torch.float32 and slices.shape[-1] % CHUNK == 0


def estimate_slice_sums(slices: Tensor, period: int | None = None) -> Tensor:
    """Return what :func:`slice_sums` does up to :data:`ESTIMATE_ERROR`, in three fifths of its time.

    Most of that time goes into a copy in float64. Here only every chunk's sum is copied.
    """
    return block_by_block(slices, partial(_sums_of_chunks, period=period), ESTIMATED_BLOCK, CHUNK)


def _sums_of_chunks(slices: Tensor, period: int | None) -> Tensor:
    if period is not None:
        repeats = slices.shape[-1] // period
        size = next(size for size in range(CHUNK, 0, -1) if repeats % size == 0)
        of_chunks: Tensor = slices.abs().unflatten(-1, (size, repeats // size, period)).sum(-3)
        return of_chunks.sum(-2, dtype=torch.float64)
    if runs_along(slices):
        of_chunks = slices.abs().unflatten(-1, (CHUNK, -1)).sum(-2)
        return of_chunks.sum(-1, dtype=torch.float64)
    of_chunks = slices.mT.abs().unflatten(-2, (-1, CHUNK)).sum(-2)
    return of_chunks.sum(-2, dtype=torch.float64)


def largest_by_estimates(estimates: Tensor, k: int, exact: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return what :func:`largest` does of exact norms, shape (count, k), given estimates of them and few exact ones.

    Slices whose estimate is so close to the k-th largest that its error could change the selection are compared by
    their exact norms.

    Args:
        estimates: Of all norms, (count, n), in float64, with relative errors up to :data:`ESTIMATE_ERROR`.
        k: How many to select.
        exact: Returns the norms of some slices (c,) of a matrix in float32, given its number and those of the slices.
    """
    threshold = torch.topk(estimates, k, sorted=False).values.amin(-1, keepdim=True)
    # Each of two estimates may be off by an error. With a third between them, their norms differ in float32 too.
    margin = 3 * ESTIMATE_ERROR * threshold
    known = (estimates <= LARGEST_ESTIMATE).all(-1, keepdim=True)  # neither NaN nor infinite in float32
    chosen = (estimates >= threshold - margin) | ~known
    certain = (estimates > threshold + margin) & known
    undecided = chosen.sum(-1) != k
    zero = undecided & (threshold == 0).squeeze(-1) & known.squeeze(-1)  # estimates that are zero are exact
    if zero.any():
        chosen[zero] = torch.zeros_like(chosen[zero]).scatter_(-1, largest(estimates[zero], k), True)
    for matrix in (undecided & ~zero).nonzero().flatten().tolist():
        close = (chosen[matrix] & ~certain[matrix]).nonzero().flatten()
        missing = k - int(certain[matrix].sum())
        kept = largest(exact(matrix, close).unsqueeze(0), missing)
        chosen[matrix] = certain[matrix].index_fill(0, close[kept.squeeze(0)], True)
    return chosen.nonzero()[:, 1].view(len(estimates), k)
