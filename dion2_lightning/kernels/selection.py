"""Selection: which slices of the momentum are the largest, and moving them out of and into their matrices.

Everything here sees matrices as (count, n, m) views, n slices of m entries each. A view's memory runs along the slices
(rows of the stored matrix) or across them (columns), with gaps where other matrices lie between; the fast kernels
differ, the results do not.

The entries of slices may also lie in p equal pieces that are equally far apart, of which there is no such view: then it
is (count, p, n, m / p).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.kernels.stacks import runs_along

BLOCK: Final = 2**17
"""Entries that a CPU sums at once."""

ESTIMATED_BLOCK: Final = 2**19
"""Entries that a CPU sums at once where it estimates, as only chunks are summed in float64."""

SHARED: Final = 2**20
"""Entries of rows that matrices share which are copied at once."""

CHUNK: Final = 32
"""Entries of a slice that an estimate of its sum adds up in float32."""

MIN_ESTIMATED: Final = 2**16
"""Entries of a matrix from which on estimates are faster: deciding by them takes a dozen small operations."""

LARGEST_ESTIMATE: Final = 3e38
"""Norms over it may be infinite in float32."""

ESTIMATE_ERROR: Final = (CHUNK + 8) * 2.0**-24
"""An estimate's largest error, relative to the sum: CHUNK - 1 roundings of float32, and a margin for float64's."""


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
    """Return k = ceil(fraction * n), at least 1; the small term keeps 0.1 * 30 = 3.0000000000000004 at 3."""
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

    return _block_by_block(slices, sums_of, BLOCK) if slices.device.type == "cpu" else sums_of(slices)


def _block_by_block(slices: Tensor, sums_of: Callable[[Tensor], Tensor], size: int, multiple: int = 1) -> Tensor:
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


def can_estimate_sums(slices: Tensor) -> bool:
    """Return whether :func:`estimate_slice_sums` takes such slices, and is faster: in float32, on a CPU, not few."""
    is_large = slices.numel() >= MIN_ESTIMATED * max(1, slices.shape[0])
    return is_large and slices.device.type == "cpu" and slices.dtype == torch.float32 and slices.shape[-1] % CHUNK == 0


def estimate_slice_sums(slices: Tensor, period: int | None = None) -> Tensor:
    """Return what :func:`slice_sums` does up to :data:`ESTIMATE_ERROR`, in three fifths of its time.

    Most of that time goes into a copy in float64. Here only every chunk's sum is copied.
    """
    return _block_by_block(slices, partial(_sums_of_chunks, period=period), ESTIMATED_BLOCK, CHUNK)


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


def largest(norms: Tensor, k: int) -> Tensor:
    """Return the sorted indices, shape (count, k), of the k largest norms; among equals the lower index wins."""
    order = torch.sort(norms, dim=-1, descending=True, stable=True).indices
    return order.narrow(-1, 0, k).sort(dim=-1).values


def gather(slices: Tensor, indices: Tensor) -> Tensor:
    """Return the slices at ``indices``, shape (count, k, m), in the memory order of ``slices``."""
    if 0 in (slices.numel(), indices.numel()):
        return slices.new_empty((*indices.shape, slices.shape[-1] * (slices.shape[1] if slices.ndim == 4 else 1)))
    if runs_along(slices):
        rows = _rows(slices)
        if rows is None:
            shared = _shared_rows(slices)
            if shared is not None:
                return _gather_from_shared(shared, indices, slices.shape[-1])
            return torch.cat([gather(*each) for each in _one_by_one(slices, indices)])
        return rows.index_select(0, _rows_at(indices, slices)).view(*indices.shape, rows.shape[1:].numel())
    stored, columns = slices.mT, _across(indices, slices)
    if slices.stride(0) < slices.stride(-1):  # matrices side by side: row by row, in the order of the memory
        gathered = stored.transpose(0, 1).gather(-1, columns.transpose(0, 1)).transpose(0, 1)
    else:
        gathered = stored.gather(-1, columns)
    return _whole_rows(gathered).mT


def put_(slices: Tensor, indices: Tensor, gathered: Tensor) -> None:
    """Write what :func:`gather` has returned back to the slices at ``indices``, in place."""
    if 0 in (slices.numel(), indices.numel()):
        return
    if runs_along(slices):
        rows = _rows(slices)
        if rows is not None:
            rows.index_copy_(0, _rows_at(indices, slices), gathered.reshape(-1, *rows.shape[1:]))
            return
        for each in _one_by_one(slices, indices, gathered):
            put_(*each)
    else:
        slices.mT.scatter_(-1, _across(indices, slices), _in_pieces(gathered.mT, slices))


def decay_(slices: Tensor, indices: Tensor, gathered: Tensor, factor: float | Tensor) -> None:
    """Multiply the slices at ``indices``, which :func:`gather` has just returned, by ``factor``, in place.

    A factor that is a tensor is 0-d, or has one for each matrix, (count, 1, 1).
    """
    if runs_along(slices):
        # torch would first round a factor in a tensor to the precision of the slices.
        wide = gathered.to(factor.dtype) if isinstance(factor, Tensor) else gathered
        put_(slices, indices, (wide * factor).to(gathered.dtype))
    else:
        # Writing single columns costs more than a pass over the whole, which is in cache. Above, a momentum in half
        # precision is multiplied by the factor itself; so must it be here.
        precise = torch.promote_types(slices.dtype, torch.float32)
        factors = torch.ones((len(slices), slices.shape[-2]), dtype=precise, device=slices.device)
        factor = factor.view(-1, 1).expand(indices.shape) if isinstance(factor, Tensor) else factor
        factors.scatter_(-1, indices, factor)
        slices.mul_(factors.view(len(slices), *[1] * (slices.ndim - 3), -1, 1))


def add_(slices: Tensor, indices: Tensor, change: Tensor) -> None:
    """Add ``change``, shape (count, k, m), to the slices at ``indices``, in place."""
    if 0 in (slices.numel(), indices.numel()):
        return
    change = change.to(slices.dtype)
    if runs_along(slices):
        rows = _rows(slices)
        if rows is not None:
            _add_to_rows(rows, _rows_at(indices, slices), change.reshape(-1, *rows.shape[1:]))
            return
        shared = _shared_rows(slices)
        if shared is not None:
            _add_to_shared(shared, indices, change)
            return
        for each in _one_by_one(slices, indices, change):
            add_(*each)
    else:
        slices.mT.scatter_add_(-1, _across(indices, slices), _in_pieces(change.mT, slices))


# Slices that are rows


def _rows(slices: Tensor) -> Tensor | None:
    """View the memory from the first slice to the last one as rows, with what lies between them.

    Rows are (r, m), or (r, p, m / p); None where matrices lie otherwise than one after another.
    """
    by_slice = slices.transpose(1, 2) if slices.ndim == 4 else slices
    (count, n, *entries), (step, row, *between) = by_slice.shape, by_slice.stride()
    if count == 1:
        return by_slice.flatten(0, 1)
    if not step or step % row:  # an expanded gradient has no steps
        return None
    return by_slice.as_strided(((count - 1) * (step // row) + n, *entries), (row, *between))


def _rows_at(indices: Tensor, slices: Tensor) -> Tensor:
    """Which of these rows the slices at ``indices`` are."""
    if slices.shape[0] > 1:
        step = slices.stride(0) // slices.stride(-2)
        indices = indices + torch.arange(0, len(slices) * step, step, device=indices.device).unsqueeze(-1)
    return indices.view(-1)


def _shared_rows(slices: Tensor) -> Tensor | None:
    """View the rows (n, m count) that matrices share which lie entry by entry side by side; None if they do not.

    Such rows are copied, or added to, in less time than single entries of them: 3% of a step of four small experts.
    """
    by_row = slices.movedim(0, -1)
    return by_row.flatten(1) if slices.ndim == 3 and by_row.is_contiguous() else None


def _gather_from_shared(shared: Tensor, indices: Tensor, m: int) -> Tensor:
    gathered = shared.new_empty((*indices.shape, m))
    size = _slices_at_once(shared, indices)
    for at, its_part in zip(indices.split(size, 1), gathered.split(size, 1), strict=True):
        its_part.copy_(_own_entries(shared.index_select(0, at.flatten()), its_part.shape))
    return gathered


def _add_to_shared(shared: Tensor, indices: Tensor, change: Tensor) -> None:
    size = _slices_at_once(shared, indices)
    wide = shared.new_empty(0)
    for at, its_part in zip(indices.split(size, 1), change.split(size, 1), strict=True):
        if len(wide) != at.numel():  # -0.0, as it changes nothing when it is added
            wide = torch.full((at.numel(), shared.shape[1]), -0.0, dtype=shared.dtype, device=shared.device)
        _own_entries(wide, its_part.shape).copy_(its_part)
        shared.index_add_(0, at.flatten(), wide)


def _slices_at_once(shared: Tensor, indices: Tensor) -> int:
    """Of how many slices of each matrix whole rows are copied: they take no more than what is of the slices."""
    count, k = indices.shape
    return max(1, min(SHARED // (count * shared.shape[1]), -(-k // count)))


def _own_entries(rows: Tensor, shape: torch.Size) -> Tensor:
    """View what belongs to slices (count, k, m) in the shared rows that they are in, one behind the other."""
    count, k, m = shape
    return rows.view(count, k, m, count).diagonal(0, 0, 3).movedim(-1, 0)


def _one_by_one(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go over slices, and over what is of them, matrix by matrix."""
    return zip(*(each.split(1) for each in tensors), strict=True)


def _add_to_rows(rows: Tensor, at: Tensor, change: Tensor) -> None:
    if rows.is_contiguous() or rows.device.type != "cpu":
        rows.index_add_(0, at, change)
    else:  # to rows with gaps a CPU adds entry by entry, three times as slowly
        rows.index_copy_(0, at, rows.index_select(0, at).add_(change))


# Slices that are columns


def _across(indices: Tensor, slices: Tensor) -> Tensor:
    """Column indices (count, m, k) of the stored matrices, or of their pieces, the same in every row."""
    columns = indices.view(len(indices), *[1] * (slices.ndim - 2), -1)
    return columns.expand(*slices.shape[:-2], slices.shape[-1], -1)


def _whole_rows(stored: Tensor) -> Tensor:
    """Put the rows of pieces (count, p, m / p, k) together, (count, m, k)."""
    return stored.flatten(1, 2) if stored.ndim == 4 else stored


def _in_pieces(stored: Tensor, slices: Tensor) -> Tensor:
    """Cut rows (count, m, k) into pieces, as those of the slices."""
    return stored.unflatten(1, (slices.shape[1], -1)) if slices.ndim == 4 else stored
