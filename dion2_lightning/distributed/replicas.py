"""Replicas whose matrices' gradients are not averaged: keeping DDP from it, and averaging what has to be.

DDP has one hook a module, which it calls for buckets that mix parameters; and a list of names to ignore, for a module
that it does not wrap yet. FSDP2 averages nothing where it shards over one dimension of a mesh alone.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import is_dtensor, local, local_gradient, placed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES: Final = 2**26
"""What is averaged at once, unless one tensor has more."""

ROUNDING: Final = 1e-3
"""By how much the norms of a gradient may differ between replicas that have rounded it differently."""

_IGNORED: Final = WeakIdKeyDictionary()
"""By the module that DDP may wrap: the names that it was told to ignore, and for whom."""


class _Ignored(list[str]):
    """Names of what DDP is to ignore of a module. A copy of it has none of those that an optimizer has put there."""

    def __init__(self, known: Iterable[str], names: Iterable[str]) -> None:
        self._known = list(known)
        super().__init__([*self._known, *sorted(names)])

    def __reduce__(self) -> tuple[type[list[str]], tuple[list[str]]]:
        return list, (self._known,)


class Unaveraged:
    """Parameters whose gradients DDP's communication hook leaves to the optimizer."""

    def __init__(self, group: "ProcessGroup") -> None:
        self.group = group
        self.parameters = WeakIdKeyDictionary()

    def average(self, bucket: Any) -> "torch.futures.Future[Tensor]":
        """Average all other gradients of a bucket, in one all-reduce."""
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
            _put_back(future.value()[0], averaged)
            return buffer

        averaging: torch.futures.Future[Tensor] = work.get_future().then(put_back)
        return averaging


def unaveraged_of(ddp: Any) -> Unaveraged | None:
    """Return what the communication hook of a DistributedDataParallel leaves out, if that is the hook of this file."""
    return next((state for _, state in ddp._comm_hooks if isinstance(state, Unaveraged)), None)


def leave_to_optimizer(module: nn.Module, parameters: Sequence[Tensor], group: "ProcessGroup") -> Callable[[], None]:
    """Keep DDP from averaging the gradients of some parameters.

    Args:
        module: A DistributedDataParallel that has not run yet; or a module that may be wrapped in one later, which then
            does not send these parameters to all ranks at its start either: this does, where it reaches them.
        parameters: The same ones in the same order on every rank.
        group: The ranks that hold replicas.

    Returns:
        What takes it back, unless a later call has taken its place; for when the optimizer is gone.
    """
    owner, reference = object(), weakref.ref(module)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        unaveraged = unaveraged_of(module)
        if unaveraged is None:
            unaveraged = Unaveraged(group)
            # A lambda, because DDP wants annotations that a torch without distributed does not have.
            module.register_comm_hook(unaveraged, lambda state, bucket: state.average(bucket))
        unaveraged.parameters.update(dict.fromkeys(parameters, owner))
    else:
        chosen = set(parameters)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if chosen.issuperset(trained):
            # DDP refuses a module that leaves it nothing. It may average the smallest: then all replicas have the mean.
            chosen.discard(min(trained, key=torch.Tensor.numel))
        names = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter in chosen}
        _set_ignored(module, names, owner)
        _broadcast([parameter.detach() for parameter in parameters], group)

    def take_back() -> None:
        known = reference()
        if known is not None:
            leave_to_ddp(known, parameters, owner)

    return take_back


def leave_to_ddp(module: nn.Module, parameters: Iterable[Tensor], owner: object | None = None) -> None:
    """Have DDP average gradients again that were left to an optimizer: to that of the owner, or to any.

    A DistributedDataParallel that was told to ignore them when it was made cannot: it gets an error.
    """
    is_wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
    unaveraged = unaveraged_of(module) if is_wrapped else None
    if unaveraged is not None:
        for parameter in parameters:
            if owner is None or unaveraged.parameters.get(parameter) is owner:
                unaveraged.parameters.pop(parameter, None)
    inside: Any = module.module if is_wrapped else module
    names, its_owner = _IGNORED.get(inside, (set(), None))
    if owner is None and is_wrapped:
        ignored = {id(each) for name, each in inside.named_parameters(remove_duplicate=False) if name in names}
        if any(id(parameter) in ignored for parameter in parameters):
            raise ValueError(
                "the model was wrapped in DistributedDataParallel for an optimizer with sync='compressed', so it does "
                "not average the gradients of matrices that this one needs averaged; build this one on the module, and "
                "wrap that anew"
            )
    elif names and owner in (None, its_owner):
        _set_ignored(inside, set(), None)


