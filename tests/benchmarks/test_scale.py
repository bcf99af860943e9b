"""The simulation of large models."""

import itertools
import random

import pytest

from benchmarks.scale import MODELS, Layout, imbalance, is_ruled_out, parameters, shard, simulate, verdict

RANKS = [2**power for power in range(3, 13)]


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
