"""What a step of an optimizer takes, from shapes alone: bytes of state, FLOPs, and bytes sent to other ranks.

No weight is needed: parameters may be on the meta device. The package's own planner assigns the owners, and the
algorithms say what state they have. Assumed is that the selected slices spread evenly over a matrix; at fraction 1,
which is Muon, there is nothing to assume.

Submatrices travel in the precision of the orthonormalization, bfloat16 where a group does not say. An all-reduce is a
ring, in which a rank sends 2 (n - 1) / n of the buffer.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.algorithm import default_working_memory
from dion2_lightning.algorithms.working_memory import shared_bytes
from dion2_lightning.distributed.buckets import assign_buckets, count_buckets
from dion2_lightning.distributed.owners import Owner, plan_owners
from dion2_lightning.kernels.orthonormal_columns import sketch_rows
from dion2_lightning.kernels.orthonormalize import flops
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import Span
from dion2_lightning.matrices.parts import held_of_matrix
from dion2_lightning.matrices.splits import OUTPUT_AXIS
from dion2_lightning.matrices.views import Matrices, Observed

SUM_BYTES: Final = 8
"""What is summed up over ranks travels in float64: a slice's norm, a neuron's sum of squares."""

ADAMW_FLOPS: Final = 14
"""An entry: weight decay 1, first moment 3, second moment 4, denominator 3, update 3."""

DION2_FLOPS: Final = 4
"""An entry, selected or not: M + G, |M|, their sum, weight decay."""

SELECTED_FLOPS: Final = 3
"""A selected entry: momentum decay, and the scaled update."""

NEURON_FLOPS: Final = 3
"""More where neurons are normalized, a selected entry: its square, their sum, and the neuron's factor."""

LOW_RANK_FLOPS: Final = 2
"""An entry, besides the products: M + G, weight decay."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks.

    Attributes:
        kind: ``"one"`` rank, ``"ddp"``, ``"fsdp2"``, ``"hsdp"`` or ``"tp"``.
        replicas: How many groups of ``shards`` ranks hold the same.
        shards: How many ranks hold parts of one replica.
    """

    kind: str = "one"
    replicas: int = 1
    shards: int = 1

    @classmethod
    def read(cls, text: str) -> "Layout":
        """Read ``"fsdp2=8"``, ``"ddp=8"``, ``"hsdp=4x8"``, 4 replicas of 8 shards, ``"tp=8"`` or ``"one"``.

        Raises:
            ValueError: It is none of these.
        """
        match = re.fullmatch(r"(one)|(ddp|fsdp2|tp)=([1-9]\d*)|(hsdp)=([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(
                f"layout {text!r} is unknown; write fsdp2=8, ddp=8, hsdp=4x8 for 4 replicas of 8 shards, tp=8, or one"
            )
        one, kind, ranks, hsdp, replicas, shards = match.groups()
        if one or hsdp:
            return cls(hsdp, int(replicas), int(shards)) if hsdp else cls()
        return cls(kind, int(ranks), 1) if kind == "ddp" else cls(kind, 1, int(ranks))

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.replicas * self.shards

    @property
    def batches(self) -> int:
        """How many batches they train on in a step: ranks under TP work on one together."""
        return 1 if self.kind == "tp" else self.ranks


