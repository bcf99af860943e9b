"""Which ranks share a DTensor's matrices and what each of them holds, on meshes of fake ranks.

The expectation is what FSDP2 and TP do to a matrix whose entries are numbered: ``torch.chunk``, one after the other.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dion2_lightning.algorithms.algorithm import StateTensor
from dion2_lightning.matrices.layout import (
    Layout,
    Rectangle,
    Replicas,
    held_coordinates,
    layout_of,
    local,
    placed_like_stack,
)

RANKS = 8
RANK = 5
FSDP_OVER_TP = (_StridedShard(0, split_factor=2), Shard(0))


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    """A fake group of eight ranks, of which this process is the sixth."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


def mesh_of(*shape: int, order: list[int] | None = None, named: bool = True) -> DeviceMesh:
    """All eight ranks, in order unless told otherwise."""
    mesh_ranks = torch.tensor(order if order is not None else list(range(RANKS))).view(shape)
    return DeviceMesh("cpu", mesh_ranks, mesh_dim_names=("a", "b", "c")[: len(shape)] if named else None)


def fake_dtensor(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...]) -> DTensor:
    """A DTensor without data: only its metadata is read here."""
    stride = torch.empty(shape, device="meta").stride()
    part = torch.empty([0] * len(shape))
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def layout(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...], batched: bool = False) -> Layout:
    return layout_of(fake_dtensor(shape, mesh, placements), "the weight", batched=batched, process_group=None, known={})


def part_at(tensor: Tensor, coordinate: list[int], mesh: DeviceMesh, placements: tuple[Any, ...]) -> Tensor:
    """What the rank at a coordinate holds; under a strided shard the inner mesh dimension is split first."""
    dims = list(range(mesh.ndim))
    if any(isinstance(placement, _StridedShard) for placement in placements):
        dims.reverse()
    for dim in dims:
        if not isinstance(placements[dim], Replicate):
            axis = placements[dim].dim
            chunks = tensor.chunk(mesh.size(dim), axis)
            index = coordinate[dim]
            tensor = chunks[index] if index < len(chunks) else tensor.narrow(axis, 0, 0)
    return tensor


def expected_blocks(
    shape: tuple[int, int], mesh: DeviceMesh, placements: tuple[Any, ...], ranks: list[int]
) -> list[Rectangle | None]:
    """The rectangle of each rank, read off a matrix of numbered entries; None where it holds nothing."""
    numbered = torch.arange(shape[0] * shape[1]).view(shape)
    blocks: list[Rectangle | None] = []
    for rank in ranks:
        part = part_at(numbered, (mesh.mesh == rank).nonzero()[0].tolist(), mesh, placements)
        if part.numel() == 0:
            blocks.append(None)
            continue
        (top, left), (bottom, right) = divmod(int(part[0, 0]), shape[1]), divmod(int(part[-1, -1]), shape[1])
        assert torch.equal(part, numbered[top : bottom + 1, left : right + 1])
        blocks.append(Rectangle((top, bottom + 1), (left, right + 1)))
    return blocks


def size(block: Rectangle) -> int:
    (top, bottom), (left, right) = block
    return (bottom - top) * (right - left)


