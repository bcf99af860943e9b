"""Norms, top-k and moving slices, for views whose memory runs along and across the slices."""

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels.selection import add_, decay_, gather, largest, selected_count, slice_sums


@pytest.fixture(params=["along", "across", "neither"])
def slices(request) -> Tensor:
    """Two matrices of 6 slices with 5 entries each, in every memory order."""
    values = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    if request.param == "across":
        return values.mT.contiguous().mT
    if request.param == "neither":
        return torch.zeros(2, 6, 10)[..., ::2].copy_(values)
    return values


INDICES = torch.tensor([[0, 2, 5], [1, 2, 3]])


@pytest.mark.parametrize(
    ("slices", "fraction", "k"),
    [(8, 0.25, 2), (9, 0.25, 3), (1, 0.25, 1), (3, 0.01, 1), (30, 0.1, 3), (49, 1 / 49, 1), (7, 1.0, 7), (10, 0.3, 3)],
)
def test_selected_count(slices, fraction, k):
    """k = ceil(fraction * n), at least 1; 0.1 * 30 and 49 / 49 are over 3 and 1 in floating point only."""
    assert selected_count(slices, fraction) == k


def test_norms(slices):
    assert torch.equal(slice_sums(slices), slices.double().abs().sum(-1))


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


def test_gather(slices):
    expected = torch.stack([slices[0][INDICES[0]], slices[1][INDICES[1]]])
    assert torch.equal(gather(slices, INDICES), expected)


def test_decay(slices):
    expected = slices.clone()
    for matrix, indices in zip(expected, INDICES, strict=True):
        matrix[indices] *= 0.5
    decay_(slices, INDICES, gather(slices, INDICES), 0.5)
    assert torch.equal(slices, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add(slices, dtype):
    change = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = slices.clone()
    for matrix, indices, its_change in zip(expected, INDICES, change, strict=True):
        matrix[indices] += its_change.float()
    add_(slices, INDICES, change)
    assert torch.equal(slices, expected)
