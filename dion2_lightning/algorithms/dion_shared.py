"""The Dion update of matrices that several ranks share: the box of dion.py, with sums over the ranks in between.

Every rank of a group holds a rectangle of B: some of its long rows, and some of its short columns. The products sum
over what is spread, and only what is smaller than the matrix travels:

- Rows are spread: P is by rows as B is, and is orthonormalized where it is by a randomized Cholesky QR, for which a
  sketch of P and an (r, r) matrix are summed up. Then R is, (short, r).
- Columns are spread: P is summed up, (long, r), and every rank takes an exact QR of it. R and Q are by rows as the
  columns of B are; of R only the norms of its columns are summed up.
- Both: P and R are summed up, each with zeros where a rank has no part.

Ranks that hold replicas do the same work, on the same numbers where their gradients are averaged. Of plain
replicas (DDP) each makes P and R of its share of the matrices where ``share_replicas=True`` asks for it, and one
all-gather brings them to all, (long + short) r numbers a matrix.

Where P and R are averaged instead, X, P, R and Q are the same on all, and B is not: both products are linear in B, so
that X moves as it would by the mean of the gradients. Each M loses what P captures of its own B, so the differences
between replicas decay too.
"""

import math
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.low_rank import (
    LowRankUpdate,
    apply,
    batches,
    column_norms,
    count_failures,
    left_products,
    orthonormal,
    right_products,
)
from dion2_lightning.algorithms.matrix_update import count_step, draw_bits
from dion2_lightning.algorithms.passes import accumulate
from dion2_lightning.algorithms.projections import Projections
from dion2_lightning.algorithms.shared import checked, gradient_counts, nonzero_gradients, reading_is_free
from dion2_lightning.distributed.collectives import sum_over_ranks
from dion2_lightning.distributed.overlap import IN_FLIGHT, WaitingStep
from dion2_lightning.distributed.owners import assign_owners
from dion2_lightning.distributed.summing import Over, Summand, SummingWork, run_together
from dion2_lightning.distributed.torch_versions import all_gather_single
from dion2_lightning.kernels.orthonormal_columns import finish, grams, orthonormal_columns, precondition, sketches
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import Replicas, Span