@pytest.mark.parametrize("shape", [(16, 24), (37, 53), (3, 64), (64, 3), (1, 9), (5, 1)], ids=str)
@pytest.mark.parametrize(
    ("mesh_shape", "placements", "sharing", "holding_the_same"),
    [
        ((8,), (Shard(0),), list(range(8)), None),
        ((8,), (Shard(1),), list(range(8)), None),
        ((8,), (Shard(-1),), list(range(8)), None),
        ((2, 4), (Replicate(), Shard(0)), [4, 5, 6, 7], [1, 5]),
        ((4, 2), (Shard(0), Replicate()), [1, 3, 5, 7], [4, 5]),
        ((4, 2), (Shard(0), Shard(1)), list(range(8)), None),
        ((4, 2), (Shard(1), Shard(0)), list(range(8)), None),
        ((4, 2), (Shard(0), Shard(0)), list(range(8)), None),
        ((4, 2), FSDP_OVER_TP, list(range(8)), None),
        ((2, 2, 2), (Replicate(), *FSDP_OVER_TP), [4, 5, 6, 7], [1, 5]),
    ],
    ids=str,
)
def test_blocks(
    shape: Any, mesh_shape: Any, placements: Any, sharing: list[int], holding_the_same: list[int] | None
) -> None:
    """Every rank that shares the matrix, in the group's order, with the rectangle it holds; and this one's replicas."""
    mesh = mesh_of(*mesh_shape)
    found = layout(shape, mesh, placements)
    assert found.group is not None
    assert dist.get_process_group_ranks(found.group) == sharing
    assert (found.replicas is None) == (holding_the_same is None)
    if holding_the_same is not None:
        assert dist.get_process_group_ranks(found.replicas.group) == holding_the_same
        assert dist.get_process_group_ranks(found.replicas.everyone) == list(range(8))
        assert found.replicas.numbers == tuple(range(2))
    if isinstance(placements[0], Replicate) and len(placements) == 3:  # HSDP over TP: this rank's replica
        mesh, placements = mesh["b", "c"], placements[1:]
    placements = tuple(Shard(1) if placement == Shard(-1) else placement for placement in placements)
    expected = expected_blocks(shape, mesh, placements, sharing)
    for rank, block, rectangle in zip(sharing, found.rectangles, expected, strict=True):
        assert block == rectangle if rectangle is not None else size(block) == 0, f"rank {rank}"
    assert sum(size(block) for block in found.rectangles) == shape[0] * shape[1]


def test_meshes_in_any_order() -> None:
    """Torch sorts the ranks of a group; blocks follow the group, not the mesh."""
    mesh = mesh_of(4, 2, order=[7, 0, 6, 1, 5, 2, 4, 3])
    found = layout((20, 30), mesh, (Shard(0), Replicate()))
    assert dist.get_process_group_ranks(found.group) == [4, 5, 6, 7]
    assert [block.rows for block in found.rectangles] == [(15, 20), (10, 15), (5, 10), (0, 5)]
    # The mesh's second column belongs to the second replica, whatever its ranks.
    assert dist.get_process_group_ranks(found.replicas.group) == [2, 5]
    assert found.replicas.numbers == (1, 0)
    both = layout((20, 30), mesh, (Shard(0), Shard(1)))
    assert dist.get_process_group_ranks(both.group) == list(range(8))
    assert both.rectangles == tuple(expected_blocks((20, 30), mesh, (Shard(0), Shard(1)), list(range(8))))


def test_two_layouts_over_the_same_ranks_share_a_group() -> None:
    """So that their matrices travel together; a new group would be made at every step otherwise."""
    mesh = mesh_of(4, 2)
    layouts = [layout((20, 30), mesh, placements) for placements in (FSDP_OVER_TP, (Shard(0), Shard(1)))]
    assert layouts[0].group is layouts[1].group


@pytest.mark.parametrize(
    ("shape", "placements", "batched", "holding_the_same"),
    [
        ((6, 8), (Replicate(), Replicate()), False, list(range(8))),
        ((8, 4, 6), (Shard(0), Replicate()), True, [4, 5]),
        ((8, 4, 6), (Shard(0), Shard(0)), True, None),
        ((3, 4, 6), (Replicate(), Shard(0)), True, [1, 3, 5, 7]),
    ],
    ids=str,
)
def test_whole_matrices_are_shared_with_replicas_alone(
    shape: Any, placements: Any, batched: bool, holding_the_same: list[int] | None
) -> None:
    found = layout(shape, mesh_of(4, 2), placements, batched)
    assert (found.group, found.rectangles) == (None, ())
    assert (found.replicas is None) == (holding_the_same is None)
    if holding_the_same is not None:
        assert dist.get_process_group_ranks(found.replicas.group) == holding_the_same
        assert found.replicas.everyone is found.replicas.group
        assert found.replicas.numbers == tuple(range(len(holding_the_same)))


def test_a_dimension_of_one_rank_shares_nothing() -> None:
    assert layout((6, 8), mesh_of(8, 1), (Shard(0), Replicate())).replicas is None
    assert layout((6, 8), mesh_of(1, 8), (Shard(0), Shard(1))).group is mesh_of(8).get_group()
    assert layout((6, 8), mesh_of(1, 8), (Shard(0), Replicate())).group is None