@dataclass(frozen=True, eq=False)
class Placed:
    """A parameter of an optimizer, and how it is spread.

    Attributes:
        parameter: Whole, on any device.
        group: Its group in the optimizer, complete.
        dim: Along which of its dimensions ranks hold parts, as ``torch.chunk`` cuts it; None where each has it whole.
    """

    parameter: Tensor
    group: Mapping[str, Any]
    dim: int | None = None

    @cached_property
    def observed(self) -> tuple[Observed, ...]:
        """How a step updates its matrices, one entry for each of the blocks that lie side by side in it."""
        return tuple(ALGORITHMS[self.group["algorithm"]].observed(self.parameter, self.group))

    @cached_property
    def state(self) -> dict[str, Any]:
        """What its state consists of, on one rank that has all of it."""
        return dict(ALGORITHMS[self.group["algorithm"]].state(self.parameter, self.group))

    @property
    def holds_whole_matrices(self) -> bool:
        """Whether ranks hold different matrices of a stack, each of them whole."""
        return self.dim == 0 and bool(self.group.get("batched"))

    @property
    def normalizes_neurons(self) -> bool:
        """Whether a step normalizes its neurons."""
        return "variance" in self.state

    @property
    def itemsize(self) -> int:
        """Bytes of an entry of a submatrix on its way to its owner."""
        return int(getattr(torch, self.group["orthonormalize_dtype"] or "bfloat16").itemsize)

    def is_shared(self, layout: Layout) -> bool:
        """Whether ranks hold parts of each of its matrices."""
        return layout.shards > 1 and self.dim is not None and not self.holds_whole_matrices

    def count(self, matrices: Matrices, layout: Layout) -> int:
        """Return how many of its matrices the first rank holds, or holds a part of."""
        return -(-matrices.count // layout.shards) if self.holds_whole_matrices else matrices.count

    def entries(self, layout: Layout) -> int:
        """Return how many of its entries the first rank holds, which has the most."""
        if self.dim is None:
            return self.parameter.numel()
        size = self.parameter.shape[self.dim]
        return self.parameter.numel() // max(size, 1) * -(-size // layout.shards)

    def held(self, matrices: Matrices, layout: Layout) -> Iterator[tuple[int, tuple[Span, ...], bool]]:
        """Yield how many matrices of a block are alike, what each rank holds of one, and whether that is rows."""
        sizes, block = matrices.shape[::-1] if matrices.transposed else matrices.shape, matrices.block
        if not self.is_shared(layout):
            yield self.count(matrices, layout), ((0, sizes[0]),), True
            return
        is_rows = self.dim == (1 if matrices.is_stack else 0)
        if block is None or matrices.blocks_are_rows != is_rows:
            yield matrices.count, tuple(shard(sizes[0 if is_rows else 1], layout.shards)), is_rows
            return
        of_axis = shard(block.period * block.repeats, layout.shards)
        edges = [(block.before(start), block.before(stop)) for start, stop in of_axis]
        for number in range(block.matrices):
            held = held_of_matrix(edges, number, block.total // block.matrices)
            yield matrices.count // block.matrices, held, is_rows


class Costs(NamedTuple):
    """What a step takes of one rank, the one with the most.

    Attributes:
        state: Bytes of the optimizer's state.
        products: FLOPs of matrix products.
        factorizations: FLOPs of QR and Cholesky factorizations, and of solving by their triangles.
        elementwise: FLOPs entry by entry.
        sums: Bytes sent of what is summed up over ranks: norms, sums by neuron, and all that Dion sends.
        submatrices: Bytes sent of submatrices, to their owners and back, and to replicas.
    """

    state: int
    products: int
    factorizations: int
    elementwise: int
    sums: int
    submatrices: int

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.products + self.factorizations + self.elementwise

    @property
    def sent(self) -> int:
        """All bytes that are sent."""
        return self.sums + self.submatrices


@dataclass(frozen=True, eq=False)
class Submatrix:
    """The selected slices of a matrix that ranks share.

    Attributes:
        cost: FLOPs of its orthonormalization.
        held: Entries by rank.
        itemsize: Bytes of an entry.
        working_bytes: Working memory of its orthonormalization.
    """

    cost: int
    held: tuple[int, ...]
    itemsize: int = 2
    working_bytes: int = 0

    @property
    def size(self) -> int:
        """Entries on all ranks together."""
        return sum(self.held)


def shard(size: int, ranks: int) -> list[Span]:
    """Return what each rank holds of a sharded axis, as ``torch.chunk`` cuts it; the last ranks may hold nothing."""
    step = -(-size // ranks)
    return [(min(size, rank * step), min(size, (rank + 1) * step)) for rank in range(ranks)]


@lru_cache(maxsize=65536)
def submatrix(
    matrices: Matrices, axis: int, k: int, held: tuple[Span, ...], is_rows: bool, itemsize: int = 2
) -> Submatrix:
    """Return what is selected of a matrix, if it spreads evenly over the slices.

    Args:
        matrices: Of which this is one.
        axis: Of the slices, 0 output or 1 input.
        k: How many rows or columns are selected.
        held: By rank, which of the stored rows or columns it holds.
        is_rows: Whether they are rows.
        itemsize: Bytes of an entry.
    """
    slices, entries = matrices.shape[axis], matrices.shape[1 - axis]
    if matrices.slices_are_rows(axis) == is_rows:
        sizes = tuple((k * stop // slices - k * start // slices) * entries for start, stop in held)
    else:
        sizes = tuple(k * (stop - start) for start, stop in held)
    return Submatrix(flops(k, entries), sizes, itemsize, shared_bytes(k, entries, slices, itemsize))


def plan_buckets(
    submatrices: Sequence[Submatrix], owners: tuple[Owner, ...], ranks: int, working_memory: int
) -> tuple[int, ...]:
    """Return in which bucket each submatrix travels, as a step plans it for a working memory in bytes."""
    flops_of_each = tuple(each.cost for each in submatrices)
    count = count_buckets(
        flops_of_each,
        owners,
        [each.size * each.itemsize for each in submatrices],
        [each.working_bytes for each in submatrices],
        ranks,
        working_memory,
    )
    return assign_buckets(flops_of_each, owners, count)


def shared_work(
    submatrices: Sequence[Submatrix], ranks: int, replicas: int, working_memory: int
) -> tuple[list[int], list[int]]:
    """Plan owners; return by rank the FLOPs of what it owns, and the bytes it sends.

    It sends its parts to the owners in its replica, results as an owner, and results to the other replicas, where these
    share the work: as many bytes as the replica with the most has, in each of the buckets that they travel in.
    """
    nbytes = tuple(each.size * each.itemsize for each in submatrices)
    owners = plan_owners(tuple(each.cost for each in submatrices), nbytes, ranks, replicas, None)
    if owners and owners[0].replica is None and replicas > 1:
        work, sent = shared_work(submatrices, ranks, 1, working_memory)
        return work * replicas, sent * replicas
    owned = Counter((each, replica or 0, rank) for each, (replica, rank) in zip(submatrices, owners, strict=True))
    work, sent = [0] * (ranks * replicas), [0] * (ranks * replicas)
    for kind in set(submatrices):
        for replica in range(replicas):
            of_rank = [owned[kind, replica, rank] for rank in range(ranks)]
            for rank, (held, mine) in enumerate(zip(kind.held, of_rank, strict=True)):
                position = replica * ranks + rank
                work[position] += mine * kind.cost
                sent[position] += ((sum(of_rank) - mine) * held + mine * (kind.size - held)) * kind.itemsize
    if replicas == 1:
        return work, sent
    buckets = plan_buckets(submatrices, owners, ranks, working_memory)
    of_replicas: dict[int, list[Counter[Submatrix]]] = {each: [Counter() for _ in range(replicas)] for each in buckets}
    for each, owner, bucket in zip(submatrices, owners, buckets, strict=True):
        of_replicas[bucket][owner.replica or 0][each] += 1

    def gathered(rank: int) -> int:
        """Return the bytes of its parts, padded to those of the replica with the most."""
        return sum(
            max(sum(count * kind.held[rank] * kind.itemsize for kind, count in results.items()) for results in bucket)
            for bucket in of_replicas.values()
        )

    padded = [(replicas - 1) * gathered(rank) for rank in range(ranks)] * replicas
    return work, [own + more for own, more in zip(sent, padded, strict=True)]


def dion_flops(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Return the FLOPs of Dion's four products with a matrix, and of the QR of P, its orthonormal factor included."""
    short, long = sorted(shape)
    return 8 * long * short * rank, 4 * long * rank**2 - 4 * rank**3 // 3


def ring(nbytes: float, ranks: int) -> float:
    """Return what a rank sends in an all-reduce of a buffer."""
    return 2 * (ranks - 1) / ranks * nbytes


def adamw_state_bytes(placed: Sequence[Placed], layout: Layout) -> int:
    """Return the bytes of the state of ``torch.optim.AdamW`` on the first rank: two moments each, and a count."""
    return sum(2 * each.entries(layout) * each.parameter.itemsize + 4 for each in placed)


def gradient_bytes(placed: Sequence[Placed], layout: Layout) -> int:
    """Return what a rank sends to average gradients, whatever the optimizer.

    Under DDP an all-reduce; under FSDP2 a reduce-scatter; under HSDP that, and an all-reduce of its result over the
    replicas. Under TP nothing: ranks that work on one batch exchange activations.
    """
    if layout.kind == "tp":
        return 0
    whole = sum(each.parameter.numel() * each.parameter.itemsize for each in placed)
    part = whole // layout.shards
    return (layout.shards - 1) * part + round(ring(part, layout.replicas))


def step_costs(placed: Sequence[Placed], layout: Layout) -> Costs:
    """Return what a step takes of one rank, the one with the most."""
    total = Costs(state_bytes(placed, layout), 0, 0, 0, 0, 0)
    parts_of = (layout.shards if each.dim is not None else 1 for each in placed)
    held = sum(each.parameter.nbytes // parts for each, parts in zip(placed, parts_of, strict=True))
    working_memory = default_working_memory(held)
    for algorithm in dict.fromkeys(each.group["algorithm"] for each in placed):
        members = [each for each in placed if each.group["algorithm"] == algorithm]
        sliced = [each for each in members if any(one.selected for one in each.observed)]
        low_rank = [each for each in members if any(one.rank for one in each.observed)]
        rest = [each for each in members if not each.observed]
        parts = [_sliced(sliced, layout, working_memory), _low_rank(low_rank, layout)]
        parts.append(Costs(0, 0, 0, ADAMW_FLOPS * sum(each.entries(layout) for each in rest), 0, 0))
        total = Costs(*(sum(numbers) for numbers in zip(total, *parts, strict=True)))
    return total


def state_bytes(placed: Sequence[Placed], layout: Layout) -> int:
    """Return the bytes of state on the first rank, which has the most of everything that is cut."""
    total = 0
    for each in placed:
        parameter = _as_spread(each, layout)
        for tensor in ALGORITHMS[each.group["algorithm"]].state(parameter, each.group).values():
            shape = list(tensor.shape)
            for placement in tensor.placements or ():
                if not placement.is_replicate():
                    shape[placement.dim] = -(-shape[placement.dim] // layout.shards)
            total += math.prod(shape) * tensor.dtype.itemsize
    return total


def _as_spread(placed: Placed, layout: Layout) -> Any:
    """The parameter with what algorithms ask a DTensor for, which needs no ranks: a real mesh would."""
    if layout.shards == 1 or placed.dim is None:
        return placed.parameter
    from torch.distributed.tensor import Shard

    spread: Any = placed.parameter.detach()
    spread.device_mesh = SimpleNamespace(shape=(layout.shards,), ndim=1)
    spread.placements, spread.to_local = (Shard(placed.dim),), spread.detach
    return spread


def _sliced(placed: Sequence[Placed], layout: Layout, working_memory: int) -> Costs:
    """Of what selects slices and orthonormalizes them, by owners where ranks share a matrix or hold replicas."""
    products = elementwise = sums = sent = 0
    # Matrices that ranks share by parts, and those of which only replicas hold the same, take separate messages.
    for is_shared, members in group_by(placed, lambda each: each.is_shared(layout)).items():
        ranks = layout.shards if is_shared else 1
        submatrices: list[Submatrix] = []
        norms = neurons = 0
        for each in members:
            elementwise += DION2_FLOPS * each.entries(layout)
            per_selected = SELECTED_FLOPS + NEURON_FLOPS * each.normalizes_neurons
            for matrices, axis, selected, _ in each.observed:
                k, entries = selected * matrices.taps_along(axis), matrices.shape[1 - axis]
                count = each.count(matrices, layout)
                elementwise += per_selected * count * k * entries // ranks
                norms += count * matrices.slices_along(axis)
                if each.normalizes_neurons:
                    neurons += count * (k if axis == OUTPUT_AXIS else entries)
                for copies, held, is_rows in each.held(matrices, layout):
                    submatrices += [submatrix(matrices, axis, k, held, is_rows, each.itemsize)] * copies
        work, nbytes = shared_work(submatrices, ranks, layout.replicas, working_memory)
        products, sent = products + max(work), sent + max(nbytes)
        sums += round(ring(SUM_BYTES * (1 + len(members) + norms), ranks * layout.replicas))
        sums += round(ring(SUM_BYTES * (1 + neurons), ranks)) if neurons else 0
    return Costs(0, products, 0, elementwise, sums, sent)


def _low_rank(placed: Sequence[Placed], layout: Layout) -> Costs:
    """Of updates of low rank: ranks add up what is smaller than the matrix, and replicas each do all of the work."""
    products = factorizations = elementwise = sums = 0
    for is_shared, members in group_by(placed, lambda each: each.is_shared(layout)).items():
        ranks, summed = layout.shards if is_shared else 1, 0
        for each in members:
            elementwise += LOW_RANK_FLOPS * each.entries(layout)
            for matrices, short_axis, _, rank in each.observed:
                count, itemsize = each.count(matrices, layout), each.state["momentum"].dtype.itemsize
                short, long = matrices.shape[short_axis], matrices.shape[1 - short_axis]
                its_products, exact_qr = dion_flops((short, long), rank)
                products += count * its_products // ranks
                # As dion_shared.py does: by a randomized Cholesky QR where ranks hold different long rows.
                is_rows = next(each.held(matrices, layout))[2]
                long_is_cut = is_shared and matrices.slices_are_rows(1 - short_axis) == is_rows
                sketch = sketch_rows(rank)
                if long_is_cut and each.group["qr"] != "qr" and sketch < long:
                    part = -(-long // ranks)
                    products += count * (2 * sketch * part * rank + 2 * part * rank**2)
                    factorizations += count * (2 * sketch * rank**2 + 2 * part * rank**2 - rank**3 // 3)
                    summed += count * itemsize * (sketch * rank + rank**2 + short * rank)
                    continue
                factorizations += count * exact_qr
                # Of a block every rank has all of Q, so that R is summed up in any case.
                all_of_right = long_is_cut or matrices.block is not None
                summed += count * (itemsize * (long + short * all_of_right) + SUM_BYTES * (not long_is_cut)) * rank
        sums += round(ring(SUM_BYTES * (1 + len(members)), ranks * layout.replicas) + ring(summed, ranks))
    return Costs(0, products, factorizations, elementwise, sums, 0)
