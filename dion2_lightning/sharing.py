"""The update of matrices that several ranks share, down the same page as update.py with the exchange in between.

Ranks may share a matrix in two ways, and in both at once:

- By parts: every rank of a group holds a rectangle of it (FSDP2, TP, FSDP2 over TP). They add up the norms of the
  slices, send what is selected to the matrix's owner, who orthonormalizes it and sends the parts back.
- As replicas: every rank holds the same (DDP). Only the work is shared: owners orthonormalize, one all-gather brings
  the results to everyone.

Under HSDP a group shares a matrix by parts, and there are replicas of the group: owners are dealt out over all of them,
a matrix travels inside its owner's replica, and its parts are then gathered by the other replicas.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.exchange import Exchange, Gathering, Totals, Transfer, assert_same_gradients, read_together
from dion2_lightning.layout import Replicas, Span, alike
from dion2_lightning.owners import assign_owners, orthonormalization_cost
from dion2_lightning.selection import Selection, slice_sums
from dion2_lightning.update import (
    BATCH_ELEMENTS,
    MatrixUpdate,
    Orthonormalize,
    accumulate,
    apply,
    dion2_update,
    look_at,
    orthonormal_of,
    select,
    shrink,
    take,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOPS_PER_BYTE: Final = 4000
"""Work on replicas is worth sharing from here on: what a GPU multiplies in the time a byte takes between nodes."""

OtherSettings = Mapping[Any, Sequence[Any]]
"""What ranks must agree about beside the matrices, by the mesh of the parameters; None for plain ones."""


def update_matrices(
    updates: Sequence[MatrixUpdate],
    custom: Orthonormalize | None,
    share_replicas: bool | None,
    others: OtherSettings,
    meanwhile: Callable[[], None],
) -> dict[Tensor, Selection]:
    """Take one step on all matrices, those of this rank alone and those it shares.

    Args:
        updates: Every parameter of the matrix groups, in the same order on every rank; this rank may lack gradients.
        custom: Replaces the orthonormalization.
        share_replicas: Whether ranks share the work on replicated matrices; None decides by its cost.
        others: Settings of what is no matrix; ranks that differ in them get an error where they share matrices.
        meanwhile: Other work, done once while submatrices are on their way.

    Returns:
        What was selected, by parameter.
    """
    alone, parts = _parted(updates, custom, share_replicas, others)
    for part in parts:
        part.start()
    selections = dion2_update([update for update in alone if update.gradient is not None], custom)
    for part in parts:
        part.select()
    if any(part.must_read for part in parts):
        on_host = iter(read_together([tensor for part in parts for tensor in part.unread]))
        for part in parts:
            part.read([next(on_host) for _ in part.unread])
    else:
        for part in parts:
            part.skip_reading()
    for part in parts:
        part.send()
    meanwhile()
    for part in parts:
        part.send_back()
    for part in parts:
        part.gather()
    for part in parts:
        part.finish()
        selections.update(part.selections())
    return selections


def _parted(
    updates: Sequence[MatrixUpdate], custom: Orthonormalize | None, share_replicas: bool | None, others: OtherSettings
) -> tuple[list[MatrixUpdate], list["SharedMatrices"]]:
    """Part updates in those of this rank alone, and those that travel together: the same ranks hold them alike."""
    alone: list[MatrixUpdate] = []
    parts = []
    for members in alike(updates, lambda u: (u.layout.group, u.layout.replicas, u.momentum.device)).values():
        layout = members[0].layout
        if layout.group is not None:
            replicas = layout.replicas if _is_worth_sharing(members, share_replicas) else None
            parts.append(SharedMatrices(members, layout.group, replicas, custom, others))
        elif layout.replicas is not None:
            apart = alike(members, lambda update: _is_worth_sharing([update], share_replicas))
            alone += apart.get(False, [])
            if True in apart:
                parts.append(SharedMatrices(apart[True], None, layout.replicas, custom, others))
        else:
            alone += members
    return alone, parts


def _is_worth_sharing(updates: Sequence[MatrixUpdate], share_replicas: bool | None) -> bool:
    """Whether replicas save more by sharing the work than it costs to send the results."""
    if updates[0].layout.replicas is None or share_replicas is not None:
        return bool(share_replicas)
    cost = sum(len(update.momentum) * orthonormalization_cost(update.k, update.entries) for update in updates)
    received = sum(len(update.momentum) * update.k * update.entries * update.dtype.itemsize for update in updates)
    return pays_off(cost, received)


def owner_of(number: int, replicas: int) -> tuple[int, int]:
    """Return the replica of an owner, and its rank there: one after the other they go round the replicas.

    So that few matrices too are spread over the replicas, which gather as much as the one with the most results has.
    """
    return number % replicas, number // replicas


def pays_off(flops: int, received: int) -> bool:
    """Return whether replicas that share so much work gain more than it costs to receive so many bytes of results."""
    return flops >= FLOPS_PER_BYTE * received


class SharedMatrices:
    """Matrices that the same ranks share, in the same way.

    Attributes:
        unread: What the host would know: the headers, and the selections that decide who sends how much.
        must_read: Whether it has to wait for that: where ranks hold different slices, and where this rank lacks a
            gradient that another may have. On a CPU it costs nothing.
    """

    def __init__(
        self,
        updates: list[MatrixUpdate],
        group: "ProcessGroup | None",
        replicas: Replicas | None,
        custom: Orthonormalize | None,
        others: OtherSettings,
    ) -> None:
        """Take updates that travel together.

        Args:
            updates: In the same order on every rank.
            group: The ranks that share them by parts; None where every rank has them whole.
            replicas: The ranks to share the work with, which hold the same; None for none.
            custom: Replaces the orthonormalization.
            others: Settings of what is no matrix.
        """
        self._updates, self._group, self._replicas, self._custom = updates, group, replicas, custom
        self._rank = 0 if group is None else dist.get_rank(group)
        self._device = updates[0].momentum.device
        self._has_gradient = [update.gradient is not None for update in updates]
        meshes = alike(updates, lambda update: getattr(update.parameter, "device_mesh", None))
        settings = [update.fingerprint() for update in updates], [others.get(mesh) for mesh in meshes]
        self._fingerprint = zlib.crc32(repr(settings).encode())

    def start(self) -> None:
        """M <- M + G; this rank's numbers go on their way."""
        accumulate(self._updates)
        numbers = self._fingerprint, self._has_gradient
        self._totals = []
        if self._group is not None:
            self._totals.append(Totals(self._group, *numbers, self._partial_sums(), self._device))
        if self._replicas is not None:
            self._totals.append(Totals(self._replicas.everyone, *numbers, [], self._device))

    def select(self) -> None:
        """K, the same on every rank."""
        headers, sums = zip(*(each.wait() for each in self._totals), strict=True)
        norms = sums[0] if self._group is not None else [slice_sums(each.momentum).float() for each in self._updates]
        self._norms = dict(zip(self._updates, norms, strict=True))
        self._selected = _select(self._updates, norms)
        self._on_host: dict[MatrixUpdate, Tensor] = {}
        self._split = [update for update in self._updates if _is_split(update)]
        self.unread = [*headers, *(self._selected[update] for update in self._split)]
        self.must_read = bool(self._split) or not all(self._has_gradient) or self._device.type == "cpu"

    def read(self, on_host: Sequence[Tensor]) -> None:
        """Take ``unread`` on the host; leave out what has no gradient on any rank.

        A gradient that some ranks of a group lack counts as zero there. Replicas must have the same: they would select
        differently, and go apart.
        """
        headers, indices = on_host[: len(self._totals)], on_host[len(self._totals) :]
        counts = [each.gradient_counts(header) for each, header in zip(self._totals, headers, strict=True)]
        if self._replicas is not None:
            of_a_replica = counts[0] if self._group is not None else [min(count, 1) for count in counts[0]]
            self._check_replicas(self._replicas, of_a_replica, counts[-1])
        self._updates = [update for update, count in zip(self._updates, counts[-1], strict=True) if count]
        self._on_host = dict(zip(self._split, indices, strict=True))

    def skip_reading(self) -> None:
        """Go on without the host; where ranks disagree, or replicas lack a gradient, the device will say so."""
        headers = self.unread[: len(self._totals)]
        for each, header in zip(self._totals, headers, strict=True):
            each.assert_agreement(header)
        if self._replicas is not None:
            assert_same_gradients(headers[-1], headers[0] if self._group else None, len(self._replicas.numbers))

    def send(self) -> None:
        """This rank's part of every S goes to its owner; M[K] <- mu M[K]."""
        pieces = [
            piece
            for update in self._updates
            for piece in _pieces(update, self._selected[update], self._on_host.get(update), self._rank)
        ]
        by_dtype = alike(pieces, lambda piece: piece.update.dtype).values()
        self._journeys = [_Journey(members, self._group, self._replicas, self._custom) for members in by_dtype]
        for journey in self._journeys:
            journey.send()

    def send_back(self) -> None:
        """O of the submatrices that this rank owns; every rank's part goes back to it. X <- (1 - lr weight_decay) X."""
        for journey in self._journeys:
            journey.send_back()
        shrink(self._updates)

    def gather(self) -> None:
        """Other replicas get their parts of O too."""
        for journey in self._journeys:
            journey.gather()

    def finish(self) -> None:
        """X[K] <- X[K] - lr scale O, this rank's part of it."""
        for journey in self._journeys:
            journey.finish()

    def selections(self) -> dict[Tensor, Selection]:
        """What was selected, by parameter."""
        return {
            update.parameter: update.selection(self._selected[update], self._norms[update]) for update in self._updates
        }

    def _check_replicas(self, replicas: Replicas, of_a_replica: list[int], of_all: list[int]) -> None:
        number = len(replicas.numbers)
        for update, here, everywhere in zip(self._updates, of_a_replica, of_all, strict=True):
            if everywhere != number * here:
                raise RuntimeError(
                    f"{update.what} has a gradient on {everywhere} of {replicas.everyone.size()} ranks, and not on the "
                    "same ones in every replica; average the gradients over the replicas before step(), with zeros "
                    "where there is none"
                )

    def _partial_sums(self) -> list[Tensor]:
        return [
            _spread(slice_sums(update.momentum), update.spans[self._rank][0], update.slices) for update in self._updates
        ]


