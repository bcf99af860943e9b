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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.algorithms.dion2 import (
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
from dion2_lightning.distributed.exchange import Exchange, Gathering, Totals, Transfer, read_together
from dion2_lightning.distributed.owners import assign_owners, orthonormalization_cost
from dion2_lightning.kernels.selection import Selection, slice_sums
from dion2_lightning.matrices.layout import Replicas, Span, alike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOPS_PER_BYTE: Final = 4000
"""Work on replicas is worth sharing from here on: what a GPU multiplies in the time a byte takes between nodes."""


def update_matrices(
    updates: Sequence[MatrixUpdate],
    custom: Orthonormalize | None,
    share_replicas: bool | None,
    settings: int,
    meanwhile: Callable[[], None],
) -> dict[Tensor, Selection]:
    """Take one step on all matrices, those of this rank alone and those it shares.

    Args:
        updates: Every parameter of the matrix groups, in the same order on every rank; this rank may lack gradients.
        custom: Replaces the orthonormalization.
        share_replicas: Whether ranks share the work on replicated matrices; None decides by its cost.
        settings: A number made of the settings of all groups; ranks that differ in it get an error.
        meanwhile: Other work, done once while submatrices are on their way.

    Returns:
        What was selected, by parameter.
    """

    def likeness(update: MatrixUpdate) -> tuple[object, ...]:
        replicas = update.layout.replicas if share_replicas is not False else None
        return update.layout.group, replicas and replicas.group, update.momentum.device

    together = alike(updates, likeness)
    alone = [update for ranks, members in together.items() for update in members if ranks[:2] == (None, None)]
    parts = [
        SharedMatrices(members, custom, share_replicas, settings)
        for ranks, members in together.items()
        if ranks[:2] != (None, None)
    ]
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


class SharedMatrices:
    """Matrices that the same ranks share, in the same way.

    Attributes:
        unread: What the host would know: the header, and the selections that decide who sends how much.
        must_read: Whether it has to wait for that: where ranks hold different slices, and where this rank lacks a
            gradient that another may have. On a CPU it costs nothing.
    """

    def __init__(
        self, updates: list[MatrixUpdate], custom: Orthonormalize | None, share_replicas: bool | None, settings: int
    ) -> None:
        """Take updates that travel together; see :func:`update_matrices`."""
        self._updates, self._custom, self._share_replicas = updates, custom, share_replicas
        layout = updates[0].layout
        self._group: ProcessGroup | None = layout.group
        self._replicas = layout.replicas if share_replicas is not False else None
        self._rank = 0 if self._group is None else dist.get_rank(self._group)
        self._device = updates[0].momentum.device
        self._has_gradient = [update.gradient is not None for update in updates]
        numbers = settings, [update.fingerprint() for update in updates]
        self._fingerprint = zlib.crc32(repr(numbers).encode())

    def start(self) -> None:
        """M <- M + G; this rank's numbers go on their way."""
        accumulate(self._updates)
        everyone = self._group if self._replicas is None else self._replicas.everyone
        assert everyone is not None
        self._totals = Totals(everyone, self._fingerprint, self._has_gradient, self._partial_sums(), self._device)

    def select(self) -> None:
        """K, the same on every rank."""
        header, norms = self._totals.wait()
        self._norms = dict(zip(self._updates, norms, strict=True))
        self._selected = _select(self._updates, norms)
        self._on_host: dict[MatrixUpdate, Tensor] = {}
        self._split = [update for update in self._updates if update.is_split]
        self.unread = [header, *(self._selected[update] for update in self._split)]
        self.must_read = bool(self._split) or not all(self._has_gradient) or self._device.type == "cpu"

    def read(self, on_host: Sequence[Tensor]) -> None:
        """Take ``unread`` on the host; leave out what has no gradient on any rank.

        A gradient that some ranks of a group lack counts as zero there.
        """
        header, *indices = on_host
        counts = self._totals.gradient_counts(header)
        self._check_replicas(counts)
        self._updates = [update for update, count in zip(self._updates, counts, strict=True) if count]
        self._on_host = dict(zip(self._split, indices, strict=True))

    def skip_reading(self) -> None:
        """Go on without the host; where ranks disagree, or replicas lack a gradient, the device will say so."""
        self._totals.assert_agreement(self.unread[0])
        if self._replicas is not None:
            self._totals.assert_multiples(self.unread[0], self._replicas.count)

    def send(self) -> None:
        """This rank's part of every S goes to its owner; M[K] <- mu M[K]."""
        pieces = [
            piece
            for update in self._updates
            for piece in _pieces(update, self._selected[update], self._on_host.get(update), self._rank)
        ]
        owners = iter(self._owners(pieces))
        owned = [(piece, list(itertools.islice(owners, piece.count))) for piece in pieces]
        self._journeys = [
            _Journey(members, self._group, self._replicas, self._custom)
            for members in alike(owned, lambda each: each[0].update.dtype).values()
        ]
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

    def _partial_sums(self) -> list[Tensor]:
        """What this rank adds to the sums of |M|.

        Replicas take turns: one of them gives a matrix's sums, so that all select the same, whatever the rounding of
        their gradients.
        """
        count, number = (1, 0) if self._replicas is None else (self._replicas.count, self._replicas.number)
        return [
            _spread(slice_sums(update.momentum), update.held[self._rank], update.slices)
            if index % count == number
            else update.momentum.new_zeros((len(update.momentum), update.slices), dtype=torch.float64)
            for index, update in enumerate(self._updates)
        ]

    def _check_replicas(self, counts: Sequence[int]) -> None:
        """Refuse a gradient that some replicas have and others lack: their momenta would go apart."""
        if self._replicas is None:
            return
        for update, count in zip(self._updates, counts, strict=True):
            if count % self._replicas.count:
                raise RuntimeError(
                    f"{update.what} has a gradient on {count} of {self._replicas.everyone.size()} ranks, so not in "
                    "every replica; average the gradients over the replicas before step(), with zeros where there is "
                    "none"
                )

    def _owners(self, pieces: Sequence["_Piece"]) -> list["Owner"]:
        matrices = [piece for piece in pieces for _ in range(piece.count)]
        return plan_owners(
            [piece.cost for piece in matrices],
            [piece.nbytes for piece in matrices],
            1 if self._group is None else self._group.size(),
            1 if self._replicas is None else self._replicas.count,
            self._share_replicas,
        )


Owner = tuple[int | None, int]
"""In which replica a matrix is orthonormalized, None for in every one, and by which rank there."""


def plan_owners(
    costs: Sequence[int], nbytes: Sequence[int], ranks: int, replicas: int, share_replicas: bool | None
) -> list[Owner]:
    """Return who orthonormalizes each matrix, the same on every rank.

    Args:
        costs: FLOPs of each matrix's orthonormalization.
        nbytes: Size of each submatrix.
        ranks: How many share each matrix by parts.
        replicas: How many hold each part.
        share_replicas: Whether replicas share the work; None where that gains more than it costs to gather the results.
    """
    if replicas > 1 and share_replicas is not False:
        # Owners go round the replicas: each gathers as much as the one with the most results has.
        owners = [divmod(owner, replicas)[::-1] for owner in assign_owners(tuple(costs), ranks * replicas)]
        results = [0] * replicas
        for (replica, _), size in zip(owners, nbytes, strict=True):
            results[replica] += size
        saved = sum(costs) * (replicas - 1) // replicas
        if share_replicas or saved >= FLOPS_PER_BYTE * max(results) * (replicas - 1):
            return list(owners)
    return [(None, owner) for owner in assign_owners(tuple(costs), ranks)]


@dataclass(frozen=True, eq=False)
class _Piece:
    """This rank's part of consecutive matrices of a parameter, of which it holds equally many slices.

    Attributes:
        update: The parameter they belong to.
        first: Which of the parameter's matrices on this rank is the first.
        edges: Where each rank's slices begin and end among the k selected ones, on the host (count, ranks, 2); None
            where every rank holds a part of all.
        indices: Shape (count, r), the selected slices that this rank holds, counted from its first slice.
    """

    update: MatrixUpdate
    first: int
    edges: Tensor | None
    indices: Tensor

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def cost(self) -> int:
        """FLOPs of one of its matrices."""
        return orthonormalization_cost(self.update.k, self.update.entries)

    @property
    def nbytes(self) -> int:
        """Size of one whole submatrix."""
        return self.update.k * self.update.entries * self.update.dtype.itemsize

    def take(self) -> Sequence[Tensor]:
        return take(self.update.momentum.narrow(0, self.first, self.count), self.indices, self.update).unbind()

    def apply(self, parts: Sequence[Tensor]) -> None:
        weight = self.update.weight.narrow(0, self.first, self.count)
        stack = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))
        apply(weight, self.indices, stack, self.update)

    def transfer(self, matrix: int, owner: int, rank: int) -> Transfer:
        """One of its matrices' way."""
        columns = self.update.columns
        left, right = columns[rank]
        return Transfer(
            owner,
            (self.update.k, self.update.entries),
            (self.indices.shape[1], right - left),
            None if self.edges is None else self.edges[matrix],
            columns,
        )


