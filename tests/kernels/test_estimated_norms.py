"""Estimates of norms select what norms do."""

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels import estimated_norms
from dion2_lightning.kernels.estimated_norms import (
    CHUNK,
    ESTIMATE_ERROR,
    can_estimate_sums,
    estimate_slice_sums,
    largest_by_estimates,
)
from dion2_lightning.kernels.selection import largest, slice_sums
from tests.kernels.sample_slices import ORDERS, of_many_sizes

each_order = pytest.mark.parametrize("order", ORDERS)


def selected_by_estimates(slices: Tensor, k: int) -> tuple[Tensor, int]:
    """What estimates select, and how many exact norms that took."""
    sizes = []

    def exact(matrix: int, indices: Tensor) -> Tensor:
        sizes.append(len(indices))
        return slice_sums(slices[matrix, indices]).float()

    return largest_by_estimates(estimate_slice_sums(slices), k, exact), sum(sizes)


@each_order
@pytest.mark.parametrize("block", [2**12, 2**16, 2**20])
def test_errors_of_estimates(order, block, monkeypatch):
    monkeypatch.setattr(estimated_norms, "ESTIMATED_BLOCK", block)
    slices = ORDERS[order](of_many_sizes(2, 64, 4096))
    assert can_estimate_sums(slices)
    errors = (estimate_slice_sums(slices) / slices.double().abs().sum(-1) - 1).abs()
    assert 1e-8 < errors.max() < ESTIMATE_ERROR


def test_what_has_no_whole_chunks_or_is_small_is_not_estimated():
    assert can_estimate_sums(torch.zeros(2, 2048, CHUNK))
    assert not can_estimate_sums(torch.zeros(2, 1024, CHUNK))
    assert not can_estimate_sums(torch.zeros(1, 4096, CHUNK + 1))
    assert not can_estimate_sums(torch.zeros(1, 4096, CHUNK, dtype=torch.float64))
    assert not can_estimate_sums(torch.zeros(0, 4, CHUNK))


@each_order
@pytest.mark.parametrize("k", [1, 7, 63, 64])
def test_estimates_select_the_lower_index_among_equals(order, k):
    """Sums of the same entries in other orders: estimates differ, norms do not."""
    slices = ORDERS[order](of_many_sizes(3, 64, 4096))
    by_estimates, _ = selected_by_estimates(slices, k)
    assert torch.equal(by_estimates, torch.arange(k).expand(3, -1))
    assert k == 64 or not torch.equal(largest(estimate_slice_sums(slices), k), by_estimates)


@pytest.mark.parametrize("seed", range(20))
def test_estimates_that_are_off_by_the_largest_error_select_like_norms(seed):
    """Norms around the threshold that differ by few errors or by nothing, each estimated as badly as can be."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-12, 13, (4, 60), generator=generator) * (ESTIMATE_ERROR / 4)
    norms = ((1 + steps.double()) * 10.0**seed).float()
    signs = torch.randint(0, 2, norms.shape, generator=generator) * 2 - 1
    estimates = norms.double() * (1 + signs * (ESTIMATE_ERROR - 2.0**-24))  # norms are rounded already
    for k in (1, 20, 30, 59):
        selected = largest_by_estimates(estimates, k, lambda matrix, indices: norms[matrix, indices])
        assert torch.equal(selected, largest(norms, k))
        assert k not in (20, 30) or not torch.equal(largest(estimates, k), selected)


def test_few_exact_norms_are_asked_for():
    slices = torch.randn(4, 512, 512, generator=torch.Generator().manual_seed(0))
    selected, exact_norms = selected_by_estimates(slices, 128)
    assert torch.equal(selected, largest(slice_sums(slices).float(), 128))
    assert exact_norms <= 8


def test_of_zeros_no_exact_norm_is_asked_for():
    slices = torch.zeros(3, 40, 64)
    slices[1, 30:] = 1
    for k in (1, 10, 20):
        selected, exact_norms = selected_by_estimates(slices, k)
        assert torch.equal(selected, largest(slice_sums(slices).float(), k))
        assert exact_norms <= (10 if k < 10 else 0)  # the ten that are equal, and not zero


VALUES = [float("nan"), float("inf"), 1e38, 5e36, 0.0, 1e-41, 1e-44]


@pytest.mark.parametrize("value", VALUES)
def test_estimates_select_like_norms_whatever_the_values(value):
    """Of these some sums are infinite in float32, or round to the same number, where float64 has different ones."""
    generator = torch.Generator().manual_seed(0)
    slices = torch.randn(3, 40, 128, generator=generator)
    slices[1, 3:20] = value
    slices[2] = value * torch.linspace(1, 1.2, 40).unsqueeze(1)
    for k in (1, 10, 30, 40):
        assert torch.equal(selected_by_estimates(slices, k)[0], largest(slice_sums(slices).float(), k))