@dataclass(frozen=True, eq=False)
class _Piece:
    """This rank's part of consecutive matrices of a parameter, of which every rank holds equally many slices.

    Attributes:
        update: The parameter they belong to.
        first: Which of the parameter's matrices on this rank is the first.
        rows: By rank, which of the k selected slices it holds.
        indices: Shape (count, r), the selected slices that this rank holds, counted from its first slice.
    """

    update: MatrixUpdate
    first: int
    rows: tuple[Span, ...]
    indices: Tensor

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def cost(self) -> int:
        """FLOPs of one of its matrices."""
        return orthonormalization_cost(self.update.k, self.update.entries)

    def take(self) -> Sequence[Tensor]:
        return take(self.update.momentum.narrow(0, self.first, self.count), self.indices, self.update).unbind()

    def apply(self, parts: Sequence[Tensor]) -> None:
        weight = self.update.weight.narrow(0, self.first, self.count)
        stack = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))
        apply(weight, self.indices, stack, self.update)

    def transfer(self, owner: int) -> Transfer:
        columns = tuple(entries for _, entries in self.update.spans)
        return Transfer(owner, (self.update.k, self.update.entries), self.rows, columns)


class _Journey:
    """Submatrices of one precision on their way to their owners, and back to every rank that holds a part of them."""

    def __init__(
        self,
        pieces: Sequence[_Piece],
        group: "ProcessGroup | None",
        replicas: Replicas | None,
        custom: Orthonormalize | None,
    ) -> None:
        """Plan it, the same on every rank."""
        self._pieces, self._custom = pieces, custom
        members = 1 if group is None else group.size()
        rank, replica = 0 if group is None else dist.get_rank(group), 0
        position_of = {0: 0}
        if replicas is not None:
            replica = replicas.numbers[dist.get_rank(replicas.group)]
            position_of = {number: position for position, number in enumerate(replicas.numbers)}
        costs = tuple(piece.cost for piece in pieces for _ in range(piece.count))
        owners = [owner_of(each, len(position_of)) for each in assign_owners(costs, members * len(position_of))]
        its_pieces = [piece for piece in pieces for _ in range(piece.count)]
        self._update_of = [piece.update for piece in its_pieces]
        transfers = [piece.transfer(owner) for piece, (_, owner) in zip(its_pieces, owners, strict=True)]
        self._in_this_replica = [index for index, (where, _) in enumerate(owners) if where == replica]
        dtype, device = pieces[0].update.dtype, pieces[0].update.momentum.device
        self._exchange = self._gathering = None
        if group is not None:
            here = [transfers[index] for index in self._in_this_replica]
            self._exchange = Exchange(group, here, dtype, device)
        if replicas is not None:
            sources = [position_of[where] for where, _ in owners]
            shapes = [transfer.shape_on(rank) for transfer in transfers]
            self._gathering = Gathering(replicas.group, sources, shapes, dtype, device)

    def send(self) -> None:
        parts = [part for piece in self._pieces for part in piece.take()]
        here = [parts[index] for index in self._in_this_replica]
        if self._exchange is not None:
            self._exchange.send(here)
        elif self._gathering is not None:
            self._gathering.send(self._orthonormal(here, self._in_this_replica))

    def send_back(self) -> None:
        if self._exchange is not None:
            owned = [self._in_this_replica[index] for index in self._exchange.owned]
            self._exchange.send_back(self._orthonormal(self._exchange.receive(), owned))

    def gather(self) -> None:
        if self._exchange is not None and self._gathering is not None:
            self._gathering.send(self._exchange.receive_back())

    def finish(self) -> None:
        last = self._gathering or self._exchange
        assert last is not None
        parts = iter(last.receive_back())
        for piece in self._pieces:
            piece.apply(list(itertools.islice(parts, piece.count)))

    def _orthonormal(self, submatrices: Sequence[Tensor], matrices: Sequence[int]) -> list[Tensor]:
        """O of whole submatrices, given which of the matrices they are of."""
        results = _orthonormal(submatrices, self._custom)
        for result, matrix in zip(results, matrices, strict=True):
            look_at(result.unsqueeze(0), self._update_of[matrix])
        return results


def _pieces(update: MatrixUpdate, selected: Tensor, on_host: Tensor | None, rank: int) -> Iterator[_Piece]:
    """This rank's part of a parameter's matrices; a split selection (count, k) is on the host too."""
    first_slice = update.spans[rank][0][0]
    rows_of = [tuple((0, update.k) for _ in update.spans)] * len(selected)
    if on_host is not None:
        rows_of = _rows_by_rank(update, on_host)
    first = 0
    for rows, equal in itertools.groupby(rows_of):
        count, (start, stop) = len(list(equal)), rows[rank]
        held = selected.narrow(0, first, count).narrow(1, start, stop - start)
        yield _Piece(update, first, rows, held - first_slice)
        first += count


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
