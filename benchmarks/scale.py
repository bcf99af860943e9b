"""Work and traffic of a step of large models on up to thousands of ranks, simulated from shapes: no weight is made.

    python -m benchmarks.scale --models llama-3-8b llama-3-405b --ranks 8 64 4096 --algorithm dion3
    python -m benchmarks.scale --between 1 10 25 50 100 400
    python -m benchmarks.scale --buckets --models llama-3-8b llama-3-405b

The package's own planner counts, assigns the owners and says who holds which part. Assumed is that the selected slices
spread evenly over a matrix; at fraction 1, which is Muon, there is nothing to assume. Only matrices count: embeddings
and whatever else AdamW updates either way are left out.

Submatrices are bfloat16. A rank sends its part of every submatrix to the owner, an owner every other part back; what
stays on a rank does not count. AdamW sends nothing. The all-reduces of norms, and of Dion3's sums by neuron, are
counted once, in float64.

Under HSDP a matrix travels inside one replica of the shard group, and every rank of it sends its part of the result
once to each of the other replicas. Experts stay whole on their ranks, for FSDP2 shards a stack on the axis that counts
them; or they are sharded by rows, like every other matrix, without which ranks beyond the number of experts hold none.

Owners should do the same work up to 5% wherever there are 4 matrices for each. The table says "cannot" where that is
proved to be impossible for every assignment of whole matrices, and "-" where there are fewer matrices.

With ``--between`` the time of a whole step is computed instead, for replicas of one GPU each with a slow network
between them: that of the model and of the optimizer by assumed rates, and that of the bytes by the bandwidth. Latencies
count nothing, nor does attention besides its matrices. An all-reduce is a ring, in which a rank sends 2 (n - 1) / n of
the buffer. Dion's replicas each do all of the work. Dion2 is there twice: where its planner decides whether replicas
share the work, and "alone", with ``share_replicas=False``.

With ``--buckets`` the time of the exchange with owners under FSDP2 is computed, products included, in one bucket of
matrices, in two and three, and in as many as a step plans. Buckets go in the order of the package's own schedule. An
all-to-all begins when every rank has come to it and the one before has ended, and ends on all ranks when the last has
sent and received everything: one message to each other rank, one after the other, and bytes by bandwidth, those within
a node beside those between nodes. Working memory is 15% of the matrices alone; that of a step counts the other weights
too, so it may plan fewer buckets. Products take no time from messages, nor the other way round. Passes over all
entries, the all-reduces, and experts that stay whole are left out: they are the same in any number of buckets.
"""

import argparse
import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

from dion2_lightning import costs
from dion2_lightning.algorithms.algorithm import default_working_memory
from dion2_lightning.costs import (
    ADAMW_FLOPS,
    DION2_FLOPS,
    NEURON_FLOPS,
    SELECTED_FLOPS,
    SUM_BYTES,
    Submatrix,
    plan_buckets,
    ring,
    shard,
    shared_work,
)
from dion2_lightning.distributed.buckets import assign_buckets
from dion2_lightning.distributed.overlap import IN_FLIGHT, staggered
from dion2_lightning.distributed.owners import Owner, plan_owners
from dion2_lightning.kernels.selection import selected_count
from dion2_lightning.matrices.views import read_matrices

Shape = tuple[int, ...]


def llama(hidden: int, key_value: int, intermediate: int) -> list[Shape]:
    """Return the matrices of a layer: query, key, value, output; gate, up, down."""
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


DEEPSEEK_ATTENTION = [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)]
MODELS: dict[str, list[tuple[int, list[Shape]]]] = {
    # Layers of a kind, and the matrices of one: (out, in), or (experts, out, in), where gate and up are one.
    "llama-3.2-1b": [(16, llama(2048, 512, 8192))],
    "llama-3-8b": [(32, llama(4096, 1024, 14336))],
    "llama-3-70b": [(80, llama(8192, 1024, 28672))],
    "llama-3-405b": [(126, llama(16384, 1024, 53248))],
    "qwen3-235b-a22b": [
        (94, [(8192, 4096), (512, 4096), (512, 4096), (4096, 8192), (128, 3072, 4096), (128, 4096, 1536)])
    ],
    "deepseek-v3": [
        (3, [*DEEPSEEK_ATTENTION, (18432, 7168), (18432, 7168), (7168, 18432)]),
        (58, [*DEEPSEEK_ATTENTION, (2048, 7168), (2048, 7168), (7168, 2048), (256, 4096, 7168), (256, 7168, 2048)]),
    ],
}
BESIDES_MATRICES = {"llama-3.2-1b": (128256 + 2 * 16 + 1) * 2048}
"""Parameters of embeddings and norms, for models that fit on one GPU: what AdamW updates and replicas average."""

