"""Stacks that share a buffer."""

import pytest
import torch

from dion2_lightning.kernels.stacks import adjacent, concatenate, concatenate_slices, empty_stacks

SHAPES = [(1, 4, 6), (2, 4, 5), (3, 4, 6), (2, 4, 6)]


@pytest.mark.parametrize("along", [True, False])
def test_stacks_of_one_shape_are_adjacent(along):
    stacks = empty_stacks(SHAPES, [along] * 4, [torch.float32] * 4, torch.device("cpu"))
    assert [tuple(stack.shape) for stack in stacks] == SHAPES
    for number, stack in enumerate(stacks):
        stack.copy_(torch.randn(stack.shape, generator=torch.Generator().manual_seed(number)))
    equal = [stacks[index] for index in (0, 2, 3)]
    together = adjacent(equal)
    assert together is not None
    assert together.shape == (6, 4, 6)
    assert together.data_ptr() == stacks[0].data_ptr() == concatenate(equal).data_ptr()
    assert torch.equal(together, torch.cat(equal))
    assert (together.stride(-1) == 1) == along
    for apart in ([stacks[0], stacks[1]], [stacks[0], stacks[3]], [stacks[2], stacks[0]], [equal[0], equal[1].clone()]):
        assert adjacent(apart) is None


def test_orders_and_dtypes_are_apart():
    dtypes = [torch.float32, torch.float32, torch.bfloat16]
    stacks = empty_stacks([(1, 4, 6)] * 3, [True, False, True], dtypes, torch.device("cpu"))
    assert [stack.dtype for stack in stacks] == dtypes
    assert [stack.stride(-1) == 1 for stack in stacks] == [True, False, True]
    assert adjacent([stacks[0], stacks[2]]) is None


@pytest.mark.parametrize(
    ("function", "shapes", "dim"),
    [(concatenate, [(2, 4, 6), (1, 4, 6)], 0), (concatenate_slices, [(2, 3, 6), (2, 5, 6)], 1)],
)
@pytest.mark.parametrize("along", [True, False])
def test_what_is_apart_is_copied_in_its_memory_order(function, shapes, dim, along):
    stacks = [torch.randn(shape) for shape in shapes]
    if not along:
        stacks = [stack.mT.contiguous().mT for stack in stacks]
    together = function(stacks)
    assert torch.equal(together, torch.cat(stacks, dim))
    assert (together.stride(-1) == 1) == along
    assert function(stacks[:1]) is stacks[0]