def test_no_replicas_on_a_mesh_without_names() -> None:
    """Torch makes a group over several dimensions by their names; without, every replica works by itself."""
    found = layout((16, 24), mesh_of(4, 2, named=False), (Replicate(), Shard(0)))
    assert dist.get_process_group_ranks(found.group) == [4, 5]
    assert found.replicas is None


@pytest.mark.parametrize(("axis", "spans"), [(1, [(0, 5), (5, 10)]), (2, [(0, 7), (7, 14)])])
def test_stacks_share_each_matrix_with_those_that_have_the_same_experts(axis: int, spans: Any) -> None:
    found = layout((6, 10, 14), mesh_of(4, 2), (Shard(0), Shard(axis)), batched=True)
    assert dist.get_process_group_ranks(found.group) == [4, 5]
    assert [block[axis - 1] for block in found.rectangles] == spans
    assert {block[2 - axis] for block in found.rectangles} == {(0, 14 if axis == 1 else 10)}


def test_plain_parameters_are_replicas_of_a_group() -> None:
    weight = torch.ones(4, 6)
    group = dist.group.WORLD
    replicas = Replicas(group, tuple(range(8)), group)
    assert layout_of(weight, "w", batched=False, process_group=group, known={}) == Layout(replicas=replicas)
    assert layout_of(weight, "w", batched=False, process_group=None, known={}) == Layout()
    alone = dist.new_group([RANK])
    assert layout_of(weight, "w", batched=False, process_group=alone, known={}) == Layout()


