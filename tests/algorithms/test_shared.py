"""What ranks add up to know which gradients there are."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from dion2_lightning.algorithms.shared import MORE_THAN_RANKS, gradient_counts
from dion2_lightning.matrices.layout import Layout, Rectangle


def test_the_sums_tell_whether_all_replicas_have_the_same_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two matrices in two parts, in three replicas; the first matrix in every combination."""
    replicas, parts = range(3), range(2)
    monkeypatch.setattr(Layout, "own_rank", property(lambda layout: layout.group))
    rectangles = tuple(Rectangle((8 * part, 8 * part + 8), (0, 6)) for part in parts)

    def counts_of(replica: int, part: int, has_it: bool) -> list[int]:
        of_rank: Any = part
        layout = Layout(of_rank, rectangles)
        updates: Any = [SimpleNamespace(layout=layout, has_gradient=each) for each in (has_it, True)]
        known: Any = SimpleNamespace(count=len(replicas), number=replica)
        return gradient_counts(updates, known)

    ranks = [*itertools.product(replicas, parts)]
    for have_it in itertools.product([False, True], repeat=len(ranks)):
        counts = [counts_of(*rank, has_it) for rank, has_it in zip(ranks, have_it, strict=True)]
        first, other = (divmod(sum(column), MORE_THAN_RANKS) for column in zip(*counts, strict=True))
        assert (first[1], other) == (sum(have_it), (0, len(ranks)))
        assert (first[0] == 0) == (have_it[:2] == have_it[2:4] == have_it[4:])
