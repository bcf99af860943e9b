"""The Dion2 update of matrices that several ranks share: the box of dion2.py, with messages in between.

There are two ways to share a matrix, which combine:

- By parts: every rank of a group holds a rectangle of it (FSDP2, TP, FSDP2 over TP). They sum up the norms of the
  slices, send what is selected to the matrix's owner, who orthonormalizes it and sends the parts back.
- As replicas: every rank holds the same (DDP). Only the work is shared: owners orthonormalize, one all-gather brings
  the results to everyone.

Under HSDP a group shares a matrix by parts, and there are replicas of the group: owners are assigned over all of them,
a submatrix travels inside its owner's replica, and the results are then gathered by the other replicas.

What is left after the selection is done in buckets of matrices: while one is orthonormalized, the next travels to the
owners, and the results of the last travel back.
"""

import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dion2_lightning.algorithms import neurons
from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.matrix_update import (
    MatrixUpdate,
    SelectedSlices,
    count_step,
    draw_bits,
    stack_alike,
)
from dion2_lightning.algorithms.passes import (
    SliceSums,
    accumulate,
    accumulate_and_sum,
    apply,
    polar_factors,
    record_selection,
    select,
    show_result,
    shrink,
    take,
)
from dion2_lightning.algorithms.shared import checked, gradient_counts, nonzero_gradients, reading_is_free
from dion2_lightning.distributed.buckets import assign_buckets, count_buckets
from dion2_lightning.distributed.collectives import sum_over_ranks
from dion2_lightning.distributed.overlap import IN_FLIGHT, WaitingStep, staggered
from dion2_lightning.distributed.owner_exchange import OwnerExchange, SharedSubmatrix
from dion2_lightning.distributed.owners import Owner, plan_owners
from dion2_lightning.kernels.orthonormalize import flops
from dion2_lightning.kernels.stacks import concatenate
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import Replicas


def update_shared(updates: list[MatrixUpdate], context: StepContext) -> WaitingStep:
    """Take one step on matrices that the same ranks share in the same way: the same ones in the same order on each.

    A gradient that some ranks of a group lack counts as zero there; what has none on any rank is left out. Ranks whose
    settings differ get an error, and so does a gradient that some replicas have and others lack.
    """
    group, device = updates[0].layout.group, updates[0].device
    replicas = updates[0].layout.replicas if context.share_replicas is not False else None
    rank = 0 if group is None else dist.get_rank(group)

    # M <- M + G, and the norms of the slices of M, summed over the ranks.
    draw_bits(updates)
    own_sums = _accumulate(updates, replicas, rank, context.working_memory)
    everyone = group if replicas is None else replicas.everyone
    assert everyone is not None
    owners_of = partial(_owners, group=group, replicas=replicas, share_replicas=context.share_replicas)
    buckets = _count_buckets(updates, owners_of(updates), group, context)
    settings = context.settings_checksum, list(buckets.values()), [update.checksum() for update in updates]
    checksum = zlib.crc32(repr(settings).encode())
    counts = gradient_counts(updates, replicas)
    nonzero = nonzero_gradients(updates)
    sums = [*own_sums, *nonzero.values()]
    receive = sum_over_ranks([everyone], checksum, counts, sums, device)
    yield IN_FLIGHT

    # K, the same on every rank. The host reads it where it decides who sends how much, or which gradients there are.
    header, sums = receive()
    for update, its_nonzero in zip(nonzero, sums[len(updates) :], strict=True):
        update.leave_idle(its_nonzero)
    selected = dict(zip(updates, select(updates, [SliceSums(each) for each in sums[: len(updates)]]), strict=True))
    places = {update: update.places(indices) for update, (indices, _) in selected.items()}
    split = [update for update in updates if update.is_split]
    reads = bool(split) or not all(counts) or reading_is_free(device)
    on_host = yield [header, *(places[update] for update in split)] if reads else []
    header_on_host = on_host[0] if reads else None
    updates = checked(updates, header, header_on_host, everyone=[everyone], checksum=checksum, replicas=replicas)
    edges = {update: _edges(update, indices) for update, indices in zip(split, on_host[1:], strict=True)}

    # What is left of the box, for all submatrices of a bucket together; one bucket a pause behind the other.
    exchanges, seen = [], set[MatrixUpdate]()
    for bucket in _buckets(updates, places, owners_of(updates), buckets):
        parts = [part for run in bucket for part in _parts(run, edges.get(run.update), rank)]
        first = [update for update in dict.fromkeys(run.update for run in bucket) if update not in seen]
        seen.update(first)
        exchanges.append(_update_by_owners(parts, first, group, replicas, context))
    yield from staggered(exchanges)
    for update in updates:
        record_selection(update, *selected[update], context)
        update.write_back()
    count_step(updates)


@dataclass(eq=False, kw_only=True)
class _Run(SelectedSlices):
    """What is selected of consecutive matrices of an update that travel in one bucket, on all ranks together.

    Attributes:
        owners: The owner of each.
    """

    owners: Sequence[Owner]


