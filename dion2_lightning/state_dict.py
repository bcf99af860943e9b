"""Checkpoints: which saved state belongs to which parameter, whether it fits, and restoring it without rounding."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.algorithm import StateTensor
from dion2_lightning.algorithms.hyperparameters import numbers, plain
from dion2_lightning.distributed.collectives import is_first_rank
from dion2_lightning.kernels.precision import has_float64
from dion2_lightning.lists import first_few
from dion2_lightning.matrices.layout import is_dtensor, local, moved
from dion2_lightning.parameter_groups import (
    ENTRIES,
    algorithm_of,
    check_scheduled,
    parameter_names,
    tensor_rates,
    unwrapped_names,
)

Group = Mapping[str, Any]

WEIGHTS_ALONE: Final = (
    "load the model's weights alone: in Lightning load_from_checkpoint() and fit() without ckpt_path, in the Trainer "
    "from_pretrained() and train() without resume_from_checkpoint"
)
"""What to do with a checkpoint whose optimizer state does not fit."""

OTHERWISE: Final = (
    "build the optimizer with the arguments of that run (algorithm, lora, splits, per_head, overrides, what was "
    f"frozen), or {WEIGHTS_ALONE}"
)
"""What to do with a checkpoint of an optimizer whose groups are others."""

PLACED: Final = (
    "save what get_optimizer_state_dict(model, optimizer, options=options) of torch.distributed.checkpoint.state_dict "
    "returns, with options=StateDictOptions(full_state_dict=True), and load it by set_optimizer_state_dict(model, "
    "optimizer, state_dict, options=options). A state_dict() of plain tensors is loaded so too, once "
    "dion2_lightning.with_parameter_names(state_dict, optimizer, model) has named what it numbers"
)
"""How state goes from one layout to another."""


def match_state_dict(saved: StateDict, groups: Sequence[Group], given: Sequence[Group]) -> StateDict:
    """Return a saved state dict with its groups and parameters in the order of an optimizer's, and nothing missing.

    Its parameter ids are numbers or names; it is not changed. One that does not fit gets an error that says why.
    ``given`` holds the settings that each group was made with; where they differ from the saved ones a warning says so.
    """
    _check_keys(saved)
    saved = {**saved, "param_groups": [numbers(group) for group in saved["param_groups"]]}
    _refuse_other_optimizers(saved["param_groups"])
    in_order = _match_order(saved, groups)
    said = ["algorithm" in group for group in in_order]
    if any(said) and not all(said):  # torch.distributed.checkpoint found no settings for it
        raise ValueError(
            f"the checkpoint has no settings for group {groups[said.index(False)]['name']!r}, as it has other groups; "
            f"{OTHERWISE}"
        )
    matched = [_match_group(old, new) for old, new in zip(in_order, groups, strict=True)]
    without_state = []
    for old, new in zip(matched, groups, strict=True):
        for key, parameter, name in zip(old["params"], new["params"], parameter_names(new), strict=True):
            label = f"group {new['name']!r}: {name}"
            algorithm_of(new).check_parameter(parameter, f"with the checkpoint's settings {label}", old)
            if key in saved["state"]:
                _check_state(saved["state"][key], parameter, old, label)
            elif saved["state"] and parameter.requires_grad:
                without_state.append(name)
    if without_state:
        warnings.warn(
            f"the checkpoint has no state for {first_few(without_state)}, as of what was frozen when it was saved; "
            "these start anew",
            stacklevel=2,
        )
    _refuse_shared_rates(matched, groups)
    changes = _changed_settings(in_order, groups, given)
    if changes and is_first_rank():
        warnings.warn(
            f"the checkpoint's settings replace those that this optimizer was given: {'; '.join(changes)}. To go on "
            "with the given ones, set them in optimizer.param_groups after loading. Where a scheduler changes lr, "
            "multiply lr and initial_lr of each group, and the scheduler's base_lrs, by the new rate over the old one",
            stacklevel=2,
        )
    return {**saved, "param_groups": [numbers(group) for group in matched]}


def carry_over_state(saved: StateDict, groups: Sequence[Group]) -> StateDict:
    """Return a state dict of an optimizer's present groups that has what a checkpoint of other algorithms can give.

    Parameters are matched by name where both sides know the names, else by position. What the present algorithm has
    besides starts anew, and a warning says so. A checkpoint that does not fit gets an error that says why.
    """
    _check_keys(saved)
    _refuse_other_optimizers(saved["param_groups"])
    members = [
        (group, *each)
        for group in groups
        for each in zip(group["params"], parameter_names(group), unwrapped_names(group), strict=True)
    ]
    found = _saved_parameters(saved["param_groups"], groups)
    state, anew = dict[int, Mapping[str, Any]](), dict[str, list[str]]()
    for place, ((group, parameter, name, plain_name), (key, its_algorithm)) in enumerate(
        zip(members, found, strict=True)
    ):
        algorithm, label = algorithm_of(group), f"group {group['name']!r}: {name}"
        old = algorithm if its_algorithm is None else algorithm_of({"algorithm": its_algorithm}, "the checkpoint's ")
        if not algorithm.continues(old):
            raise ValueError(
                f"{label} has the state of algorithm {old.name!r} in the checkpoint, with which {algorithm.name!r} "
                f"cannot go on; {OTHERWISE}"
            )
        if key not in saved["state"]:
            continue
        entries, expected = saved["state"][key], algorithm.state(parameter, group)
        shared = {entry for entry in expected if not algorithm.depends_on_settings(entry)}
        if missing := sorted(shared - entries.keys()):
            raise ValueError(f"{label}: the checkpoint holds {sorted(entries)} for it, and not {first_few(missing)}")
        new = expected.keys() - shared
        state[place] = {
            **{entry: entries[entry] for entry in shared},
            **{entry: expected[entry].start_for(parameter, plain_name) for entry in new},
        }
        for entry in new:
            anew.setdefault(entry, []).append(name)
    if anew and is_first_rank():
        entries_anew = "; ".join(f"{entry!r} of {first_few(names)}" for entry, names in anew.items())
        warnings.warn(f"this starts anew: {entries_anew}", stacklevel=3)
    ids = iter(range(len(members)))
    packed = [{**group, "params": [next(ids) for _ in group["params"]]} for group in groups]
    return {"state": state, "param_groups": packed}


def _saved_parameters(saved_groups: Sequence[Group], groups: Sequence[Group]) -> list[tuple[Any, str | None]]:
    """The key in the saved state, and the algorithm, of every parameter of the present groups, in their order."""
    saved = [(key, group.get("algorithm")) for group in saved_groups for key in group["params"]]
    wanted = sum(len(group["params"]) for group in groups)
    if len(saved) != wanted:
        raise ValueError(f"the checkpoint has {len(saved)} parameters, this optimizer {wanted}; {OTHERWISE}")
    old_names, names = _names_of(saved_groups), _names_of(groups)
    if old_names is None or names is None:
        return saved
    by_name = dict(zip(old_names, saved, strict=True))
    if len(by_name) < wanted or len(set(names)) < wanted:
        raise ValueError("parameters of several groups have the same names, so what was saved of them is ambiguous")
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"the checkpoint has no parameters of the names {first_few(unknown)}; {OTHERWISE}")
    return [by_name[name] for name in names]


def _names_of(groups: Sequence[Group]) -> list[str] | None:
    """The names of all parameters without the prefixes of wrappers; None where a group does not know them."""
    names: list[str] = []
    for group in groups:
        by_name = all(isinstance(key, str) for key in group["params"])  # torch.distributed.checkpoint's
        if not by_name and "param_names" not in group:
            return None
        names += unwrapped_names({"param_names": group["params"]} if by_name else group)
    return names


def shares_memory(saved: StateDict, state: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Return whether a saved state dict holds tensors of an optimizer's present state.

    ``torch.distributed.checkpoint`` reads files into the tensors that an optimizer has, before it calls
    ``load_state_dict``.
    """
    tensors = (value for parameter, its in state.items() if isinstance(parameter, Tensor) for value in its.values())
    present = {local(value).data_ptr() for value in tensors if value.numel()}
    entries_of_all = (entries for entries in saved.get("state", {}).values() if isinstance(entries, Mapping))
    values = (value for entries in entries_of_all for value in entries.values())
    return any(isinstance(value, Tensor) and local(value).data_ptr() in present for value in values)


