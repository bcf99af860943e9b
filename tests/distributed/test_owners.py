"""Who owns which matrix."""

import itertools
import random

import pytest

from dion2_lightning.distributed.owners import FLOPS_PER_BYTE, Owner, assign_owners, plan_owners
from dion2_lightning.kernels.orthonormalize import flops


def largest_load(costs: tuple[int, ...], owners: tuple[int, ...], ranks: int) -> int:
    return max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks))


def test_every_matrix_has_one_owner_and_equal_ones_are_spread_evenly():
    owners = assign_owners((7,) * 12, 4)
    assert sorted(owners) == sorted(list(range(4)) * 3)
    assert assign_owners((), 3) == ()


@pytest.mark.parametrize("seed", range(20))
def test_largest_load_is_within_the_bound_of_the_best(seed):
    """The bound of longest-first assignment, against every assignment of up to nine matrices to two ranks."""
    random.seed(seed)
    costs = tuple(random.choices([random.randint(1, 30) for _ in range(3)], k=random.randint(2, 9)))
    best = min(largest_load(costs, owners, 2) for owners in itertools.product(range(2), repeat=len(costs)))
    assert largest_load(costs, assign_owners(costs, 2), 2) <= best * 7 / 6  # 4/3 - 1 / (3 * ranks) for two ranks


@pytest.mark.parametrize("ranks", [64, 128])
def test_llama_70b_at_a_quarter_is_even_within_five_percent(ranks):
    shapes = [(2048, 8192), (256, 8192), (256, 8192), (2048, 8192), *[(2048, 28672)] * 3] * 80
    costs = tuple(flops(*shape) for shape in shapes)
    assert largest_load(costs, assign_owners(costs, ranks), ranks) * ranks <= 1.05 * sum(costs)


# Ranks and replicas

LARGE, SMALL = (2048, 8192), (64, 256)


def plan(shapes: list[tuple[int, int]], ranks: int, replicas: int, share_replicas: bool | None = None) -> list:
    costs, nbytes = tuple(flops(*shape) for shape in shapes), tuple(2 * k * m for k, m in shapes)
    return list(plan_owners(costs, nbytes, ranks, replicas, share_replicas))


@pytest.mark.parametrize(("shape", "shares"), [(LARGE, True), (SMALL, False)])
def test_replicas_share_work_that_costs_more_than_sending_it(shape: tuple[int, int], shares: bool) -> None:
    """The FLOPs of a submatrix grow faster than its bytes, so sharing pays for large ones."""
    k, m = shape
    assert (flops(k, m) >= FLOPS_PER_BYTE * 2 * k * m) is shares
    owners = plan([shape] * 8, ranks=2, replicas=4)
    assert all((replica is None) is not shares for replica, _ in owners)
    assert plan([shape] * 8, 2, 4, share_replicas=not shares) != owners


def test_padding_counts() -> None:
    """One matrix over many replicas: padding makes all of them receive as much as if each had one."""
    smallest_k = next(k for k in itertools.count(100) if flops(k, 8 * k) >= FLOPS_PER_BYTE * 16 * k * k)
    shape = (smallest_k, 8 * smallest_k)
    assert plan([shape] * 8, ranks=1, replicas=8)[0][0] is not None
    assert plan([shape], ranks=1, replicas=8)[0][0] is None


def test_owners_are_spread_over_the_replicas() -> None:
    owners = plan([LARGE] * 6, ranks=4, replicas=3, share_replicas=True)
    assert sorted(replica for replica, _ in owners) == [0, 0, 1, 1, 2, 2]
    assert len(set(owners)) == 6


@pytest.mark.parametrize("share_replicas", [True, False, None])
def test_owners_without_replicas(share_replicas: bool | None) -> None:
    assert sorted(plan([LARGE] * 4, ranks=4, replicas=1, share_replicas=share_replicas)) == [
        Owner(None, rank) for rank in range(4)
    ]
    assert plan([], 4, 2) == []
