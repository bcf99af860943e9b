"""Which ranks hold which part of a parameter's matrices.

Whatever the mesh, the part of a matrix that a rank holds is one rectangle. So a layout is a list of rectangles, one for
each rank that shares the matrix, and everything above this file is the same for FSDP2, HSDP, TP and their products.
"""

import itertools
import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dion2_lightning.matrices.mesh_groups import group_along

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

Span = tuple[int, int]
"""Start and stop."""


class Rectangle(NamedTuple):
    """What a rank holds of each of some matrices, as stored; empty spans where it holds nothing."""

    rows: Span
    columns: Span


class Spans(tuple[Span, ...]):
    """What each rank of a group holds along an axis; what follows from it is found once for all matrices."""

    @cached_property
    def are_equal(self) -> bool:
        """Whether all ranks hold the same."""
        return all(span == self[0] for span in self)

    @cached_property
    def edges(self) -> Tensor:
        """Where each begins and ends, one after the other, on the host."""
        return torch.tensor(self).flatten()


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold the same parts of the same matrices as this one.

    Attributes:
        group: These ranks, this one among them.
        numbers: Which replica each rank of the group belongs to, in the group's order. All ranks that share a matrix by
            parts belong to one replica.
        everyone: The ranks of all replicas together.
    """

    group: "ProcessGroup"
    numbers: tuple[int, ...]
    everyone: "ProcessGroup"

    @property
    def count(self) -> int:
        """How many replicas there are."""
        return len(self.numbers)

    @property
    def number(self) -> int:
        """Which of them this rank belongs to."""
        return self.numbers[torch.distributed.get_rank(self.group)]

    @property
    def position_of(self) -> dict[int, int]:
        """The rank in the group of every replica's member."""
        return {number: position for position, number in enumerate(self.numbers)}


