"""The simulation of large models."""

import itertools
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from benchmarks.scale import (
    BESIDES_MATRICES,
    MODELS,
    Bucket,
    Cluster,
    Layout,
    ReplicaStep,
    SlowNetwork,
    break_even,
    buckets_of,
    compressed_bytes,
    dion_flops,
    exchange_seconds,
    imbalance,
    is_ruled_out,
    main,
    model_seconds,
    parameters,
    planned_owners,
    replica_steps,
    shard,
    shared_submatrices,
    simulate,
    step_seconds,
    verdict,
)
from dion2_lightning import Dion2
from dion2_lightning.costs import Submatrix, plan_buckets
from dion2_lightning.distributed.buckets import assign_buckets
from dion2_lightning.distributed.owners import Owner

RANKS = [2**power for power in range(3, 13)]
SLOW = SlowNetwork(replicas=4, tokens=10, peak=2e-6, mfu=0.5, float32=1e-6, qr=1e-6, memory=1e-6)
"""A million FLOPs and bytes a second."""


def stacks(model: str) -> int:
    return sum(len(shape) == 3 for shape in parameters(model))


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("model", [model for model in MODELS if not stacks(model)])
def test_owners_are_balanced_with_4_matrices_per_rank(model: str, fraction: float) -> None:
    shapes = parameters(model)
    rank_counts = [ranks for ranks in RANKS if len(shapes) >= 4 * ranks]
    assert rank_counts
    for ranks in rank_counts:
        assert verdict(simulate(shapes, Layout("", ranks), fraction)) == "yes", ranks


@pytest.mark.parametrize("model", [model for model in MODELS if stacks(model)])
def test_work_with_whole_experts_is_balanced(model: str) -> None:
    for ranks in (8, 16, 32, 64):
        assert imbalance(simulate(parameters(model), Layout("", ranks), 0.25).flops) <= 0.05, ranks


def test_whole_experts_send_nothing() -> None:
    step = simulate([(16, 64, 32)], Layout("", ranks=8), 0.25)
    assert not any(step.sent)
    assert len(set(step.flops)) == 1


def test_experts_by_rows_are_shared() -> None:
    step = simulate([(16, 64, 32)], Layout("", ranks=8, experts_by_rows=True), 0.25)
    assert len(step.shared) == 16
    assert verdict(step) == "-"
    assert all(step.sent)


def test_a_large_matrix_rules_balance_out() -> None:
    step = simulate([(64, 64)] + [(8, 64)] * 31, Layout("", ranks=8), 0.25)
    assert verdict(step) == "cannot"