def restore_exactly(
    optimizer: Optimizer,
    saved: StateDict,
    state_of: Callable[[Tensor, Group], Mapping[str, StateTensor]],
) -> None:
    """Copy what ``Optimizer.load_state_dict`` has rounded or was not given, and put step counts where they belong.

    It rounds every floating-point state to the dtype of its parameter. ``saved`` is what :func:`match_state_dict`
    returned, ``state_of`` says what the state of a parameter in a group is, and where it is kept.
    """
    for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(old["params"], new["params"], strict=True):
            expected = state_of(parameter, new)
            for entry, value in saved["state"].get(key, {}).items():
                state = optimizer.state[parameter]
                if expected[entry].shape == ():
                    device = expected[entry].device
                    number = torch.as_tensor(value, dtype=expected[entry].dtype, device=device)
                    state[entry] = number.clone()
                else:
                    dtype = torch.promote_types(value.dtype, expected[entry].dtype)
                    if entry not in state or dtype != state[entry].dtype:
                        state[entry] = moved(value, expected[entry].device, dtype)


def restore_in_place(
    optimizer: Optimizer,
    rates: Sequence[Mapping[str, Tensor]],
    before: Mapping[Tensor, Mapping[str, Tensor]],
    state_of: Callable[[Tensor, Group], Mapping[str, StateTensor]],
) -> None:
    """Put what was loaded into the tensors that there were before, which captured graphs read and write.

    Args:
        optimizer: It has loaded a state dict.
        rates: The rates that were tensors, for each group.
        before: The state of parameters. That of groups which are not ``capturable``, or what has changed its form,
            stays as it was loaded. What was not loaded of trainable parameters is as before a first step.
        state_of: Says what the state of a parameter in a group is to be.
    """
    for group, tensors in zip(optimizer.param_groups, rates, strict=True):
        for name, tensor in tensors.items():
            group[name] = tensor.fill_(group[name])
        if not group["capturable"]:
            continue
        for parameter, name in zip(group["params"], unwrapped_names(group), strict=True):
            state = optimizer.state.get(parameter, {})
            present = before.get(parameter, {})
            if present and parameter.requires_grad:
                asked = state_of(parameter, group)
                anew = {entry: like.start_for(parameter, name) for entry, like in asked.items() if entry not in state}
                state = optimizer.state[parameter] = {**state, **anew}
            for entry, tensor in present.items():
                if entry in state and _has_form_of(state[entry], tensor):
                    state[entry] = tensor.copy_(state[entry])