MUON = 1.0

MOVED = {"adamw": 28, "dion2": 24, "dion": 36}
"""Bytes of memory read and written for a float32 entry. Dion2: M + G 12, |M| 4, weight decay 8. Dion: M + G 12, B Q and
B^T P 4 each, M and X 8 each."""

MOVED_SELECTED = 20
"""More of Dion2, for a selected entry: momentum read, sent in bfloat16, decayed; the result read and applied."""

SELECT = {"dion2": "shorter", "dion3": "output"}
TITLES = {"dion2": "Dion2", "dion3": "Dion3"}

HEADER = (
    f"{'':20} matrices | {'imbalance of owners, <= 5%?':29} | {'TFLOPs, busiest rank':29}     all | MB sent by a rank\n"
    f"{'':20}   a rank |   {{title}}           Muon        "
    f" |{{title:>10}}{'Muon':>10}{'AdamW':>10}{'work':>8} |{'mean':>9}{'largest':>9}{'Muon':>9}{'sums':>9}"
)

IMBALANCE = 0.05
MAX_WEIGHTING = 100
"""Weightings of matrices that are tried to prove that owners cannot be balanced; the first few do it."""

MATRICES_PER_RANK = 4
"""The owners must do the same work up to ``IMBALANCE`` wherever there are this many matrices for each."""


@dataclass(frozen=True)
class Layout:
    """How a model is distributed.

    Attributes:
        name: For the table.
        ranks: How many shard each matrix, by its stored rows.
        experts_by_rows: Whether stacks are sharded likewise, not by experts.
        replicas: How many groups of ``ranks`` ranks hold the same.
    """

    name: str
    ranks: int
    experts_by_rows: bool = False
    replicas: int = 1


@dataclass(frozen=True)
class Step:
    """A step, by rank, one replica after the other.

    Attributes:
        shared: FLOPs of orthonormalizing each matrix that the ranks share.
        owned: FLOPs of orthonormalizing the matrices that each rank owns.
        flops: All FLOPs of each rank: matrices it owns, its experts, and elementwise work on its shards.
        sent: Bytes of submatrices to other ranks.
    """

    shared: list[int]
    owned: list[int]
    flops: list[int]
    sent: list[int]


def parameters(model: str) -> list[Shape]:
    """Return the shapes of all parameters with matrices, in model order."""
    return [shape for layers, shapes in MODELS[model] for shape in shapes * layers]


def stays_whole(shape: Shape, layout: Layout) -> bool:
    """Whether the parameter is a stack whose experts stay whole on their ranks."""
    return len(shape) == 3 and not layout.experts_by_rows


def sizes(shape: Shape, layout: Layout) -> list[int]:
    """Return the entries of a parameter on each rank."""
    axis = 0 if stays_whole(shape, layout) else -2
    others = math.prod(shape) // shape[axis]
    return [(stop - start) * others for start, stop in shard(shape[axis], layout.ranks)]


@lru_cache
def submatrix(shape: Shape, fraction: float, ranks: int, algorithm: str = "dion2") -> Submatrix:
    """Return what is selected of a matrix of this shape, if it spreads evenly over the slices."""
    (matrices,) = read_matrices(shape[-2:])
    axis = matrices.selection_axis(SELECT[algorithm])
    k = selected_count(matrices.shape[axis], fraction)
    return costs.submatrix(matrices, axis, k, tuple(shard(shape[-2], ranks)), is_rows=True)


def shared_submatrices(shapes: Sequence[Shape], layout: Layout, fraction: float, algorithm: str) -> list[Submatrix]:
    """Return what is selected of all matrices that ranks share."""
    shared: list[Submatrix] = []
    for shape in shapes:
        if not stays_whole(shape, layout):
            shared += [submatrix(shape, fraction, layout.ranks, algorithm)] * math.prod(shape[:-2])
    return shared


