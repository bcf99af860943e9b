"""The AdamW side: torch's own functional AdamW over the groups that are not matrices."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import _default_to_fused_or_foreach

from dion2_lightning.layout import alike, local, local_gradient, zeros_like


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state that ``torch.optim.AdamW`` starts with: moments in the parameter's dtype, and a step count."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device(parameter)),
        "exp_avg": zeros_like(parameter),
        "exp_avg_sq": zeros_like(parameter),
    }


def step_device(parameter: Tensor) -> torch.device:
    """Return where a step count lives: beside its parameter for the fused kernel, else on the host, cheap to read."""
    return parameter.device if is_fused([local(parameter)]) else torch.device("cpu")


def is_fused(parameters: Sequence[Tensor]) -> bool:
    """Whether torch has a fused AdamW for these parameters."""
    return _default_to_fused_or_foreach(list(parameters), differentiable=False, use_fused=True)[0]


def adamw_update(
    parameters: Sequence[Tensor], states: Mapping[Tensor, MutableMapping[str, Tensor]], group: Mapping[str, Any]
) -> None:
    """Take one AdamW step on the parameters of a group that have a gradient.

    The fused kernel takes one device and dtype at a time. AdamW goes entry by entry, so each rank updates what it
    holds, whatever the mesh.
    """
    beta1, beta2 = group["betas"]
    for bucket in alike(parameters, lambda parameter: (parameter.device, parameter.dtype)).values():
        weights = [local(parameter) for parameter in bucket]
        _place_steps([states[parameter] for parameter in bucket], step_device(bucket[0]))
        adamw(
            weights,
            [gradient for gradient in map(local_gradient, bucket) if gradient is not None],
            [local(states[parameter]["exp_avg"]) for parameter in bucket],
            [local(states[parameter]["exp_avg_sq"]) for parameter in bucket],
            [],
            [states[parameter]["step"] for parameter in bucket],
            fused=is_fused(weights) or None,  # None: torch chooses between foreach and a loop
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _place_steps(states: Sequence[MutableMapping[str, Tensor]], device: torch.device) -> None:
    """Move step counts that are elsewhere: Lightning moves parameters and moments between devices, but no counts."""
    for state in states:
        if state["step"].device != device:
            state["step"] = state["step"].to(device)