@pytest.mark.parametrize(
    ("mesh_shape", "named", "placements", "message"),
    [
        ((8,), True, (Partial(),), r"the weight is placed as \(Partial\(sum\),\): sum it up with redistribute"),
        ((4, 2), True, (Shard(0), Partial()), r"the weight is placed as .*Partial.*: sum it up"),
        ((8,), True, (_StridedShard(0, split_factor=2),), "the weight is placed as .* which leaves scattered rows"),
        ((4, 2), True, (_StridedShard(0, split_factor=2), Replicate()), "which leaves scattered rows on a rank"),
        ((4, 2), True, (_StridedShard(0, split_factor=4), Shard(0)), "which leaves scattered rows on a rank"),
        ((4, 2), True, (_StridedShard(1, split_factor=2), Shard(0)), "which leaves scattered rows on a rank"),
        ((2, 2, 2), True, (Shard(0), Shard(1), Shard(0)), "is sharded over 3 dimensions .* at most 2 are supported"),
        ((4, 2), False, (Shard(0), Shard(1)), "is sharded over two dimensions of a mesh without mesh_dim_names"),
    ],
    ids=str,
)
def test_what_is_refused(mesh_shape: Any, named: bool, placements: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout((16, 24), mesh_of(*mesh_shape, named=named), placements)


def test_selections_of_stacks_are_placed_like_the_stacks() -> None:
    """By the counting axis only: ranks that share a matrix know all of its selection."""
    mesh = mesh_of(4, 2)
    rows = torch.arange(10).view(2, 5)
    placed = placed_like_stack(rows, fake_dtensor((8, 10, 14), mesh, (Shard(0), Shard(1))), 8)
    assert isinstance(placed, DTensor)
    assert (placed.shape, placed.placements) == ((8, 5), (Shard(0), Replicate()))
    assert torch.equal(placed.to_local(), rows)
    assert placed_like_stack(rows, fake_dtensor((2, 10, 14), mesh, (Replicate(), Shard(1))), 2) is rows
    assert placed_like_stack(rows, torch.ones(2, 3, 4), 2) is rows


ALONG_ROWS: list[tuple[Any, Any]] = [
    ((8,), (Shard(0),)),
    ((2, 4), (Replicate(), Shard(0))),
    ((4, 2), (Shard(0), Shard(0))),
    ((4, 2), FSDP_OVER_TP),
    ((2, 2, 2), (Replicate(), *FSDP_OVER_TP)),
    ((8,), (Replicate(),)),
    (None, None),
]
ALONG_BOTH: list[tuple[Any, Any]] = [((4, 2), (Shard(0), Shard(1))), ((4, 2), (Shard(1), Shard(0)))]
SHAPES = [(37, 53), (3, 64), (64, 3), (5, 12, 20), (9, 4, 3, 3)]


@pytest.mark.parametrize(
    ("shape", "mesh_shape", "placements"),
    [
        *(((37,), *layout) for layout in ALONG_ROWS),
        *((shape, *layout) for shape in SHAPES for layout in ALONG_ROWS + ALONG_BOTH),
    ],
    ids=str,
)
def test_coordinates(shape: tuple[int, ...], mesh_shape: Any, placements: Any) -> None:
    """Row and column numbers of what each rank holds, read off a tensor whose entries are numbered."""
    numbered = torch.arange(torch.Size(shape).numel()).view(shape)
    mesh = None if mesh_shape is None else mesh_of(*mesh_shape)
    part = numbered if mesh is None else part_at(numbered, mesh.get_coordinate(), mesh, placements)
    parameter = numbered if mesh is None else fake_dtensor(shape, mesh, placements)
    rows, columns = held_coordinates(parameter)
    assert torch.equal((rows.unsqueeze(-1) * shape[-1] + columns).flatten(), part.flatten())


def test_coordinates_of_scattered_rows() -> None:
    """A strided placement without the one that it stands behind: a rank holds a part of each of its pieces."""
    mesh = mesh_of(2, 4)
    rows, columns = held_coordinates(fake_dtensor((20, 3), mesh, (Replicate(), _StridedShard(0, split_factor=2))))
    assert rows.tolist() == [3, 4, 5, 13, 14, 15]  # the second of four in each half of twenty, cut as 3, 3, 3, 1
    assert columns.tolist() == [0, 1, 2]


def test_coordinates_of_a_number() -> None:
    assert [each.tolist() for each in held_coordinates(torch.tensor(3.0))] == [[0], [0]]


def test_local_shares_memory() -> None:
    part = torch.zeros(2, 6)
    local(DTensor.from_local(part, mesh_of(8), (Shard(0),), run_check=False)).fill_(1.0)
    assert part.all()
    assert local(part) is part


class DTensorOperations(TorchDispatchMode):
    """Records the operations on DTensors, for which torch plans shardings."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, DTensor) for each in args):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize(
    "placements", [(Replicate(), *FSDP_OVER_TP), (Shard(1), Replicate(), Shard(0))], ids=["rows", "rows and columns"]
)
def test_zeros_are_placed_like_their_parameter_and_torch_plans_nothing(
    placements: tuple[Any, ...], dtype: torch.dtype | None
) -> None:
    mesh = mesh_of(2, 2, 2)
    part = part_at(torch.ones(37, 53, dtype=torch.bfloat16), mesh.get_coordinate(), mesh, placements).contiguous()
    shape, stride = torch.Size((37, 53)), (53, 1)
    parameter = torch.nn.Parameter(
        DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
    )
    expected = torch.zeros_like(parameter, dtype=dtype)
    with DTensorOperations() as operations, torch.no_grad():
        zeros = StateTensor.like(parameter, dtype).zeros_for(parameter)
    assert operations.seen == []
    assert type(zeros) is type(expected)
    assert not zeros.requires_grad
    for name in ("shape", "dtype", "device_mesh", "placements"):
        assert getattr(zeros, name) == getattr(expected, name), name
    assert zeros.stride() == expected.stride()
    assert torch.equal(local(zeros), local(expected))
    assert local(zeros).stride() == local(expected).stride()


@pytest.mark.parametrize("placements", [(Replicate(), Replicate(), Shard(0)), (Shard(0), Replicate(), Replicate())])
def test_zeros_of_another_shape_are_where_the_parameter_is(placements: tuple[Any, ...]) -> None:
    """Under CPU offload the mesh is of GPUs and parameters are on the CPU; states must be beside them."""
    mesh = mesh_of(2, 2, 2)
    parameter = fake_dtensor((37, 53), mesh, placements)
    state = StateTensor((37, 1), torch.float32, torch.device("meta"), placements)
    with DTensorOperations() as operations:
        zeros: Any = state.zeros_for(parameter)
    assert operations.seen == []
    assert local(zeros).device.type == "meta"  # the mesh is of CPUs
    expected = part_at(torch.ones(37, 1), mesh.get_coordinate(), mesh, placements)
    assert (zeros.shape, zeros.placements, local(zeros).shape) == ((37, 1), placements, expected.shape)
