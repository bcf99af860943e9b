"""In which buckets matrices go to their owners and back: while one bucket travels, another is orthonormalized."""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Final

from dion2_lightning.distributed.owners import assign_owners
from dion2_lightning.lists import group_by

MAX_OVERLAPPED: Final = 3
"""Buckets that are made for overlap. What cannot overlap is sending the first and returning the last: a third each."""

BUCKET_BYTES: Final = 2**24
"""A bucket made for overlap has at least so many bytes a rank: between nodes, at 50 GB/s, they take 0.3 ms, several
times what it takes to start two collectives more."""

MESSAGE_BYTES: Final = 2**17
"""And so many for each pair of ranks: at 50 GB/s they take 2.6 us, about as long as a message of no bytes. Smaller ones
would wait for the network's latency, which more buckets multiply."""


def count_buckets(
    costs: Sequence[int],
    owners: Sequence[Hashable],
    sizes: Sequence[int],
    working: Sequence[int],
    ranks: int,
    working_memory: int,
) -> int:
    """Return in how many buckets matrices travel: one where they are small, and never more than an owner has matrices.

    Overlap asks for two or three, where the work of the busiest owner can be divided so. Memory asks for more where
    the work of an owner, and what is in flight beside it, would take more than the working memory, or than the largest
    matrix: while a bucket is orthonormalized, a rank's parts of its two neighbours are there twice, as what it sends
    and as what it receives.

    Args:
        costs: FLOPs of the work on each matrix.
        owners: Of each.
        sizes: Bytes of each, on its way.
        working: Bytes that the work on each takes.
        ranks: How many share each by parts.
        working_memory: How many bytes a step may take.
    """
    if not costs:
        return 1
    parts = sum(sizes) // ranks
    divisible = max(_by_owner(owners, costs).values()) // max(1, *costs)
    for_overlap = min(MAX_OVERLAPPED, divisible, parts // max(BUCKET_BYTES, ranks * MESSAGE_BYTES))
    needed = max(_by_owner(owners, working).values()) + 4 * parts
    for_memory = -(-needed // max(working_memory, *working))
    return max(1, min(max(for_overlap, for_memory), max(Counter(owners).values())))


def _by_owner(owners: Sequence[Hashable], numbers: Sequence[int]) -> Counter[Hashable]:
    totals: Counter[Hashable] = Counter()
    for owner, number in zip(owners, numbers, strict=True):
        totals[owner] += number
    return totals


@lru_cache(maxsize=256)
def assign_buckets(costs: tuple[int, ...], owners: tuple[Hashable, ...], buckets: int) -> tuple[int, ...]:
    """Return the bucket of each matrix, given the work on it: every owner has about as much to do in each bucket.

    Owners that are balanced over all matrices are so in each bucket then, and none waits long for another.
    """
    bucket_of = [0] * len(costs)
    for owned in group_by(range(len(owners)), lambda index: owners[index]).values():
        of_owner = assign_owners(tuple(costs[index] for index in owned), buckets)
        for index, bucket in zip(owned, of_owner, strict=True):
            bucket_of[index] = bucket
    return tuple(bucket_of)
