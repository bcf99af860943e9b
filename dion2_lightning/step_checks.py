"""What a step checks before it changes anything: settings, placements, gradients, and what ranks must have in common.

All of it may have been changed since the optimizer was made. Every error names the group and the parameter.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.hyperparameters import numbers, plain
from dion2_lightning.distributed.collectives import RanksAround, on_any_rank, on_every_rank
from dion2_lightning.kernels import fused
from dion2_lightning.kernels.gate import are_finite
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import is_dtensor, local, local_gradient, refuse_misplaced
from dion2_lightning.offload import refuse_device
from dion2_lightning.parameter_groups import (
    Group,
    Labelled,
    algorithm_of,
    check_scheduled,
    labelled_parameters,
    parameter_names,
    refuse_flattened,
    tensor_rates,
    unwrapped_names,
)

NOT_SETTINGS: Final = ("params", "param_names", "initial_lr", "given_lr")
"""Entries of groups that say nothing about the update."""


def check_settings(groups: Sequence[Group]) -> None:
    """Refuse what groups cannot say, as when they were made, and make numbers of other libraries plain.

    Learning rate and weight decay may be any finite number: schedules set them, some of them a rounding error under
    zero. What rates that are tensors hold is not checked, for the host would wait.
    """
    known: dict[str, Collection[str]] = {}
    for group in groups:
        prefix = f"group {group['name']!r}: "
        algorithm = algorithm_of(group, prefix)
        if algorithm.name not in known:
            known[algorithm.name] = algorithm.defaults().keys()
        settings = known[algorithm.name]
        if missing := [name for name in settings if name not in group]:
            raise ValueError(
                f"{prefix}has no {missing[0]!r}, which algorithm {algorithm.name!r} needs; a group's algorithm is "
                "chosen when it is added"
            )
        given = plain({name: group[name] for name in settings})
        group.update(given)
        for name in tensor_rates(group):
            del given[name]
        check_scheduled(algorithm, given, prefix)


def check_placements(
    groups: Sequence[Group],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    *,
    is_offloaded: bool,
    needs_triton: bool,
) -> None:
    """Refuse parameters that cannot be updated as they are now, before ranks talk to each other."""
    labelled = list(labelled_parameters(groups))
    for group, parameter, label in labelled:
        refuse_flattened(parameter, label)
        refuse_misplaced(parameter, label)
        algorithm = ALGORITHMS[group["algorithm"]]
        algorithm.check_parameter(parameter, label, group)
        if parameter.requires_grad:
            _refuse_resized(parameter, label, state.get(parameter, {}).get(algorithm.shaped_state or ""))
        if is_offloaded:
            refuse_device(parameter, label)
    if needs_triton:
        for device in {local(parameter).device for _, parameter, _ in labelled}:
            reason = fused.unavailable(device)
            if reason is not None:
                raise ValueError(
                    f"kernels='triton' cannot run on {device}: {reason}; with 'auto' torch takes their place"
                )


def _refuse_resized(parameter: Tensor, label: str, shaped: Tensor | None) -> None:
    """Raise an error where a parameter was resized after a step: the fused AdamW would write beyond its state."""
    if shaped is not None and shaped.shape != parameter.shape:
        raise ValueError(
            f"{label} has the shape {tuple(parameter.shape)}, and its state still has {tuple(shaped.shape)}; build the "
            "optimizer after a resize, or drop the state: del optimizer.state[parameter]"
        )


def check_kinds_of_gradients(groups: Sequence[Group]) -> None:
    """Refuse gradients that have no update, before ranks compare anything."""
    for group in groups:
        for parameter, name in zip(group["params"], parameter_names(group), strict=True):
            gradient = parameter.grad if parameter.requires_grad else None
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"group {group['name']!r}: {name} has a gradient stored as {gradient.layout}; use sparse=False"
                )
            if is_dtensor(parameter) and not is_dtensor(gradient):
                raise TypeError(
                    f"group {group['name']!r}: {name} is a DTensor, and its gradient a plain tensor; "
                    "distribute_tensor makes a DTensor of it"
                )


def check_gradients(groups: Sequence[Group], ranks: RanksAround) -> None:
    """Refuse gradients with NaN or Inf where groups ask for that.

    Raises:
        FloatingPointError: On all ranks that share parameters, if one has a bad gradient.
    """
    checked = [
        (label, parameter)
        for group, parameter, label in labelled_parameters(groups)
        if group["check_finite"] is True and parameter.requires_grad
    ]
    if not checked:
        return
    labels, parameters = zip(*checked, strict=True)
    flags = [is_finite.logical_not() for is_finite in _have_finite_gradients(parameters)]
    for label, is_broken in zip(labels, on_any_rank(flags, parameters, ranks), strict=True):
        if is_broken:
            raise FloatingPointError(f"{label} has a gradient with NaN or Inf; no weight and no state was changed")


def gradients_are_finite(groups: Sequence[Group], ranks: RanksAround) -> Tensor | None:
    """Return whether to take a step, where groups ask to skip it for a bad gradient: boolean, 0-d, on a device.

    None where no group asks. All ranks that share parameters get the same answer, and the host does not wait for it.
    """
    labelled = list(labelled_parameters(groups))
    checked = [
        parameter for group, parameter, _ in labelled if group["check_finite"] == "skip" and parameter.requires_grad
    ]
    if not checked:
        return None
    by_device = group_by(_have_finite_gradients(checked), lambda is_finite: is_finite.device).values()
    of_devices = [torch.stack(flags).all().to(checked[0].device) for flags in by_device]
    return on_every_rank(torch.stack(of_devices).all(), [parameter for _, parameter, _ in labelled], ranks)


def _have_finite_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Which gradients, as far as this rank has them, hold neither NaN nor Inf: boolean, 0-d, on their devices."""
    flags: dict[int, Tensor] = {}
    gradients = [(index, local_gradient(parameter)) for index, parameter in enumerate(parameters)]
    present = [(index, gradient) for index, gradient in gradients if gradient is not None and gradient.numel()]
    for alike in group_by(present, lambda pair: (pair[1].device, pair[1].dtype)).values():
        for (index, _), is_finite in zip(alike, are_finite([gradient for _, gradient in alike]), strict=True):
            flags[index] = is_finite
    for device, missing in group_by(
        set(range(len(parameters))) - flags.keys(), lambda at: parameters[at].device
    ).items():
        flags.update(dict.fromkeys(missing, torch.ones((), dtype=torch.bool, device=device)))
    return [flags[index] for index in range(len(parameters))]


