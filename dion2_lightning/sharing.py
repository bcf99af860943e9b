"""The update of matrices that several ranks share, down the same page as update.py with the exchange in between.

``SharedByParts``: every rank holds a rectangle of each matrix (FSDP2, HSDP, TP, FSDP2 over TP). Ranks add up the norms
of the slices, send what is selected to the matrix's owner, who orthonormalizes it and sends the parts back.

``SharedReplicas``: every rank holds each matrix (DDP). Only the work is shared: owners orthonormalize, one all-gather
brings the results to everyone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.exchange import Exchange, Gathering, Totals, Transfer, assign_owners, orthonormalization_cost
from dion2_lightning.layout import Span, alike
from dion2_lightning.selection import Selection, slice_sums
from dion2_lightning.update import (
    MatrixUpdate,
    Orthonormalize,
    accumulate,
    apply,
    dion2_update,
    orthonormal_of,
    select,
    shrink,
    take,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

FLOPS_PER_BYTE: Final = 4000
"""A replicated matrix is worth sharing from here on: what a GPU multiplies in the time a byte takes between nodes."""


def update_matrices(
    updates: Sequence[MatrixUpdate],
    custom: Orthonormalize | None,
    share_replicas: bool | None,
    meanwhile: Callable[[], None],
) -> dict[Tensor, Selection]:
    """Take one step on all matrices, those of this rank alone and those it shares.

    Args:
        updates: Every parameter of the matrix groups, in the same order on every rank; this rank may lack gradients.
        custom: Replaces the orthonormalization.
        share_replicas: Whether ranks share the work on replicated matrices; None decides by its cost.
        meanwhile: Other work, done once while submatrices are on their way.

    Returns:
        What was selected, by parameter.
    """
    alone: list[MatrixUpdate] = []
    shared: list[MatrixUpdate] = []
    for update in updates:
        (shared if _is_shared(update, share_replicas) else alone).append(update)
    parts = list(_by_group(shared, custom))
    for part in parts:
        part.start()
    selections = dion2_update([update for update in alone if update.gradient is not None], custom)
    for part in parts:
        part.send()
    meanwhile()
    for part in parts:
        part.send_back()
    for part in parts:
        selections.update(part.finish())
    return selections


def _is_shared(update: MatrixUpdate, share_replicas: bool | None) -> bool:
    if update.layout.group is None:
        return False
    if not update.layout.replicated or share_replicas is not None:
        return share_replicas is not False or not update.layout.replicated
    received = update.k * update.entries * update.dtype.itemsize
    return orthonormalization_cost(update.k, update.entries) >= FLOPS_PER_BYTE * received


def _by_group(
    updates: Sequence[MatrixUpdate], custom: Orthonormalize | None
) -> Iterator["SharedByParts | SharedReplicas"]:
    """What travels together: one group of ranks, one precision."""
    for members in alike(updates, lambda u: (u.layout.group, u.layout.replicated, u.dtype, u.momentum.device)).values():
        group = members[0].layout.group
        assert group is not None
        yield (SharedReplicas if members[0].layout.replicated else SharedByParts)(group, members, custom)


class SharedByParts:
    """Matrices of which every rank of a group holds a rectangle."""

    def __init__(self, group: "ProcessGroup", updates: list[MatrixUpdate], custom: Orthonormalize | None) -> None:
        """Take updates that travel together."""
        self._group, self._updates, self._custom = group, updates, custom

    def start(self) -> None:
        """M <- M + G; the sums over this rank's part of every slice go on their way."""
        accumulate(self._updates)
        self._totals = _send_totals(self._group, self._updates, [_partial_sums(update) for update in self._updates])

    def send(self) -> None:
        """K from the global norms; this rank's part of every S goes to its owner; M[K] <- mu M[K]."""
        reads_indices = any(_is_split(update) for update in self._updates)
        present, norms = self._totals.wait(read=reads_indices)
        self._updates, norms = _only(present, self._updates), _only(present, norms)
        self._selected = _select(self._updates, norms)
        self._pieces = _pieces(self._updates, self._selected, dist.get_rank(self._group))
        owners = assign_owners(tuple(piece.cost for piece in self._pieces), self._group.size())
        transfers = [piece.transfer(owner) for piece, owner in zip(self._pieces, owners, strict=True)]
        self._exchange = Exchange(self._group, transfers)
        self._exchange.send([take(piece.momentum, piece.indices, piece.update) for piece in self._pieces])

    def send_back(self) -> None:
        """O of the submatrices that this rank owns; every rank's part goes back to it."""
        self._exchange.send_back(_orthonormal(self._exchange.receive(), self._custom))
        shrink(self._updates)

    def finish(self) -> dict[Tensor, Selection]:
        """X[K] <- X[K] - lr scale O, this rank's part of it."""
        for piece, part in zip(self._pieces, self._exchange.receive_back(), strict=True):
            apply(piece.weight, piece.indices, part.view(1, *part.shape), piece.update)
        return {u.parameter: u.selection(indices) for u, indices in zip(self._updates, self._selected, strict=True)}


