"""Replicas that send less than their gradients: which parameters these are, what is refused, and what is averaged."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.distributed.replicas import (
    average_,
    average_gradients,
    refuse_wrong_replicas,
    same_on_replicas,
)
from dion2_lightning.matrices.layout import is_dtensor, local, local_gradient
from dion2_lightning.parameter_groups import Labelled

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

Groups = Sequence[Mapping[str, Any]]

WITHOUT_REPLICAS: Final = (
    "sync='compressed' needs ranks that hold replicas, and this optimizer knows of none: pass strategy= to "
    "build_optimizer, or process_group= to Dion2; under FSDP2 the group of ranks that hold the same part, which "
    "fully_shard must not know of. In Accelerate and the Trainer: parallelism_config=CompressedParallelismConfig(...), "
    "not ParallelismConfig. On one rank, or under FSDP2 alone, use sync='full'"
)

SMALL: Final = 2**16
"""Entries of a parameter whose gradient is looked at in every step."""

SCALED: Final = (
    "{} has gradients that differ between replicas, and sync='compressed' leaves it to DistributedDataParallel to "
    "average them. If they were clipped, each replica was by its own norm: pass max_grad_norm= to the optimizer "
    "instead, which clips all alike"
)


def is_compressing(groups: Groups) -> bool:
    """Return whether a group asks that replicas send less than its gradients."""
    return any(ALGORITHMS[group["algorithm"]].compresses(group) for group in groups)


def compressed_parameters(groups: Groups) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
    """Yield the parameters of which replicas do send less, each with its group."""
    for group in groups:
        algorithm = ALGORITHMS[group["algorithm"]]
        if algorithm.compresses(group):
            for parameter in group["params"]:
                if algorithm.is_compressed(parameter, group):
                    yield group, parameter


def refuse_without_replicas(
    labelled: Iterable[Labelled], process_group: "ProcessGroup | None", share_replicas: bool | None
) -> "ProcessGroup":
    """Return the ranks that hold replicas; raise an error where there are none, or where they cannot send less."""
    if process_group is None or process_group.size() == 1:
        raise ValueError(WITHOUT_REPLICAS)
    if share_replicas is False:
        raise ValueError("share_replicas=False keeps replicas apart, and sync='compressed' needs them; remove one")
    for _, parameter, label in labelled:
        refuse_wrong_replicas(parameter, label, process_group)
    return process_group


class CompressedReplicas:
    """What an optimizer remembers of such replicas between steps.

    Attributes:
        momenta_differ: Whether replicas have state of their own that nobody has averaged since.
    """

    def __init__(self) -> None:
        self.momenta_differ = False
        self._is_checked = False

    def refuse_change(self, groups: Groups) -> None:
        """Refuse groups that no longer say that replicas have state of their own, while they have."""
        if self.momenta_differ and not is_compressing(groups):
            raise RuntimeError(
                "sync was changed from 'compressed' to 'full' in the groups, and replicas have momenta of their own: "
                "set it back, save a checkpoint, and load that into an optimizer that is built with sync='full'"
            )

    def refuse_other_weights(self, labelled: Sequence[Labelled], process_group: "ProcessGroup") -> None:
        """Refuse replicas that begin with different weights; nothing would ever bring them together."""
        self._is_checked = False
        weights = [local(parameter).detach() for _, parameter, _ in labelled]
        found = same_on_replicas(weights, weights[0].device, process_group)
        for (_, _, label), are_same in zip(labelled, found, strict=True):
            if are_same is False:
                raise RuntimeError(
                    f"{label} differs between replicas, which with sync='compressed' nothing brings together: give "
                    "all ranks the same weights, by one seed or one checkpoint, before the first step"
                )

    def average(self, labelled: Sequence[Labelled], groups: Groups, process_group: "ProcessGroup") -> None:
        """Average the gradients on meshes that are not compressed, as nobody else does; and look at all others.

        Those that DistributedDataParallel has averaged must be equal: all of them at the first step, small ones at
        every step, as what scales gradients scales all. Those that are compressed must not, or they were averaged too.
        """
        compressed = {parameter for _, parameter in compressed_parameters(groups)}
        trained = [(parameter, label) for _, parameter, label in labelled if parameter.requires_grad]
        average_gradients([each for each, _ in trained if is_dtensor(each) and each not in compressed], process_group)
        averaged = [each for each in trained if not is_dtensor(each[0]) and each[0] not in compressed]
        if self._is_checked or not trained:
            refuse_scaled(averaged, process_group)
            return
        everything = [*averaged, *((parameter, label) for parameter, label in trained if parameter in compressed)]
        if not everything:
            return
        gradients = [local_gradient(parameter) for parameter, _ in everything]
        found = same_on_replicas(gradients, local(everything[0][0]).device, process_group)
        for (_, label), are_same in zip(averaged, found, strict=False):
            if are_same is False:
                raise RuntimeError(SCALED.format(label))
        apart = [are_same for are_same in found[len(averaged) :] if are_same is not None]
        if apart and all(apart):
            raise RuntimeError(
                f"{everything[-1][1]} and all others have the same gradients on all replicas, so with "
                "sync='compressed' nothing is saved: they were averaged already, or all replicas got the same data. "
                "Build the optimizer by build_optimizer(), with the model and strategy=, before anything averages"
            )
        self._is_checked = any(are_same is not None for are_same in found)

    def synchronize(
        self, groups: Groups, state: Mapping[Tensor, Mapping[str, Tensor]], process_group: "ProcessGroup | None"
    ) -> None:
        """Average what replicas keep apart."""
        self.refuse_change(groups)
        if not self.momenta_differ or process_group is None:
            return
        apart = [
            (local(state[parameter][entry]), local(parameter).device)
            for group, parameter in compressed_parameters(groups)
            if parameter in state
            for entry in sorted(ALGORITHMS[group["algorithm"]].state_by_replica)
        ]
        average_([tensor for tensor, device in apart if tensor.device == device], process_group)
        for tensor, device in apart:
            if tensor.device != device:  # offloaded: there is room for one of them
                copy = tensor.to(device)
                average_([copy], process_group)
                tensor.copy_(copy)
        self.momenta_differ = False


def refuse_scaled(averaged: Sequence[tuple[Tensor, str]], process_group: "ProcessGroup") -> None:
    """Raise an error where averaged gradients differ between replicas, on a device there and later.

    The sum of the norms of small ones is compared. What is not finite is left to ``check_finite``.
    """
    averaged = [each for each in averaged if each[0].numel() <= SMALL] or averaged[:1]
    gradients = [gradient for parameter, _ in averaged if (gradient := parameter.grad) is not None]
    if not averaged:
        return
    device = averaged[0][0].device
    norms = [norm.to(device).double() for norm in torch._foreach_norm(gradients, 2.0)] if gradients else []
    total = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *norms]).sum()
    extremes = torch.stack([total, -total])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=process_group)
    are_same = (extremes.sum() == 0) | extremes.isfinite().all().logical_not()
    message = SCALED.format(averaged[0][1])
    if device.type != "cpu":
        torch._assert_async(are_same, message)
    elif not are_same:
        raise RuntimeError(message)
