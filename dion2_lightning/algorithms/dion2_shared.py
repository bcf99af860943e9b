"""The Dion2 update of matrices that several ranks share: the box of dion2.py, with messages in between.

Ranks may share a matrix in two ways, and in both at once:

- By parts: every rank of a group holds a rectangle of it (FSDP2, TP, FSDP2 over TP). They sum up the norms of the
  slices, send what is selected to the matrix's owner, who orthonormalizes it and sends the parts back.
- As replicas: every rank holds the same (DDP). Only the work is shared: owners orthonormalize, one all-gather brings
  the results to everyone.

Under HSDP a group shares a matrix by parts, and there are replicas of the group: owners are assigned over all of them,
a submatrix travels inside its owner's replica, and the results are then gathered by the other replicas.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.matrix_update import (
    BATCH_ELEMENTS,
    MatrixUpdate,
    accumulate,
    apply,
    polar_factors,
    record_selection,
    select,
    show_result,
    shrink,
    take,
)
from dion2_lightning.distributed.collectives import NormAllReduce
from dion2_lightning.distributed.overlap import IN_FLIGHT, WaitingStep
from dion2_lightning.distributed.owner_exchange import OwnerRoundTrip, SharedSubmatrix
from dion2_lightning.distributed.owners import Owner, plan_owners
from dion2_lightning.kernels.orthonormalize import flops
from dion2_lightning.kernels.selection import slice_sums
from dion2_lightning.matrices.layout import Replicas, Span, group_by


def split_by_ranks(
    updates: Sequence[MatrixUpdate], share_replicas: bool | None
) -> tuple[list[MatrixUpdate], list[list[MatrixUpdate]]]:
    """Return the updates of this rank alone, and those it shares: lists that the same ranks share in the same way."""

    def ranks_of(update: MatrixUpdate) -> tuple[object, object]:
        replicas = update.layout.replicas if share_replicas is not False else None
        return update.layout.group, replicas and replicas.group

    alone = [update for update in updates if ranks_of(update) == (None, None)]
    shared = [update for update in updates if ranks_of(update) != (None, None)]
    return alone, list(group_by(shared, lambda each: (*ranks_of(each), each.momentum.device)).values())


def update_shared(updates: list[MatrixUpdate], context: StepContext) -> WaitingStep:
    """Take one step on matrices that the same ranks share in the same way.

    Args:
        updates: The same parameters in the same order on every rank; this rank may lack gradients. A gradient that some
            ranks of a group lack counts as zero there; what has none on any rank is left out.
        context: Of the step.

    Raises:
        RuntimeError: The ranks' settings differ, or some replicas have a gradient that others lack.
    """
    group, device = updates[0].layout.group, updates[0].momentum.device
    replicas = updates[0].layout.replicas if context.share_replicas is not False else None
    rank = 0 if group is None else dist.get_rank(group)

    # M <- M + G, and the norms of the slices of M, summed over the ranks.
    accumulate(updates)
    everyone = group if replicas is None else replicas.everyone
    assert everyone is not None
    checksum = zlib.crc32(repr((context.settings_checksum, [update.checksum() for update in updates])).encode())
    has_gradient = [update.gradient is not None for update in updates]
    norm_sums = NormAllReduce(everyone, checksum, has_gradient, _partial_sums(updates, replicas, rank), device)
    yield IN_FLIGHT

    # K, the same on every rank. The host reads it where it decides who sends how much, or which gradients there are.
    header, norms = norm_sums.wait()
    norms_of = dict(zip(updates, norms, strict=True))
    selected = _select(updates, norms)
    split = [update for update in updates if update.is_split]
    reads = bool(split) or not all(has_gradient) or _reading_is_free(device)
    on_host = yield [header, *(selected[update] for update in split)] if reads else []
    edges: dict[MatrixUpdate, Tensor] = {}
    if reads:
        updates = _with_gradient(updates, norm_sums.gradient_counts(on_host[0]), replicas)
        edges = {update: _edges(update, indices) for update, indices in zip(split, on_host[1:], strict=True)}
    else:
        norm_sums.check_on_device(header, 1 if replicas is None else replicas.count)

    # S <- M[K], to the owners; M[K] <- mu M[K].
    parts = [part for update in updates for part in _parts(update, selected[update], edges.get(update), rank)]
    trips = list(_plan_trips(parts, group, replicas, context.share_replicas))
    for trip, its_parts in trips:
        trip.send(submatrix for part in its_parts for submatrix in part.take())
    if group is not None:
        yield IN_FLIGHT

    # O of the submatrices that this rank owns, back to those who hold parts. X <- (1 - lr weight_decay) X meanwhile.
    for trip, its_parts in trips:
        update_of = [part.update for part in its_parts for _ in range(part.count)]
        results = _polar_factors(trip.receive(), context)
        for index, result in zip(trip.owned, results, strict=True):
            show_result(update_of[index], result.unsqueeze(0))
        trip.send_back(results)
    shrink(updates)
    yield IN_FLIGHT
    for trip, _ in trips:
        trip.send_to_replicas()
    yield IN_FLIGHT

    # X[K] <- X[K] - lr scale O.
    for trip, its_parts in trips:
        returned = iter(trip.results())
        for part in its_parts:
            part.apply(list(itertools.islice(returned, part.count)))
    for update in updates:
        record_selection(update, selected[update], norms_of[update], context)


@dataclass(frozen=True, eq=False)
class _Part:
    """This rank's part of consecutive matrices of a parameter, of which it holds equally many selected slices.

    Attributes:
        update: The parameter they belong to.
        first: Which of the parameter's matrices on this rank is the first.
        edges: Where each rank's slices start and stop among the k selected ones, on the host (count, ranks, 2); None
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
    def shape(self) -> tuple[int, int]:
        """(k, m) of each whole submatrix."""
        return self.update.k, self.update.entries

    def submatrices(self, owners: Sequence[Owner], rank: int) -> Iterator[SharedSubmatrix]:
        """The submatrices that it is a part of, given the owner of each."""
        left, right = self.update.columns[rank]
        own_shape = (self.indices.shape[1], right - left)
        for matrix, owner in enumerate(owners):
            edges = None if self.edges is None else self.edges[matrix]
            yield SharedSubmatrix(owner, self.shape, own_shape, edges, self.update.columns)

    def take(self) -> Sequence[Tensor]:
        return take(self.update.momentum.narrow(0, self.first, self.count), self.indices, self.update).unbind()

    def apply(self, results: Sequence[Tensor]) -> None:
        weight = self.update.weight.narrow(0, self.first, self.count)
        stack = results[0].unsqueeze(0) if len(results) == 1 else torch.stack(list(results))
        apply(self.update, weight, self.indices, stack)


