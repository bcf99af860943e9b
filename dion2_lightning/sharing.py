"""The update of matrices that several ranks share, down the same page as update.py with the exchange in between.

``SharedByParts``: every rank holds a rectangle of each matrix (FSDP2, HSDP, TP, FSDP2 over TP). Ranks add up the norms
of the slices, send what is selected to the matrix's owner, who orthonormalizes it and sends the parts back.

``SharedReplicas``: every rank holds each matrix (DDP). Only the work is shared: owners orthonormalize, one all-gather
brings the results to everyone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.exchange import (
    Exchange,
    Gathering,
    Totals,
    Transfer,
    read_together,
)
from dion2_lightning.layout import Span, alike
from dion2_lightning.owners import assign_owners, orthonormalization_cost
from dion2_lightning.selection import Selection, slice_sums
from dion2_lightning.update import (
    BATCH_ELEMENTS,
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
        part.select()
    if any(part.must_read for part in parts):
        on_host = iter(read_together([tensor for part in parts for tensor in part.unread]))
        for part in parts:
            part.read(*(next(on_host) for _ in part.unread))
    else:
        for part in parts:
            part.skip_reading()
    for part in parts:
        part.send()
    meanwhile()
    for part in parts:
        part.send_back()
    for part in parts:
        part.finish()
        selections.update(part.selections())
    return selections


def _is_shared(update: MatrixUpdate, share_replicas: bool | None) -> bool:
    if update.layout.group is None or not update.layout.replicated:
        return update.layout.group is not None
    if share_replicas is not None:
        return share_replicas
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


class _Shared(ABC):
    """What both ways have in common: numbers that all ranks contribute to, and the host's one look at them.

    Attributes:
        unread: What the host would know: the header, and the selections that decide who sends how much.
        must_read: Whether it has to wait for that: where ranks hold different slices, and where this rank lacks a
            gradient that another may have. On a CPU it costs nothing.
    """

    def __init__(self, group: "ProcessGroup", updates: list[MatrixUpdate], custom: Orthonormalize | None) -> None:
        """Take updates that travel together."""
        self._group, self._updates, self._custom = group, updates, custom
        self._dtype, self._device = updates[0].dtype, updates[0].momentum.device
        self._has_gradient = [update.gradient is not None for update in updates]

    def start(self) -> None:
        """M <- M + G; this rank's numbers go on their way."""
        accumulate(self._updates)
        fingerprint = hash(tuple(update.fingerprint() for update in self._updates))
        self._totals = Totals(self._group, fingerprint, self._has_gradient, self._partial_sums(), self._device)

    def select(self) -> None:
        """K, the same on every rank."""
        header, sums = self._totals.wait()
        self._selected = _select(self._updates, self._norms(sums))
        self._on_host: dict[MatrixUpdate, Tensor] = {}
        self._split = [update for update in self._updates if _is_split(update)]
        self.unread = [header, *(self._selected[update] for update in self._split)]
        self.must_read = bool(self._split) or not all(self._has_gradient) or self._device.type == "cpu"

    def read(self, header: Tensor, *indices: Tensor) -> None:
        """Take ``unread`` on the host; leave out what has no gradient on any rank."""
        counts = self._totals.gradient_counts(header)
        self._check(counts)
        self._updates = [update for update, count in zip(self._updates, counts, strict=True) if count]
        self._on_host = dict(zip(self._split, indices, strict=True))

    def skip_reading(self) -> None:
        """Go on without the host; where the ranks disagree, the device will say so."""
        self._totals.assert_agreement(self.unread[0])

    def selections(self) -> dict[Tensor, Selection]:
        """What was selected, by parameter."""
        return {update.parameter: update.selection(self._selected[update]) for update in self._updates}

    @abstractmethod
    def _check(self, counts: list[int]) -> None:
        """Refuse what cannot be right of the number of ranks that have each gradient."""

    @abstractmethod
    def _partial_sums(self) -> list[Tensor]:
        """What this rank adds to the sums of |M|: nothing where it has them whole."""

    @abstractmethod
    def _norms(self, sums: list[Tensor]) -> list[Tensor]:
        """The norms (count, n) of every update's slices, from what came of the partial sums."""


class SharedByParts(_Shared):
    """Matrices of which every rank of a group holds a rectangle."""

    def send(self) -> None:
        """This rank's part of every S goes to its owner; M[K] <- mu M[K]."""
        rank = dist.get_rank(self._group)
        self._pieces = [
            piece
            for update in self._updates
            for piece in _pieces(update, self._selected[update], self._on_host.get(update), rank)
        ]
        owners = assign_owners(tuple(piece.cost for piece in self._pieces), self._group.size())
        transfers = [piece.transfer(owner) for piece, owner in zip(self._pieces, owners, strict=True)]
        self._exchange = Exchange(self._group, transfers, self._dtype, self._device)
        self._exchange.send([take(piece.momentum, piece.indices, piece.update) for piece in self._pieces])

    def send_back(self) -> None:
        """O of the submatrices that this rank owns; every rank's part goes back to it. X <- (1 - lr weight_decay) X."""
        self._exchange.send_back(_orthonormal(self._exchange.receive(), self._custom))
        shrink(self._updates)

    def finish(self) -> None:
        """X[K] <- X[K] - lr scale O, this rank's part of it."""
        for piece, part in zip(self._pieces, self._exchange.receive_back(), strict=True):
            apply(piece.weight, piece.indices, part.view(1, *part.shape), piece.update)

    def _check(self, counts: list[int]) -> None:
        """Any number will do: a gradient that this rank lacks counts as zero here."""

    def _partial_sums(self) -> list[Tensor]:
        rank = dist.get_rank(self._group)
        return [_spread(slice_sums(update.momentum), update.spans[rank][0], update.slices) for update in self._updates]

    def _norms(self, sums: list[Tensor]) -> list[Tensor]:
        return sums


