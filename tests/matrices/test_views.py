"""Which matrices a parameter yields."""

import pytest
import torch

from dion2_lightning.matrices.views import read_matrices


@pytest.mark.parametrize(
    ("shape", "batched", "transposed", "expected"),
    [
        ((6, 4), False, False, (1, (6, 4))),
        ((6, 4), False, True, (1, (4, 6))),
        ((3, 6, 4), True, False, (3, (6, 4))),
        ((3, 6, 4), True, True, (3, (4, 6))),
    ],
)
def test_shapes_are_out_in_whatever_the_storage(shape, batched, transposed, expected):
    (matrices,) = read_matrices(shape, batched, transposed)
    assert (matrices.count, matrices.shape) == expected


@pytest.mark.parametrize(
    ("shape", "transposed", "select", "axis"),
    [
        ((4, 6), False, "shorter", 0),
        ((6, 4), False, "shorter", 1),
        ((4, 6), True, "shorter", 1),
        ((6, 4), True, "shorter", 0),
        ((5, 5), False, "shorter", 0),
        ((5, 5), True, "shorter", 0),
        ((6, 4), False, "output", 0),
        ((4, 6), True, "output", 0),
    ],
)
def test_selection_axis(shape, transposed, select, axis):
    assert read_matrices(shape, False, transposed)[0].selection_axis(select) == axis


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_slices_are_views_along_the_axis(batched, transposed):
    """Slice i of axis 0 is what computes output i, of axis 1 what reads input i."""
    tensor = torch.arange(72.0).view(3, 6, 4) if batched else torch.arange(24.0).view(6, 4)
    (matrices,) = read_matrices(tuple(tensor.shape), batched, transposed)
    stack = tensor if batched else tensor[None]
    out_in = stack.mT if transposed else stack
    assert torch.equal(matrices.slices(stack, 0), out_in)
    assert torch.equal(matrices.slices(stack, 1), out_in.mT)
    matrices.slices(stack, 1).zero_()
    assert tensor.count_nonzero() == 0
