"""AdamW (arXiv 1711.05101): torch's own functional update, for everything that is no matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import _default_to_fused_or_foreach

from dion2_lightning.algorithms.algorithm import Algorithm, Member, StateTensor, StepContext, StepWork
from dion2_lightning.algorithms.hyperparameters import SharedSettings, not_negative, setting, two_decay_rates
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.matrices.layout import group_by, local, local_gradient


@dataclass(kw_only=True)
class AdamWSettings(SharedSettings):
    """The hyperparameters of AdamW."""

    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's decay rates.", two_decay_rates)
    eps: float = setting(1e-8, "AdamW's term in the denominator.", not_negative)


class AdamWAlgorithm(Algorithm):
    """Updates parameters of any shape, entry by entry: each rank updates what it holds, whatever the mesh."""

    name: ClassVar[str] = "adamw"
    settings: ClassVar[type[SharedSettings]] = AdamWSettings

    def state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Return the state that ``torch.optim.AdamW`` has: a step count, and moments in the parameter's dtype."""
        return {
            "step": StateTensor((), torch.float32, _step_device(parameter)),
            "exp_avg": StateTensor.like(parameter),
            "exp_avg_sq": StateTensor.like(parameter),
        }

    def step(self, members: Sequence[Member], context: StepContext) -> StepWork:
        """Plan a step on the parameters that have a gradient."""
        return StepWork(local=[partial(_update, members, context.gates)])


def _update(members: Sequence[Member], gates: Mapping[torch.device, Gate]) -> None:
    """Take one step; the fused kernel takes one group, device and dtype at a time."""
    present = [member for member in members if member.parameter.grad is not None]

    def key(member: Member) -> tuple[int, torch.device, torch.dtype]:
        return id(member.group), member.parameter.device, member.parameter.dtype

    for bucket in group_by(present, key).values():
        weights = [local(parameter) for parameter, _, _, _ in bucket]
        gradients = [local_gradient(parameter) for parameter, _, _, _ in bucket]
        states, group = [state for _, state, _, _ in bucket], bucket[0].group
        gate, is_fused = gates.get(weights[0].device), _is_fused(weights)
        if gate is not None and not is_fused and not gate.is_open:  # only the fused kernel skips by itself
            continue
        _place_steps(states, _step_device(bucket[0].parameter))
        adamw(
            weights,
            [gradient for gradient in gradients if gradient is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=is_fused or None,  # None: torch chooses between foreach and a loop
            found_inf=gate.found_inf if gate is not None and is_fused else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _step_device(parameter: Tensor) -> torch.device:
    """Return where a step count lives: beside its parameter for the fused kernel, else on the host, cheap to read."""
    return parameter.device if _is_fused([local(parameter)]) else torch.device("cpu")


def _is_fused(parameters: Sequence[Tensor]) -> bool:
    """Return whether torch has a fused AdamW for these parameters."""
    return _default_to_fused_or_foreach(list(parameters), differentiable=False, use_fused=True)[0]


def _place_steps(states: Sequence[dict[str, Tensor]], device: torch.device) -> None:
    """Move step counts that are elsewhere: Lightning moves parameters and moments between devices, but no counts."""
    for state in states:
        if state["step"].device != device:
            state["step"] = state["step"].to(device)