def creates_state_alone(groups: Sequence[Group], ranks: RanksAround) -> bool:
    """Return whether nothing but state is asked of a first step: every gradient is zero and lr is 0, on every rank.

    By such a step ``torch.distributed.checkpoint`` makes an optimizer create its state; nothing else may change.
    """
    if any(group["lr"] for group in groups):
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    gradients = [local_gradient(parameter) for parameter in parameters]
    flags = [
        torch.zeros((), dtype=torch.bool, device=parameter.device) if gradient is None else gradient.bool().any()
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    return not any(on_any_rank(flags, parameters, ranks))


def settings_of(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what a group says about the update, which ranks that share parameters must have in common.

    A rate that is a tensor counts only as "a tensor": the host does not read its value.
    """
    return [
        (name, "a tensor" if isinstance(value, Tensor) else value)
        for name, value in group.items()
        if name not in NOT_SETTINGS
    ]


def descriptions_of(
    shared: Sequence[Labelled], attributes: Mapping[str, Any], steps: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Return what ranks must have in common of parameters that they share, in plain words for the error.

    Args:
        shared: The parameters.
        attributes: Of the optimizer, which hold for all.
        steps: How many steps each has taken; None where ranks need not have taken as many.
    """
    groups = {id(group): group for group, _, _ in shared}
    settings = {key: dict(settings_of(numbers(group))) for key, group in groups.items()}
    names = {
        parameter: name
        for group in groups.values()
        if group.get("param_names") is not None  # else nothing tells that ranks have other orders
        for parameter, name in zip(group["params"], unwrapped_names(group), strict=True)
    }
    return [
        {
            "parameter": names.get(parameter),
            "shape": tuple(parameter.shape),
            "dtype": parameter.dtype,
            "requires_grad": parameter.requires_grad,
            "number of steps": its_steps,
            "precision": ALGORITHMS[group["algorithm"]].agreement(parameter, group),
            **attributes,
            **settings[id(group)],
        }
        for (group, parameter, _), its_steps in zip(shared, steps, strict=True)
    ]
