"""AdamW (arXiv 1711.05101): torch's own functional update, for everything that is no matrix.

It refuses tensors of several dtypes, and half precision is too coarse for its moments: at 0.999 a second moment in
bfloat16 never decays. So half-precision parameters have moments in float32 and are updated on float32 copies. It has no
cautious weight decay: what decays so is updated on copies too.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
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
from dion2_lightning.algorithms.working_memory import pass_bytes
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.device_numbers import DeviceNumber, Number, as_factor
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, blocks, cut_like, random_bits, store_each_
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import held_coordinates, local, local_gradient


@dataclass(kw_only=True)
class AdamWSettings(RoundingSettings):
    """The hyperparameters of AdamW."""

    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's decay rates.", two_decay_rates)
    eps: float = setting(1e-8, "AdamW's term in the denominator.", not_negative)


class AdamWAlgorithm(Algorithm):
    """Updates parameters of any shape, entry by entry: each rank updates what it holds, whatever the mesh."""

    name: ClassVar[str] = "adamw"
    settings: ClassVar[type[SharedSettings]] = AdamWSettings
    shaped_state: ClassVar[str | None] = "exp_avg"

    def state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Return the state that ``torch.optim.AdamW`` has: a step count, and moments, in float32 at least."""
        moment = StateTensor.like(parameter, torch.float32 if parameter.dtype in HALF_PRECISION else None)
        return {
            "step": StateTensor((), torch.float32, _step_device(parameter, group)),
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


class _Pieces(NamedTuple):
    """The tensors of several pieces, in lists, as torch takes them."""

    weights: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    @classmethod
    def of(cls, pieces: Iterable[_Piece]) -> "_Pieces":
        """Take them apart."""
        return cls(*map(list, zip(*pieces, strict=True)))


class _Rates(NamedTuple):
    """The rates of a group in a step."""

    lr: Number
    weight_decay: Number

    @classmethod
    def read(cls, group: Mapping[str, Any], context: StepContext) -> "_Rates":
        """Read them as they are now."""
        return cls(context.number(group["lr"]), context.number(group["weight_decay"]))

    @property
    def shrink(self) -> Number:
        """1 - lr * weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    def shrink_by(self, gate: Gate | None, dtype: torch.dtype) -> float | Tensor:
        """Return what weights of a dtype decay by; 1 where the gate is closed."""
        return as_factor(self.shrink, dtype) if gate is None else gate.number(self.shrink, 1.0, dtype)

    def lr_of(self, device: torch.device) -> float | Tensor:
        """Return the learning rate as torch takes it: a tensor in float32, in float64 on a CPU, which reads it."""
        return as_factor(self.lr, torch.float64 if device.type == "cpu" else torch.float32)


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
        rates = _Rates.read(group, context)
        pieces = [
            _Piece(local(each), gradient, local(state["exp_avg"]), local(state["exp_avg_sq"]), state["step"])
            for (each, state, *_), gradient in bucket
        ]
        gate = gate if is_fused else None
        entries = max(1, context.working_memory // pass_bytes(parameter.dtype))
        if parameter.dtype in HALF_PRECISION or _decays_cautiously(group, rates):
            _update_by_copies(pieces, _random_bits([member for member, _ in bucket]), group, rates, gate, entries)
            continue
        at_once: list[_Piece] = []
        others: list[_Piece] = []
        for piece in pieces:
            is_alike = piece.gradient.dtype == piece.weight.dtype and (not is_fused or _lies_in_one_order(piece))
            (at_once if is_alike else others).append(piece)
        if at_once:
            _adamw(_Pieces.of(at_once), group, rates, gate)
        if others:
            _update_by_copies(others, [None] * len(others), group, rates, gate, entries)


def _lies_in_one_order(piece: _Piece) -> bool:
    """Return whether all four tensors lie in memory in one order, in which torch's fused kernel goes along them.

    It ignores strides. They differ where a layer became ``channels_last`` after its first step, where a parameter is a
    view of a larger tensor, while the state has no gaps, or where a gradient is expanded or transposed.
    """
    tensors = piece[:4]
    return all(each.is_contiguous() for each in tensors) or len({each.stride() for each in tensors}) == 1


def _update_by_copies(
    pieces: Sequence[_Piece],
    random_bits_of_each: Sequence[RandomBits | None],
    group: Mapping[str, Any],
    rates: _Rates,
    gate: Gate | None,
    entries: int,
) -> None:
    """Update copies, in float32 at least and in one memory order, and round them once; so many ``entries`` at a time.

    For cautious weight decay the copies are zero, and what torch makes of them is the update; its sign is exp_avg's.
    """
    is_cautious = _decays_cautiously(group, rates)
    precise = torch.promote_types(pieces[0].weight.dtype, torch.float32)
    shrink = rates.shrink_by(gate, precise)
    cut = [
        (_Piece(*block, whole.step), bits)  # type: ignore[call-arg]
        for whole, its_bits in zip(pieces, random_bits_of_each, strict=True)
        for block, bits in blocks([torch.atleast_1d(each) for each in whole[:4]], its_bits, entries)
    ]
    for run in bounded(cut, lambda each: each[0].weight.numel(), entries):
        own = _Pieces.of(piece for piece, _ in run)
        make = torch.zeros if is_cautious else torch.empty
        values = make(sum(each.numel() for each in own.weights), dtype=precise, device=own.weights[0].device)
        weights = cut_like(values, own.weights)
        if not is_cautious:
            torch._foreach_copy_(weights, own.weights)
        copies = _Pieces(
            weights,
            _copied(own.gradients, precise),
            _copied(own.exp_avgs, own.exp_avgs[0].dtype),
            _copied(own.exp_avg_sqs, own.exp_avg_sqs[0].dtype),
            list(torch.stack(own.steps).unbind()),
        )
        _adamw(copies, group, rates, gate)
        for moments, its_copies in ((own.exp_avgs, copies.exp_avgs), (own.exp_avg_sqs, copies.exp_avg_sqs)):
            if its_copies is not moments:
                torch._foreach_copy_(moments, its_copies)
        del copies, its_copies  # which would take memory while weights are rounded
        if is_cautious:
            for weight, exp_avg, copy in zip(own.weights, own.exp_avgs, weights, strict=True):
                copy.add_(decayed(weight, exp_avg, shrink))
        if own.weights[0].dtype in HALF_PRECISION:
            store_each_(own.weights, values, [bits for _, bits in run])
        else:
            torch._foreach_copy_(own.weights, weights)
    steps = [piece.step for piece in pieces]
    if gate is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, [1 - gate.found_inf] * len(steps))


def _copied(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return contiguous tensors in a precision: these if all of them are so, else a copy of each."""
    if all(each.dtype == dtype and each.is_contiguous() for each in tensors):
        return tensors
    buffer = torch.empty(sum(each.numel() for each in tensors), dtype=dtype, device=tensors[0].device)
    copies = cut_like(buffer, tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


def _decays_cautiously(group: Mapping[str, Any], rates: _Rates) -> bool:
    return bool(group["cautious_weight_decay"] and rates.shrink != 1.0)


def _random_bits(members: Sequence[Member]) -> Sequence[RandomBits | None]:
    """The random bits of this step for parameters of one group, device and dtype; None for each without any."""
    if members[0].group["rounding"] != "stochastic" or members[0].parameter.dtype not in HALF_PRECISION:
        return [None] * len(members)
    parameters = [member.parameter for member in members]
    keys = [(each.shape, getattr(each, "device_mesh", None), getattr(each, "placements", None)) for each in parameters]
    coordinates = {key: held_coordinates(each) for key, each in dict(zip(keys, parameters, strict=True)).items()}
    drawn = random_bits(
        [coordinates[key] for key in keys],
        [zlib.crc32(f"{member.group['rounding_seed']} apply {member.name}".encode()) for member in members],
        [member.state["step"] for member in members],
    )
    shapes = [torch.atleast_1d(local(each)).shape for each in parameters]
    return [bits.shaped(shape) for bits, shape in zip(drawn, shapes, strict=True)]


def _adamw(pieces: _Pieces, group: Mapping[str, Any], rates: _Rates, gate: Gate | None) -> None:
    """Call torch's update, for tensors of one device and dtype.

    It reads a weight decay on the host; one on the device goes before it.
    """
    weights = pieces.weights
    weight_decay = rates.weight_decay
    if isinstance(weight_decay, DeviceNumber):
        torch._foreach_mul_(weights, rates.shrink_by(gate, weights[0].dtype))
        weight_decay = 0.0
    adamw(
        weights,
        pieces.gradients,
        pieces.exp_avgs,
        pieces.exp_avg_sqs,
        [],
        pieces.steps,
        fused=_is_fused(weights) or None,  # None: torch chooses between foreach and a loop
        found_inf=None if gate is None else gate.found_inf,
        capturable=group["capturable"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=rates.lr_of(weights[0].device),
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _step_device(parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Return where a step count lives: beside its parameter, or on the host where it is read there."""
    is_read = not (group["capturable"] or _is_fused([local(parameter)]))
    return torch.device("cpu") if is_read else parameter.device


def _is_fused(parameters: Sequence[Tensor]) -> bool:
    """Return whether torch has a fused AdamW for these parameters."""
    return _default_to_fused_or_foreach(list(parameters), differentiable=False, use_fused=True)[0]
