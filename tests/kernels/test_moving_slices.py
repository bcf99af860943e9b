"""Moving slices, for views whose memory runs along and across them."""

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels.moving_slices import add_, decay_, gather, put_
from tests.kernels.sample_slices import PLACES, random_slices


@pytest.fixture(params=PLACES)
def slices(request) -> Tensor:
    """Two matrices of 6 slices with 5 entries each, in every memory order."""
    return random_slices(request.param)


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


@pytest.mark.parametrize("shape", [(2, 6, 0), (0, 6, 5), (1, 0, 5), (2, 3, 6, 0), (0, 3, 6, 4)])
def test_nothing_is_moved_where_nothing_is(shape):
    slices = torch.zeros(shape)
    k = 0 if 0 in shape[-2:-1] else 3
    indices = torch.zeros(shape[0], k, dtype=torch.int64)
    gathered = gather(slices, indices)
    assert gathered.shape == (shape[0], k, shape[-1] * (3 if len(shape) == 4 else 1))
    add_(slices, indices, gathered)
    put_(slices, indices, gathered)