def _partial_sums(updates: Sequence[MatrixUpdate], replicas: Replicas | None, rank: int) -> list[Tensor]:
    """Sums of |M| by slice, (count, n), over what this rank holds; zero for the slices that it does not.

    Of replicas one gives a matrix's sums, in turn, so that all select the same, whatever the rounding of their
    gradients.
    """
    count, number = (1, 0) if replicas is None else (replicas.count, replicas.number)
    return [
        _among_all_slices(slice_sums(update.momentum), update.held[rank], update.slices)
        if index % count == number
        else update.momentum.new_zeros((len(update.momentum), update.slices), dtype=torch.float64)
        for index, update in enumerate(updates)
    ]


def _among_all_slices(sums: Tensor, held: Span, slices: int) -> Tensor:
    start, stop = held
    whole = sums.new_zeros(len(sums), slices)
    whole.narrow(1, start, stop - start).copy_(sums)
    return whole


def _select(updates: Sequence[MatrixUpdate], norms: Sequence[Tensor]) -> dict[MatrixUpdate, Tensor]:
    """K for every update, those of one (n, k) together."""
    selected: dict[MatrixUpdate, Tensor] = {}
    pairs = zip(updates, norms, strict=True)
    for batch in group_by(pairs, lambda pair: (pair[0].slices, pair[0].k)).values():
        its_updates, its_norms = zip(*batch, strict=True)
        selected.update(zip(its_updates, select(its_updates, its_norms), strict=True))
    return selected


