"""Moving slices out of and into their matrices.

Everything here sees matrices as (count, n, m) views, n slices of m entries each. A view's memory runs along the slices
(rows of the stored matrix) or across them (columns), with gaps where other matrices lie between; the fast kernels
differ, the results do not.

The entries of slices may also lie in p equal pieces that are equally far apart, of which there is no such view: then it
is (count, p, n, m / p).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dion2_lightning.kernels.stacks import runs_along


def gather(slices: Tensor, indices: Tensor) -> Tensor:
    """Return the slices at ``indices``, shape (count, k, m), in the memory order of ``slices``."""
    if 0 in (slices.numel(), indices.numel()):
        return slices.new_empty((*indices.shape, slices.shape[-1] * (slices.shape[1] if slices.ndim == 4 else 1)))
    if runs_along(slices):
        rows = _rows(slices)
        if rows is None:
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
