"""The Dion2 update of matrices that several ranks share: the box of dion2.py, with messages in between.

There are two ways to share a matrix, which combine:

- By parts: every rank of a group holds a rectangle of it (FSDP2, TP, FSDP2 over TP). They sum up the norms of the
  slices, send what is selected to the matrix's owner, who orthonormalizes it and sends the parts back.
- As replicas: every rank holds the same (DDP). Only the work is shared: owners orthonormalize, one all-gather brings
  the results to everyone.

Under HSDP a group shares a matrix by parts, and there are replicas of the group: owners are assigned over all of them,
a submatrix travels inside its owner's replica, and the results are then gathered by the other replicas.
"""

import itertools
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dion2_lightning.algorithms import neurons
from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.matrix_update import (
    MatrixUpdate,
    SelectedSlices,
    accumulate,
    accumulate_and_sum,
    apply,
    concatenate,
    count_step,
    draw_bits,
    polar_factors,
    record_selection,
    select,
    show_result,
    shrink,
    take,
)
from dion2_lightning.algorithms.shared import nonzero_gradients, with_gradient
from dion2_lightning.distributed.collectives import refuse_disagreement, sum_over_ranks
from dion2_lightning.distributed.overlap import IN_FLIGHT, WaitingStep
from dion2_lightning.distributed.owner_exchange import OwnerExchange, SharedSubmatrix
from dion2_lightning.distributed.owners import Owner, plan_owners
from dion2_lightning.kernels.orthonormalize import flops
from dion2_lightning.matrices.layout import Replicas, group_by


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
    checksum = zlib.crc32(repr((context.settings_checksum, [update.checksum() for update in updates])).encode())
    has_gradient = [update.has_gradient for update in updates]
    nonzero = nonzero_gradients(updates)
    sums = [*own_sums, *nonzero.values()]
    receive = sum_over_ranks([everyone], checksum, has_gradient, sums, device)
    yield IN_FLIGHT

    # K, the same on every rank. The host reads it where it decides who sends how much, or which gradients there are.
    header, sums = receive()
    for update, its_nonzero in zip(nonzero, sums[len(updates) :], strict=True):
        update.leave_idle(its_nonzero)
    selected = dict(zip(updates, select(updates, sums[: len(updates)]), strict=True))
    places = {update: update.places(indices) for update, (indices, _) in selected.items()}
    split = [update for update in updates if update.is_split]
    reads = bool(split) or not all(has_gradient) or _reading_is_free(device)
    on_host = yield [header, *(places[update] for update in split)] if reads else []
    edges: dict[MatrixUpdate, Tensor] = {}
    refuse_disagreement(on_host[0] if reads else header, [everyone], checksum)
    if reads:
        updates = with_gradient(updates, on_host[0], replicas)
        edges = {update: _edges(update, indices) for update, indices in zip(split, on_host[1:], strict=True)}
    elif replicas is not None:
        is_complete = (header.narrow(0, 1, len(header) - 1) % replicas.count == 0).all()
        torch._assert_async(is_complete, "some replicas lack gradients that others have")

    # What is left of the box, for all submatrices of one precision together.
    owners = _owners(
        [update for update in updates for _ in range(len(places[update]))], group, replicas, context.share_replicas
    )
    parts = [part for update in updates for part in _parts(update, places[update], edges.get(update), rank, owners)]
    precisions = group_by(parts, lambda part: part.update.dtype).values()
    exchanges = [_update_by_owners(its_parts, group, replicas, places, context) for its_parts in precisions]
    for _ in itertools.zip_longest(*exchanges):
        yield IN_FLIGHT
    for update in updates:
        record_selection(update, *selected[update], context)
        update.write_back()
    count_step(updates)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part(SelectedSlices):
    """This rank's part of consecutive matrices of an update, of which it holds equally many selected slices.

    Attributes:
        start: Which of the k selected slices is the first that this rank holds.
        left: Which of the m entries of a slice is the first that this rank holds.
        submatrices: The submatrices that it is a part of.
    """

    start: int
    left: int
    submatrices: list[SharedSubmatrix]

    def of_neurons(self, tensor: Tensor) -> Tensor:
        """View its part of a tensor about the neurons of O, of all the parameter's matrices."""
        rows, columns = self.submatrices[0].own_shape
        start, length = (self.start, rows) if self.update.slices_are_neurons else (self.left, columns)
        return self.of_matrices(tensor).narrow(1, start, length)


