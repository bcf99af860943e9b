"""Who orthonormalizes what."""

import itertools

import pytest

from dion2_lightning.algorithms.dion2_shared import FLOPS_PER_BYTE, plan_owners
from dion2_lightning.distributed.owners import orthonormalization_cost

LARGE, SMALL = (2048, 8192), (64, 256)


def plan(shapes: list[tuple[int, int]], ranks: int, replicas: int, share_replicas: bool | None = None) -> list:
    costs = [orthonormalization_cost(*shape) for shape in shapes]
    return plan_owners(costs, [2 * k * m for k, m in shapes], ranks, replicas, share_replicas)


@pytest.mark.parametrize(("shape", "shares"), [(LARGE, True), (SMALL, False)])
def test_replicas_share_what_costs_more_than_sending_it(shape: tuple[int, int], shares: bool) -> None:
    """The work of a large submatrix grows faster than its size."""
    k, m = shape
    assert (orthonormalization_cost(k, m) >= FLOPS_PER_BYTE * 2 * k * m) is shares
    owners = plan([shape] * 8, ranks=2, replicas=4)
    assert all((replica is None) is not shares for replica, _ in owners)
    assert plan([shape] * 8, 2, 4, share_replicas=not shares) != owners


def test_padding_counts() -> None:
    """One matrix over many replicas: all of them receive as much as if each had one."""
    just_worth = next(
        k for k in itertools.count(100) if orthonormalization_cost(k, 8 * k) >= FLOPS_PER_BYTE * 16 * k * k
    )
    shape = (just_worth, 8 * just_worth)
    assert plan([shape] * 8, ranks=1, replicas=8)[0][0] is not None
    assert plan([shape], ranks=1, replicas=8)[0][0] is None


def test_owners_go_round_the_replicas() -> None:
    owners = plan([LARGE] * 6, ranks=4, replicas=3, share_replicas=True)
    assert sorted(replica for replica, _ in owners) == [0, 0, 1, 1, 2, 2]
    assert len(set(owners)) == 6


@pytest.mark.parametrize("share_replicas", [True, False, None])
def test_without_replicas_the_ranks_are_all_there_is(share_replicas: bool | None) -> None:
    assert sorted(plan([LARGE] * 4, ranks=4, replicas=1, share_replicas=share_replicas)) == [
        (None, rank) for rank in range(4)
    ]
    assert plan([], 4, 2) == []
