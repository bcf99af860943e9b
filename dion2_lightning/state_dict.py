"""Checkpoints: which saved state belongs to which parameter, whether it fits, and restoring it without rounding."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.algorithm import StateTensor
from dion2_lightning.kernels.precision import has_float64
from dion2_lightning.matrices.layout import is_dtensor, local
from dion2_lightning.parameter_groups import algorithm_of, parameter_names

Group = Mapping[str, Any]


def match_state_dict(saved: StateDict, groups: Sequence[Group]) -> StateDict:
    """Return a saved state dict with its groups and parameters in the order of an optimizer's, and nothing missing.

    Its parameter ids are numbers or names; it is not changed. One that does not fit gets an error that says why.
    """
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"the checkpoint has no {key!r}; pass what state_dict() returned")
    matched = [_match_group(old, new) for old, new in zip(_match_order(saved, groups), groups, strict=True)]
    without_state = []
    for old, new in zip(matched, groups, strict=True):
        for key, parameter, name in zip(old["params"], new["params"], parameter_names(new), strict=True):
            if key in saved["state"]:
                _check_state(saved["state"][key], parameter, new, f"group {new['name']!r}: {name}")
            elif saved["state"] and parameter.requires_grad:
                without_state.append(name)
    if without_state:
        warnings.warn(
            f"the checkpoint has no state for {_some(without_state)}, as of what was frozen when it was saved; these "
            "start anew",
            stacklevel=2,
        )
    return {**saved, "param_groups": matched}


def shares_memory(saved: StateDict, state: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Return whether a saved state dict holds tensors of an optimizer's present state.

    ``torch.distributed.checkpoint`` reads files into the tensors that an optimizer has, before it calls
    ``load_state_dict``.
    """
    present = {local(value).data_ptr() for entries in state.values() for value in entries.values() if value.numel()}
    values = (value for entries in saved.get("state", {}).values() for value in entries.values())
    return any(isinstance(value, Tensor) and local(value).data_ptr() in present for value in values)


def restore_exactly(optimizer: Optimizer, saved: StateDict) -> None:
    """Copy again what ``Optimizer.load_state_dict`` has rounded, and put step counts where they belong.

    It rounds every floating-point state to the dtype of its parameter. ``saved`` is what :func:`match_state_dict`
    returned.
    """
    for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(old["params"], new["params"], strict=True):
            expected = algorithm_of(new).state(parameter, new)
            for entry, value in saved["state"].get(key, {}).items():
                state = optimizer.state[parameter]
                if entry not in expected:
                    continue  # it is optional
                if expected[entry].shape == ():
                    number = torch.as_tensor(value, dtype=expected[entry].dtype)
                    state[entry] = number.to(expected[entry].device, copy=True)
                else:
                    dtype = torch.promote_types(value.dtype, expected[entry].dtype)
                    if dtype != state[entry].dtype:
                        state[entry] = value.to(parameter.device, dtype)


def _match_order(saved: StateDict, groups: Sequence[Group]) -> Sequence[Group]:
    """The saved groups in the order of ``groups``: by name where both have the same names, else as they stand."""
    old_groups: Sequence[Group] = saved["param_groups"]
    old_names, new_names = [group.get("name") for group in old_groups], [group["name"] for group in groups]
    if len(old_groups) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(old_groups)} groups, {old_names}; this optimizer {len(groups)}, {new_names}"
        )
    if set(old_names) != set(new_names):
        return old_groups
    by_name = dict(zip(old_names, old_groups, strict=True))
    return [by_name[name] for name in new_names]


def _match_group(old: Group, new: Group) -> dict[str, Any]:
    """A saved group with its parameters in the order of the present one, and the present settings where it has none."""
    prefix = f"group {new['name']!r}"
    algorithm = old.get("algorithm", new["algorithm"])
    if algorithm != new["algorithm"]:
        raise ValueError(
            f"{prefix}: the checkpoint's algorithm is {algorithm!r}, this optimizer's {new['algorithm']!r}"
        )
    if len(old["params"]) != len(new["params"]):
        raise ValueError(
            f"{prefix}: the checkpoint has {len(old['params'])} parameters, this optimizer {len(new['params'])}; "
            "it is of another model, or the model was split otherwise"
        )
    _check_settings(old, new, prefix)
    # Version 0.1.0 wrote the settings of all algorithms into every group; what schedulers have added stays.
    foreign = {name for each in ALGORITHMS.values() for name in each.defaults()} - new.keys()
    group = {**new, **{name: value for name, value in old.items() if name not in foreign}}
    if "param_names" in new:
        group["params"] = _in_order(old, new, prefix)
        group["param_names"] = list(new["param_names"])
    return group