def _has_form_of(loaded: Any, tensor: Any) -> bool:
    """Return whether a tensor can be copied into another one that is then as it was."""
    return all(
        getattr(loaded, name, None) == getattr(tensor, name, None)
        for name in ("shape", "dtype", "device", "placements", "device_mesh")
    )


def _check_keys(saved: StateDict) -> None:
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"the checkpoint has no {key!r}; pass what state_dict() returned")


def _refuse_other_optimizers(saved_groups: Sequence[Group]) -> None:
    """Refuse groups that say no algorithm and have settings that no algorithm knows."""
    known = {*ENTRIES, *(name for algorithm in ALGORITHMS.values() for name in algorithm.defaults())}
    unknown = sorted({name for group in saved_groups for name in group} - known)
    if unknown and not any("algorithm" in group for group in saved_groups):
        raise ValueError(
            f"the checkpoint is of another optimizer: its groups say no algorithm and have {first_few(unknown)}. Its "
            f"state does not fit; {WEIGHTS_ALONE}"
        )


def _changed_settings(saved_groups: Sequence[Group], groups: Sequence[Group], given: Sequence[Group]) -> list[str]:
    """Say which saved settings are not those that the groups were made with, each once for all groups alike.

    What a schedule has made of a learning rate is no change: the rates that groups were made with are compared, or,
    where a schedule begins with rates of its own, those.
    """
    changes: dict[str, list[str]] = {}
    for old, group, its_given in zip(saved_groups, groups, given, strict=True):
        saved, asked, group = plain(old), dict(its_given), numbers(group)
        if "initial_lr" in old and group.get("initial_lr", asked.get("lr")) != asked.get("lr"):
            saved["lr"], asked["lr"] = old["initial_lr"], group["initial_lr"]
        else:
            # Set by hand after a load, as its warning advises, it is as asked.
            now = old.get("initial_lr", old.get("lr"))
            saved["lr"] = now if now == asked.get("lr") else old.get("given_lr", now)
        if old.get("lr") == 0.0 and "initial_lr" not in group:  # a schedule has ended there, and none goes on
            saved["lr"], asked["lr"] = 0.0, its_given.get("lr", 0.0)
        for name, value in asked.items():
            if name in algorithm_of(group).settings_of_run:
                continue
            found = saved.get(name, value)
            if _without_lists(found) != _without_lists(value) and not _differ_by_rounding(found, value):
                changes.setdefault(f"{name} {found!r} instead of {value!r}", []).append(repr(old.get("name")))
    return [f"{change} ({', '.join(groups)})" for change, groups in changes.items()]


