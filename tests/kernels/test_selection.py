"""Norms, top-k and moving slices, for views whose memory runs along and across the slices."""

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels import selection
from dion2_lightning.kernels.selection import (
    CHUNK,
    ESTIMATE_ERROR,
    add_,
    can_estimate_sums,
    decay_,
    estimate_slice_sums,
    gather,
    largest,
    largest_by_estimates,
    put_,
    selected_count,
    slice_sums,
)

PLACES = {
    "along": lambda stack: stack.clone(),
    "across": lambda stack: stack.mT.contiguous().mT,
    "neither": lambda stack: torch.zeros(2, 6, 10)[..., ::2].copy_(stack),
    "entry by entry": lambda stack: torch.zeros(6, 5, 2).permute(2, 0, 1).copy_(stack),
    "column by column": lambda stack: torch.zeros(5, 2, 6).permute(1, 2, 0).copy_(stack),
    "side by side with others": lambda stack: torch.zeros(6, 5, 3)[..., :2].permute(2, 0, 1).copy_(stack),
    "heads of inputs": lambda stack: torch.zeros(6, 2, 8)[..., :5].transpose(0, 1).copy_(stack),
}


@pytest.fixture(params=PLACES)
def slices(request) -> Tensor:
    """Two matrices of 6 slices with 5 entries each, in every memory order."""
    return PLACES[request.param](torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(params=["rows", "columns"])
def pieces(request) -> Tensor:
    """Two matrices of 6 slices with 3 pieces of 4 entries each, and others in between."""
    values = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    if request.param == "rows":
        return torch.zeros(2, 6, 3, 7)[..., :4].transpose(1, 2).copy_(values)
    return torch.zeros(2, 3, 7, 6)[:, :, :4].mT.copy_(values)


def as_whole(pieces: Tensor) -> Tensor:
    """A copy of the slices without others in between."""
    return pieces.transpose(1, 2).flatten(2)


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


@pytest.mark.parametrize("block", [8, 2**20])
@pytest.mark.parametrize("repeats", [1, 7, 64, 74])
def test_sums_of_a_period(repeats, block, monkeypatch):
    """Every third entry, as blocks that lie in between each other have it; 74 is 2 times 37, more than a chunk."""
    monkeypatch.setattr(selection, "BLOCK", block)
    monkeypatch.setattr(selection, "ESTIMATED_BLOCK", block)
    rows = torch.randn(2, 5, 3 * repeats, generator=torch.Generator().manual_seed(0))
    expected = rows.double().abs().unflatten(-1, (repeats, 3)).sum(-2)
    torch.testing.assert_close(slice_sums(rows, 3), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(estimate_slice_sums(rows, 3), expected, rtol=ESTIMATE_ERROR, atol=0)


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


ORDERS = {
    "rows": lambda slices: slices.contiguous(),
    "rows with gaps": lambda slices: torch.zeros(*slices.shape[:2], 2 * slices.shape[2])[..., ::2].copy_(slices),
    "columns": lambda slices: slices.mT.contiguous().mT,
    "columns with gaps": lambda slices: torch.zeros(*slices.mT.shape, 2)[..., 0].mT.copy_(slices),
}
each_order = pytest.mark.parametrize("order", ORDERS)


def of_many_sizes(count: int, n: int, m: int) -> Tensor:
    """Slices of entries from 1e-4 to 1e4 in many orders: what float32 sums of them differ by most."""
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(count, 1, m, generator=generator) * torch.logspace(-4, 4, m)
    orders = torch.rand(count, n, m, generator=generator).argsort(-1)
    return entries.expand(-1, n, -1).gather(-1, orders)


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
    monkeypatch.setattr(selection, "ESTIMATED_BLOCK", block)
    slices = ORDERS[order](of_many_sizes(2, 64, 4096))
    assert can_estimate_sums(slices)
    errors = (estimate_slice_sums(slices) / slices.double().abs().sum(-1) - 1).abs()
    assert 1e-8 < errors.max() < ESTIMATE_ERROR


@each_order
@pytest.mark.parametrize("block", [2**12, 2**16])
def test_sums_do_not_depend_on_blocks(order, block, monkeypatch):
    slices = ORDERS[order](of_many_sizes(2, 64, 4096))
    expected = slices.double().abs().sum(-1)
    monkeypatch.setattr(selection, "BLOCK", block)
    torch.testing.assert_close(slice_sums(slices), expected, rtol=1e-13, atol=0)


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


def test_put(slices):
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    expected = slices.clone()
    for matrix, indices, its_values in zip(expected, INDICES, values, strict=True):
        matrix[indices] = its_values
    put_(slices, INDICES, values)
    assert torch.equal(slices, expected)


def test_gather_from_pieces(pieces):
    expected = torch.stack([each[at] for each, at in zip(as_whole(pieces), INDICES, strict=True)])
    assert torch.equal(gather(pieces, INDICES), expected)


@pytest.mark.parametrize("change_pieces", [add_, put_])
def test_change_of_pieces(pieces, change_pieces):
    """What lies in between stays: the fixture has zeros there."""
    change = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
    expected = as_whole(pieces)
    for matrix, indices, its_change in zip(expected, INDICES, change, strict=True):
        matrix[indices] = its_change + (matrix[indices] if change_pieces is add_ else 0)
    change_pieces(pieces, INDICES, change)
    assert torch.equal(as_whole(pieces), expected)
    everything = torch.tensor(pieces.untyped_storage().tolist(), dtype=torch.uint8).view(torch.float32)
    assert everything.count_nonzero() == pieces.numel() < everything.numel()


@pytest.mark.parametrize("size", [1, 40, 2**20])
def test_rows_that_matrices_share_are_copied_in_parts(size, monkeypatch):
    """The numbers of another matrix stay as they are, also a zero's sign."""
    monkeypatch.setattr(selection, "SHARED", size)
    whole = torch.full((6, 5, 2), -0.0)
    slices = whole.permute(2, 0, 1)
    change = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    add_(slices, INDICES, change)
    assert torch.equal(gather(slices, INDICES), change)
    assert (whole.signbit() & (whole == 0)).sum() == whole.numel() - change.numel()


@pytest.mark.parametrize("shape", [(2, 6, 0), (0, 6, 5), (1, 0, 5), (2, 3, 6, 0), (0, 3, 6, 4)])
def test_nothing_is_moved_where_nothing_is(shape):
    slices = torch.zeros(shape)
    k = 0 if 0 in shape[-2:-1] else 3
    indices = torch.zeros(shape[0], k, dtype=torch.int64)
    gathered = gather(slices, indices)
    assert gathered.shape == (shape[0], k, shape[-1] * (3 if len(shape) == 4 else 1))
    add_(slices, indices, gathered)
    put_(slices, indices, gathered)