class _Journey:
    """Submatrices of one precision on their way to their owners, and back to every rank that holds a part of them."""

    def __init__(
        self,
        owned: Sequence[tuple[_Piece, Sequence[Owner]]],
        group: "ProcessGroup | None",
        replicas: Replicas | None,
        custom: Orthonormalize | None,
    ) -> None:
        """Plan it, the same on every rank."""
        self._pieces, self._custom = [piece for piece, _ in owned], custom
        self._update_of = [piece.update for piece, owners in owned for _ in owners]
        rank = 0 if group is None else dist.get_rank(group)
        transfers = [
            piece.transfer(matrix, owner, rank) for piece, owners in owned for matrix, (_, owner) in enumerate(owners)
        ]
        where = [replica for _, owners in owned for replica, _ in owners]
        mine = None if replicas is None else replicas.number
        self._here = [index for index, replica in enumerate(where) if replica in (None, mine)]
        dtype, device = self._update_of[0].dtype, self._update_of[0].momentum.device
        self._exchange = self._gathering = None
        self._results: Sequence[Tensor] = ()
        if group is not None:
            self._exchange = Exchange(group, [transfers[index] for index in self._here], dtype, device)
        if replicas is not None and where[0] is not None:
            position_of = replicas.position_of
            sources = [position_of[number] for number in where if number is not None]
            shapes = [transfer.own for transfer in transfers]
            self._gathering = Gathering(replicas.group, sources, shapes, dtype, device)

    def send(self) -> None:
        here, taken = [], iter(self._here)
        following = next(taken, None)
        for index, part in enumerate(part for piece in self._pieces for part in piece.take()):
            if index == following:
                here.append(part)
                following = next(taken, None)
        if self._exchange is not None:
            self._exchange.send(here)
        else:
            self._results = self._orthonormal(here, self._here)
        if self._exchange is None and self._gathering is not None:
            self._gathering.send(self._results)

    def send_back(self) -> None:
        if self._exchange is not None:
            owned = [self._here[index] for index in self._exchange.owned]
            self._exchange.send_back(self._orthonormal(self._exchange.receive(), owned))

    def gather(self) -> None:
        if self._exchange is not None:
            self._results = self._exchange.receive_back()
            if self._gathering is not None:
                self._gathering.send(self._results)

    def finish(self) -> None:
        parts = iter(self._results if self._gathering is None else self._gathering.receive())
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
    first_slice = update.held[rank][0]
    if on_host is None:
        yield _Piece(update, 0, None, selected - first_slice)
        return
    edges = _edges(update, on_host)
    first = 0
    for (start, stop), equal in itertools.groupby(edges[:, rank].tolist()):
        count = len(list(equal))
        held = selected.narrow(0, first, count).narrow(1, start, stop - start)
        yield _Piece(update, first, edges.narrow(0, first, count), held - first_slice)
        first += count


def _edges(update: MatrixUpdate, indices: Tensor) -> Tensor:
    """For every matrix and rank, where its slices begin and end among the sorted selected ones; (count, ranks, 2)."""
    positions = torch.searchsorted(indices, update.held.edges.expand(len(indices), -1).contiguous())
    return positions.view(len(indices), -1, 2)


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