class SharedReplicas:
    """Matrices that every rank of a group holds whole."""

    def __init__(self, group: "ProcessGroup", updates: list[MatrixUpdate], custom: Orthonormalize | None) -> None:
        """Take updates that travel together."""
        self._group, self._updates, self._custom = group, updates, custom
        self._dtype, self._device = updates[0].dtype, updates[0].momentum.device

    def start(self) -> None:
        """M <- M + G; which gradients there are goes on its way."""
        accumulate(self._updates)
        self._totals = _send_totals(self._group, self._updates, [])

    def send(self) -> None:
        """K and S on every rank alike, M[K] <- mu M[K]; O of what this rank owns goes to all others."""
        present, _ = self._totals.wait(read=False)
        self._updates = _only(present, self._updates)
        self._selected = _select(self._updates, [slice_sums(update.momentum).float() for update in self._updates])
        taken = [take(u.momentum, indices, u) for u, indices in zip(self._updates, self._selected, strict=True)]
        submatrices = [submatrix for stack in taken for submatrix in stack.unbind()]
        shapes = [(submatrix.shape[0], submatrix.shape[1]) for submatrix in submatrices]
        owners = assign_owners(tuple(orthonormalization_cost(*shape) for shape in shapes), self._group.size())
        transfers = list(zip(owners, shapes, strict=True))
        self._gathering = Gathering(self._group, transfers, self._dtype, self._device)
        self._gathering.send(_orthonormal([submatrices[index] for index in self._gathering.owned], self._custom))

    def send_back(self) -> None:
        """X <- (1 - lr weight_decay) X, while results are on their way."""
        shrink(self._updates)

    def finish(self) -> dict[Tensor, Selection]:
        """X[K] <- X[K] - lr scale O, the same on every rank."""
        results = iter(self._gathering.receive())
        for update, indices in zip(self._updates, self._selected, strict=True):
            orthonormal = torch.stack([next(results) for _ in indices])
            apply(update.weight, indices, orthonormal, update)
        return {u.parameter: u.selection(indices) for u, indices in zip(self._updates, self._selected, strict=True)}


@dataclass(frozen=True, eq=False)
class _Piece:
    """This rank's part of one matrix.

    Attributes:
        update: The parameter it belongs to.
        matrix: Which of the parameter's matrices on this rank.
        rows: By rank, which of the k selected slices it holds.
        indices: Shape (1, r), the selected slices that this rank holds, counted from its first slice.
    """

    update: MatrixUpdate
    matrix: int
    rows: tuple[Span, ...]
    indices: Tensor

    @property
    def momentum(self) -> Tensor:
        return self.update.momentum.narrow(0, self.matrix, 1)

    @property
    def weight(self) -> Tensor:
        return self.update.weight.narrow(0, self.matrix, 1)

    @property
    def cost(self) -> int:
        return orthonormalization_cost(self.update.k, self.update.entries)

    def transfer(self, owner: int) -> Transfer:
        columns = tuple(entries for _, entries in self.update.spans)
        return Transfer(owner, (self.update.k, self.update.entries), self.rows, columns)


