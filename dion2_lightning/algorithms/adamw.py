"""AdamW (arXiv 1711.05101): torch's own functional update, for everything that is no matrix.

It refuses tensors of several dtypes, and half precision is too coarse for its moments: at 0.999 a second moment in
bfloat16 never decays. So half-precision parameters have moments in float32 and are updated on float32 copies. It has no
cautious weight decay: what decays so is updated on copies too.
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
from dion2_lightning.algorithms.matrix_update import bounded, pass_bytes
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.gate import Gate
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
        return StepWork(local=[partial(_update, members, context)])


class _Piece(NamedTuple):
    """What torch updates at once, of what this rank holds: a parameter, or a part of one."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _update(members: Sequence[Member], context: StepContext) -> None:
    """Take one step; the fused kernel takes one group, device and dtype at a time."""
    present = [(member, gradient) for member in members if (gradient := local_gradient(member.parameter)) is not None]

    def key(pair: tuple[Member, Tensor]) -> tuple[int, torch.device, torch.dtype]:
        return id(pair[0].group), pair[0].parameter.device, pair[0].parameter.dtype

    for bucket in group_by(present, key).values():
        parameter, group = bucket[0][0].parameter, bucket[0][0].group
        gate, is_fused = context.gates.get(parameter.device), _is_fused([local(parameter)])
        if gate is not None and not is_fused and not gate.is_open:  # only the fused kernel skips by itself
            continue
        found_inf = gate.found_inf if gate is not None and is_fused else None
        _place_steps([member.state for member, _ in bucket], _step_device(parameter))
        pieces = [
            _Piece(local(each), gradient, local(state["exp_avg"]), local(state["exp_avg_sq"]), state["step"])
            for (each, state, *_), gradient in bucket
        ]
        if parameter.dtype in HALF_PRECISION or _decays_cautiously(group):
            bits = _random_bits([member for member, _ in bucket])
            entries = max(1, context.working_memory // pass_bytes(parameter.dtype))
            _update_by_copies(pieces, bits, group, gate if is_fused else None, entries)
        else:
            _adamw(pieces, group, found_inf)


def _update_by_copies(
    pieces: Sequence[_Piece],
    random_bits_of_each: Sequence[RandomBits | None],
    group: Mapping[str, Any],
    gate: Gate | None,
    entries: int,
) -> None:
    """Update copies, in float32 at least, and round them once; so many ``entries`` at a time.

    For cautious weight decay the copies are zero, and what torch makes of them is the update; its sign is exp_avg's.
    """
    is_cautious, found_inf = _decays_cautiously(group), None if gate is None else gate.found_inf
    precise = torch.promote_types(pieces[0].weight.dtype, torch.float32)
    factor: float = 1.0 - group["lr"] * group["weight_decay"]
    shrink = factor if gate is None else gate.number(factor, 1.0, precise)
    cut = [
        (_Piece(*block, whole.step), bits)  # type: ignore[call-arg]
        for whole, its_bits in zip(pieces, random_bits_of_each, strict=True)
        for block, bits in blocks([torch.atleast_1d(each) for each in whole[:4]], its_bits, entries)
    ]
    for run in bounded(cut, lambda each: each[0].weight.numel(), entries):
        copies = [
            piece._replace(
                weight=torch.zeros_like(piece.weight, dtype=precise) if is_cautious else piece.weight.to(precise),
                gradient=piece.gradient.to(precise),
                step=piece.step.clone(),
            )
            for piece, _ in run
        ]
        _adamw(copies, group, found_inf)
        for (piece, bits), copy in zip(run, copies, strict=True):
            if is_cautious:
                copy.weight.add_(decayed(piece.weight, piece.exp_avg, shrink))
            if piece.weight.dtype in HALF_PRECISION:
                store_(piece.weight, copy.weight, bits)
            else:
                piece.weight.copy_(copy.weight)
    steps = [piece.step for piece in pieces]
    if found_inf is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, [1 - found_inf] * len(steps))


def _decays_cautiously(group: Mapping[str, Any]) -> bool:
    return bool(group["cautious_weight_decay"] and group["lr"] * group["weight_decay"])


def _random_bits(members: Sequence[Member]) -> Sequence[RandomBits | None]:
    """The random bits of this step for parameters of one group, device and dtype; None for each without any."""
    if members[0].group["rounding"] != "stochastic" or members[0].parameter.dtype not in HALF_PRECISION:
        return [None] * len(members)
    drawn = random_bits(
        [held_coordinates(member.parameter) for member in members],
        [zlib.crc32(f"{member.group['rounding_seed']} apply {member.name}".encode()) for member in members],
        [member.state["step"] for member in members],
    )
    shapes = [torch.atleast_1d(local(member.parameter)).shape for member in members]
    return [bits.shaped(shape) for bits, shape in zip(drawn, shapes, strict=True)]


def _adamw(pieces: Sequence[_Piece], group: Mapping[str, Any], found_inf: Tensor | None) -> None:
    """Call torch's update, for tensors of one device and dtype."""
    weights, gradients, exp_avgs, exp_avg_sqs, steps = (list(each) for each in zip(*pieces, strict=True))
    adamw(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=_is_fused(weights) or None,  # None: torch chooses between foreach and a loop
        found_inf=found_inf,
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
