"""Replicas whose matrices' gradients are not averaged: keeping DDP from it, and averaging what has to be.

DDP has one hook a module, which it calls for buckets that mix parameters; and a list of names to ignore, for a module
that it does not wrap yet. FSDP2 averages nothing where it shards over one dimension of a mesh alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.matrices.layout import group_by, is_dtensor, local, local_gradient, placed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES: Final = 2**26
"""What is averaged at once, unless one tensor has more."""


class LeftOut:
    """Whose gradients DDP's communication hook does not average; all others it does, as DDP itself."""

    def __init__(self, group: "ProcessGroup") -> None:
        self.group = group
        self.parameters = WeakTensorKeyDictionary()

    def average(self, bucket: Any) -> "torch.futures.Future[Tensor]":
        """Average the other gradients of a bucket, in one all-reduce."""
        buffer: Tensor = bucket.buffer()
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        averaged = [gradient for parameter, gradient in pairs if parameter not in self.parameters]
        if not averaged:
            done: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[buffer.device] if buffer.device.type != "cpu" else None
            )
            done.set_result(buffer)
            return done
        together = torch.cat([gradient.flatten() for gradient in averaged]).div_(self.group.size())
        work = dist.all_reduce(together, group=self.group, async_op=True)

        def put_back(future: "torch.futures.Future[list[Tensor]]") -> Tensor:
            parts = future.value()[0].split([gradient.numel() for gradient in averaged])
            for gradient, part in zip(averaged, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
            return buffer

        averaging: torch.futures.Future[Tensor] = work.get_future().then(put_back)
        return averaging


def left_out_of(ddp: Any) -> LeftOut | None:
    """Return what the communication hook of a DistributedDataParallel leaves out, if that is the hook of this file."""
    return next((state for _, state in ddp._comm_hooks if isinstance(state, LeftOut)), None)


def leave_to_optimizer(module: nn.Module, parameters: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Keep DDP from averaging the gradients of some parameters.

    Args:
        module: A DistributedDataParallel that has not run yet; or a module that may be wrapped in one later, which then
            does not send these parameters to all ranks at its start either: this does.
        parameters: The same ones in the same order on every rank.
        group: The ranks that hold replicas.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        left_out = left_out_of(module)
        if left_out is None:
            left_out = LeftOut(group)
            # A lambda, because DDP wants annotations that a torch without distributed does not have.
            module.register_comm_hook(left_out, lambda state, bucket: state.average(bucket))
        left_out.parameters.update(dict.fromkeys(parameters))
        return
    chosen = set(parameters)
    names = [name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter in chosen]
    known = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*known, *names])
    for bucket in _buckets([parameter.detach() for parameter in parameters if not parameter.is_meta]):
        buffer = torch.cat([tensor.flatten() for tensor in bucket])
        dist.broadcast(buffer, dist.get_process_group_ranks(group)[0], group=group)
        _put_back(buffer, bucket)


def average_(tensors: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Replace tensors by their means over ranks, in place; in float32 at least."""
    pending = []
    for bucket in _buckets(tensors):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)
        buffer = torch.cat([tensor.flatten() for tensor in bucket]).to(dtype).div_(group.size())
        pending.append((buffer, bucket, dist.all_reduce(buffer, group=group, async_op=True)))
    for buffer, bucket, work in pending:
        work.wait()
        _put_back(buffer, bucket)


def average_gradients(parameters: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Average gradients over replicas. One that some replicas lack counts as zero there; one that all lack stays None.

    The host waits where this rank lacks one.
    """
    if not parameters:
        return
    device = local(parameters[0]).device
    has_gradient = [parameter.grad is not None for parameter in parameters]
    somewhere = torch.tensor(has_gradient, dtype=torch.int32).to(device, non_blocking=True)
    dist.all_reduce(somewhere, op=dist.ReduceOp.MAX, group=group)
    if not all(has_gradient):
        for parameter, is_somewhere in zip(parameters, somewhere.tolist(), strict=True):
            if is_somewhere and parameter.grad is None:
                parameter.grad = placed(torch.zeros_like(local(parameter)), parameter)
    average_([gradient for each in parameters if (gradient := local_gradient(each)) is not None], group)


def refuse_wrong_replicas(parameter: Any, label: str, group: "ProcessGroup") -> None:
    """Raise an error where a parameter's mesh and the ranks that hold replicas of it do not go together."""
    if not is_dtensor(parameter):
        return
    mesh = parameter.device_mesh
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate() and mesh.size(dim) > 1:
            raise ValueError(
                f"{label} has replicas along dimension {dim} of {mesh}, which sync='compressed' does not do: call "
                "fully_shard with the mesh of the sharded dimension alone, and pass the group of the other one as "
                "process_group= or strategy="
            )
    both = set(mesh.mesh.flatten().tolist()) & set(dist.get_process_group_ranks(group))
    if both != {dist.get_rank()}:
        raise ValueError(
            f"{label} is spread over ranks {mesh.mesh.flatten().tolist()}, and {sorted(both)} of them are in the "
            "process group of its replicas too; for sync='compressed' pass the group of the ranks that hold the same "
            "part, such as mesh['replicate'].get_group()"
        )


def compare_gradients(parameters: Sequence[Tensor], group: "ProcessGroup") -> list[bool | None]:
    """Return for every parameter whether replicas have the same gradient; None where it is zero on all, or not finite.

    They are told by their norms, which are the same numbers where gradients are the same bits. The host waits.
    """
    gradients = [local_gradient(parameter) for parameter in parameters]
    device = local(parameters[0]).device
    dtype = sum_dtype(device)
    norms = torch.stack(
        [
            torch.zeros((), dtype=dtype, device=device)
            if gradient is None
            else torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, dtype)).to(device)
            for gradient in gradients
        ]
    )
    norms = torch.nan_to_num(norms, nan=math.inf)
    extremes = torch.stack([norms, -norms])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    return [None if high in (0, math.inf) else high == -low for high, low in zip(largest, smallest, strict=True)]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that are sent together."""
    for alike in group_by(tensors, lambda tensor: (tensor.dtype, tensor.device)).values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _put_back(buffer: Tensor, bucket: Sequence[Tensor]) -> None:
    parts = buffer.split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
