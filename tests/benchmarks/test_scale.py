"""The simulation of large models."""

import pytest

from benchmarks.scale import MODELS, Layout, imbalance, least_imbalance, parameters, shard, simulate, verdict

RANKS = [2**power for power in range(3, 13)]


def stacks(model: str) -> int:
    return sum(len(shape) == 3 for shape in parameters(model))


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("model", [model for model in MODELS if not stacks(model)])
def test_owners_are_balanced_where_there_are_4_matrices_a_rank(model: str, fraction: float) -> None:
    shapes = parameters(model)
    asked = [ranks for ranks in RANKS if len(shapes) >= 4 * ranks]
    assert asked
    for ranks in asked:
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


@pytest.mark.parametrize(("costs", "ranks", "least"), [([6, 1, 1], 2, 0.5), ([3, 3, 3], 2, 1 / 3), ([2, 2], 2, 0.0)])
def test_least_imbalance(costs: list[int], ranks: int, least: float) -> None:
    assert least_imbalance(costs, ranks) == pytest.approx(least)


def test_shards_of_fewer_rows_than_ranks() -> None:
    assert shard(3, 4) == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert shard(5, 4) == [(0, 2), (2, 4), (4, 5), (5, 5)]
