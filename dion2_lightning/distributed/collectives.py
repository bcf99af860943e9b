"""What ranks find out together: gradients, flags, whether they agree, and the norms of slices."""

import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.kernels.precision import has_float64
from dion2_lightning.matrices.layout import group_by, is_dtensor, local, placed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DISAGREE: Final = (
    "ranks share parameters but disagree about their settings (lr, fraction, momentum, weight_decay, dtypes, ...), "
    "their number or their order; give all ranks the same groups"
)


def place_gradients(parameters: Iterable[Any]) -> None:
    """Place every gradient like its parameter.

    Under TP the gradients of replicated parameters, such as norms under sequence parallelism, are partial: still to be
    summed over the ranks. All of a mesh take one all-reduce; every rank must have the same ones.

    Args:
        parameters: Plain, or DTensors. Their gradients are replaced where they are placed otherwise.
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


def on_any_rank(
    flags: Sequence[Tensor], parameters: Sequence[Tensor], process_group: "ProcessGroup | None"
) -> list[bool]:
    """Return for each parameter whether its flag is set on any rank that holds a part or a replica of it.

    Args:
        flags: Boolean, 0-d, one for each parameter; every rank gives them for the same parameters.
        parameters: Plain, or DTensors.
        process_group: The ranks that hold replicas of the plain ones.
    """
    result = [False] * len(flags)
    key_of = [(getattr(each, "device_mesh", None), each.device) for each in parameters]
    for (mesh, _), positions in group_by(range(len(flags)), lambda index: key_of[index]).items():
        raised = torch.stack([flags[position] for position in positions]).to(torch.int32)
        for group in _groups_around(mesh, process_group):
            dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
        for position, is_raised in zip(positions, raised.tolist(), strict=True):
            result[position] = bool(is_raised)
    return result


def check_agreement(
    descriptions: Sequence[str], parameters: Sequence[Tensor], process_group: "ProcessGroup | None"
) -> None:
    """Raise an error on every rank where ranks that hold the same parameters describe them differently.

    A number for each mesh, whatever the descriptions: what differs must not make the collectives differ.

    Args:
        descriptions: Of each parameter and its settings.
        parameters: Plain, or DTensors.
        process_group: The ranks that hold replicas of the plain ones.
    """
    meshes = group_by(range(len(parameters)), lambda i: getattr(parameters[i], "device_mesh", None))
    for mesh, positions in meshes.items():
        number = zlib.crc32(repr([descriptions[position] for position in positions]).encode())
        extremes = torch.tensor([number, -number], device=parameters[positions[0]].device)
        for group in _groups_around(mesh, process_group):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes.tolist()
        if largest != -smallest:
            raise RuntimeError(f"{DISAGREE}; this rank has {len(positions)} parameters there")


def refuse_unreachable(parameter: Tensor, label: str, process_group: "ProcessGroup | None") -> None:
    """Raise an error where ranks share a parameter on a device that their group does not communicate from.

    CPU offload under FSDP2 leaves parameters and gradients on the CPU, and NCCL alone does not reach them. Apple's GPUs
    have no float64, in which :class:`NormAllReduce` adds up the norms.
    """
    for group in _groups_around(getattr(parameter, "device_mesh", None), process_group):
        if not has_float64(parameter.device):
            raise ValueError(
                f"{label} is on {parameter.device.type!r} and shared by {group.size()} ranks, which add up norms in "
                "float64, and there is none on this device; train in one process, or on CUDA or the CPU"
            )
        reached = [device.type for device in group._device_types]
        if parameter.device.type not in reached:
            raise ValueError(
                f"{label} is on {parameter.device.type!r}, as under CPU offload, but its ranks communicate on "
                f"{', '.join(map(repr, reached))} only; call init_process_group with a backend for both, such as "
                "'cpu:gloo,cuda:nccl'"
            )


def _groups_around(mesh: Any, process_group: "ProcessGroup | None") -> list["ProcessGroup"]:
    """The groups along every dimension of a mesh, or that of plain parameters; none of a single rank."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh is not None else [process_group]
    return [group for group in groups if group is not None and group.size() > 1]


class NormAllReduce:
    """The sums of all slices' norms over the ranks that share matrices, in one all-reduce.

    The buffer is float64: a checksum of the settings, a flag for each parameter that says whether this rank has its
    gradient, then the sums of |M| over the part of each matrix that this rank holds.
    """

    def __init__(
        self,
        group: "ProcessGroup",
        checksum: int,
        has_gradient: Sequence[bool],
        sums: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Start the all-reduce.

        Args:
            group: The ranks to sum over.
            checksum: Of the settings that all ranks must share, in [0, 2^32).
            has_gradient: For each parameter.
            sums: Of any shape, float64.
            device: Where the group communicates.
        """
        self._group, self._checksum, self._shapes = group, checksum, [each.shape for each in sums]
        header = [checksum, *has_gradient]
        self._header_size = len(header)
        start = torch.tensor(header, dtype=torch.float64).to(device, non_blocking=True)
        self._buffer = torch.cat([start, *(each.flatten() for each in sums)])
        self._work = dist.all_reduce(self._buffer, group=group, async_op=True)

    def wait(self) -> tuple[Tensor, list[Tensor]]:
        """Return the header, int64, and the sums over all ranks, rounded to float32; the host does not wait.

        Rounded, sums do not depend on their order, so every rank and every layout sees the same numbers.
        """
        assert self._work is not None
        self._work.wait()
        header = self._buffer.narrow(0, 0, self._header_size)
        rest = self._buffer.narrow(0, self._header_size, len(self._buffer) - self._header_size).float()
        parts = torch.split(rest, [shape.numel() for shape in self._shapes])
        return header.long(), [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def gradient_counts(self, header: Tensor) -> list[int]:
        """Return for each parameter how many ranks have its gradient.

        Args:
            header: As :meth:`wait` returned it, on the host.

        Raises:
            RuntimeError: The ranks' settings differ.
        """
        if not bool(self._agree(header)):
            raise RuntimeError(self._disagreement)
        counts: list[int] = header[1:].tolist()
        return counts

    def check_on_device(self, header: Tensor, replicas: int) -> None:
        """Fail on the device, later, where settings differ or some replicas lack gradients; the host does not wait."""
        torch._assert_async(self._agree(header), self._disagreement)
        counts = header.narrow(0, 1, len(header) - 1)
        torch._assert_async((counts % replicas == 0).all(), "some replicas lack gradients that others have")

    def _agree(self, header: Tensor) -> Tensor:
        # Exact: a checksum has 32 bits, and an integer in float64 53. All ranks compared everything at the first step.
        return (header.narrow(0, 0, 1) == self._group.size() * self._checksum).all()

    @property
    def _disagreement(self) -> str:
        return f"ranks {dist.get_process_group_ranks(self._group)}: {DISAGREE}"