def _update_by_owners(
    parts: Sequence[_Part],
    group: "dist.ProcessGroup | None",
    replicas: Replicas | None,
    places: dict[MatrixUpdate, Tensor],
    context: StepContext,
) -> Generator[None, object, None]:
    """Take S, have it orthonormalized by its owners and apply O, for parts of one precision."""
    submatrices = [submatrix for part in parts for submatrix in part.submatrices]
    update_of = [part.update for part in parts for _ in part.submatrices]
    exchange = OwnerExchange(submatrices, group, replicas, update_of[0].dtype, update_of[0].device)

    # S <- M[K], to the owners; M[K] <- mu M[K].
    receive = exchange.to_owners([submatrix for part in parts for submatrix in take(part)])
    if group is not None:
        yield IN_FLIGHT

    # O of the submatrices that this rank owns, back to those who hold parts. X <- (1 - lr weight_decay) X meanwhile.
    owned = [update_of[index] for index in exchange.owned]
    results = polar_factors([submatrix.unsqueeze(0) for submatrix in receive()], owned, context)
    for update, result in zip(owned, results, strict=True):
        show_result(update, result, context)
    receive = exchange.from_owners([result.squeeze(0) for result in results])
    if group is not None and replicas is not None:
        yield IN_FLIGHT
    receive = exchange.to_replicas(receive)
    shrink(list(dict.fromkeys(update_of)))
    yield IN_FLIGHT

    # X[K] <- X[K] - lr scale O.
    returned = iter(receive())
    results = [concatenate([next(returned).unsqueeze(0) for _ in part.submatrices]) for part in parts]
    factors = yield from _neuron_factors(parts, results, group, places, context)
    for part, result in zip(parts, results, strict=True):
        its_factors = part.of_neurons(factors[part.update]) if part.update in factors else None
        apply(part, result, its_factors, context)


def _neuron_factors(
    parts: Sequence[_Part],
    results: Sequence[Tensor],
    group: "dist.ProcessGroup | None",
    places: dict[MatrixUpdate, Tensor],
    context: StepContext,
) -> Generator[None, object, dict[MatrixUpdate, Tensor]]:
    """What the neurons of O are multiplied by, where they are normalized: from the sums of squares of all parts."""
    sums: dict[MatrixUpdate, Tensor] = {}
    for part, result in zip(parts, results, strict=True):
        update = part.update
        if update.neuron_beta is None:
            continue
        if update not in sums:
            shape = (update.count, update.k if update.slices_are_neurons else update.entries)
            sums[update] = torch.zeros(shape, dtype=torch.float64, device=result.device)
        part.of_neurons(sums[update]).copy_(neurons.square_sums(update, result))
    if sums and group is not None:
        receive = sum_over_ranks([group], 0, (), list(sums.values()), results[0].device)
        yield IN_FLIGHT
        sums = dict(zip(sums, receive()[1], strict=True))
    whole = {update: SelectedSlices(update, places[update]) for update in sums}
    factors = neurons.factors({each: sums[update] for update, each in whole.items()}, context)
    return {update: factors[each] for update, each in whole.items()}


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
    own_sums = dict(zip(own, accumulate_and_sum(own, working_memory), strict=True))
    sums = []
    for update in updates:
        start, stop = (place // update.taps for place in update.held[rank])
        slices = update.slices // update.taps
        if update in own_sums:
            sums.append(pad(own_sums[update], (start, slices - stop)))
        else:
            sums.append(update.momentum.new_zeros((update.count, slices), dtype=torch.float64))
    return sums


def _reading_is_free(device: torch.device) -> bool:
    """Return whether the host need not wait to read what is on a device."""
    return device.type == "cpu"


def _edges(update: MatrixUpdate, indices: Tensor) -> Tensor:
    """Where each rank's slices start and stop among the sorted selected ones, (count, ranks, 2), on the host."""
    positions = torch.searchsorted(indices, update.held.edges.expand(len(indices), -1).contiguous())
    return positions.view(len(indices), len(update.held), 2)


def _owners(
    of_matrices: Sequence[MatrixUpdate],
    group: "dist.ProcessGroup | None",
    replicas: Replicas | None,
    share_replicas: bool | None,
) -> Iterator[Owner]:
    """The owner of each matrix on this rank, given the parameter of each; work is balanced over all precisions."""
    shapes = [(update.k, update.entries) for update in of_matrices]
    sizes = [k * m * update.dtype.itemsize for (k, m), update in zip(shapes, of_matrices, strict=True)]
    return iter(
        plan_owners(
            tuple(flops(*shape) for shape in shapes),
            tuple(sizes),
            1 if group is None else group.size(),
            1 if replicas is None else replicas.count,
            share_replicas,
        )
    )


def _parts(
    update: MatrixUpdate, places: Tensor, edges: Tensor | None, rank: int, owners: Iterator[Owner]
) -> Iterator[_Part]:
    """This rank's parts of an update's matrices, given which n are selected (count, k); none where others have them.

    ``edges`` say where each rank's slices start and stop among the k selected ones, on the host (count, ranks, 2); None
    where every rank holds a part of all.
    """
    left, right = update.columns[rank]
    whole, first = (update.k, update.entries), 0
    spans = [(0, update.k)] * len(places) if edges is None else edges[:, rank].tolist()
    for (start, stop), equal in itertools.groupby(spans):
        count = len(list(equal))
        indices = places.narrow(0, first, count).narrow(1, start, stop - start) - update.held[rank][0]
        own = (stop - start, right - left)
        submatrices = [
            SharedSubmatrix(next(owners), whole, own, None if edges is None else edges[matrix], update.columns)
            for matrix in range(first, first + count)
        ]
        yield _Part(update, indices, first, start=start, left=left, submatrices=submatrices)
        first += count