@pytest.mark.parametrize("seed", range(40))
def test_what_is_ruled_out_is_impossible(seed: int) -> None:
    """Against every assignment of up to seven matrices to three ranks."""
    random.seed(seed)
    costs = random.choices([random.randint(1, 12) for _ in range(3)], k=random.randint(3, 7))
    loads = (
        [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
        for owners in itertools.product(range(3), repeat=len(costs))
    )
    least = min(imbalance(each) for each in loads)
    assert not is_ruled_out(costs, 3, least + 1e-3)


def test_most_of_what_is_impossible_is_ruled_out() -> None:
    """One large matrix; three equal ones on two ranks; one that leaves no room for any of ten others."""
    assert is_ruled_out([6, 1, 1], 2, 0.49)
    assert is_ruled_out([3, 3, 3], 2, 0.32)
    assert is_ruled_out([17] + [5] * 10 + [1] * 9, 4, 0.05)
    assert not is_ruled_out([2, 2], 2, 0.0)


def test_replicas_share_the_work_and_send_less_within_a_group() -> None:
    """Owners are spread over all replicas; each of these sends the parts of its matrices alone."""
    shapes = parameters("llama-3-8b")
    group, hybrid = simulate(shapes, Layout("", 8), 0.25), simulate(shapes, Layout("", 8, replicas=4), 0.25)
    assert len(hybrid.owned) == 32
    assert sum(hybrid.owned) == sum(group.owned)
    assert imbalance(hybrid.owned) <= 0.05
    assert max(hybrid.sent) < max(group.sent)


def test_shards_of_fewer_rows_than_ranks() -> None:
    assert shard(3, 4) == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert shard(5, 4) == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_steps_of_replicas_by_hand() -> None:
    """A matrix (200, 100) at a rank of 25, and 5,000 other parameters."""
    assert dion_flops((200, 100), 0.25) == (4_000_000, 479_167)
    assert compressed_bytes([(200, 100)], 0.25, gradient_bytes=4) == (0, 4 * 300 * 25)
    steps = replica_steps([(200, 100)], others=5000, fraction=0.25, network=SLOW)
    gradients = 1.5 * 4 * 25_000
    expected = {
        "AdamW": ReplicaStep(0.7, gradients),
        "Dion2, alone": ReplicaStep(0.72 + 2.65625, gradients),
        "Dion": ReplicaStep(0.86 + 4.0 + 0.479167, gradients),
        "Dion, compressed": ReplicaStep(0.86 + 4.0 + 0.479167, 1.5 * 4 * 5000, 1.5 * 4 * 300 * 25),
    }
    for name, step in expected.items():
        assert vars(steps[name]) == pytest.approx(vars(step)), name

    model = model_seconds(25_000, SLOW)
    assert model == pytest.approx(1.5)
    overlapping = replace(SLOW, overlap=0.5)
    for network, adamw, dion in ((SLOW, 3.4, 7.439167), (overlapping, 2.65, 7.199167)):
        assert step_seconds(steps["AdamW"], model, network, bandwidth=1e-3) == pytest.approx(adamw)
        assert step_seconds(steps["Dion, compressed"], model, network, bandwidth=1e-3) == pytest.approx(dion)


def test_gradients_that_are_no_larger_are_averaged() -> None:
    """A square at half rank; and in half precision P and R have twice the bytes of as many numbers."""
    assert compressed_bytes([(64, 64), (96, 32)], 0.5, gradient_bytes=4) == (4 * 64 * 64, 4 * 128 * 16)
    assert compressed_bytes([(64, 64), (96, 32)], 0.25, gradient_bytes=2) == (2 * 64 * 64, 4 * 128 * 8)


def test_break_even_by_hand() -> None:
    compressed, full = ReplicaStep(2.0, 0.0, 1e9), ReplicaStep(1.0, 3e9)
    assert break_even(compressed, full, 2.0, SLOW) == pytest.approx(16, rel=1e-3)
    assert break_even(compressed, full, 2.0, replace(SLOW, overlap=0.5)) == pytest.approx(8, rel=1e-3)
    assert break_even(replace(compressed, seconds=1.0), full, 2.0, SLOW) == math.inf


def test_replicas_that_share_gather_results() -> None:
    """In bfloat16, to seven others; and a norm of every slice."""
    shapes = parameters("llama-3.2-1b")
    steps = replica_steps(shapes, BESIDES_MATRICES["llama-3.2-1b"], 0.25, SlowNetwork())
    results = 7 * 2 * sum(map(math.prod, shapes)) // 4 // 8
    assert steps["Dion2"].updates == pytest.approx(results, rel=0.01)
    assert steps["Dion2"].gradients == steps["Dion2, alone"].gradients


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_products_of_a_real_step_of_dion(shape: tuple[int, int]) -> None:
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = Dion2([{"params": [parameter], "algorithm": "dion", "rank_fraction": 0.25}])
    parameter.grad = torch.randn(shape)
    in_place = {torch.ops.aten.baddbmm_: lambda *shapes, out_shape: baddbmm_flop(*shapes)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        optimizer.step()
    assert counter.get_total_flops() == dion_flops(shape, 0.25)[0]


def test_table_of_a_slow_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The faster the network, the less a step with compressed gradients gains."""
    monkeypatch.setattr(sys, "argv", ["scale", "--between", "1", "1000", "--replicas", "2"])
    main()
    lines = capsys.readouterr().out.splitlines()
    slow, fast = (next(line for line in lines if line.startswith(f"step at {each} Gbit/s")) for each in (1, 1000))
    assert slow.endswith("*")
    assert not fast.endswith("*")
    assert any(line.split()[:2] == ["2", "replicas,"] for line in lines)


# The exchange with owners in buckets

ONE_NODE = Cluster(peak=1e-6, mfu=1.0, node=8, inside=8e-3, outside=8e-3, latency=0.0)
"""A million FLOPs and bytes a second."""
HALVES = Submatrix(cost=6_000_000, held=(500_000, 500_000))
"""A megabyte on each of two ranks, and six seconds of work."""


def in_buckets(submatrix: Submatrix, buckets: list[int], cluster: Cluster) -> list[Bucket]:
    """Two ranks own one of two submatrices after the other."""
    owners = [Owner(None, index % 2) for index in range(len(buckets))]
    return buckets_of([submatrix] * len(buckets), owners, buckets, 2, cluster)


def test_times_of_buckets_by_hand() -> None:
    """Each of two ranks owns two of four matrices, and sends its halves of the others'."""
    (together,) = in_buckets(HALVES, [0, 0, 0, 0], ONE_NODE)
    assert together.exchange == pytest.approx(2.0)
    assert together.products == pytest.approx([12.0, 12.0])
    first, second = in_buckets(HALVES, [0, 0, 1, 1], ONE_NODE)
    assert vars(first) == vars(second)
    assert first.exchange == pytest.approx(1.0)
    assert first.products == pytest.approx([6.0, 6.0])
    late = replace(ONE_NODE, latency=1e6)
    assert in_buckets(HALVES, [0, 0, 0, 0], late)[0].exchange == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("exchange", "products", "expected"),
    [
        # Products take longer: the first goes and the last comes back while nothing is multiplied.
        ([2.0], [12.0], 2 + 12 + 2),
        ([1.0, 1.0], [6.0, 6.0], 1 + 12 + 1),
        ([1.0, 1.0, 1.0], [4.0, 4.0, 4.0], 1 + 12 + 1),
        # The network takes longer: send 0-1 and 1-2, return 2-3; what arrived at 2 is multiplied by 2.5, return 3-4.
        ([1.0, 1.0], [0.5, 0.5], 4),
        # Send 0-2 and 2-4; products 2-5 and 5-6; return 5-7 and 7-9.
        ([2.0, 2.0], [3.0, 1.0], 9),
    ],
)
def test_schedule_by_hand(exchange: list[float], products: list[float], expected: float) -> None:
    buckets = [Bucket(each, [work, work]) for each, work in zip(exchange, products, strict=True)]
    assert exchange_seconds(buckets) == pytest.approx(expected)


def test_ranks_wait_for_the_busiest() -> None:
    """Sent at 1 and 2; the busiest multiplies 1-4 and 4-5, the other 1-2 and, as results go at 4 only, 2-5."""
    assert exchange_seconds([Bucket(1.0, [3.0, 1.0]), Bucket(1.0, [1.0, 3.0])]) == pytest.approx(6)


def test_bytes_between_nodes() -> None:
    """Four ranks, two nodes: the owner on each gets a quarter from its neighbour, and two from the other node."""
    quarters = Submatrix(cost=0, held=(1_000_000,) * 4)
    owners = [Owner(None, 0), Owner(None, 2)]

    def seconds(**changes: float) -> float:
        (bucket,) = buckets_of([quarters] * 2, owners, [0, 0], 4, replace(ONE_NODE, **changes))
        return bucket.exchange

    assert seconds() == pytest.approx(6.0)
    assert seconds(node=2) == pytest.approx(4.0)
    assert seconds(node=2, outside=16e-3) == pytest.approx(2.0)
    assert seconds(node=2, outside=80e-3) == pytest.approx(2.0)
    assert seconds(node=2, latency=1e6) == pytest.approx(4.0 + 3.0)


@pytest.mark.parametrize("model", [model for model in MODELS if not stacks(model)])
def test_buckets_bring_the_time_down_to_the_longer_of_both(model: str) -> None:
    """Without latency, where each owner has many matrices."""
    shapes, cluster = parameters(model), Cluster(latency=0.0)
    submatrices = shared_submatrices(shapes, Layout("", 8), 0.25, "dion2")
    owners, costs = planned_owners(submatrices, 8), tuple(each.cost for each in submatrices)
    times = []
    for number in (1, 2, 3, 7):
        buckets = buckets_of(submatrices, owners, assign_buckets(costs, owners, number), 8, cluster)
        times.append(exchange_seconds(buckets))
        if number == 1:
            exchange, products = 2 * buckets[0].exchange, max(buckets[0].products)
    assert times[0] == pytest.approx(exchange + products)
    for number, seconds in zip((2, 3, 7), times[1:], strict=True):
        assert seconds == pytest.approx(products + exchange / number, rel=0.02)


@pytest.mark.parametrize("model", [model for model in MODELS if not stacks(model)])
def test_buckets_made_for_overlap_are_no_slower_than_one(model: str) -> None:
    shapes = parameters(model)
    gains = []
    for ranks in RANKS:
        submatrices = shared_submatrices(shapes, Layout("", ranks), 0.25, "dion2")
        owners = planned_owners(submatrices, ranks)
        planned = plan_buckets(submatrices, owners, ranks, working_memory=2**50)
        together = [0] * len(planned)
        many, one = (
            exchange_seconds(buckets_of(submatrices, owners, each, ranks, Cluster())) for each in (planned, together)
        )
        gains.append(one / many - 1)
    assert min(gains) >= 0.0
    assert max(gains) > 0.1


def test_table_of_buckets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--buckets", "--models", "llama-3-8b", "--ranks", "16", "--outside", "100", "--latency", "0"]
    monkeypatch.setattr(sys, "argv", ["scale", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "100" and "other nodes" in line for line in lines)
    numbers = [float(each) for each in lines[-1].replace("|", " ").split()[2:7]]
    exchange, products, one, two, three = numbers
    assert one == pytest.approx(exchange + products, abs=0.02)
    assert three <= two < one
