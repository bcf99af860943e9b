"""The process groups of ranks along several dimensions of a mesh, and around several meshes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


_GROUPS: Final = dict[tuple[Any, tuple[int, ...]], Any]()
"""Those that were made, by the group of all ranks and theirs."""


def group_along(mesh: "DeviceMesh", dims: Sequence[int]) -> "ProcessGroup | None":
    """Return the ranks that differ from this one along some dimensions of a mesh.

    None for several without names, where all ranks of the world have to make the group together.
    """
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if mesh.size() < torch.distributed.get_world_size():
        group = _group_of_members(mesh, dims)
        if group is not None:
            return group
    names = mesh.mesh_dim_names
    if names is None:
        return None
    part = mesh if len(dims) == mesh.ndim else mesh[tuple(names[dim] for dim in dims)]
    # Torch keeps the flattened mesh, so that its group is made once.
    return part._flatten().get_group()


def group_around(meshes: "Sequence[DeviceMesh]") -> "ProcessGroup":
    """Return the ranks of some meshes that this one belongs to, and those with which these share other such meshes.

    Of a mesh (pp, dp, ep), its parts dp and ep have around them the ranks along both. All ranks give the meshes in the
    same order.
    """
    world = torch.distributed.group.WORLD
    assert world is not None
    largest = max(meshes, key=lambda mesh: (mesh.size(), -mesh.ndim))
    if len(meshes) == 1 or _contains(largest, meshes):
        return group_along(largest, range(largest.ndim)) or world
    roots = {mesh._get_root_mesh() for mesh in meshes}
    if len(roots) > 1:
        return world
    # Along the dimensions of the mesh that they are parts of in which one of them goes.
    root = roots.pop()
    dims = sorted({dim for mesh in meshes for dim in _dims_of(mesh, root)})
    is_world = len(dims) == root.ndim and root.size() == world.size()
    return world if is_world else _group_of_members(root, dims) or world


def _group_of_members(mesh: "DeviceMesh", dims: Sequence[int]) -> "ProcessGroup | None":
    """Return the group of ranks along some dimensions of a mesh, which these alone make, once; None if they cannot."""
    world: Any = torch.distributed.group.WORLD
    if any(of is not world for of, _ in _GROUPS):  # the process group was made anew
        _GROUPS.clear()
    index = tuple(slice(None) if dim in dims else each for dim, each in enumerate(mesh.get_coordinate() or ()))
    ranks = _sorted(mesh.mesh[index])
    if (world, ranks) not in _GROUPS:
        _GROUPS[world, ranks] = _new_group(mesh, dims, ranks) if _can_make_groups() else None
    made: ProcessGroup | None = _GROUPS[world, ranks]
    return made


def _can_make_groups() -> bool:
    """Whether ranks can make a group while others do not: not by MPI, nor by splitting the communicator of all."""
    is_split = getattr(torch.distributed.group.WORLD, "bound_device_id", None) is not None
    return not is_split and torch.distributed.get_backend() != "mpi"


def _new_group(mesh: "DeviceMesh", dims: Sequence[int], ranks: tuple[int, ...]) -> "ProcessGroup | None":
    """Make a group; None where its ranks have other names for it, as where some have made groups of their own."""
    torch_names = torch.distributed.distributed_c10d
    number = int(torch_names._hash_ranks_to_str(list(ranks))[:8], 16)
    extremes = torch.tensor([number, -number], device=mesh.device_type)
    for dim in dims:
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        return None
    count = torch_names._world.group_count
    try:
        made: ProcessGroup = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
        return made
    finally:  # torch names the next group of all ranks by this count, and from 2.15 on raises it on these ranks alone
        torch_names._world.group_count = count


def _sorted(ranks: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(ranks.flatten().tolist()))


def _contains(mesh: "DeviceMesh", others: "Sequence[DeviceMesh]") -> bool:
    ranks = set(_sorted(mesh.mesh))
    return all(ranks.issuperset(_sorted(other.mesh)) for other in others)


def _dims_of(mesh: "DeviceMesh", root: "DeviceMesh") -> list[int]:
    """In which dimensions of its root mesh the ranks of a mesh differ."""
    places = torch.isin(root.mesh, mesh.mesh).nonzero()
    return [int(dim) for dim in (places != places[0]).any(0).nonzero()]
