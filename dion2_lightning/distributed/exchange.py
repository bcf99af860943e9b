"""The collectives of a step: slice norms made global, submatrices to their owners, and back.

The matrices that ranks share take one all-reduce a step, and for each precision two all-to-alls where ranks hold parts
of them and one all-gather where ranks hold replicas, however many they are. Sent is only what is selected. Every rank
knows every other rank's rectangle (layout.py) and, after the all-reduce, the same selection; so everyone knows what
everyone sends, and no sizes are exchanged.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.distributed.torch_versions import all_gather_single
from dion2_lightning.kernels.precision import has_float64
from dion2_lightning.matrices.layout import Span, alike, is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DISAGREE: Final = (
    "ranks share parameters but disagree about their settings (lr, fraction, momentum, weight_decay, dtypes, ...), "
    "their number or their order; give all ranks the same groups"
)
PIECE_BITS: Final = 16
PIECES: Final = 2
"""A fingerprint travels in pieces so short that sums of their squares over thousands of ranks are exact in float64."""


def place_gradients(parameters: Iterable[Any]) -> None:
    """Place every gradient like its parameter.

    Under TP the gradients of replicated parameters, such as norms under sequence parallelism, come as summands that are
    still to be added up. All that a mesh has of them take one all-reduce; every rank must have the same ones.

    Args:
        parameters: Plain, or DTensors. Their gradients are replaced where they are placed otherwise.
    """
    misplaced = [
        parameter
        for parameter in parameters
        if is_dtensor(parameter) and parameter.grad is not None and parameter.grad.placements != parameter.placements
    ]
    for (mesh, dims, _, _), members in alike(misplaced, _summands).items():
        if dims is None:
            for parameter in members:
                parameter.grad = parameter.grad.redistribute(mesh, parameter.placements)
            continue
        summands = [local(parameter.grad) for parameter in members]
        sums = torch.cat([each.flatten() for each in summands])
        for dim in dims:
            dist.all_reduce(sums, group=mesh.get_group(dim))
        parts = torch.split(sums, [each.numel() for each in summands])
        for parameter, part, summand in zip(members, parts, summands, strict=True):
            parameter.grad = type(parameter.grad).from_local(
                part.view(summand.shape),
                mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )


def _summands(parameter: Any) -> tuple[Any, tuple[int, ...] | None, torch.dtype, torch.device]:
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
    likeness = [(getattr(each, "device_mesh", None), each.device) for each in parameters]
    for (mesh, _), positions in alike(range(len(flags)), lambda i: likeness[i]).items():
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
    meshes = alike(range(len(parameters)), lambda i: getattr(parameters[i], "device_mesh", None))
    for mesh, positions in meshes.items():
        number = zlib.crc32(repr([descriptions[position] for position in positions]).encode())
        extremes = torch.tensor([number, -number], device=parameters[positions[0]].device)
        for group in _groups_around(mesh, process_group):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes.tolist()
        if largest != -smallest:
            raise RuntimeError(f"{DISAGREE}; this rank has {len(positions)} parameters there")


def refuse_unreachable(parameter: Tensor, what: str, process_group: "ProcessGroup | None") -> None:
    """Raise an error where ranks share a parameter on a device that their group does not communicate from.

    CPU offload under FSDP2 leaves parameters and gradients on the CPU, and NCCL alone does not reach them. Apple's GPUs
    have no float64, in which :class:`Totals` adds up the norms.
    """
    for group in _groups_around(getattr(parameter, "device_mesh", None), process_group):
        if not has_float64(parameter.device):
            raise ValueError(
                f"{what} is on {parameter.device.type!r} and shared by {group.size()} ranks, which add up norms in "
                "float64, and there is none on this device; train in one process, or on CUDA or the CPU"
            )
        reached = [device.type for device in group._device_types]
        if parameter.device.type not in reached:
            raise ValueError(
                f"{what} is on {parameter.device.type!r}, as under CPU offload, but its ranks communicate on "
                f"{', '.join(map(repr, reached))} only; call init_process_group with a backend for both, such as "
                "'cpu:gloo,cuda:nccl'"
            )


def _groups_around(mesh: Any, process_group: "ProcessGroup | None") -> list["ProcessGroup"]:
    """The groups along every dimension of a mesh, or that of plain parameters; none of a single rank."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh is not None else [process_group]
    return [group for group in groups if group is not None and group.size() > 1]


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring integer tensors to the host, all in one synchronisation with their device."""
    on_host: dict[int, Tensor] = {}
    for positions in alike(range(len(tensors)), lambda i: tensors[i].device).values():
        flat = torch.cat([tensors[position].flatten() for position in positions]).cpu()
        parts = torch.split(flat, [tensors[position].numel() for position in positions])
        on_host.update(zip(positions, parts, strict=True))
    return [on_host[position].view(tensor.shape) for position, tensor in enumerate(tensors)]


class Totals:
    """Numbers that every rank of a group contributes to, summed up in one all-reduce.

    The buffer is float64: a header with the fingerprint of the rank's settings and a flag for each parameter that says
    whether this rank has its gradient, then the sums of |M| over the part of each matrix that this rank holds.
    """

    def __init__(
        self,
        group: "ProcessGroup",
        fingerprint: int,
        has_gradient: Sequence[bool],
        sums: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Send this rank's numbers on their way.

        Args:
            group: The ranks to sum over.
            fingerprint: Of the settings that all ranks must share.
            has_gradient: For each parameter.
            sums: Of any shape, float64.
            device: Where the group communicates.
        """
        self._group, self._shapes = group, [each.shape for each in sums]
        pieces = [(fingerprint >> (part * PIECE_BITS)) % 2**PIECE_BITS for part in range(PIECES)]
        header = [*pieces, *(piece**2 for piece in pieces), *has_gradient]
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
            RuntimeError: The ranks' fingerprints differ.
        """
        if not bool(self._agree(header)):
            raise RuntimeError(self._disagreement)
        counts: list[int] = header[2 * PIECES :].tolist()
        return counts

    def assert_agreement(self, header: Tensor) -> None:
        """Fail on the device, later, where the ranks' fingerprints differ: without a host that waits."""
        torch._assert_async(self._agree(header), self._disagreement)

    def assert_multiples(self, header: Tensor, replicas: int) -> None:
        """Fail on the device, later, where some replicas have gradients that others lack."""
        counts = header.narrow(0, 2 * PIECES, len(header) - 2 * PIECES)
        torch._assert_async((counts % replicas == 0).all(), "some replicas lack gradients that others have")

    def _agree(self, header: Tensor) -> Tensor:
        # Equality in Cauchy and Schwarz's inequality: all ranks said the same.
        totals, squares = header.narrow(0, 0, PIECES), header.narrow(0, PIECES, PIECES)
        return (totals * totals == squares * self._group.size()).all()

    @property
    def _disagreement(self) -> str:
        return f"ranks {dist.get_process_group_ranks(self._group)}: {DISAGREE}"


