"""Which rank works on which of the matrices that ranks share: every rank about as much as the others.

Matrices are assigned whole, so balance depends on their sizes: with few large ones for each rank, on whether the
number of ranks divides theirs.
"""

import heapq
from functools import lru_cache
from typing import Final, NamedTuple

FLOPS_PER_BYTE: Final = 4000
"""Share replicated work if it saves at least this many FLOPs per byte received: what a GPU multiplies in the time a
byte takes between nodes."""


class Owner(NamedTuple):
    """Which rank works on a matrix.

    Attributes:
        replica: In which replica; None for the same rank of every one.
        rank: By which rank there.
    """

    replica: int | None
    rank: int


def assign_owners(costs: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Return which rank owns each matrix: the costliest first, each to the rank that has the least to do."""
    owners = [0] * len(costs)
    loads = [(0, rank) for rank in range(ranks)]
    for matrix in sorted(range(len(costs)), key=lambda matrix: -costs[matrix]):
        load, rank = heapq.heappop(loads)
        owners[matrix] = rank
        heapq.heappush(loads, (load + costs[matrix], rank))
    return tuple(owners)


@lru_cache(maxsize=256)
def plan_owners(
    costs: tuple[int, ...], nbytes: tuple[int, ...], ranks: int, replicas: int, share_replicas: bool | None
) -> tuple[Owner, ...]:
    """Return the owner of each matrix, given the FLOPs of the work on each and the size of its result in bytes.

    Each matrix is shared by parts among ``ranks``, and each part held by ``replicas`` ranks. These share the work where
    ``share_replicas`` says so; None: where that saves more than gathering the results costs.
    """
    if replicas > 1 and share_replicas is not False:
        # Owners go round the replicas: each gathers as much as the one with the most results has.
        owners = [Owner(owner % replicas, owner // replicas) for owner in assign_owners(costs, ranks * replicas)]
        results = [0] * replicas
        for owner, size in zip(owners, nbytes, strict=True):
            results[owner.replica or 0] += size
        saved = sum(costs) * (replicas - 1) // replicas
        if share_replicas or saved >= FLOPS_PER_BYTE * max(results) * (replicas - 1):
            return tuple(owners)
    return tuple(Owner(None, rank) for rank in assign_owners(costs, ranks))