def _differ_by_rounding(found: Any, value: Any) -> bool:
    """Return whether two numbers may be the same rate, of which one is a float32 tensor."""
    return isinstance(found, float) and isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)


def _refuse_shared_rates(saved_groups: Sequence[Group], groups: Sequence[Group]) -> None:
    """Refuse rates of several groups that are one tensor here, and of which the checkpoint has several values."""
    names, values = dict[tuple[str, Tensor], list[str]](), dict[tuple[str, Tensor], set[float]]()
    for old, group in zip(saved_groups, groups, strict=True):
        for name, tensor in tensor_rates(group).items():
            names.setdefault((name, tensor), []).append(repr(group["name"]))
            values.setdefault((name, tensor), set()).add(old[name])
    for (name, tensor), found in values.items():
        if len(found) > 1:
            raise ValueError(
                f"the groups {', '.join(names[name, tensor])} have one tensor as their {name}, and the checkpoint has "
                f"{sorted(found)}; give each group a tensor of its own"
            )


def _without_lists(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # some formats save a pair as a list


def _match_order(saved: StateDict, groups: Sequence[Group]) -> Sequence[Group]:
    """The saved groups in the order of ``groups``: by name where both have the same names, else as they stand."""
    old_groups: Sequence[Group] = saved["param_groups"]
    old_names, new_names = [group.get("name") for group in old_groups], [group["name"] for group in groups]
    if len(old_groups) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(old_groups)} groups, {old_names}; this optimizer {len(groups)}, {new_names}; to "
            f"go on with the momenta, call the optimizer's carry_over(state_dict); else {OTHERWISE}"
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
        continues = algorithm in ALGORITHMS and algorithm_of(new).continues(ALGORITHMS[algorithm])
        hint = "to go on with its momentum, call the optimizer's carry_over(state_dict); else " if continues else ""
        raise ValueError(
            f"{prefix}: the checkpoint's algorithm is {algorithm!r}, this optimizer's {new['algorithm']!r}; "
            f"{hint}{OTHERWISE}"
        )
    if len(old["params"]) != len(new["params"]):
        raise ValueError(
            f"{prefix}: the checkpoint has {len(old['params'])} parameters, this optimizer {len(new['params'])}; "
            f"it is of another model, or the model was split otherwise; {OTHERWISE}"
        )
    check_scheduled(algorithm_of(new), old, f"{prefix}: the checkpoint's ")
    left_out = algorithm_of(new).settings_of_run
    group = {**new, **{name: value for name, value in old.items() if name not in left_out}}
    if "param_names" in new:
        group["params"] = _in_order(old, new, prefix)
        group["param_names"] = list(new["param_names"])
    return group