@dataclass(frozen=True, eq=False)
class Transfer:
    """One submatrix to be sent to its owner and back.

    Attributes:
        owner: The rank that orthonormalizes it.
        shape: (k, m) of the whole submatrix.
        own: Shape of the part that this rank holds.
        edges: By rank, where the slices that it holds begin and end among the k selected ones, on the host (ranks, 2);
            None where every rank holds a part of all.
        columns: By rank, which of the m entries of each it holds.
    """

    owner: int
    shape: tuple[int, int]
    own: tuple[int, int]
    edges: Tensor | None
    columns: Sequence[Span]

    @property
    def own_size(self) -> int:
        """Entries that this rank holds."""
        rows, columns = self.own
        return rows * columns

    def size_on(self, rank: int) -> int:
        """Return the number of entries that a rank holds."""
        (start, stop), (left, right) = self._rows(rank), self.columns[rank]
        return (stop - start) * (right - left)

    def part(self, submatrix: Tensor, rank: int) -> Tensor:
        """View the part of the (k, m) submatrix that a rank holds."""
        (start, stop), (left, right) = self._rows(rank), self.columns[rank]
        return submatrix.narrow(0, start, stop - start).narrow(1, left, right - left)

    def _rows(self, rank: int) -> Span:
        return (0, self.shape[0]) if self.edges is None else self._all_rows[rank]

    @cached_property
    def _all_rows(self) -> list[Span]:
        assert self.edges is not None
        return [(start, stop) for start, stop in self.edges.tolist()]


