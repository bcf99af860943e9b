"""Who owns which matrix."""

import itertools
import random

import pytest

from dion2_lightning.distributed.owners import assign_owners, orthonormalization_cost


def largest_load(costs: tuple[int, ...], owners: tuple[int, ...], ranks: int) -> int:
    return max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks))


def test_every_matrix_has_one_owner_and_equal_ones_are_spread_evenly():
    owners = assign_owners((7,) * 12, 4)
    assert sorted(owners) == sorted(list(range(4)) * 3)
    assert assign_owners((), 3) == ()


def test_dealing_anew_finds_what_longest_first_misses():
    """Longest first ends with loads 7 and 5 of the first, and with 15 of the second, where 12 is best."""
    few, many = (3, 3, 2, 2, 2), (7, 7, 6, 6, 5, 5, 4, 4, 4)
    assert largest_load(few, assign_owners(few, 2), 2) == 6
    assert largest_load(many, assign_owners(many, 4), 4) < 15


@pytest.mark.parametrize("seed", range(20))
def test_two_ranks_are_as_even_as_can_be(seed):
    """Against every way of parting up to ten matrices in two."""
    random.seed(seed)
    costs = tuple(random.choices([random.randint(1, 30) for _ in range(3)], k=random.randint(2, 10)))
    best = min(largest_load(costs, owners, 2) for owners in itertools.product(range(2), repeat=len(costs)))
    assert largest_load(costs, assign_owners(costs, 2), 2) <= max(best, 1.01 * sum(costs) / 2)


@pytest.mark.parametrize("ranks", [72, 96, 128])
def test_llama_70b_at_a_quarter_is_even_within_five_percent(ranks):
    shapes = [(2048, 8192), (256, 8192), (256, 8192), (2048, 8192), *[(2048, 28672)] * 3] * 80
    costs = tuple(orthonormalization_cost(*shape) for shape in shapes)
    assert largest_load(costs, assign_owners(costs, ranks), ranks) * ranks <= 1.05 * sum(costs)
