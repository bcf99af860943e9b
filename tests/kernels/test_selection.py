"""Norms and top-k."""

import pytest
import torch

from dion2_lightning.kernels import estimated_norms, selection
from dion2_lightning.kernels.estimated_norms import ESTIMATE_ERROR, estimate_slice_sums
from dion2_lightning.kernels.selection import largest, selected_count, slice_sums
from tests.kernels.sample_slices import ORDERS, PLACES, of_many_sizes, random_slices


@pytest.mark.parametrize(
    ("slices", "fraction", "k"),
    [
        (8, 0.25, 2),
        (9, 0.25, 3),
        (1, 0.25, 1),
        (3, 0.01, 1),
        (30, 0.1, 3),
        (49, 1 / 49, 1),
        (100, 0.07, 7),
        (200, 0.55, 110),
        (7, 1.0, 7),
        (10, 0.3, 3),
    ],
)
def test_selected_count(slices, fraction, k):
    """k = ceil(fraction * n), at least 1; 0.07 * 100 and 0.55 * 200 are over 7 and 110 in floating point only."""
    assert selected_count(slices, fraction) == k


@pytest.mark.parametrize("place", PLACES)
def test_norms(place):
    slices = random_slices(place)
    assert torch.equal(slice_sums(slices), slices.double().abs().sum(-1))


@pytest.mark.parametrize("block", [8, 2**20])
@pytest.mark.parametrize("repeats", [1, 7, 64, 74])
def test_sums_of_a_period(repeats, block, monkeypatch):
    """Every third entry, as blocks that lie in between each other have it; 74 is 2 times 37, more than a chunk."""
    monkeypatch.setattr(selection, "BLOCK", block)
    monkeypatch.setattr(estimated_norms, "ESTIMATED_BLOCK", block)
    rows = torch.randn(2, 5, 3 * repeats, generator=torch.Generator().manual_seed(0))
    expected = rows.double().abs().unflatten(-1, (repeats, 3)).sum(-2)
    torch.testing.assert_close(slice_sums(rows, 3), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(estimate_slice_sums(rows, 3), expected, rtol=ESTIMATE_ERROR, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [2**12, 2**16])
def test_sums_do_not_depend_on_blocks(order, block, monkeypatch):
    slices = ORDERS[order](of_many_sizes(2, 64, 4096))
    expected = slices.double().abs().sum(-1)
    monkeypatch.setattr(selection, "BLOCK", block)
    torch.testing.assert_close(slice_sums(slices), expected, rtol=1e-13, atol=0)


def test_norms_do_not_depend_on_the_order_of_the_entries():
    """What makes every layout select alike: float32 sums of these differ, float64 sums rounded to float32 do not."""
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(1, 64, 4096, generator=generator) * torch.logspace(-4, 4, 4096)
    shuffled = entries[..., torch.randperm(4096, generator=generator)]
    assert torch.equal(slice_sums(entries).float(), slice_sums(shuffled).float())
    assert not torch.equal(entries.abs().sum(-1), shuffled.abs().sum(-1))


def test_largest_is_sorted_and_takes_the_lower_index_among_equals():
    norms = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 0.0], [0.0] * 6])
    assert largest(norms, 2).tolist() == [[1, 2], [0, 1]]
    assert largest(norms, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