class SharedReplicas(_Shared):
    """Matrices that every rank of a group holds whole."""

    def send(self) -> None:
        """S on every rank alike, M[K] <- mu M[K]; O of what this rank owns goes to all others."""
        stacks = [take(update.momentum, self._selected[update], update) for update in self._updates]
        submatrices = [submatrix for stack in stacks for submatrix in stack.unbind()]
        shapes = [(submatrix.shape[0], submatrix.shape[1]) for submatrix in submatrices]
        owners = assign_owners(tuple(orthonormalization_cost(*shape) for shape in shapes), self._group.size())
        transfers = list(zip(owners, shapes, strict=True))
        self._gathering = Gathering(self._group, transfers, self._dtype, self._device)
        self._gathering.send(_orthonormal([submatrices[index] for index in self._gathering.owned], self._custom))

    def send_back(self) -> None:
        """X <- (1 - lr weight_decay) X, while results are on their way."""
        shrink(self._updates)

    def finish(self) -> None:
        """X[K] <- X[K] - lr scale O, the same on every rank."""
        results = iter(self._gathering.receive())
        for update in self._updates:
            indices = self._selected[update]
            apply(update.weight, indices, torch.stack([next(results) for _ in range(len(indices))]), update)

    def skip_reading(self) -> None:
        """Go on without the host; where a rank lacks a gradient, or disagrees, the device will say so."""
        super().skip_reading()
        self._totals.assert_gradients_everywhere(self.unread[0])

    def _check(self, counts: list[int]) -> None:
        """Replicas with different gradients would select differently, and go apart."""
        for update, count in zip(self._updates, counts, strict=True):
            if 0 < count < self._group.size():
                raise RuntimeError(
                    f"{update.what} has a gradient on {count} of {self._group.size()} ranks that hold replicas of it; "
                    "average the gradients over the ranks before step(), with zeros where there is none"
                )

    def _partial_sums(self) -> list[Tensor]:
        return []

    def _norms(self, sums: list[Tensor]) -> list[Tensor]:
        return [slice_sums(update.momentum).float() for update in self._updates]


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


def _pieces(update: MatrixUpdate, selected: Tensor, on_host: Tensor | None, rank: int) -> Iterator[_Piece]:
    """This rank's part of each of a parameter's matrices; a split selection (count, k) is on the host too."""
    first_slice = update.spans[rank][0][0]
    rows_of = [tuple((0, update.k) for _ in update.spans)] * len(selected)
    if on_host is not None:
        rows_of = _rows_by_rank(update, on_host)
    for matrix, rows in enumerate(rows_of):
        start, stop = rows[rank]
        held = selected.narrow(0, matrix, 1).narrow(1, start, stop - start)
        yield _Piece(update, matrix, rows, held - first_slice)


def _is_split(update: MatrixUpdate) -> bool:
    """Whether ranks hold different slices: how many of the selected ones each holds then depends on the selection."""
    return any(slices != (0, update.slices) for slices, _ in update.spans)


def _rows_by_rank(update: MatrixUpdate, indices: Tensor) -> list[tuple[Span, ...]]:
    """For every matrix and rank, where its slices begin and end among the sorted selected ones."""
    edges = torch.tensor([edge for slices, _ in update.spans for edge in slices])
    positions = torch.searchsorted(indices, edges.expand(len(indices), -1).contiguous()).tolist()
    return [tuple(zip(each[0::2], each[1::2], strict=True)) for each in positions]


def _spread(sums: Tensor, held: Span, slices: int) -> Tensor:
    """Put the sums over the slices that this rank holds in their place among all, (count, n); zero elsewhere."""
    start, stop = held
    whole = sums.new_zeros(len(sums), slices)
    whole.narrow(1, start, stop - start).copy_(sums)
    return whole


def _select(updates: Sequence[MatrixUpdate], norms: Sequence[Tensor]) -> dict[MatrixUpdate, Tensor]:
    """K for every update, those of one (n, k) together."""
    selected: dict[MatrixUpdate, Tensor] = {}
    pairs = zip(updates, norms, strict=True)
    for batch in alike(pairs, lambda pair: (pair[0].slices, pair[0].k)).values():
        its_updates, its_norms = zip(*batch, strict=True)
        selected.update(zip(its_updates, select(its_updates, its_norms), strict=True))
    return selected


def _orthonormal(submatrices: Sequence[Tensor], custom: Orthonormalize | None) -> list[Tensor]:
    """O for every submatrix (k, m), equal shapes together."""
    results: dict[int, Tensor] = {}
    for equal in alike(range(len(submatrices)), lambda i: submatrices[i].shape).values():
        size = max(1, BATCH_ELEMENTS // submatrices[equal[0]].numel())
        for positions in (equal[start : start + size] for start in range(0, len(equal), size)):
            stack = torch.stack([submatrices[position] for position in positions])
            results.update(zip(positions, orthonormal_of([stack], custom).unbind(), strict=True))
    return [results[position] for position in range(len(submatrices))]