@dataclass(eq=False, kw_only=True)
class _Part(SelectedSlices):
    """This rank's part of consecutive matrices of a run, of which it holds equally many selected slices.

    Attributes:
        run: The run.
        start: Which of the k selected slices is the first that this rank holds.
        left: Which of the m entries of a slice is the first that this rank holds.
        submatrices: The submatrices that it is a part of.
    """

    run: _Run
    start: int
    left: int
    submatrices: list[SharedSubmatrix]

    def of_neurons(self, tensor: Tensor) -> Tensor:
        """View its part of a tensor about the neurons of O, of all matrices of the run."""
        rows, columns = self.submatrices[0].own_shape
        start, length = (self.start, rows) if self.update.slices_are_neurons else (self.left, columns)
        return tensor.narrow(0, self.first - self.run.first, self.count).narrow(1, start, length)


def _update_by_owners(
    parts: Sequence[_Part],
    first: Sequence[MatrixUpdate],
    group: "dist.ProcessGroup | None",
    replicas: Replicas | None,
    context: StepContext,
) -> Generator[None, object, None]:
    """Take S, have it orthonormalized by its owners and apply O, for the parts of one bucket.

    ``first`` are the updates that no earlier bucket has matrices of: their weights decay here.
    """
    submatrices = [submatrix for part in parts for submatrix in part.submatrices]
    update_of = [part.update for part in parts for _ in part.submatrices]
    exchange = OwnerExchange(submatrices, group, replicas, update_of[0].dtype, update_of[0].device)

    # S <- M[K], to the owners; M[K] <- mu M[K].
    receive = exchange.to_owners([submatrix for its_submatrices in take(parts) for submatrix in its_submatrices])
    if group is not None:
        yield IN_FLIGHT

    # O of the submatrices that this rank owns, back to those who hold parts. X <- (1 - lr weight_decay) X meanwhile.
    owned = [update_of[index] for index in exchange.owned]
    receive = exchange.from_owners(_orthonormalized(receive(), owned, context))
    if group is not None and replicas is not None:
        yield IN_FLIGHT
    receive = exchange.to_replicas(receive)
    shrink(first)
    yield IN_FLIGHT

    # X[K] <- X[K] - lr scale O.
    returned = iter(receive())
    results = [concatenate([next(returned).unsqueeze(0) for _ in part.submatrices]) for part in parts]
    factors = yield from _neuron_factors(parts, results, group, context)
    its_factors = [part.of_neurons(factors[part.run]) if part.run in factors else None for part in parts]
    apply(parts, results, its_factors, context)


def _orthonormalized(
    submatrices: Sequence[Tensor], updates: Sequence[MatrixUpdate], context: StepContext
) -> list[Tensor]:
    """O of whole submatrices (k, m), given the update of each."""
    results = polar_factors([submatrix.unsqueeze(0) for submatrix in submatrices], updates, context)
    for update, result in zip(updates, results, strict=True):
        show_result(update, result, context)
    return [result.squeeze(0) for result in results]


def _neuron_factors(
    parts: Sequence[_Part], results: Sequence[Tensor], group: "dist.ProcessGroup | None", context: StepContext
) -> Generator[None, object, dict[SelectedSlices, Tensor]]:
    """What the neurons of O are multiplied by, where they are normalized: from the sums of squares of all parts."""
    sums: dict[SelectedSlices, Tensor] = {}
    of_results = dict(zip(parts, results, strict=True))
    normalized = [part for part in parts if part.update.neuron_beta is not None]
    own_sums = neurons.square_sums({part: of_results[part] for part in normalized})
    for part in normalized:
        run, update = part.run, part.update
        if run not in sums:
            shape = (len(run.indices), update.k if update.slices_are_neurons else update.entries)
            sums[run] = torch.zeros(shape, dtype=torch.float64, device=of_results[part].device)
        part.of_neurons(sums[run]).copy_(own_sums[part])
    if sums and group is not None:
        receive = sum_over_ranks([group], 0, (), list(sums.values()), results[0].device)
        yield IN_FLIGHT
        sums = dict(zip(sums, receive()[1], strict=True))
    return neurons.factors(sums, context)