def _pieces(updates: Sequence[MatrixUpdate], selected: Sequence[Tensor], rank: int) -> list[_Piece]:
    """This rank's part of every matrix; the host learns the selection of all matrices at once, if it must at all."""
    on_host = iter(_read([indices for update, indices in zip(updates, selected, strict=True) if _is_split(update)]))
    pieces = []
    for update, indices in zip(updates, selected, strict=True):
        first_slice = update.spans[rank][0][0]
        if _is_split(update):
            rows_by_matrix = _rows_by_rank(update, next(on_host))
        else:
            rows_by_matrix = [tuple((0, update.k) for _ in update.spans)] * len(indices)
        for matrix, rows in enumerate(rows_by_matrix):
            start, stop = rows[rank]
            held = indices.narrow(0, matrix, 1).narrow(1, start, stop - start)
            pieces.append(_Piece(update, matrix, rows, held - first_slice))
    return pieces


def _is_split(update: MatrixUpdate) -> bool:
    """Whether ranks hold different slices: how many of the selected ones each holds then depends on the selection."""
    return any(slices != (0, update.slices) for slices, _ in update.spans)


def _read(selected: Sequence[Tensor]) -> list[Tensor]:
    """Bring indices to the host, in one synchronisation."""
    if not selected:
        return []
    flat = torch.cat([indices.flatten() for indices in selected]).cpu()
    parts = torch.split(flat, [indices.numel() for indices in selected])
    return [part.view(indices.shape) for part, indices in zip(parts, selected, strict=True)]


def _rows_by_rank(update: MatrixUpdate, indices: Tensor) -> list[tuple[Span, ...]]:
    """For every matrix and rank, where its slices begin and end among the selected ones, (count, k) on the host."""
    edges = torch.tensor([edge for slices, _ in update.spans for edge in slices])
    positions = torch.searchsorted(indices, edges.expand(len(indices), -1).contiguous()).tolist()
    return [tuple(zip(each[0::2], each[1::2], strict=True)) for each in positions]


def _partial_sums(update: MatrixUpdate) -> Tensor:
    """The sums over this rank's part of every slice, (count, n), zero where it holds none."""
    assert update.layout.group is not None
    (start, stop), _ = update.spans[dist.get_rank(update.layout.group)]
    sums = slice_sums(update.momentum)
    whole = sums.new_zeros(len(sums), update.slices)
    whole.narrow(1, start, stop - start).copy_(sums)
    return whole


def _send_totals(group: "ProcessGroup", updates: Sequence[MatrixUpdate], sums: Sequence[Tensor]) -> Totals:
    fingerprint = hash(tuple(update.fingerprint() for update in updates))
    flags = [update.gradient is not None for update in updates]
    return Totals(group, fingerprint, flags, sums, updates[0].momentum.device)


def _select(updates: Sequence[MatrixUpdate], norms: Sequence[Tensor]) -> list[Tensor]:
    """K for every update, those of one (n, k) together."""
    selected: dict[int, Tensor] = {}
    for positions in alike(range(len(updates)), lambda i: (updates[i].slices, updates[i].k)).values():
        batch = [updates[position] for position in positions]
        selected.update(zip(positions, select(batch, [norms[position] for position in positions]), strict=True))
    return [selected[position] for position in range(len(updates))]


def _orthonormal(submatrices: Sequence[Tensor], custom: Orthonormalize | None) -> list[Tensor]:
    """O for every submatrix (k, m), equal shapes together."""
    results: dict[int, Tensor] = {}
    for positions in alike(range(len(submatrices)), lambda i: submatrices[i].shape).values():
        stack = torch.stack([submatrices[position] for position in positions])
        results.update(zip(positions, orthonormal_of([stack], custom).unbind(), strict=True))
    return [results[position] for position in range(len(submatrices))]


def _only(present: Sequence[bool], things: Sequence[T]) -> list[T]:
    return [thing for thing, is_present in zip(things, present, strict=True) if is_present]
