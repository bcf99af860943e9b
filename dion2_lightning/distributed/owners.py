"""Who orthonormalizes which of the matrices that ranks share: every rank about the same work.

Whole matrices are dealt out, so how even it can be depends on the matrices: with few large ones for each rank, on
whether the number of ranks divides theirs.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from dion2_lightning.matrices.layout import alike

GOOD_ENOUGH: Final = 1.01
"""The busiest rank's work over the mean; dealing anew stops here."""

MAX_DEALS: Final = 20_000
"""Ways of dealing out two ranks' matrices that are looked at; models have a handful of kinds, and far fewer."""


def orthonormalization_cost(k: int, m: int) -> int:
    """Return the FLOPs of orthonormalizing a (k, m) matrix, by which owners are balanced."""
    short, long = sorted((k, m))
    return 20 * short * short * long + 10 * short**3


@lru_cache(maxsize=256)
def assign_owners(costs: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Return which rank owns each matrix.

    The costliest matrix first, each to the rank with the least to do (longest processing time); then the busiest
    rank's matrices and another's are dealt anew between the two, as long as that relieves it.

    Args:
        costs: Of each matrix, the same on every rank.
        ranks: How many share them.
    """
    held = _longest_first(costs, ranks)
    while max(_loads(held, costs)) * ranks > GOOD_ENOUGH * sum(costs) and _relieve_busiest(held, costs):
        pass
    owner_of = {matrix: rank for rank, matrices in enumerate(held) for matrix in matrices}
    return tuple(owner_of[matrix] for matrix in range(len(costs)))


def _longest_first(costs: Sequence[int], ranks: int) -> list[list[int]]:
    held: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for matrix in sorted(range(len(costs)), key=lambda matrix: -costs[matrix]):
        load, rank = heapq.heappop(loads)
        held[rank].append(matrix)
        heapq.heappush(loads, (load + costs[matrix], rank))
    return held


def _loads(held: Sequence[Sequence[int]], costs: Sequence[int]) -> list[int]:
    return [sum(costs[matrix] for matrix in matrices) for matrices in held]


def _relieve_busiest(held: list[list[int]], costs: Sequence[int]) -> bool:
    """Deal the busiest rank's matrices and another's anew, if some deal is better; one rank of each kind is tried."""
    loads = _loads(held, costs)
    busiest = max(range(len(held)), key=loads.__getitem__)
    kinds = alike(
        sorted(range(len(held)), key=loads.__getitem__), lambda rank: tuple(sorted(costs[i] for i in held[rank]))
    )
    for other, *_ in kinds.values():
        halves = _halves(held[busiest] + held[other], costs)
        if max(_loads(halves, costs)) < loads[busiest]:
            held[busiest], held[other] = halves
            return True
    return False


def _halves(matrices: Sequence[int], costs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Part matrices in two, as evenly in cost as can be."""
    kinds = alike(matrices, costs.__getitem__)
    if math.prod(len(each) + 1 for each in kinds.values()) > MAX_DEALS:
        return list(matrices), []
    total = sum(costs[matrix] for matrix in matrices)

    def unevenness(counts: tuple[int, ...]) -> int:
        return abs(2 * sum(count * cost for count, cost in zip(counts, kinds, strict=True)) - total)

    best = min(itertools.product(*(range(len(each) + 1) for each in kinds.values())), key=unevenness)
    parted = list(zip(best, kinds.values(), strict=True))
    return [i for count, each in parted for i in each[:count]], [i for count, each in parted for i in each[count:]]
