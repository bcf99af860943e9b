"""In how many buckets matrices travel, and in which."""

import random
from collections import Counter

import pytest

from dion2_lightning.distributed.buckets import BUCKET_BYTES, MESSAGE_BYTES, assign_buckets, count_buckets
from dion2_lightning.distributed.owners import assign_owners

ENOUGH = 2**40


def count(size: int, working: int = 1, ranks: int = 4, each: int = 8, memory: int = ENOUGH) -> int:
    """Of ``each`` matrices for each of ``ranks`` owners, all of one size in bytes."""
    owners = list(range(ranks)) * each
    return count_buckets([7] * len(owners), owners, [size] * len(owners), [working] * len(owners), ranks, memory)


def test_small_models_take_one() -> None:
    assert count(size=1000) == 1
    assert count_buckets([], [], [], [], 4, ENOUGH) == 1
    assert count_buckets([0, 0], [0, 1], [0, 0], [100, 100], 2, ENOUGH) == 1  # of matrices without entries


def test_overlap_asks_for_two_or_three() -> None:
    """A rank's part of 8 matrices for each of 4 owners has as many bytes as 8 matrices."""
    assert count(BUCKET_BYTES // 4 - 1) == 1
    assert count(BUCKET_BYTES // 4) == 2
    assert [count(BUCKET_BYTES // 8 * buckets) for buckets in (1, 2, 3, 4, 100)] == [1, 2, 3, 3, 3]


def test_messages_are_not_made_too_small() -> None:
    """A bucket has a message for each other rank: on 512 ranks it is four times as large as it had to be otherwise."""
    assert 512 * MESSAGE_BYTES == 4 * BUCKET_BYTES
    assert [count(BUCKET_BYTES // 8 * buckets, ranks=512) for buckets in (3, 4, 8, 12)] == [1, 1, 2, 3]


def test_work_that_cannot_be_divided_takes_one() -> None:
    """A matrix as costly as all others of an owner: there would be nothing to do beside it."""
    arguments = ["a", "a", "a", "b"], [BUCKET_BYTES] * 4, [1] * 4, 2, ENOUGH
    assert count_buckets([5, 5, 5, 15], *arguments) == 1
    assert count_buckets([5, 5, 5, 6], *arguments) == 2


def test_memory_asks_for_more() -> None:
    """8 matrices of an owner take 8 x 24 bytes, and parts of as many bytes as 8 matrices four times: 8 x 4 x 2."""
    assert [count(2, 24, memory=memory) for memory in (256, 255, 128, 127, 64)] == [1, 2, 2, 3, 4]


def test_memory_is_at_least_that_of_the_largest_matrix() -> None:
    """24 bytes; an owner has at most 6 of 24 bytes, beside parts of 2 x 6 bytes four times."""
    owners = [0] * 6 + [1]
    assert count_buckets([5] * 7, owners, [2] * 7, [24] * 7, 1, 1) == 6
    assert count_buckets([5] * 7, owners, [2] * 7, [24] * 6 + [200], 1, 1) == 2


def test_no_more_than_an_owner_has_matrices() -> None:
    assert count(2, 24, memory=1) == 8
    assert count(BUCKET_BYTES, each=1) == 1


@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
def test_an_owner_has_as_much_to_do_in_each(buckets: int) -> None:
    """Within the smallest matrix, which fill the gaps; so owners are balanced in each bucket as they are over all."""
    random.seed(0)
    costs = tuple(random.choices([3, 7, 20], k=120))
    owners = assign_owners(costs, 4)
    work: Counter[tuple[int, int]] = Counter()
    for cost, owner, bucket in zip(costs, owners, assign_buckets(costs, owners, buckets), strict=True):
        work[owner, bucket] += cost
    assert len(work) == 4 * buckets
    for owner in range(4):
        of_owner = [work[owner, bucket] for bucket in range(buckets)]
        assert max(of_owner) - min(of_owner) <= 3
    assert len(set(assign_buckets((5,) * 12, tuple(range(4)) * 3, buckets))) == min(buckets, 3)