def _in_order(old: Group, new: Group, prefix: str) -> list[Any]:
    """The ids of a saved group's parameters, in the order of the present group's names."""
    ids = list(old["params"])
    wanted, names, of_module = _without_prefixes(
        new["param_names"], old.get("param_names") or [], ids if all(isinstance(each, str) for each in ids) else []
    )
    if of_module:
        # Names of the module that was saved, which the optimizer may know a part of. torch.distributed.checkpoint has
        # put them in the present order and into the present groups, but left param_names as they are in the file.
        is_same_group = not names or set(names) == set(wanted) or _are_of_part(names, of_module)
        if is_same_group and set(of_module) == set(wanted):
            by_name = dict(zip(of_module, ids, strict=True))
            return [by_name[name] for name in wanted]
        if is_same_group and all(_is_part(name, each) for each, name in zip(of_module, wanted, strict=True)):
            return ids
        are_paired = len(names) == len(ids) and all(map(_is_part, names, of_module))
        if set(names) == set(wanted) and names != wanted and not are_paired:
            raise ValueError(
                f"{prefix}: the checkpoint has its parameters by names that are not the optimizer's, and in another "
                f"order: {first_few(of_module)} and {first_few(names)}; build the optimizer with the model's names in "
                f"their order, or {WEIGHTS_ALONE}"
            )
        names = names or of_module
    if not names:
        return ids
    if set(names) != set(wanted):
        are_named = any(isinstance(each, str) for each in ids)
        numbered = ", and number the parameters, in the groups and in the state, instead of naming them"
        raise ValueError(
            f"{prefix}: the names of the parameters differ; only in the checkpoint: "
            f"{first_few(sorted(set(names) - set(wanted)))}; only in this optimizer: "
            f"{first_few(sorted(set(wanted) - set(names)))}. To load by position, remove 'param_names' from the "
            f"checkpoint's groups{numbered if are_named else ''}"
        )
    if len(names) != len(ids):
        raise ValueError(f"{prefix}: the checkpoint has {len(names)} names for {len(ids)} parameters; it is damaged")
    of_names = dict(zip(names, ids, strict=True))
    return [of_names[name] for name in wanted]


def _is_part(name: str, whole: str) -> bool:
    """Return whether one may be the name of a parameter in a part of the module, in which the other one is its name."""
    return whole == name or whole.endswith(f".{name}")


def _are_of_part(names: Sequence[str], wholes: Sequence[str]) -> bool:
    """Return whether names are those of all parameters in a part of the module, in whatever order."""
    prefixes = [whole.removesuffix(names[0]) for whole in wholes if _is_part(names[0], whole)]
    return any({prefix + name for name in names} == set(wholes) for prefix in prefixes)


def _without_prefixes(*several: Sequence[str]) -> list[list[str]]:
    """Return lists of names without the prefixes of wrappers; as they are where two would then be the same."""
    unwrapped = [list(unwrapped_names({"param_names": names})) for names in several]
    are_unique = all(len(set(names)) == len(names) for names in unwrapped)
    return unwrapped if are_unique else [list(names) for names in several]


def _check_state(state: Mapping[str, Any], parameter: Tensor, group: Group, label: str) -> None:
    algorithm = algorithm_of(group)
    expected = algorithm.state(parameter, group)
    if set(state) != set(expected):
        differs_by_setting = all(map(algorithm.depends_on_settings, set(state) ^ set(expected)))
        advice = (
            "to go on with the rest of it, call the optimizer's carry_over(state_dict)"
            if differs_by_setting
            else f"it is of another optimizer: {WEIGHTS_ALONE}"
        )
        raise ValueError(
            f"{label}: the checkpoint holds {sorted(state)} for it, algorithm {group['algorithm']!r} needs "
            f"{sorted(expected)}; {advice}"
        )
    for entry, tensor in expected.items():
        if tensor.shape != ():  # a number is taken from wherever it is, in any form
            _check_tensor(state[entry], tensor, entry, label, parameter)


def _check_tensor(found: Any, expected: StateTensor, entry: str, label: str, parameter: Any) -> None:
    if is_dtensor(found) != (expected.placements is not None):
        raise ValueError(f"{label} and the checkpoint's {entry!r} are not placed alike, one is a DTensor; {PLACED}")
    if tuple(found.shape) != expected.shape:
        raise ValueError(
            f"{label}: the checkpoint's {entry!r} has shape {tuple(found.shape)}, this optimizer's {expected.shape}"
        )
    if expected.placements is not None:
        mesh = parameter.device_mesh
        if tuple(found.placements) != expected.placements or not torch.equal(found.device_mesh.mesh, mesh.mesh):
            raise ValueError(
                f"{label}: the checkpoint's {entry!r} is placed as {tuple(found.placements)} on {found.device_mesh}, "
                f"this optimizer's as {expected.placements} on {mesh}; {PLACED}"
            )
    if found.dtype == torch.float64 and not has_float64(expected.device):
        raise ValueError(
            f"{label} is on {expected.device.type!r}, which has no float64, and the checkpoint's {entry!r} is in "
            "float64; convert it with .float() before loading"
        )