def update_shared(updates: list[LowRankUpdate], context: StepContext) -> WaitingStep:
    """Take one step on matrices that the same ranks share in the same way: the same ones in the same order on each.

    A gradient that some ranks of a group lack counts as zero there; what has none on any rank is left out. Ranks whose
    settings differ get an error, and so does a gradient that some replicas have and others lack.
    """
    first = updates[0]
    layout, device = first.layout, first.device
    # Replicas with momenta of their own may lack a gradient that others have, as ranks that share a matrix may.
    replicas = layout.replicas if context.share_replicas is not False and first.replicas is None else None
    groups = [layout.group, first.replicas] if replicas is None else [replicas.everyone]
    everyone = [group for group in groups if group is not None]
    # What a run sums up, or gathers, is there at once; the other half of the memory is for the weights.
    runs = list(bounded(list(batches(updates, context)), _working_bytes, context.working_memory // 2))
    lengths = [[*map(len, run)] for run in runs]
    settings = context.settings_checksum, lengths, [update.checksum() for update in updates]
    checksum = zlib.crc32(repr(settings).encode())
    counts = gradient_counts(updates, replicas)
    nonzero = nonzero_gradients(updates)
    receive = sum_over_ranks(everyone, checksum, counts, [*nonzero.values()], device)
    yield IN_FLIGHT

    # The host reads which gradients there are where this rank lacks one, or reading is free.
    header, sums = receive()
    for update, its_nonzero in zip(nonzero, sums, strict=True):
        update.leave_idle(its_nonzero)
    reads = not all(counts) or reading_is_free(device)
    on_host = yield [header] if reads else []
    header_on_host = on_host[0] if reads else None
    updates = checked(updates, header, header_on_host, everyone=everyone, checksum=checksum, replicas=replicas)
    draw_bits(updates)
    present = set(updates)
    for whole_run in runs:
        run = [batch for each in whole_run if (batch := [update for update in each if update in present])]
        if not run:
            continue
        accumulate([update for batch in run for update in batch], context.working_memory // 2)
        if layout.group is None and replicas is not None and context.share_replicas:
            yield from _update_by_owners(run, replicas, context)
        else:
            yield from run_together([_update(batch, context) for batch in run], layout.group, first.replicas)
    count_step(updates)


def _update(batch: list[LowRankUpdate], context: StepContext) -> SummingWork:
    """Take the step on matrices of equal shape, of which every rank holds the same part."""
    first = batch[0]
    everywhere = Over.PARTS if first.replicas is None else Over.ALL
    projections = Projections.wanted(batch, context)

    # P <- orth(B Q): whole on every rank, or by rows.
    product = left_products(batch)
    if first.left_is_whole:
        whole = yield Summand(_padded(product, first.own_rows, first.slices), everywhere)
        left = _part(orthonormal(whole, first, context), first.own_rows)
    else:
        if first.replicas is not None:
            product = yield Summand(product, Over.REPLICAS)
        rows = torch.arange(*first.own_rows, device=product.device)
        left = precondition(product, (yield Summand(sketches(product, rows))))
        left, failed = finish(left, (yield Summand(grams(left))))
        if first.replicas is not None:  # all have the same numbers, if their hardware adds up alike
            failed = (yield Summand(failed.float(), Over.REPLICAS)) > 0
        failed = yield failed
        if failed.any():
            count_failures(failed, context)
            whole = yield Summand(_padded(product[failed], first.own_rows, first.slices))
            left[failed] = _part(orthonormal_columns(whole), first.own_rows)

    # R <- B^T P: summed up where rows are spread, and then this rank's part of it again.
    right = own_right = right_products(batch, left)
    whole_right: Tensor | None = None
    if first.is_split:
        whole = yield Summand(_padded(right, first.own_columns, first.entries))
        own_right = _part(whole, first.own_columns)
        if first.replicas is not None:
            whole = yield Summand(whole, Over.SHARES)
        norms, right, whole_right = column_norms(whole), _part(whole, first.own_columns), whole
    else:
        if first.replicas is not None:
            right = yield Summand(right, Over.REPLICAS)
        norms = (yield Summand(column_norms(right).square())).sqrt()
        if first.q_is_whole:
            whole_right = yield Summand(_padded(right, first.own_columns, first.entries))
    apply(batch, left, right, norms, own_right, context, whole_right if first.q_is_whole else None)
    if projections is not None:
        sums = yield Summand(projections.sums(own_right))
        if first.replicas is not None:  # replicas differ in B, and in what P captures of it
            energies = yield Summand(sums[:, :2].contiguous(), Over.REPLICAS)
            sums = torch.cat([energies, sums[:, 2:]], dim=1)
        projections.show(sums, norms)


def _update_by_owners(run: Sequence[list[LowRankUpdate]], replicas: Replicas, context: StepContext) -> WaitingStep:
    """Take the step on batches of matrices that are whole on every replica, and whose work the replicas share."""
    for its_batches in group_by(run, lambda batch: batch[0].dtype).values():
        updates = [update for batch in its_batches for update in batch]
        shares = _shares(updates, replicas.count)
        factors: dict[LowRankUpdate, tuple[Tensor, Tensor]] = {}
        for batch in batches(shares[replicas.number], context):
            left = orthonormal(left_products(batch), batch[0], context)
            counts = [update.count for update in batch]
            parts = left.split(counts), right_products(batch, left).split(counts)
            factors.update(zip(batch, zip(*parts, strict=True), strict=True))
        size = max(sum(map(_factor_entries, share)) for share in shares)
        own = updates[0].momentum.new_zeros(size)
        for update, (left, right) in _unpacked(shares[replicas.number], own):
            left.copy_(factors[update][0])
            right.copy_(factors[update][1])
        everything = own.new_empty(replicas.count * size)
        work = all_gather_single(everything, own, group=replicas.group, async_op=True)
        yield IN_FLIGHT
        work.wait()
        for number, its_factors in zip(replicas.numbers, everything.view(replicas.count, size), strict=True):
            factors.update(_unpacked(shares[number], its_factors))
        for batch in its_batches:
            left, right = (torch.cat(parts) for parts in zip(*(factors[update] for update in batch), strict=True))
            norms = column_norms(right)
            projections = Projections.wanted(batch, context)
            apply(batch, left, right, norms, right, context)
            if projections is not None:
                projections.show(projections.sums(right), norms)


def _shares(updates: Sequence[LowRankUpdate], replicas: int) -> list[list[LowRankUpdate]]:
    """Which updates each replica works on: about as many FLOPs as the others."""
    costs = tuple(update.count * update.slices * update.rank * (update.entries + update.rank) for update in updates)
    owners = assign_owners(costs, replicas)
    return [
        [update for update, owner in zip(updates, owners, strict=True) if owner == replica]
        for replica in range(replicas)
    ]


def _factor_entries(update: LowRankUpdate) -> int:
    """How many numbers P and R have."""
    return update.count * (update.slices + update.entries) * update.rank


def _unpacked(
    updates: Sequence[LowRankUpdate], factors: Tensor
) -> Iterator[tuple[LowRankUpdate, tuple[Tensor, Tensor]]]:
    """Yield each update with its P and R, which lie one after the other."""
    first = 0
    for update in updates:
        found = []
        for rows in (update.slices, update.entries):
            shape = update.count, rows, update.rank
            found.append(factors.narrow(0, first, math.prod(shape)).view(shape))
            first += math.prod(shape)
        yield update, (found[0], found[1])


def _part(whole: Tensor, span: Span) -> Tensor:
    """Return this rank's rows of (batch, size, r)."""
    start, stop = span
    return whole.narrow(1, start, stop - start)


def _padded(part: Tensor, span: Span, size: int) -> Tensor:
    """Return this rank's rows (batch, n, r) among zeros for those of other ranks, (batch, size, r)."""
    start, stop = span
    return part if stop - start == size else pad(part, (0, 0, start, size - stop))


def _working_bytes(batch: Sequence[LowRankUpdate]) -> int:
    """Working memory of a batch."""
    return sum(update.count * update.working_bytes for update in batch)
