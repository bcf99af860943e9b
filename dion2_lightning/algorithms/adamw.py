"""AdamW (arXiv 1711.05101): torch's own functional update, for everything that is no matrix.

It refuses tensors of several dtypes, and half precision is too coarse for its moments: at 0.999 a second moment in
bfloat16 never decays. So half-precision parameters have moments in float32 and are updated on float32 copies.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import _default_to_fused_or_foreach

from dion2_lightning.algorithms.algorithm import Algorithm, Member, StateTensor, StepContext, StepWork
from dion2_lightning.algorithms.hyperparameters import (
    RoundingSettings,
    SharedSettings,
    not_negative,
    setting,
    two_decay_rates,
)
from dion2_lightning.algorithms.matrix_update import BATCH_ELEMENTS, bounded
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, blocks, random_bits, store_
from dion2_lightning.matrices.layout import group_by, held_coordinates, local, local_gradient


@dataclass(kw_only=True)
class AdamWSettings(RoundingSettings):
    """The hyperparameters of AdamW."""

    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's decay rates.", two_decay_rates)
    eps: float = setting(1e-8, "AdamW's term in the denominator.", not_negative)


class AdamWAlgorithm(Algorithm):
    """Updates parameters of any shape, entry by entry: each rank updates what it holds, whatever the mesh."""

    name: ClassVar[str] = "adamw"
    settings: ClassVar[type[SharedSettings]] = AdamWSettings

    def state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Return the state that ``torch.optim.AdamW`` has: a step count, and moments, in float32 at least."""
        moment = StateTensor.like(parameter, torch.float32 if parameter.dtype in HALF_PRECISION else None)
        return {
            "step": StateTensor((), torch.float32, _step_device(parameter)),
            "exp_avg": moment,
            "exp_avg_sq": moment,
        }

    def step(self, members: Sequence[Member], context: StepContext) -> StepWork:
        """Plan a step on the parameters that have a gradient."""
        return StepWork(local=[partial(_update, members)])


def _update(members: Sequence[Member]) -> None:
    """Take one step; the fused kernel takes one group, device and dtype at a time."""
    present = [member for member in members if member.parameter.grad is not None]

    def key(member: Member) -> tuple[int, torch.device, torch.dtype]:
        return id(member.group), member.parameter.device, member.parameter.dtype

    for bucket in group_by(present, key).values():
        _place_steps([member.state for member in bucket], _step_device(bucket[0].parameter))
        update = _update_in_float32 if bucket[0].parameter.dtype in HALF_PRECISION else _update_in_place
        update(bucket)


class _Piece(NamedTuple):
    """What is updated at once: a parameter, or a part of a large one."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    bits: RandomBits | None


def _update_in_place(bucket: Sequence[Member]) -> None:
    _adamw(
        bucket[0].group,
        [local(member.parameter) for member in bucket],
        [local(member.parameter.grad) for member in bucket if member.parameter.grad is not None],
        [local(member.state["exp_avg"]) for member in bucket],
        [local(member.state["exp_avg_sq"]) for member in bucket],
        [member.state["step"] for member in bucket],
    )


def _update_in_float32(bucket: Sequence[Member]) -> None:
    """Take the step on float32 copies, rounded once, of as much at a time as the working memory allows."""
    pieces: list[_Piece] = []
    for member, bits in zip(bucket, _random_bits(bucket), strict=True):
        state, gradient = member.state, local_gradient(member.parameter)
        assert gradient is not None
        whole = (local(member.parameter), gradient, local(state["exp_avg"]), local(state["exp_avg_sq"]))
        cut = blocks([torch.atleast_1d(each) for each in whole], bits, BATCH_ELEMENTS)
        for (weight, its_gradient, exp_avg, exp_avg_sq), its_bits in cut:
            pieces.append(_Piece(weight, its_gradient, exp_avg, exp_avg_sq, state["step"], its_bits))
    for run in bounded(pieces, lambda piece: piece.weight.numel()):
        copies = [piece.weight.float() for piece in run]
        _adamw(
            bucket[0].group,
            copies,
            [piece.gradient.float() for piece in run],
            [piece.exp_avg for piece in run],
            [piece.exp_avg_sq for piece in run],
            list(torch.stack([piece.step for piece in run]).unbind()),  # copies, as each piece counts the step
        )
        for piece, copy in zip(run, copies, strict=True):
            store_(piece.weight, copy, piece.bits)
    torch._foreach_add_([member.state["step"] for member in bucket], 1)


def _random_bits(bucket: Sequence[Member]) -> Sequence[RandomBits | None]:
    """The random bits of this step for parameters of one group and device; None for each if it rounds to nearest."""
    if bucket[0].group["rounding"] != "stochastic":
        return [None] * len(bucket)
    drawn = random_bits(
        [held_coordinates(member.parameter) for member in bucket],
        [zlib.crc32(f"apply {member.name}".encode()) for member in bucket],
        [member.state["step"] for member in bucket],
    )
    return [
        bits.shaped(torch.atleast_1d(local(member.parameter)).shape) for member, bits in zip(bucket, drawn, strict=True)
    ]


def _adamw(
    group: Mapping[str, Any],
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
) -> None:
    """Call torch's update, for tensors of one device and dtype."""
    adamw(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=_is_fused(weights) or None,  # None: torch chooses between foreach and a loop
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
