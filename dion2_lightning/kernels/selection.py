"""Selection: which slices of the momentum are the largest.

Slices are (count, n, m) views, or in pieces, as moving_slices.py describes them.
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.kernels.stacks import runs_along

BLOCK: Final = 2**17
"""Entries that a CPU sums at once."""


class Selection(NamedTuple):
    """The slices of a parameter's matrices that a step selected.

    Attributes:
        axis: What a slice is, in terms of (out, in): 0 an output slice, 1 an input slice, whichever way round the
            weight is stored.
        indices: Sorted, int64; shape (k,), or (E, k) for a batched parameter.
    """

    axis: int
    indices: Tensor


def selected_count(slices: int, fraction: float) -> int:
    """Return k = ceil(fraction * n), at least 1; the small term keeps 0.07 * 100 = 7.000000000000001 at 7."""
    return max(1, math.ceil(fraction * slices - 1e-9))


def slice_sums(slices: Tensor, period: int | None = None) -> Tensor:
    """Return the sum of |M| over every slice (..., m), shape (...), in float64; in float32 on a device without it.

    Rounded to float32 it is the slice's norm. float32 sums depend on their order, and near the threshold an order
    changes the selection; rounded float64 sums do not. Ranks that share a matrix need float64 to select alike; a device
    without it works alone.

    Args:
        slices: With a period, rows.
        period: Asks for sums over entries that are this far apart, (..., period).
    """
    dtype = sum_dtype(slices.device)

    def sums_of(block: Tensor) -> Tensor:
        if period is None:
            return block.abs().sum(-1, dtype=dtype)
        of_period: Tensor = block.abs().unflatten(-1, (-1, period)).sum(-2, dtype=dtype)
        return of_period

    return block_by_block(slices, sums_of, BLOCK) if slices.device.type == "cpu" else sums_of(slices)


def block_by_block(slices: Tensor, sums_of: Callable[[Tensor], Tensor], size: int, multiple: int = 1) -> Tensor:
    """Sum up blocks of about ``size`` entries, whose copies stay in the cache; of a multiple of entries of a slice."""
    if slices.numel() <= size:
        return sums_of(slices)
    if runs_along(slices):
        of_slices = max(1, size * slices.shape[-2] // slices.numel())
        return torch.cat([sums_of(block) for block in slices.split(of_slices, -2)], slices.ndim - 2)
    entries = size * slices.shape[-1] // slices.numel()
    blocks = iter(slices.split(max(1, entries // multiple) * multiple, -1))
    sums = sums_of(next(blocks))
    for block in blocks:
        sums += sums_of(block)
    return sums


def largest(norms: Tensor, k: int) -> Tensor:
    """Return the sorted indices, shape (count, k), of the k largest norms; among equals the lower index wins."""
    order = torch.sort(norms, dim=-1, descending=True, stable=True).indices
    return order.narrow(-1, 0, k).sort(dim=-1).values
