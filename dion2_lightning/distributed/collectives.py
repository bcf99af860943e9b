"""What ranks find out together: gradients, flags, sums, and whether they agree."""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import is_dtensor, local, placed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DISAGREE: Final = (
    "ranks share parameters but disagree about their settings (lr, weight_decay, dtypes, memory formats, ...), their "
    "number, their names or order, or which of them are frozen, or have loaded different checkpoints; give all ranks "
    "the same groups, and the same checkpoint"
)


class RanksAround(NamedTuple):
    """Which ranks have a part or a replica of what this one has.

    Attributes:
        process_group: The ranks that hold replicas of the plain parameters; None where no others do.
        of_meshes_too: Whether they also hold replicas of the parameters on meshes; a mesh then has one replica.
    """

    process_group: "ProcessGroup | None" = None
    of_meshes_too: bool = False

    def groups(self, mesh: Any) -> "list[ProcessGroup]":
        """Return the groups around parameters on a mesh, or around plain ones; none of a single rank."""
        groups = [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
        if (mesh is None or self.of_meshes_too) and self.process_group is not None:
            groups.append(self.process_group)
        return [group for group in groups if group.size() > 1]


def is_first_rank() -> bool:
    """Return whether this process is rank 0; before ``init_process_group``, by the environment's ``RANK``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") in ("", "0")


def place_gradients(parameters: Iterable[Any]) -> None:
    """Place every gradient like its parameter.

    Under TP the gradients of replicated parameters, such as norms under sequence parallelism, are partial: still to be
    summed over the ranks. All of a mesh take one all-reduce; every rank must have the same ones. Plain parameters stay.
    """
    misplaced = [
        parameter
        for parameter in parameters
        if is_dtensor(parameter) and parameter.grad is not None and parameter.grad.placements != parameter.placements
    ]
    for (mesh, dims, _, _), members in group_by(misplaced, _pending_sum).items():
        if dims is None:
            for parameter in members:
                parameter.grad = parameter.grad.redistribute(mesh, parameter.placements)
            continue
        partial = [local(parameter.grad) for parameter in members]
        sums = torch.cat([each.flatten() for each in partial])
        for dim in dims:
            dist.all_reduce(sums, group=mesh.get_group(dim))
        parts = torch.split(sums, [each.numel() for each in partial])
        for parameter, part, own in zip(members, parts, partial, strict=True):
            parameter.grad = placed(part.view(own.shape), parameter)


def _pending_sum(parameter: Any) -> tuple[Any, tuple[int, ...] | None, torch.dtype, torch.device]:
    """Mesh, dimensions to sum over (None where a gradient is misplaced in another way), dtype and device."""
    gradient = parameter.grad
    pairs = list(enumerate(zip(gradient.placements, parameter.placements, strict=True)))
    dims = [(dim, found, wanted) for dim, (found, wanted) in pairs if found != wanted]
    is_sum = all(found.is_partial("sum") and wanted.is_replicate() for _, found, wanted in dims)
    return (
        parameter.device_mesh,
        tuple(dim for dim, _, _ in dims) if is_sum else None,
        gradient.dtype,
        gradient.device,
    )


def on_any_rank(flags: Sequence[Tensor], parameters: Sequence[Tensor], ranks: RanksAround) -> list[bool]:
    """Return for each parameter whether its flag, boolean and 0-d, is set on any rank that holds a part or a replica.

    Every rank gives the same parameters.
    """
    result = [False] * len(flags)
    key_of = [(getattr(each, "device_mesh", None), each.device) for each in parameters]
    for (mesh, _), positions in group_by(range(len(flags)), lambda index: key_of[index]).items():
        raised = torch.stack([flags[position] for position in positions]).to(torch.int32)
        for group in ranks.groups(mesh):
            dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
        for position, is_raised in zip(positions, raised.tolist(), strict=True):
            result[position] = bool(is_raised)
    return result


def on_every_rank(flag: Tensor, parameters: Sequence[Tensor], ranks: RanksAround) -> Tensor:
    """Return whether a flag, boolean and 0-d, is set on every rank that holds a part or a replica of a parameter.

    It is the same flag on all of them, on the device, and the host does not wait for it. The second time around, ranks
    hear what others have heard on another mesh of theirs, but not of meshes behind that one. How often each group is
    asked must not depend on how many others this rank belongs to.
    """
    meshes = {getattr(each, "device_mesh", None): each.device for each in parameters}
    devices = {group: device for mesh, device in meshes.items() for group in ranks.groups(mesh)}
    for group, device in [*devices.items()] * 2:
        is_set = flag.to(device, torch.int32)
        dist.all_reduce(is_set, op=dist.ReduceOp.MIN, group=group)
        flag = is_set.bool()
    return flag


def check_agreement(
    descriptions: Sequence[Mapping[str, object]], parameters: Sequence[Tensor], ranks: RanksAround
) -> None:
    """Raise an error on every rank where ranks that hold the same parameters describe them differently.

    A number for each mesh, whatever the descriptions: what differs must not make the collectives differ. They are
    exchanged only where they do differ, to say how.
    """
    meshes = group_by(range(len(parameters)), lambda i: getattr(parameters[i], "device_mesh", None))
    differs = {}
    for mesh, positions in meshes.items():
        number = zlib.crc32(repr(_as_texts([descriptions[each] for each in positions])).encode())
        extremes = torch.tensor([number, -number], device=parameters[positions[0]].device)
        for group in ranks.groups(mesh):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes.tolist()
        differs[mesh] = largest != -smallest
    # Ranks of one mesh, between which nothing differs, hear of what does on another one that some of them belong to.
    agree = torch.tensor(not any(differs.values()), device="cpu")
    if not bool(on_every_rank(agree, parameters, ranks)):
        found = []
        for mesh in filter(differs.__getitem__, meshes):
            positions = meshes[mesh]
            own = _as_texts(descriptions[each] for each in positions)
            found.append(_differences(own, mesh, parameters[positions[0]].device, ranks))
        raise RuntimeError(f"{DISAGREE}. {' '.join(filter(None, found)) or 'Other ranks say what differs.'}")


def _as_texts(descriptions: Iterable[Mapping[str, object]]) -> list[dict[str, str]]:
    return [{name: repr(value) for name, value in sorted(each.items())} for each in descriptions]


def _differences(own: list[dict[str, str]], mesh: Any, device: torch.device, ranks: RanksAround) -> str:
    """Say in what the descriptions of parameters on a mesh differ between ranks that are around them."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # where NCCL sends from
        return " ".join(filter(None, [_difference(own, group) for group in ranks.groups(mesh)]))


def _difference(own: list[dict[str, str]], group: "ProcessGroup") -> str:
    """Say in what the descriptions of parameters first differ between ranks of a group; the same on all of them."""
    checksums: list[list[int]] = [[] for _ in range(group.size())]
    dist.all_gather_object(checksums, [zlib.crc32(repr(each).encode()) for each in own], group=group)
    rank_of = dist.get_process_group_ranks(group)
    first, counts = checksums[0], [*map(len, checksums)]
    for other, count in enumerate(counts):
        if count != counts[0]:
            return f"Rank {rank_of[0]} has {counts[0]} of the parameters, rank {rank_of[other]} has {count}."
    place = next((place for place, each in enumerate(zip(*checksums, strict=True)) if len(set(each)) > 1), None)
    if place is None:
        return ""
    there: list[dict[str, str]] = [{} for _ in checksums]
    dist.all_gather_object(there, own[place], group=group)
    other = next(other for other, its in enumerate(checksums) if its[place] != first[place])
    one, another = there[0], there[other]
    name = next(name for name in [*one, *another] if one.get(name) != another.get(name))
    which = one["parameter"] if one["parameter"] != "None" else f"parameter {place + 1}"
    values = f"{one.get(name)} on rank {rank_of[0]} and {another.get(name)} on rank {rank_of[other]}"
    return f"Of {which} of shape {one['shape']}, {name} is {values}."


def refuse_unreachable(parameter: Tensor, label: str, ranks: RanksAround) -> None:
    """Raise an error where ranks share a parameter on a device that their group does not communicate from.

    CPU offload under FSDP2 leaves parameters and gradients on the CPU, and NCCL alone does not reach them.
    """
    for group in ranks.groups(getattr(parameter, "device_mesh", None)):
        reached = [device.type for device in group._device_types]
        if parameter.device.type not in reached:
            raise ValueError(
                f"{label} is on {parameter.device.type!r}, as under CPU offload, but its ranks communicate on "
                f"{', '.join(map(repr, reached))} only; call init_process_group with a backend for both, such as "
                "'cpu:gloo,cuda:nccl'"
            )


def sum_over_ranks(
    groups: "Sequence[ProcessGroup]",
    checksum: int,
    counts: Sequence[int],
    sums: Sequence[Tensor],
    device: torch.device,
) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Start to add up float64 ``sums`` over ranks, in one all-reduce that also tells whether these agree.

    With several ``groups``, the dimensions of a grid of ranks, it takes one for each.

    Every algorithm whose ranks talk to each other in a step begins with it, with or without sums; it is the one place
    where ranks notice that their settings have drifted apart after the first step. So ``checksum``, in [0, 2^32), is of
    what all must have in common. ``counts`` are added up, such as whether this rank has a gradient.

    What is returned waits, not the host, and returns a header, int64, for :func:`refuse_disagreement`: the sum of the
    checksums, then those of the counts; and the sums, rounded to float32. Rounded, they do not depend on their order,
    so every rank and every layout sees the same numbers.
    """
    shapes, size = [each.shape for each in sums], 1 + len(counts)
    header = torch.tensor([checksum, *counts], dtype=torch.float64).to(device, non_blocking=True)
    buffer = torch.cat([header, *(each.flatten() for each in sums)])
    first, *others = groups
    work = dist.all_reduce(buffer, group=first, async_op=True)

    def receive() -> tuple[Tensor, list[Tensor]]:
        assert work is not None
        work.wait()
        for group in others:
            dist.all_reduce(buffer, group=group)
        header, rest = torch.split(buffer, [size, len(buffer) - size])
        parts = torch.split(rest.float(), [shape.numel() for shape in shapes])
        return header.long(), [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return receive


def refuse_disagreement(header: Tensor, groups: "Sequence[ProcessGroup]", checksum: int) -> None:
    """Raise an error on every rank where their checksums differ; where the header is on a device, there, and later."""
    agree = _agree(header, groups, checksum)
    message = f"ranks {' and '.join(str(dist.get_process_group_ranks(group)) for group in groups)}: {DISAGREE}"
    if header.device.type != "cpu":
        torch._assert_async(agree, message)
    elif not agree:
        raise RuntimeError(message)


def _agree(header: Tensor, groups: "Sequence[ProcessGroup]", checksum: int) -> Tensor:
    # Exact: a checksum has 32 bits, and an integer in float64 53. All ranks compared everything at the first step.
    return (header.narrow(0, 0, 1) == math.prod(group.size() for group in groups) * checksum).all()
