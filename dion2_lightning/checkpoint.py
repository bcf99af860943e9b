"""Checkpoints: which saved state belongs to which parameter, whether it fits, and restoring it without rounding."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from dion2_lightning.adamw import step_device
from dion2_lightning.groups import parameter_names
from dion2_lightning.layout import is_dtensor

Group = Mapping[str, Any]

STATE_OF: Final = {"dion2": ("momentum",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
"""The entries of a parameter's state, by algorithm."""


def match_state_dict(saved: StateDict, groups: Sequence[Group]) -> StateDict:
    """Return a saved state dict with its groups and parameters in the order of ``groups``, and nothing missing.

    Args:
        saved: With numbers or names as parameter ids. Not changed.
        groups: The groups of the optimizer that is to load it.

    Raises:
        ValueError: It does not fit; the message says what differs.
    """
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"the checkpoint has no {key!r}; pass what state_dict() returned")
    matched = [_match_group(old, new) for old, new in zip(_match_order(saved, groups), groups, strict=True)]
    for old, new in zip(matched, groups, strict=True):
        for key, parameter, name in zip(old["params"], new["params"], parameter_names(new), strict=True):
            if key in saved["state"]:
                _check_state(saved["state"][key], parameter, new["algorithm"], f"group {new['name']!r}: {name}")
    return {**saved, "param_groups": matched}


def restore_exactly(optimizer: Optimizer, saved: StateDict) -> None:
    """Copy again what ``Optimizer.load_state_dict`` has rounded, and put step counts where they belong.

    It rounds every floating-point state to the dtype of its parameter.

    Args:
        optimizer: After loading ``saved``.
        saved: What :func:`match_state_dict` returned.
    """
    for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(old["params"], new["params"], strict=True):
            for entry, value in saved["state"].get(key, {}).items():
                state = optimizer.state[parameter]
                if entry == "step":
                    count = torch.as_tensor(value, dtype=torch.float32)
                    state[entry] = count.to(step_device(parameter), copy=True)
                elif value.dtype != state[entry].dtype:
                    state[entry] = value.to(parameter.device)


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
    where = f"group {new['name']!r}"
    algorithm = old.get("algorithm", new["algorithm"])
    if algorithm != new["algorithm"]:
        raise ValueError(f"{where}: the checkpoint's algorithm is {algorithm!r}, this optimizer's {new['algorithm']!r}")
    if len(old["params"]) != len(new["params"]):
        raise ValueError(
            f"{where}: the checkpoint has {len(old['params'])} parameters, this optimizer {len(new['params'])}; "
            "it is of another model, or the model was split otherwise"
        )
    group = {**new, **old}
    names = old.get("param_names") or [key for key in old["params"] if isinstance(key, str)]
    if names and "param_names" in new:
        ids = dict(zip(names, old["params"], strict=True))
        if ids.keys() != set(new["param_names"]):
            unknown = sorted(ids.keys() - set(new["param_names"]))
            missing = sorted(set(new["param_names"]) - ids.keys())
            raise ValueError(
                f"{where}: the names of the parameters differ; only in the checkpoint: {_some(unknown)}; only in this "
                f"optimizer: {_some(missing)}. To load by position, remove 'param_names' from the checkpoint's groups"
            )
        group["params"] = [ids[name] for name in new["param_names"]]
        group["param_names"] = list(new["param_names"])
    return group


def _check_state(state: Mapping[str, Any], parameter: Tensor, algorithm: str, what: str) -> None:
    expected = STATE_OF[algorithm]
    if set(state) != set(expected):
        raise ValueError(
            f"{what}: the checkpoint holds {sorted(state)} for it, algorithm {algorithm!r} needs {sorted(expected)}"
        )
    for entry in expected:
        if entry != "step" and is_dtensor(state[entry]) != is_dtensor(parameter):
            raise ValueError(
                f"{what} and the checkpoint's {entry!r} are not placed alike, one is a DTensor; load through "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which places what it loads"
            )
        if entry != "step" and state[entry].shape != parameter.shape:
            raise ValueError(
                f"{what} has shape {tuple(parameter.shape)}, but the checkpoint's {entry!r} {tuple(state[entry].shape)}"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