def working_memory(shapes: Sequence[Shape], layout: Layout) -> int:
    """Return the bytes of working memory that a step has by default where weights are float32, all of them these."""
    return default_working_memory(4 * sum(math.prod(shape) // layout.ranks for shape in shapes))


def simulate(shapes: Sequence[Shape], layout: Layout, fraction: float, algorithm: str = "dion2") -> Step:
    """Return what every rank computes and sends in one step on parameters of these shapes."""
    shared = shared_submatrices(shapes, layout, fraction, algorithm)
    owned, sent = shared_work(shared, layout.ranks, layout.replicas, working_memory(shapes, layout))
    work = list(owned)
    for shape, copies in Counter(shapes).items():
        own = own_flops(shape, layout, fraction, algorithm)
        for rank in range(len(work)):
            work[rank] += copies * own[rank % layout.ranks]
    return Step([each.cost for each in shared], owned, work, sent)


def own_flops(shape: Shape, layout: Layout, fraction: float, algorithm: str) -> list[int]:
    """Return by rank the FLOPs on a parameter that need no owner: elementwise ones, and those of whole experts."""
    each = submatrix(shape, fraction, 1, algorithm)
    entries = shape[-2] * shape[-1]
    selected = SELECTED_FLOPS + (NEURON_FLOPS if algorithm == "dion3" else 0)
    elementwise = DION2_FLOPS + selected * each.size / entries
    orthonormalize = each.cost / entries if stays_whole(shape, layout) else 0.0
    return [round(size * (elementwise + orthonormalize)) for size in sizes(shape, layout)]


def adamw_flops(shapes: Sequence[Shape], layout: Layout) -> int:
    """Return the FLOPs of AdamW on the largest shard."""
    return ADAMW_FLOPS * sum(copies * max(sizes(shape, layout)) for shape, copies in Counter(shapes).items())


def sum_bytes(shapes: Sequence[Shape], layout: Layout, fraction: float, algorithm: str) -> int:
    """Return the size of what is summed over ranks: a norm a slice, and in Dion3 a number a selected neuron."""
    shared = [shape for shape in shapes if not stays_whole(shape, layout)]
    if algorithm == "dion2":
        return SUM_BYTES * sum(math.prod(shape[:-2]) * min(shape[-2:]) for shape in shared)
    return SUM_BYTES * sum(
        math.prod(shape[:-2]) * (shape[-2] + selected_count(shape[-2], fraction)) for shape in shared
    )


def imbalance(work: Sequence[int]) -> float:
    """Return by how much the busiest rank exceeds the mean."""
    return max(work) * len(work) / sum(work) - 1


def is_ruled_out(costs: Sequence[int], ranks: int, excess: float) -> bool:
    """Return whether no assignment of whole matrices keeps every rank within the mean plus ``excess`` of it.

    Proved by weights. Let x be a matrix's share of what a rank may do, and its weight for some whole number j the
    integer part of (j + 1) x, over j; or x itself, where (j + 1) x is whole. Whatever adds up to at most 1 in x has a
    weight of at most 1 (a dual feasible function of bin packing, Fekete and Schepers 2001). So a total weight over the
    number of ranks rules balance out, and so does a single matrix over what a rank may do.
    """
    allowed = Fraction(1 + excess).limit_denominator(1000) * Fraction(sum(costs), ranks)
    shares = {cost / allowed: count for cost, count in Counter(costs).items()}
    return max(shares) > 1 or any(
        sum(count * weight(share, j) for share, count in shares.items()) > ranks for j in range(1, MAX_WEIGHTING)
    )


def weight(share: Fraction, j: int) -> Fraction:
    """Return the weight of a matrix for :func:`is_ruled_out`."""
    several = (j + 1) * share
    return share if several.denominator == 1 else Fraction(math.floor(several), j)


def verdict(step: Step) -> str:
    """Return whether owners are balanced; "-" where there are too few matrices to ask for it."""
    ranks = len(step.owned)
    if len(step.shared) < MATRICES_PER_RANK * ranks:
        return "-"
    if imbalance(step.owned) <= IMBALANCE:
        return "yes"
    return "cannot" if is_ruled_out(step.shared, ranks, IMBALANCE) else "NO"


def layouts(shapes: Sequence[Shape], ranks: Sequence[int], groups: Sequence[int]) -> Iterator[Layout]:
    """Yield the layouts of a model: FSDP2 on all numbers of ranks, HSDP on the largest; experts by rows on many."""
    for number in ranks:
        yield Layout(f"FSDP2 {number}", number)
    for group in groups:
        if group < max(ranks):
            replicas = max(ranks) // group
            yield Layout(f"HSDP {replicas} x {group}", group, replicas=replicas)
    experts = [shape[0] for shape in shapes if len(shape) == 3]
    for number in ranks:
        if experts and number >= max(experts):
            yield Layout(f"FSDP2 {number}, by rows", number, experts_by_rows=True)


def report(model: str, algorithm: str, fraction: float, ranks: Sequence[int], groups: Sequence[int]) -> None:
    """Print a table of one model."""
    shapes = parameters(model)
    count = sum(math.prod(shape) for shape in shapes)
    title = TITLES[algorithm]
    print(f"\n{model}, {count / 1e9:.1f}B parameters in matrices; {title} at {fraction:g} against Muon (1) and AdamW")
    print(HEADER.format(title=title))
    for layout in layouts(shapes, ranks, groups):
        dion, muon = simulate(shapes, layout, fraction, algorithm), simulate(shapes, layout, MUON)
        largest = (max(dion.flops), max(muon.flops), adamw_flops(shapes, layout))
        sums = sum_bytes(shapes, layout, fraction, algorithm)
        sent = (sum(dion.sent) / len(dion.sent), max(dion.sent), max(muon.sent), sums)
        print(
            f"{layout.name:20}{len(dion.shared) / len(dion.owned):9.2f}"
            f" |{imbalance(dion.owned):8.1%}{verdict(dion):>7}{imbalance(muon.owned):8.1%}{verdict(muon):>7}"
            f" |{''.join(f'{each / 1e12:10.3g}' for each in largest)}{imbalance(dion.flops):8.1%}"
            f" |{''.join(f'{each / 1e6:9.1f}' for each in sent)}"
        )


def assumed(default: Any, text: str) -> Any:
    """Declare something assumed: a field, and an argument of the command line."""
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class Processor:
    """What is assumed of a GPU."""

    peak: float = assumed(989.0, "TFLOP/s, the GPU's peak in bfloat16")
    mfu: float = assumed(0.4, "of the peak reached by the model, and by Dion2's products")

    @property
    def rate(self) -> float:
        """FLOPs that the model and Dion2's products do in a second."""
        return self.peak * self.mfu * 1e12


@dataclass(frozen=True)
class Cluster(Processor):
    """What is assumed of nodes of several GPUs, and of the network."""

    node: int = assumed(8, "GPUs of a node")
    inside: float = assumed(3600.0, "Gbit/s that a GPU sends, and receives, within its node")
    outside: float = assumed(400.0, "Gbit/s that it sends, and receives, beside that to and from other nodes")
    latency: float = assumed(2.0, "us that a message takes besides its bytes")


@dataclass(frozen=True)
class SlowNetwork(Processor):
    """What is assumed of replicas of one GPU each, and of the network between them."""

    replicas: int = assumed(8, "replicas, of one GPU each")
    tokens: int = assumed(65536, "tokens of a replica in a step")
    float32: float = assumed(40.0, "TFLOP/s of Dion's products, in float32")
    qr: float = assumed(1.0, "TFLOP/s of Dion's exact QR, in float32")
    memory: float = assumed(3.35, "TB/s of memory")
    gradient_bytes: int = assumed(4, "bytes of a gradient's entry")
    overlap: float = assumed(0.0, "of the model's time in which gradients travel too; 0.67 is the backward pass")


@dataclass(frozen=True)
class ReplicaStep:
    """What a replica does in a step besides the model.

    Attributes:
        seconds: Of the optimizer's computation.
        gradients: Bytes that it sends of gradients.
        updates: Bytes that it sends in the optimizer's step.
    """

    seconds: float
    gradients: float
    updates: float = 0.0


def dion_flops(shape: Shape, fraction: float) -> tuple[int, int]:
    """Return the FLOPs of Dion's four products with a matrix, and of the QR of P, its orthonormal factor included."""
    return costs.dion_flops(shape, selected_count(min(shape), fraction))


def compressed_bytes(shapes: Sequence[Shape], fraction: float, gradient_bytes: int) -> tuple[int, int]:
    """Return the bytes that Dion's replicas average with compressed synchronisation: of gradients, and of P and R.

    P and R, in float32, take the place of a gradient where they are smaller.
    """
    sizes = [
        (gradient_bytes * math.prod(shape), 4 * sum(shape) * selected_count(min(shape), fraction)) for shape in shapes
    ]
    gradients = sum(gradient for gradient, products in sizes if products >= gradient)
    return gradients, sum(products for gradient, products in sizes if products < gradient)


def replica_steps(
    shapes: Sequence[Shape], others: int, fraction: float, network: SlowNetwork
) -> dict[str, ReplicaStep]:
    """Return what each optimizer does, by name.

    Args:
        shapes: Of the matrices.
        others: Parameters that AdamW updates whatever updates the matrices.
        fraction: Dion2's, and Dion's rank fraction.
        network: What is assumed.
    """
    count, replicas = sum(map(math.prod, shapes)), network.replicas
    gradients = ring(network.gradient_bytes * (count + others), replicas)

    def moving(algorithm: str, more: float = 0.0) -> float:
        return (MOVED["adamw"] * others + (MOVED[algorithm] + more) * count) / (network.memory * 1e12)

    steps = {"AdamW": ReplicaStep(moving("adamw"), gradients)}
    for name, sharing in (("Dion2", replicas), ("Dion2, alone", 1)):
        simulated = simulate(shapes, Layout("", ranks=1, replicas=sharing), fraction)
        products = max(simulated.owned) / network.rate
        norms = ring(sum_bytes(shapes, Layout("", 1), fraction, "dion2"), sharing)
        seconds = moving("dion2", MOVED_SELECTED * fraction) + products
        steps[name] = ReplicaStep(seconds, gradients, max(simulated.sent) + norms)
    work = [dion_flops(shape, fraction) for shape in shapes]
    products, factorizations = (sum(flops) for flops in zip(*work, strict=True))
    seconds = moving("dion") + products / (network.float32 * 1e12) + factorizations / (network.qr * 1e12)
    steps["Dion"] = ReplicaStep(seconds, gradients)

    averaged, updates = compressed_bytes(shapes, fraction, network.gradient_bytes)
    averaged += network.gradient_bytes * others
    steps["Dion, compressed"] = ReplicaStep(seconds, ring(averaged, replicas), ring(updates, replicas))
    return steps


def model_seconds(parameters: int, network: SlowNetwork) -> float:
    """Return the time of a forward and a backward pass: 6 FLOPs a parameter and token."""
    return 6 * parameters * network.tokens / network.rate


def step_seconds(step: ReplicaStep, model: float, network: SlowNetwork, bandwidth: float) -> float:
    """Return the time of a step at a bandwidth in Gbit/s, given the model's."""
    gradients, updates = (8 * nbytes / (bandwidth * 1e9) for nbytes in (step.gradients, step.updates))
    return model + step.seconds + max(0.0, gradients - network.overlap * model) + updates


def break_even(compressed: ReplicaStep, full: ReplicaStep, model: float, network: SlowNetwork) -> float:
    """Return the bandwidth in Gbit/s, from 0.001 to 100,000, below which the first one is faster; infinite if above."""
    low, high = 1e-3, 1e5
    if step_seconds(compressed, model, network, high) < step_seconds(full, model, network, high):
        return math.inf
    while high > 1.0001 * low:
        middle = math.sqrt(low * high)
        first, second = (step_seconds(step, model, network, middle) for step in (compressed, full))
        low, high = (middle, high) if first < second else (low, middle)
    return low


A = TypeVar("A", bound=Processor)


def print_assumptions(assumptions: Processor) -> None:
    """Print a line for each."""
    for each in fields(assumptions):
        print(f"  {getattr(assumptions, each.name):<8g}{each.metadata['text']}")


def report_slow_network(model: str, fraction: float, network: SlowNetwork, bandwidths: Sequence[float]) -> None:
    """Print a table of one model: what each optimizer needs, and its time of a step at each bandwidth."""
    shapes, others = parameters(model), BESIDES_MATRICES[model]
    count = sum(map(math.prod, shapes)) + others
    model_time = model_seconds(count, network)
    steps = replica_steps(shapes, others, fraction, network)
    print(f"\n{model}, {count / 1e9:.2f}B parameters; fractions and ranks of {fraction:g}. Assumed:")
    print_assumptions(network)
    print(f"{'':24}{''.join(f'{name:>18}' for name in steps)}")

    def line(title: str, numbers: Sequence[float], marked: bool = False) -> None:
        print(
            f"{title:24}"
            + "".join(f"{f'{each:.3f}' + '*' * (marked and each == min(numbers)):>18}" for each in numbers)
        )

    line("model, s", [model_time] * len(steps))
    line("optimizer, s", [step.seconds for step in steps.values()])
    line("sent by a replica, GB", [(step.gradients + step.updates) / 1e9 for step in steps.values()])
    for bandwidth in bandwidths:
        times = [step_seconds(step, model_time, network, bandwidth) for step in steps.values()]
        line(f"step at {bandwidth:g} Gbit/s, s", times, marked=True)
    compressed = steps.pop("Dion, compressed")
    line("compressed wins below", [break_even(compressed, step, model_time, network) for step in steps.values()])
    print("* the fastest; the last line is in Gbit/s")


@dataclass(frozen=True)
class Bucket:
    """What a bucket of matrices takes.

    Attributes:
        exchange: Seconds of its all-to-all to the owners, and of that back.
        products: Seconds of orthonormalizing what each rank owns of it.
    """

    exchange: float
    products: list[float]


def buckets_of(
    submatrices: Sequence[Submatrix], owners: Sequence[Owner], buckets: Sequence[int], ranks: int, cluster: Cluster
) -> list[Bucket]:
    """Return what each bucket takes, given the owner and the bucket of each submatrix."""
    result = []
    for number in sorted(set(buckets)):
        owned: Counter[tuple[Submatrix, int]] = Counter()
        for each, owner, bucket in zip(submatrices, owners, buckets, strict=True):
            owned[each, owner.rank] += bucket == number
        result.append(_bucket(owned, ranks, cluster))
    return result


def _bucket(owned: Counter[tuple[Submatrix, int]], ranks: int, cluster: Cluster) -> Bucket:
    """What a bucket takes, given how many submatrices of a kind each rank owns of it."""
    products = [0] * ranks
    sent_inside, received_inside, sent_outside, received_outside = ([0] * ranks for _ in range(4))
    nodes = [range(start, min(ranks, start + cluster.node)) for start in range(0, ranks, cluster.node)]
    for kind in {kind for kind, _ in owned}:
        everywhere = sum(owned[kind, rank] for rank in range(ranks))
        for node in nodes:
            in_node, held = sum(owned[kind, rank] for rank in node), sum(kind.held[rank] for rank in node)
            for rank in node:
                mine, part = owned[kind, rank], kind.held[rank]
                products[rank] += mine * kind.cost
                sent_inside[rank] += (in_node - mine) * part * kind.itemsize
                sent_outside[rank] += (everywhere - in_node) * part * kind.itemsize
                received_inside[rank] += mine * (held - part) * kind.itemsize
                received_outside[rank] += mine * (kind.size - held) * kind.itemsize
    inside, outside = max(*sent_inside, *received_inside), max(*sent_outside, *received_outside)
    bytes_take = 8e-9 * max(inside / cluster.inside, outside / cluster.outside)
    messages_take = 1e-6 * cluster.latency * (ranks - 1)
    return Bucket(bytes_take + messages_take, [flops / cluster.rate for flops in products])


class Timeline:
    """When the ranks and the network have done what they were given so far, in seconds.

    Attributes:
        ranks: By rank.
        network: Of all ranks together.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = [0.0] * ranks
        self.network = 0.0

    def all_to_all(self, seconds: float) -> float:
        """Begin one when all ranks have come to it; return when it ends."""
        self.network = max(self.network, *self.ranks) + seconds
        return self.network

    def exchange(self, bucket: Bucket) -> Generator[None, object, None]:
        """Do what a step does with a bucket."""
        arrived = self.all_to_all(bucket.exchange)
        yield IN_FLIGHT
        self.ranks = [max(free, arrived) + own for free, own in zip(self.ranks, bucket.products, strict=True)]
        returned = self.all_to_all(bucket.exchange)
        yield IN_FLIGHT
        self.ranks = [max(free, returned) for free in self.ranks]


def exchange_seconds(buckets: Sequence[Bucket]) -> float:
    """Return the time of an exchange with owners, products included, in the order in which a step goes over buckets."""
    timeline = Timeline(len(buckets[0].products))
    for _ in staggered([timeline.exchange(bucket) for bucket in buckets]):
        pass
    return max(timeline.ranks)


def planned_owners(submatrices: Sequence[Submatrix], ranks: int) -> tuple[Owner, ...]:
    """Return the owner of each submatrix under FSDP2."""
    sizes = tuple(each.size * each.itemsize for each in submatrices)
    return plan_owners(tuple(each.cost for each in submatrices), sizes, ranks, 1, None)


def report_buckets(model: str, algorithm: str, fraction: float, ranks: Sequence[int], cluster: Cluster) -> None:
    """Print a table of one model: exchange and products alone, and both together by the number of buckets."""
    shapes = parameters(model)
    print(f"\n{model}, {TITLES[algorithm]} at {fraction:g}, in ms")
    print(f"{'':20}  exchange  products |  1 bucket         2         3 |{'planned':>16}    gain")
    for layout in layouts(shapes, ranks, ()):
        submatrices = shared_submatrices(shapes, layout, fraction, algorithm)
        owners, costs = planned_owners(submatrices, layout.ranks), tuple(each.cost for each in submatrices)
        planned = plan_buckets(submatrices, owners, layout.ranks, working_memory(shapes, layout))
        plans = [
            buckets_of(submatrices, owners, assigned, layout.ranks, cluster)
            for assigned in (*(assign_buckets(costs, owners, number) for number in (1, 2, 3)), planned)
        ]
        (together,) = plans[0]
        times = [2 * together.exchange, max(together.products), *map(exchange_seconds, plans)]
        exchange, products, one, two, three, as_planned = (1e3 * seconds for seconds in times)
        print(
            f"{layout.name:20}{exchange:10.2f}{products:10.2f} |{one:10.2f}{two:10.2f}{three:10.2f}"
            f" |{len(plans[-1]):6}{as_planned:10.2f}{1 - as_planned / one:8.0%}"
        )


def main() -> None:
    """Simulate what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", help="default: all; with --between those for one GPU")
    parser.add_argument("--algorithm", choices=SELECT, default="dion2", help="default: dion2")
    parser.add_argument("--fraction", type=float, default=0.25, help="default: 0.25")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2**power for power in range(3, 13)])
    parser.add_argument("--groups", type=int, nargs="*", default=[8, 64], help="shard groups of HSDP (default: 8 64)")
    parser.add_argument("--between", type=float, nargs="+", help="Gbit/s between replicas: times of a whole step")
    parser.add_argument("--buckets", action="store_true", help="times of the exchange with owners, by bucket")
    assumptions = parser.add_argument_group("what --between and --buckets assume")
    for name, each in {each.name: each for kind in (SlowNetwork, Cluster) for each in fields(kind)}.items():
        text = f"{each.metadata['text']} (default: {each.default})"
        assumptions.add_argument(
            f"--{name.replace('_', '-')}", type=type(each.default), default=each.default, help=text
        )
    arguments = parser.parse_args()

    def assumed_of(kind: type[A]) -> A:
        return kind(**{each.name: getattr(arguments, each.name) for each in fields(kind)})

    if arguments.between:
        network = assumed_of(SlowNetwork)
        for model in arguments.models or BESIDES_MATRICES:
            if model not in BESIDES_MATRICES:
                parser.error(f"--between needs a model that fits on one GPU: {', '.join(BESIDES_MATRICES)}")
            report_slow_network(model, arguments.fraction, network, arguments.between)
        return
    if arguments.buckets:
        cluster = assumed_of(Cluster)
        print("Assumed:")
        print_assumptions(cluster)
        for model in arguments.models or MODELS:
            report_buckets(model, arguments.algorithm, arguments.fraction, arguments.ranks, cluster)
        return
    for model in arguments.models or MODELS:
        report(model, arguments.algorithm, arguments.fraction, arguments.ranks, arguments.groups)


if __name__ == "__main__":
    main()