class Exchange:
    """The way of submatrices to their owners and back: an all-to-all each."""

    def __init__(
        self, group: "ProcessGroup", transfers: Sequence[Transfer], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Plan: everyone's sizes follow from the transfers, which are the same on every rank."""
        self._group, self._transfers = group, transfers
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        self._rank, ranks = dist.get_rank(group), range(group.size())
        self._by_owner = _by_rank([transfer.owner for transfer in transfers], group.size())
        self.owned = self._by_owner[self._rank]
        self._to_owners = [sum(transfers[index].own_size for index in owned) for owned in self._by_owner]
        self._from_ranks = [sum(transfers[index].size_on(rank) for index in self.owned) for rank in ranks]

    def send(self, parts: Sequence[Tensor]) -> None:
        """Send this rank's part of every submatrix to its owner.

        Args:
            parts: One for each transfer, all of one dtype.
        """
        ordered = [parts[index].reshape(-1) for owned in self._by_owner for index in owned]
        self._start(torch.cat([self._nothing, *ordered]), self._from_ranks, self._to_owners)

    def receive(self) -> list[Tensor]:
        """Return the whole submatrices that this rank owns, in the order of ``owned``."""
        by_rank = torch.split(self._finish(), self._from_ranks)
        submatrices = [self._nothing.new_empty(self._transfers[index].shape) for index in self.owned]
        for rank, received in enumerate(by_rank):
            pieces = torch.split(received, [self._transfers[index].size_on(rank) for index in self.owned])
            for index, submatrix, piece in zip(self.owned, submatrices, pieces, strict=True):
                part = self._transfers[index].part(submatrix, rank)
                part.copy_(piece.view(part.shape))
        return submatrices

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Send every rank its part of the orthonormalized submatrices, given in the order of ``owned``."""
        ordered = [
            self._transfers[index].part(result, rank).reshape(-1)
            for rank in range(self._group.size())
            for index, result in zip(self.owned, results, strict=True)
        ]
        self._start(torch.cat([self._nothing, *ordered]), self._to_owners, self._from_ranks)

    def receive_back(self) -> list[Tensor]:
        """Return this rank's part of every orthonormalized submatrix, in the order of the transfers."""
        parts = [self._nothing] * len(self._transfers)
        for owned, received in zip(self._by_owner, torch.split(self._finish(), self._to_owners), strict=True):
            pieces = torch.split(received, [self._transfers[index].own_size for index in owned])
            for index, piece in zip(owned, pieces, strict=True):
                parts[index] = piece.view(self._transfers[index].own)
        return parts

    def _start(self, sent: Tensor, receive: list[int], send: list[int]) -> None:
        self._sent = sent  # must live until the collective is through
        self._output = sent.new_empty(sum(receive))
        self._work = dist.all_to_all_single(self._output, sent, receive, send, group=self._group, async_op=True)

    def _finish(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        return self._output


class Gathering:
    """The way of results from the rank that has each to all ranks of a group: one all-gather."""

    def __init__(
        self,
        group: "ProcessGroup",
        sources: Sequence[int],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Plan from the rank that has each result, and its shape."""
        self._group, self._shapes, self._dtype, self._device = group, shapes, dtype, device
        self._by_source = _by_rank(sources, group.size())

    def send(self, results: Sequence[Tensor]) -> None:
        """Send the results that this rank has, in their order, to all others; short ones are padded."""
        sizes = [sum(self._size(index) for index in held) for held in self._by_source]
        padded = torch.zeros(max(sizes), dtype=self._dtype, device=self._device)
        if results:
            own = torch.cat([result.reshape(-1) for result in results])
            padded.narrow(0, 0, len(own)).copy_(own)
        self._sent, self._output = padded, padded.new_empty(len(padded) * len(sizes))
        self._work = all_gather_single(self._output, padded, group=self._group, async_op=True)

    def receive(self) -> list[Tensor]:
        """Return all results, in order."""
        assert self._work is not None
        self._work.wait()
        results: list[Tensor] = [self._output] * len(self._shapes)
        width = len(self._sent)
        for rank, held in enumerate(self._by_source):
            start = rank * width
            for index in held:
                results[index] = self._output.narrow(0, start, self._size(index)).view(self._shapes[index])
                start += self._size(index)
        return results

    def _size(self, index: int) -> int:
        rows, columns = self._shapes[index]
        return rows * columns


def _by_rank(ranks: Sequence[int], size: int) -> list[list[int]]:
    """Which things each rank has, given the rank of each."""
    by_rank: list[list[int]] = [[] for _ in range(size)]
    for index, rank in enumerate(ranks):
        by_rank[rank].append(index)
    return by_rank
