"""What ranks add up to know which gradients there are."""

import itertools
from types import SimpleNamespace
from typing import Any

from dion2_lightning.algorithms.shared import gradient_flags


def test_the_sum_of_flags_is_zero_where_all_replicas_have_the_same_parts() -> None:
    """Of two matrices in two parts, in three replicas; the first matrix in every combination."""
    parts, replicas = range(2), range(3)
    rectangles = tuple(((8 * part, 8 * part + 8), (0, 6)) for part in parts)

    def flags_of(replica: int, part: int, has_it: bool) -> list[int]:
        layout = SimpleNamespace(group=object(), rectangles=rectangles, own_rank=part)
        updates: Any = [SimpleNamespace(layout=layout, has_gradient=each) for each in (has_it, True)]
        known: Any = SimpleNamespace(count=len(replicas), number=replica)
        return gradient_flags(updates, known)

    ranks = [*itertools.product(replicas, parts)]
    for have_it in itertools.product([False, True], repeat=len(ranks)):
        flags = [flags_of(*rank, has_it) for rank, has_it in zip(ranks, have_it, strict=True)]
        count, count_of_other, difference, difference_of_other = map(sum, zip(*flags, strict=True))
        assert (count, count_of_other, difference_of_other) == (sum(have_it), len(ranks), 0)
        assert (difference == 0) == (have_it[:2] == have_it[2:4] == have_it[4:])
