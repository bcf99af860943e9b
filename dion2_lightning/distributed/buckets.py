"""In which buckets matrices go to their owners and back: while one bucket travels, another is orthonormalized."""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Final

from dion2_lightning.distributed.owners import assign_owners
from dion2_lightning.matrices.layout import group_by

MAX_OVERLAPPED: Final = 3
"""Buckets that are made for overlap. What cannot overlap is sending the first and returning the last: a third each."""

BUCKET_BYTES: Final = 2**25
"""A bucket made for overlap has at least so many bytes a rank: between nodes, at 50 GB/s, they take 0.7 ms, about ten
times what it takes to start two collectives more."""

MESSAGE_BYTES: Final = 2**17
"""And so many for each pair of ranks: at 50 GB/s they take 2.6 us, about as long as a message of no bytes. Smaller ones
would wait for the network's latency, which more buckets multiply."""


def count_buckets(
    owners: Sequence[Hashable], sizes: Sequence[int], working: Sequence[int], ranks: int, working_memory: int
) -> int:
    """Return in how many buckets matrices travel: one where they are small, and never more than an owner has matrices.

    Overlap asks for two or three. Memory asks for more where the work of an owner, and what is in flight beside it,
    would take more than the working memory: while a bucket is orthonormalized, a rank's parts of its two neighbours
    are there twice, as what it sends and as what it receives.

    Args:
        owners: Of each matrix.
        sizes: Bytes of each, on its way.
        working: Bytes that the work on each takes.
        ranks: How many share each by parts.
        working_memory: How many bytes a step may take.
    """
    parts = sum(sizes) // ranks
    of_owner: Counter[Hashable] = Counter()
    for owner, nbytes in zip(owners, working, strict=True):
        of_owner[owner] += nbytes
    for_overlap = min(MAX_OVERLAPPED, parts // max(BUCKET_BYTES, ranks * MESSAGE_BYTES))
    for_memory = -(-(max(of_owner.values(), default=0) + 4 * parts) // working_memory)
    return max(1, min(max(for_overlap, for_memory), max(Counter(owners).values(), default=0)))


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