def _with_gradient(
    updates: Sequence[MatrixUpdate], counts: Sequence[int], replicas: Replicas | None
) -> list[MatrixUpdate]:
    """Return the updates whose gradient some rank has; refuse one that not every replica has: momenta would differ."""
    for update, count in zip(updates, counts, strict=True):
        if replicas is not None and count % replicas.count:
            raise RuntimeError(
                f"{update.label} has a gradient on {count} of {replicas.everyone.size()} ranks, so not in every "
                "replica; average the gradients over the replicas before step(), with zeros where there is none"
            )
    return [update for update, count in zip(updates, counts, strict=True) if count]


def _reading_is_free(device: torch.device) -> bool:
    """Return whether the host need not wait to read what is on a device."""
    return device.type == "cpu"


def _edges(update: MatrixUpdate, indices: Tensor) -> Tensor:
    """Where each rank's slices start and stop among the sorted selected ones, (count, ranks, 2), on the host."""
    positions = torch.searchsorted(indices, update.held.edges.expand(len(indices), -1).contiguous())
    return positions.view(len(indices), len(update.held), 2)


def _parts(update: MatrixUpdate, selected: Tensor, edges: Tensor | None, rank: int) -> Iterator[_Part]:
    """This rank's parts of a parameter's matrices, given the selection (count, k); none where others have them all."""
    if not len(selected):
        return
    first_slice = update.held[rank][0]
    if edges is None:
        yield _Part(update, 0, None, selected - first_slice)
        return
    first = 0
    for (start, stop), equal in itertools.groupby(edges[:, rank].tolist()):
        count = len(list(equal))
        held = selected.narrow(0, first, count).narrow(1, start, stop - start)
        yield _Part(update, first, edges.narrow(0, first, count), held - first_slice)
        first += count


def _plan_trips(
    parts: Sequence[_Part], group: "dist.ProcessGroup | None", replicas: Replicas | None, share_replicas: bool | None
) -> Iterator[tuple[OwnerRoundTrip, list[_Part]]]:
    """One round trip for each precision, with the parts that it takes; the owners' work is balanced over all."""
    rank = 0 if group is None else dist.get_rank(group)
    whole = [part for part in parts for _ in range(part.count)]
    owners = plan_owners(
        tuple(flops(*part.shape) for part in whole),
        tuple(math.prod(part.shape) * part.update.dtype.itemsize for part in whole),
        1 if group is None else group.size(),
        1 if replicas is None else replicas.count,
        share_replicas,
    )
    owners_of, following = {}, iter(owners)
    for part in parts:
        owners_of[part] = list(itertools.islice(following, part.count))
    for dtype, members in group_by(parts, lambda part: part.update.dtype).items():
        submatrices = [each for part in members for each in part.submatrices(owners_of[part], rank)]
        yield OwnerRoundTrip(submatrices, group, replicas, dtype, members[0].update.momentum.device), members


def _polar_factors(submatrices: Sequence[Tensor], context: StepContext) -> list[Tensor]:
    """O of every submatrix (k, m), equal shapes together."""
    results: dict[int, Tensor] = {}
    for equal in group_by(range(len(submatrices)), lambda index: submatrices[index].shape).values():
        size = max(1, BATCH_ELEMENTS // submatrices[equal[0]].numel())
        for positions in (equal[start : start + size] for start in range(0, len(equal), size)):
            stack = torch.stack([submatrices[position] for position in positions])
            results.update(zip(positions, polar_factors([stack], context).unbind(), strict=True))
    return [results[position] for position in range(len(submatrices))]