@dataclass(frozen=True)
class Layout:
    """Which ranks share a parameter's matrices, and what each of them holds.

    Attributes:
        group: The ranks that share each matrix by parts; None where this rank has it whole.
        rectangles: What each rank of the group holds, in the group's order; empty without a group.
        replicas: The ranks that hold the same as this one; None where no other does, or this rank knows of none.
    """

    group: "ProcessGroup | None" = None
    rectangles: tuple[Rectangle, ...] = ()
    replicas: Replicas | None = None

    @property
    def own_rank(self) -> int:
        """Which rank of the group this one is."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @cached_property
    def rows(self) -> "Spans":
        """Which rows each rank of the group holds."""
        return Spans(each.rows for each in self.rectangles)

    @cached_property
    def columns(self) -> "Spans":
        """Which columns each rank of the group holds."""
        return Spans(each.columns for each in self.rectangles)

    @cached_property
    def own_part(self) -> int:
        """A number, at most 2^16, of what this rank holds; it does not depend on the order of ranks in a replica."""
        return 1 if self.group is None else 1 + zlib.crc32(repr(self.rectangles[self.own_rank]).encode()) % 2**16

    @cached_property
    def fingerprint(self) -> int:
        """A number made of what all ranks hold; replicas may order their ranks differently."""
        return hash(tuple(sorted(self.rectangles)))


Layouts = dict[Hashable, Any]
"""What was found in this step. Parameters of one shape, mesh and placement share a layout, its parts and slicings."""


def layout_of(
    parameter: Tensor,
    label: str,
    *,
    batched: bool,
    is_kernel: bool = False,
    process_group: "ProcessGroup | None",
    known: Layouts,
) -> Layout:
    """Read a parameter's layout from its mesh and placements, as they are now; ``known`` are those read in this step.

    ``batched`` says whether its first axis counts matrices, ``is_kernel`` whether its axes from the third on are those
    of a kernel, ``process_group`` who holds replicas where it is plain. A layout that leaves no rectangle of a matrix
    on each rank gets an error.
    """
    key = None
    if is_dtensor(parameter):
        key = parameter.device_mesh, parameter.placements, parameter.shape, batched, is_kernel  # type: ignore[attr-defined]
    if key not in known:
        if key is not None:
            known[key] = _layout_of_dtensor(parameter, label, batched, is_kernel)
        elif process_group is None or process_group.size() == 1:
            known[key] = Layout()
        else:
            known[key] = Layout(replicas=Replicas(process_group, tuple(range(process_group.size())), process_group))
    layout: Layout = known[key]
    return layout


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed(
    part: Tensor, like: Any, placements: tuple[Any, ...] | None = None, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Return a DTensor of which this rank holds ``part``, placed like another one; the part itself where that is plain.

    A ``shape`` that is given is that of a whole tensor in row-major order.
    """
    if not is_dtensor(like):
        return part
    stride = like.stride() if shape is None else torch.empty(shape, device="meta").stride()
    placements = like.placements if placements is None else placements
    shape = like.shape if shape is None else torch.Size(shape)
    if part.device.type != like.device_mesh.device_type:  # on the host: from_local would move it to the mesh's devices
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        spec = DTensorSpec(like.device_mesh, placements, TensorMeta(shape, stride, part.dtype))
        return type(like)(part, spec, requires_grad=False)  # type: ignore[no-any-return]
    whole: Tensor = type(like).from_local(
        part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return whole


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor, of which this rank may hold a part, on another device, in another precision."""
    return placed(local(tensor).to(device, dtype), tensor)


def held_coordinates(parameter: Any, *, is_kernel: bool = False) -> tuple[Tensor, Tensor]:
    """Return the numbers, in the whole parameter, of the rows and of the columns that this rank holds.

    The last axis counts columns, all others together rows: row ``e R + r`` is row r of matrix e of a stack (E, R, C).
    Of a kernel (out, in, *kernel) the first axis counts rows, all others together columns. A 0-d parameter is one
    row with one column. The part that this rank holds has all of these rows, and of each all these columns.
    """
    held = [_held_along(parameter, axis) for axis in range(parameter.ndim)]
    place = 1 if is_kernel else max(parameter.ndim - 1, 0)

    def numbers(axes: slice) -> Tensor:
        if not held[axes]:
            return torch.zeros(1, dtype=torch.int64, device=local(parameter).device)
        total, *others = held[axes]
        for its_held, size in zip(others, parameter.shape[axes][1:], strict=True):
            total = (total.unsqueeze(-1) * size + its_held).flatten()
        return total

    return numbers(slice(place)), numbers(slice(place, None))


def local_shape(shape: tuple[int, ...], like: Any, placements: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the shape of what this rank holds of a tensor that is placed on the mesh of another one."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(shape, like.device_mesh, placements)[0])


def refuse_misplaced(parameter: Any, label: str) -> None:
    """Raise an error where ranks hold summands of a parameter, or this rank is none of those that hold it."""
    if not is_dtensor(parameter):
        return
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(f"{label} is placed as {parameter.placements}: sum it up with redistribute() before step()")
    if parameter.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{label} is on {parameter.device_mesh}, to which rank {torch.distributed.get_rank()} does not belong; "
            "leave it out of the groups there"
        )


def local_gradient(parameter: Any) -> Tensor | None:
    """Return this rank's part of a parameter's gradient, which is placed like the parameter; None if there is none."""
    return None if parameter.grad is None else local(parameter.grad)


def placed_like_stack(rows: Tensor, parameter: Any, count: int) -> Tensor:
    """Place one row for each matrix of a stack like the matrices: a DTensor where ranks hold different ones."""
    if not spread_dims(parameter):
        return rows
    placements = placements_of_matrices(parameter, is_stack=True)
    return placed(rows.contiguous(), parameter, placements, (count, rows.shape[1]))


def placements_of_matrices(parameter: Any, *, is_stack: bool) -> tuple[Any, ...] | None:
    """Return how to place a tensor that every rank of a matrix has whole; None where the parameter is plain.

    It is replicated, but for the first axis of a stack, which counts matrices.
    """
    if not is_dtensor(parameter):
        return None
    from torch.distributed.tensor import Replicate

    return tuple(each if is_stack and _counts_matrices(each) else Replicate() for each in parameter.placements)


def spread_dims(stack: Any) -> list[int]:
    """Return the dimensions of its mesh along which ranks hold different matrices of a stack."""
    return [dim for dim, placement in enumerate(getattr(stack, "placements", ())) if _counts_matrices(placement)]


def _counts_matrices(placement: Any) -> bool:
    """Whether a placement of a stack spreads its first axis, which counts matrices."""
    return not placement.is_replicate() and placement.dim == 0


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over a mesh; importing ``torch.distributed.tensor`` to ask takes half a second."""
    return hasattr(tensor, "device_mesh")


def number_of_parts(parameter: Any) -> int:
    """Return into how many parts its ranks divide a parameter; 1 where each has all of it."""
    if not is_dtensor(parameter):
        return 1
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _held_along(parameter: Any, axis: int) -> Tensor:
    """Which indices along an axis this rank holds, in order; also where a strided placement scatters them."""
    held = torch.arange(parameter.shape[axis], device=local(parameter).device)
    if not is_dtensor(parameter):
        return held
    mesh = parameter.device_mesh
    for dim, (placement, index) in enumerate(zip(parameter.placements, mesh.get_coordinate() or (), strict=True)):
        if not placement.is_replicate() and placement.dim == axis:
            # A strided placement cuts into its factor of pieces first, and takes a part of each.
            pieces = _chunks(held, getattr(placement, "split_factor", 1))
            held = torch.cat([_chunks(piece, mesh.size(dim))[index] for piece in pieces])
    return held


def _chunks(held: Tensor, count: int) -> list[Tensor]:
    """Cut as torch's placements do: into pieces of one length, the last ones shorter or empty."""
    size = -(-len(held) // count)
    return [held[index * size : (index + 1) * size] for index in range(count)]


def _layout_of_dtensor(parameter: Any, label: str, batched: bool, is_kernel: bool) -> Layout:
    refuse_misplaced(parameter, label)
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    for dim in sharded:
        _check_placement(placements, dim, mesh, label)
        if is_kernel and placements[dim].dim > 1 and mesh.size(dim) > 1:
            raise ValueError(f"{label} is placed as {tuple(placements)}; the taps of a kernel cannot be sharded")
    # A stack that is sharded along its first axis leaves whole matrices on every rank: nothing is shared.
    shared = [dim for dim in sharded if not (batched and _counts_matrices(placements[dim])) and mesh.size(dim) > 1]
    if len(shared) > 2:
        raise ValueError(f"{label} is sharded over {len(shared)} dimensions of {mesh}; at most 2 are supported")
    replicated = [dim for dim, each in enumerate(placements) if each.is_replicate() and mesh.size(dim) > 1]
    replicas = _replicas(mesh, shared, replicated)
    if not shared:
        return Layout(replicas=replicas)
    group = group_along(mesh, shared)
    if group is None:
        raise ValueError(f"{label} is sharded over two dimensions of a mesh without mesh_dim_names; name them")
    coordinate = tuple(mesh.get_coordinate() or ())
    rectangles = _rectangles(
        tuple(parameter.shape), tuple(mesh.shape), tuple(placements), tuple(shared), coordinate, is_kernel
    )
    return Layout(group, _in_order_of(group, mesh, shared, rectangles), replicas)


def _replicas(mesh: "DeviceMesh", shared: Sequence[int], replicated: Sequence[int]) -> Replicas | None:
    """The ranks that differ from this one along replicated dimensions; None of them where torch cannot name them."""
    if not replicated:
        return None
    group, everyone = group_along(mesh, replicated), group_along(mesh, sorted([*shared, *replicated]))
    if group is None or everyone is None:
        return None
    numbers = range(math.prod(mesh.size(dim) for dim in replicated))
    return Replicas(group, _in_order_of(group, mesh, replicated, numbers), everyone)


def _check_placement(placements: Sequence[Any], dim: int, mesh: "DeviceMesh", label: str) -> None:
    placement = placements[dim]
    if not hasattr(placement, "dim"):
        raise ValueError(f"{label} is placed as {tuple(placements)}; only Replicate and Shard are supported")
    split_factor = getattr(placement, "split_factor", None)
    if split_factor is None:
        return
    # FSDP2 over TP: TP cuts the axis first, so this rank's rows stay in one piece. Other strides scatter them.
    inner = [
        later
        for later in range(dim + 1, len(placements))
        if placements[later].is_shard(placement.dim) and mesh.size(later) == split_factor
    ]
    if not inner:
        raise ValueError(f"{label} is placed as {tuple(placements)} on {mesh}, which leaves scattered rows on a rank")


def _in_order_of(group: "ProcessGroup", mesh: "DeviceMesh", dims: Sequence[int], each: Sequence[T]) -> tuple[T, ...]:
    """Put what each rank along some dimensions of the mesh has, into the order of the group's ranks.

    Torch sorts the ranks of a group, whatever the order of the mesh.
    """
    coordinate = mesh.get_coordinate() or ()
    index = tuple(slice(None) if dim in dims else each for dim, each in enumerate(coordinate))
    in_mesh, in_group = mesh.mesh[index].flatten().tolist(), torch.distributed.get_process_group_ranks(group)
    if in_mesh == in_group:
        return tuple(each)
    by_rank = dict(zip(in_mesh, each, strict=True))
    return tuple(by_rank[rank] for rank in in_group)


@lru_cache(maxsize=4096)
def _rectangles(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Any, ...],
    shared: tuple[int, ...],
    coordinate: tuple[int, ...],
    is_kernel: bool,
) -> tuple[Rectangle, ...]:
    """The rectangles of all ranks that differ from ``coordinate`` along ``shared`` dimensions, the last one fastest."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    rectangles = []
    for position in itertools.product(*(range(mesh_shape[dim]) for dim in shared)):
        there = list(coordinate)
        for dim, index in zip(shared, position, strict=True):
            there[dim] = index
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh_shape, there, placements)
        spans = [(offset, offset + size) for size, offset in zip(sizes, offsets, strict=True)]
        if is_kernel:  # a channel has all its taps in columns side by side
            taps = math.prod(shape[2:])
            (first, last), spans = spans[1], spans[:1]
            spans.append((first * taps, last * taps))
        rectangles.append(Rectangle(*spans[-2:]))
    return tuple(rectangles)