def _set_ignored(module: nn.Module, names: set[str], owner: object | None) -> None:
    """Put names on the list of what DDP ignores of a module, instead of those that were put there before."""
    before, _ = _IGNORED.get(module, (set(), None))
    known = [name for name in getattr(module, "_ddp_params_and_buffers_to_ignore", ()) if name not in before]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in before and hasattr(parameter, "_ddp_ignored"):
            del parameter._ddp_ignored
    ignored = _Ignored(known, names)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    _IGNORED[module] = names, owner


def _broadcast(tensors: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Send tensors from the first rank of a group to the others, but for those on devices that it does not reach."""
    first, reached = dist.get_process_group_ranks(group)[0], [device.type for device in group._device_types]
    for bucket in _buckets([tensor for tensor in tensors if tensor.device.type in reached]):
        buffer = torch.cat([tensor.flatten() for tensor in bucket])
        dist.broadcast(buffer, first, group=group)
        _put_back(buffer, bucket)


def average_(tensors: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Replace tensors by their means over ranks, in place; in float32 at least. Two buckets are in flight at a time."""
    pending: list[tuple[Tensor, list[Tensor], Any]] = []
    for bucket in _buckets(tensors):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)
        buffer = torch.cat([tensor.flatten() for tensor in bucket]).to(dtype).div_(group.size())
        pending.append((buffer, bucket, dist.all_reduce(buffer, group=group, async_op=True)))
        if len(pending) == 2:
            _finish(*pending.pop(0))
    for each in pending:
        _finish(*each)


def _finish(buffer: Tensor, bucket: Sequence[Tensor], work: Any) -> None:
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
                f"{label} has replicas along dimension {dim} of {mesh}, which sync='compressed' does not do; call "
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


def same_on_replicas(
    tensors: Sequence[Tensor | None], device: torch.device, group: "ProcessGroup"
) -> list[bool | None]:
    """Return for every tensor whether replicas have the same; None where it is zero or missing on all, or not finite.

    They are told by their norms, which are the same numbers where tensors are the same bits. The host waits.

    Args:
        tensors: At least one.
        device: Where ranks compare.
        group: The ranks that hold replicas.
    """
    norms = norms_on_replicas(tensors, device, group)
    return [None if high in (0, math.inf) else high == low for low, high in norms]


def norms_on_replicas(
    tensors: Sequence[Tensor | None], device: torch.device, group: "ProcessGroup", missing: float = 0.0
) -> list[tuple[float, float]]:
    """Return the least and the largest norm of every tensor among replicas; NaN is infinite. The host waits.

    Args:
        tensors: At least one.
        device: Where ranks compare.
        group: The ranks that hold replicas.
        missing: What counts as the norm of a tensor that a rank does not have (default: 0).
    """
    dtype = sum_dtype(device)
    norms = torch.full((len(tensors),), missing, dtype=dtype, device=device)
    for place, tensor in zip(norms, tensors, strict=True):
        if tensor is not None:
            place.copy_(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, dtype)))
    norms = torch.nan_to_num(norms, nan=math.inf, posinf=math.inf)
    extremes = torch.stack([norms, -norms])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    return [(-low, high) for low, high in zip(smallest, largest, strict=True)]


def compare_gradients(labelled: "Sequence[tuple[Tensor, str]]", group: "ProcessGroup") -> bool:
    """Raise an error on every rank where replicas are to share work and have other gradients, by more than rounding.

    Gradients that a rank lacks, or that are not finite, are left to other checks. The host waits.

    Args:
        labelled: Plain parameters, at least one, each with its name for error messages.
        group: The ranks that hold their replicas.

    Returns:
        Whether there was any to compare, that is not zero on all ranks; the same on every rank.
    """
    gradients = [parameter.grad for parameter, _ in labelled]
    norms = norms_on_replicas(gradients, labelled[0][0].device, group, missing=-1.0)
    compared = [(label, low, high) for (_, label), (low, high) in zip(labelled, norms, strict=True) if low >= 0]
    for label, low, high in compared:
        if low < high * (1 - ROUNDING) and high < math.inf:
            raise RuntimeError(
                f"{label} has gradients of norm {low:.4g} to {high:.4g} on ranks that may share the work on it, so "
                "nothing has averaged them. In local steps (no_sync, LocalSGD) pass share_replicas=False; where it was "
                "frozen when DistributedDataParallel wrapped the model, wrap that anew, or average before step()"
            )
    return any(0 < high < math.inf for _, _, high in compared)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that are sent together."""
    for alike in group_by(tensors, lambda tensor: (tensor.dtype, tensor.device)).values():
        yield from bounded(alike, lambda tensor: tensor.nbytes, BUCKET_BYTES)


def _put_back(buffer: Tensor, bucket: Sequence[Tensor]) -> None:
    parts = buffer.split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