def _accumulate(
    updates: Sequence[MatrixUpdate], replicas: Replicas | None, rank: int, working_memory: int
) -> list[Tensor]:
    """M <- M + G; return the sums of |M| by slice, (count, n), over what this rank holds, zero elsewhere.

    One replica contributes each matrix's sums (replicas take turns), so that all select the same, whatever the rounding
    of their gradients.
    """
    count, number = (1, 0) if replicas is None else (replicas.count, replicas.number)
    own = updates[number::count]
    accumulate([update for index, update in enumerate(updates) if index % count != number], working_memory)
    own_sums: dict[MatrixUpdate, Tensor] = {}
    stacks = stack_alike(own)
    for stack, its_sums in zip(stacks, accumulate_and_sum(stacks, working_memory), strict=True):
        own_sums.update(zip(stack.members, stack.split(its_sums.sums), strict=True))
    sums = []
    for update in updates:
        start, stop = (place // update.taps for place in update.held[rank])
        slices = update.slices // update.taps
        if update in own_sums:
            sums.append(pad(own_sums[update], (start, slices - stop)))
        else:
            sums.append(update.momentum.new_zeros((update.count, slices), dtype=torch.float64))
    return sums


def _edges(update: MatrixUpdate, indices: Tensor) -> Tensor:
    """Where each rank's slices start and stop among the sorted selected ones, (count, ranks, 2), on the host."""
    positions = torch.searchsorted(indices, update.held.edges.expand(len(indices), -1).contiguous())
    return positions.view(len(indices), len(update.held), 2)


def _owners(
    updates: Sequence[MatrixUpdate],
    group: "dist.ProcessGroup | None",
    replicas: Replicas | None,
    share_replicas: bool | None,
) -> tuple[Owner, ...]:
    """The owner of each matrix of some updates; work is balanced over all precisions."""
    costs, sizes = [], []
    for update in updates:
        costs += [flops(update.k, update.entries)] * update.count
        sizes += [update.k * update.entries * update.dtype.itemsize] * update.count
    return plan_owners(
        tuple(costs),
        tuple(sizes),
        1 if group is None else group.size(),
        1 if replicas is None else replicas.count,
        share_replicas,
    )


def _count_buckets(
    updates: Sequence[MatrixUpdate], owners: Sequence[Owner], group: "dist.ProcessGroup | None", context: StepContext
) -> dict[torch.dtype, int]:
    """In how many buckets the matrices of each precision travel; the same on every rank, gradients or not."""
    of_matrices = [update for update in updates for _ in range(update.count)]
    pairs = list(zip(of_matrices, owners, strict=True))
    return {
        dtype: count_buckets(
            [flops(update.k, update.entries) for update, _ in equal],
            [owner for _, owner in equal],
            [update.k * update.entries * dtype.itemsize for update, _ in equal],
            [update.shared_bytes for update, _ in equal],
            1 if group is None else group.size(),
            context.working_memory,
        )
        for dtype, equal in group_by(pairs, lambda pair: pair[0].dtype).items()
    }


def _buckets(
    updates: Sequence[MatrixUpdate],
    places: dict[MatrixUpdate, Tensor],
    owners: Sequence[Owner],
    buckets: dict[torch.dtype, int],
) -> Iterator[list[_Run]]:
    """Yield the matrices of each bucket, those of one precision after the other; none that would be empty.

    Args:
        updates: That the matrices belong to.
        places: Which of the n slices are selected, by update (count, k).
        owners: Of all matrices.
        buckets: In how many they travel, by precision.
    """
    matrices = [(update, matrix) for update in updates for matrix in range(update.count)]
    for dtype, equal in group_by(range(len(matrices)), lambda at: matrices[at][0].dtype).items():
        costs = [flops(update.k, update.entries) for update, _ in (matrices[at] for at in equal)]
        assigned = assign_buckets(tuple(costs), tuple(owners[at] for at in equal), buckets[dtype])
        runs_of: dict[int, list[list[int]]] = {bucket: [] for bucket in sorted(set(assigned))}
        for at, bucket in zip(equal, assigned, strict=True):
            runs, (_, matrix) = runs_of[bucket], matrices[at]
            if matrix and runs and runs[-1][-1] == at - 1:
                runs[-1].append(at)
            else:
                runs.append([at])
        for runs in runs_of.values():
            yield [_run(*matrices[run[0]], places, [owners[at] for at in run]) for run in runs]


def _run(update: MatrixUpdate, first: int, places: dict[MatrixUpdate, Tensor], owners: Sequence[Owner]) -> _Run:
    return _Run(update, places[update].narrow(0, first, len(owners)), first, owners=owners)


def _parts(run: _Run, edges: Tensor | None, rank: int) -> Iterator[_Part]:
    """This rank's parts of a run's matrices; none where others have them.

    ``edges`` say where each rank's slices start and stop among the k selected ones of all matrices of the update, on
    the host (count, ranks, 2); None where every rank holds a part of all.
    """
    update, place = run.update, 0
    left, right = update.columns[rank]
    spans = [(0, update.k)] * len(run.indices)
    if edges is not None:
        edges = edges.narrow(0, run.first, len(run.indices))
        spans = edges[:, rank].tolist()
    for (start, stop), equal in groupby(spans):
        size = len(list(equal))
        indices = run.indices.narrow(0, place, size).narrow(1, start, stop - start) - update.held[rank][0]
        submatrices = [
            SharedSubmatrix(
                run.owners[matrix],
                (update.k, update.entries),
                (stop - start, right - left),
                None if edges is None else edges[matrix],
                update.columns,
            )
            for matrix in range(place, place + size)
        ]
        yield _Part(update, indices, run.first + place, run=run, start=start, left=left, submatrices=submatrices)
        place += size
