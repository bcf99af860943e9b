"""Clipping gradients by their norm on any mix of layouts.

``torch.nn.utils.clip_grad_norm_`` stacks the norms of all gradients, which fails where they lie on different meshes, or
on a mesh and beside it: under TP and under FSDP2 over TP. Here every mesh adds up its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.distributed.collectives import place_gradients
from dion2_lightning.kernels.precision import move_sums, sum_dtype
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import local_gradient

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup


ROW: Final = 1024
"""Entries of a gradient that a CPU sums up in float32."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    replicas: "Mapping[Tensor, ProcessGroup] | None" = None,
) -> Tensor:
    """Scale gradients, in place, so that their norm all together is at most ``max_norm``.

    The norm is that of the whole gradients, whatever part of them this rank holds; so every layout clips alike. All
    ranks have to call this with the same parameters. One all-reduce of a number for each mesh and each of its sharded
    dimensions. Gradients that are still summands, as those of norms under sequence parallelism, are added up first.

    Args:
        parameters: Plain parameters, DTensors, or both. Plain ones count as whole on every rank.
        max_norm: The norm that must not be exceeded, at least 0.
        norm_type: Which norm; ``float("inf")`` is the largest entry (default: 2.0).
        error_if_nonfinite: Raise an error where the norm is NaN or Inf, before anything is scaled; costs a
            synchronisation with the device (default: False).
        replicas: What ``optimizer.replicas()`` returns where replicas do not average all gradients: those parameters,
            each with the ranks that hold its replicas. Their norm is the root mean square of the replicas' norms, at
            least that of the average (default: None).

    Returns:
        The norm before clipping, 0-d, the same on every rank.

    Raises:
        ValueError: ``max_norm`` is negative, or ``norm_type`` not over 0.
        RuntimeError: The norm is not finite, where ``error_if_nonfinite`` asks for the check.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be over 0, got {norm_type}")
    everything = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not everything:
        return torch.tensor(0.0)
    place_gradients(everything)
    # Also what has no gradient here: its mesh's other ranks may have one, and wait.
    replicas_of = replicas or {}
    alike = group_by(everything, lambda parameter: (_sharding(parameter), replicas_of.get(parameter)))
    device = everything[0].device
    by_mesh = [move_sums(_power_sum(members, *ranks, norm_type), device) for ranks, members in alike.items()]
    together = torch.stack(by_mesh)
    norm = together.max() if norm_type == torch.inf else together.sum() ** (1.0 / norm_type)
    norm = norm.float()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the norm of the gradients is {norm.item()}, so nothing was clipped; look for NaN or Inf")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [gradient for gradient in map(local_gradient, everything) if gradient is not None]
    for its_device, members in group_by(gradients, lambda gradient: gradient.device).items():
        torch._foreach_mul_(members, factor.to(its_device))
    return norm


def _sharding(parameter: Any) -> tuple[Any, tuple[int, ...]]:
    """The mesh over which a parameter is spread, and along which of its dimensions; (None, ()) for a plain one."""
    placements = getattr(parameter, "placements", ())
    dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
    return (parameter.device_mesh, dims) if dims else (None, ())


def _norms(gradients: list[Tensor], norm_type: float, dtype: torch.dtype) -> Sequence[Tensor]:
    """The norms of gradients, 0-d."""
    if gradients[0].device.type != "cpu":
        return torch._foreach_norm(gradients, norm_type, dtype=dtype)
    # A CPU adds up the entries of a tensor one after another: the norm of a large one would be off by 1e-2 in float32.
    return [_norm(each, norm_type, dtype) for each in gradients]


def _norm(gradient: Tensor, norm_type: float, dtype: torch.dtype) -> Tensor:
    """The norm of a gradient on a CPU, from those of pieces of its memory; one that is not dense is copied."""
    if gradient.numel() <= ROW:
        whole: Tensor = torch.linalg.vector_norm(gradient, norm_type, dtype=dtype)
        return whole
    in_order = gradient.permute(sorted(range(gradient.ndim), key=gradient.stride, reverse=True))
    flat = (in_order if in_order.is_contiguous() else gradient).reshape(-1)
    rows = len(flat) // ROW * ROW
    pieces = [flat[:rows].view(-1, ROW)] + ([flat[rows:].view(1, -1)] if rows < len(flat) else [])
    norms = torch.cat([torch.linalg.vector_norm(each, norm_type, -1, dtype=dtype) for each in pieces])
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type, dtype=sum_dtype(gradient.device))
    return norm


def _power_sum(
    parameters: list[Tensor],
    sharding: tuple[Any, tuple[int, ...]],
    replicas: "ProcessGroup | None",
    norm_type: float,
) -> Tensor:
    """The sum of |g|^p over all entries on all ranks of the mesh, or the largest |g|; 0-d, in ``sum_dtype``.

    Over replicas it is the mean of their sums.
    """
    mesh, dims = sharding
    gradients = [local_gradient(parameter) for parameter in parameters]
    held = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    # Half precision would round the norm to three digits, or overflow.
    alike = group_by(held, lambda gradient: (gradient.device, torch.promote_types(gradient.dtype, torch.float32)))
    device = parameters[0].device
    of_alike = [torch.stack(list(_norms(members, norm_type, dtype))) for (_, dtype), members in alike.items()]
    none = torch.zeros(1, dtype=sum_dtype(device), device=device)
    norms = torch.cat([none, *(move_sums(each, device) for each in of_alike)])
    total = norms.max() if norm_type == torch.inf else (norms**norm_type).sum()
    operation = dist.ReduceOp.MAX if norm_type == torch.inf else dist.ReduceOp.SUM
    for dim in dims:
        dist.all_reduce(total, op=operation, group=mesh.get_group(dim))
    if replicas is not None:
        dist.all_reduce(total, op=operation, group=replicas)
        total = total if norm_type == torch.inf else total / replicas.size()
    return total
