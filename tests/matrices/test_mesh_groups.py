"""Groups of ranks along dimensions of a mesh, made by these ranks alone where the mesh is a part of the world."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion2_lightning import Dion2, SelectionTracker
from dion2_lightning.matrices import mesh_groups
from dion2_lightning.matrices.mesh_groups import group_around
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import place


def weight_on(mesh: DeviceMesh, *placements: Placement) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(place(torch.randn(8, 6, generator=generator), mesh, placements))
    weight.grad = place(torch.randn(8, 6, generator=generator), mesh, placements)
    return weight


def check_a_rank_beside_a_mesh() -> None:
    """A group that all ranks of the world had to make would leave the counts apart by which torch names groups."""
    for names in (("replicate", "shard"), None):
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=names)
        if dist.get_rank() < 4:
            Dion2([weight_on(mesh, Replicate(), Shard(0)), weight_on(mesh, Shard(0), Shard(1))]).step()
    total = torch.ones(1)
    dist.all_reduce(total, group=dist.new_group())
    assert total == 5


def test_a_rank_beside_a_mesh() -> None:
    run_on_ranks(5, check_a_rank_beside_a_mesh)


def check_ranks_that_have_made_groups_of_their_own() -> None:
    """Before 2.15 torch names a group by how many each of its ranks has; under two names they would wait forever."""
    dist.new_group([0, 2, 4])
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("replicate", "shard"))
    if dist.get_rank() < 4:
        weight = weight_on(mesh, Replicate(), Shard(0))
        Dion2([weight]).step()
        alone = nn.Parameter(weight_on(mesh, Replicate(), Shard(0)).full_tensor())
        alone.grad = weight.grad.full_tensor()
        Dion2([alone]).step()
        torch.testing.assert_close(weight.full_tensor(), alone.data)
    else:
        mesh._flatten()  # where torch can make no other group, all ranks have to make it


def check_statistics_of_two_models() -> None:
    """One on each half of the ranks, on a mesh and on a part of it: neither counts the other in, or waits for it."""
    meshes = [
        DeviceMesh("cpu", torch.tensor(each).view(2, 1), mesh_dim_names=("dp", "tp")) for each in ([0, 1], [2, 3])
    ]
    number = dist.get_rank() // 2
    mesh = meshes[number]
    weights = [weight_on(mesh, Shard(0), Replicate()), *(weight_on(mesh["dp"], Shard(0)) for _ in range(1 + number))]
    optimizer, tracker = Dion2(weights, lr=0.1**number, weight_decay=0.0), SelectionTracker(every=1)
    tracker.attach(optimizer)
    optimizer.step()
    metrics = tracker.pop_metrics()
    assert metrics is not None
    before = weight_on(mesh, Shard(0), Replicate())
    change = (weights[0] - before).full_tensor()
    assert metrics.overall["update_rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-5)


def test_ranks_that_have_made_groups_of_their_own() -> None:
    run_on_ranks(5, check_ranks_that_have_made_groups_of_their_own)


def test_statistics_of_two_models() -> None:
    run_on_ranks(4, check_statistics_of_two_models)


@pytest.fixture
def mesh_of_eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """As rank 5 sees it; groups that members alone make are their ranks."""
    monkeypatch.setattr(mesh_groups, "_new_group", lambda mesh, dims, ranks: ranks)
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "ep"))
    dist.destroy_process_group()


def test_the_ranks_around_parts_of_a_mesh_that_is_a_part_of_the_world(mesh_of_eight: DeviceMesh) -> None:
    mesh = DeviceMesh("cpu", [[4, 5], [6, 7]], mesh_dim_names=("dp", "ep"))
    assert group_around([mesh["dp"], mesh["ep"]]) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["dp"], [5, 7]),
        (["dp", "ep"], [4, 5, 6, 7]),  # of the other stage no rank has a part or a replica of these
        ([("dp", "ep"), "ep"], [4, 5, 6, 7]),
        ([("dp", "ep")], [4, 5, 6, 7]),
        (["ep", "pp"], [0, 1, 4, 5]),
        (["pp", ("dp", "ep")], list(range(8))),
    ],
    ids=str,
)
def test_the_ranks_around_several_meshes(mesh_of_eight: DeviceMesh, parts: list[Any], expected: list[int]) -> None:
    group: Any = group_around([mesh_of_eight[part] for part in parts])
    assert list(group if isinstance(group, tuple) else dist.get_process_group_ranks(group)) == expected


def test_groups_of_an_earlier_process_group_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def new_group(mesh: DeviceMesh, dims: list[int], ranks: tuple[int, ...]) -> object:
        made.append(ranks)
        return object()

    monkeypatch.setattr(mesh_groups, "_GROUPS", {})
    monkeypatch.setattr(mesh_groups, "_new_group", new_group)
    for _ in range(2):
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        mesh = init_device_mesh("cpu", (2, 2))
        groups = [mesh_groups._group_of_members(mesh, [1]) for _ in range(2)]
        assert groups[0] is groups[1]
        dist.destroy_process_group()
    assert made == [(0, 1), (0, 1)]
    assert len(mesh_groups._GROUPS) == 1


def test_where_torch_splits_the_communicator_of_all_ranks(
    mesh_of_eight: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There all ranks have to make a group together."""
    monkeypatch.setattr(mesh_groups, "_can_make_groups", lambda: False)
    assert group_around([mesh_of_eight["dp"], mesh_of_eight["ep"]]) is dist.group.WORLD
    group = group_around([mesh_of_eight["dp", "ep"]])
    assert dist.get_process_group_ranks(group) == [4, 5, 6, 7]