def _check_settings(old: Group, new: Group, prefix: str) -> None:
    """Refuse settings that are not this optimizer's; what schedulers have added may stay."""
    unknown = sorted(old.keys() - new.keys())
    if "algorithm" not in old and unknown:
        raise ValueError(
            f"{prefix}: the checkpoint's group says no algorithm and has {_some(unknown)}, which this optimizer does "
            "not know; it is of another optimizer"
        )
    algorithm_of(new).check_settings(old, f"{prefix}: the checkpoint's ")


def _in_order(old: Group, new: Group, prefix: str) -> list[Any]:
    """The ids of a saved group's parameters, in the order of the present group's names."""
    ids, wanted = list(old["params"]), list(new["param_names"])
    if all(isinstance(each, str) for each in ids):
        # Names of the module that was saved, which the optimizer may know a part of. torch.distributed.checkpoint has
        # put them in the present order, but left param_names in the file's.
        if set(ids) == set(wanted):
            return wanted
        if all(each == name or each.endswith(f".{name}") for each, name in zip(ids, wanted, strict=True)):
            return ids
    names = old.get("param_names") or [each for each in ids if isinstance(each, str)]
    if not names:
        return ids
    if set(names) != set(wanted):
        raise ValueError(
            f"{prefix}: the names of the parameters differ; only in the checkpoint: "
            f"{_some(sorted(set(names) - set(wanted)))}; only in this optimizer: "
            f"{_some(sorted(set(wanted) - set(names)))}. To load by position, remove 'param_names' from the "
            "checkpoint's groups"
        )
    if len(names) != len(ids):
        raise ValueError(f"{prefix}: the checkpoint has {len(names)} names for {len(ids)} parameters; it is damaged")
    of_names = dict(zip(names, ids, strict=True))
    return [of_names[name] for name in wanted]


def _check_state(state: Mapping[str, Any], parameter: Tensor, group: Group, label: str) -> None:
    algorithm = algorithm_of(group)
    expected = algorithm.state(parameter, group)
    if not set(state) ^ set(expected) <= algorithm.optional_state:
        raise ValueError(
            f"{label}: the checkpoint holds {sorted(state)} for it, algorithm {group['algorithm']!r} needs "
            f"{sorted(expected)}"
        )
    for entry, tensor in expected.items():
        if entry in state and tensor.shape != ():  # a number is taken from wherever it is, in any form
            _check_tensor(state[entry], tensor, entry, label, parameter)


def _check_tensor(found: Any, expected: StateTensor, entry: str, label: str, parameter: Any) -> None:
    if is_dtensor(found) != (expected.placements is not None):
        raise ValueError(
            f"{label} and the checkpoint's {entry!r} are not placed alike, one is a DTensor; load through "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which places what it loads"
        )
    if tuple(found.shape) != expected.shape:
        raise ValueError(
            f"{label}: the checkpoint's {entry!r} has shape {tuple(found.shape)}, this optimizer's {expected.shape}"
        )
    if expected.placements is not None:
        mesh = parameter.device_mesh
        if tuple(found.placements) != expected.placements or not torch.equal(found.device_mesh.mesh, mesh.mesh):
            raise ValueError(
                f"{label}: the checkpoint's {entry!r} is placed as {tuple(found.placements)} on {found.device_mesh}, "
                f"this optimizer's as {expected.placements} on {mesh}; load through "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which places what it loads"
            )
    if found.dtype == torch.float64 and not has_float64(expected.device):
        raise ValueError(
            f"{label} is on {expected.device.type!r}, which has no float64, and the checkpoint's {entry!r} is in "
            "float64; convert it with .float() before loading"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
