"""What a parameter group may say, and which parameters it may hold.

Every check comes before anything is changed, and its error names the argument or parameter, what was found, and what to
do.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from dion2_lightning.algorithms import ALGORITHMS, algorithms_with
from dion2_lightning.algorithms.algorithm import Algorithm
from dion2_lightning.algorithms.hyperparameters import (
    RATES,
    did_you_mean,
    finite,
    numbers,
    one_of,
    refuse_other_tensors,
)
from dion2_lightning.kernels.rounding import HALF_PRECISION

Group = dict[str, Any]

Labelled = tuple[Group, Tensor, str]
"""A parameter's group, the parameter, and its name for error messages."""

ENTRIES: Final = ("params", "param_names", "name", "algorithm", "initial_lr", "given_lr")
"""What every group may hold besides what its algorithm asks for. ``initial_lr`` is the schedulers', ``given_lr`` the
rate that the group was made with: a load compares it, as schedules and frameworks change rates. A group that is made of
another optimizer's has that one's, which is replaced."""

WRAPPED_NAMES: Final = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""Names of the wrapped module: in torch.compile, activation checkpointing, FSDP1 and Fabric."""


def algorithm_of(group: Mapping[str, Any], prefix: str = "") -> Algorithm:
    """Return the algorithm that a group names; errors begin with the prefix."""
    one_of(ALGORITHMS)(f"{prefix}algorithm", group["algorithm"])
    return ALGORITHMS[group["algorithm"]]


def check_names(group: Mapping[str, Any], algorithm: Algorithm, prefix: str) -> None:
    """Refuse an entry of a group that nothing would read."""
    known = sorted([*ENTRIES, *algorithm.defaults()])
    for name in group:
        if name in known:
            continue
        others = [repr(other) for other in algorithms_with(name)]
        hint = did_you_mean(name, sorted(algorithm.defaults()))
        if others:
            hint = f" of algorithm {algorithm.name!r}; it belongs to {', '.join(others)}, remove it"
        raise ValueError(f"{prefix}unknown entry {name!r}{hint}")


def check_parameters(group: Mapping[str, Any], taken: Collection[Tensor], prefix: str) -> None:
    """Refuse parameters of a complete group that its algorithm cannot update, or that another group has taken."""
    parameters, given = group["params"], group.get("param_names")
    if not parameters:
        raise ValueError(f"{prefix}the parameter list is empty; leave the group out")
    for name in given or ():
        if not isinstance(name, str):
            raise TypeError(f"{prefix}param_names must be strings, got {name!r}")
    if given is not None and len(given) != len(parameters):
        raise ValueError(f"{prefix}param_names has {len(given)} names for {len(parameters)} parameters")
    names = parameter_names(group)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{prefix}there are two of {twice}, and checkpoints tell them by their names; put them into two groups"
        )
    seen: set[Tensor] = set()
    for parameter, name in zip(parameters, names, strict=True):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{prefix}{name} must be a tensor, got {type(parameter).__name__}")
        if parameter in seen:
            raise ValueError(f"{prefix}{name} is in the group twice; pass every parameter once")
        if parameter in taken:
            raise ValueError(f"{prefix}{name} is in another group already; pass every parameter once")
        seen.add(parameter)
        label = f"{prefix}{name} of shape {tuple(parameter.shape)}"
        _refuse_unusual(parameter, label)
        algorithm_of(group).check_parameter(parameter, label, group)


def check_scheduled(algorithm: Algorithm, settings: Mapping[str, Any], prefix: str) -> None:
    """Refuse what an algorithm's group cannot say once schedules have set its rates, to any finite numbers."""
    others = dict(settings)
    for name in ("lr", "weight_decay"):
        if name in others and not isinstance(others[name], Tensor):
            finite(f"{prefix}{name}", others.pop(name))
    algorithm.check_settings(others, prefix)


def tensor_rates(group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the rates of a group that are tensors."""
    return {name: group[name] for name in RATES if isinstance(group.get(name), Tensor)}


def refuse_misplaced_rates(group: Mapping[str, Any], prefix: str) -> None:
    """Refuse tensors that are no rates, or not on the device of the group's parameters; both may be set at any time."""
    for name, value in tensor_rates(group).items():
        refuse_other_tensors(prefix + name, value, is_capturable=group["capturable"])
        for index, parameter in enumerate(group["params"]):
            if parameter.device != value.device:
                raise ValueError(
                    f"{prefix}{name} is a tensor on {str(value.device)!r} and {parameter_names(group)[index]} on "
                    f"{str(parameter.device)!r}; put it on the parameters' device, and parameters of several devices "
                    "into several groups"
                )


def parameter_names(group: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of a group's parameters for messages: given names, or places in the group."""
    given, count = group.get("param_names"), len(group["params"])
    if given is None:
        return [f"parameter {index}" for index in range(count)]
    if len(given) != count:
        raise ValueError(
            f"group {group['name']!r}: param_names has {len(given)} names for {count} parameters; change both "
            "together, or add parameters by add_param_group"
        )
    return [f"parameter {name!r}" for name in given]


def labelled_parameters(groups: Iterable[Group]) -> Iterator[Labelled]:
    """Yield every parameter with its group and its name for error messages."""
    for group in groups:
        for parameter, name in zip(group["params"], parameter_names(group), strict=True):
            yield group, parameter, f"group {group['name']!r}: {name}"


def unwrapped_names(group: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of a group's parameters without the prefixes of wrappers; without names, places in the group."""
    given = group.get("param_names")
    if given is None:
        return [f"{group['name']} {index}" for index in range(len(group["params"]))]
    return [_unwrapped(name) for name in given]


@cache  # every step asks
def _unwrapped(name: str) -> str:
    # DataParallel and DistributedDataParallel call what they wrap "module".
    return ".".join(part for part in name.split(".") if part not in WRAPPED_NAMES).removeprefix("module.")


def warn_of_lost_decay(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn, once for all groups, where half-precision weights that are rounded to nearest are too coarse to decay."""
    lost = []
    for group in groups:
        rates = numbers(group)
        decay = rates["lr"] * rates["weight_decay"]
        for dtype in {parameter.dtype for parameter in group["params"]}.intersection(HALF_PRECISION):
            largest = torch.finfo(dtype).eps / 2  # half of the last bit, of a weight just over a power of two
            if group.get("rounding") == "nearest" and 0 < decay < largest:
                lost.append(
                    f"in group {group['name']!r} lr x weight_decay is {decay:.2g}, and {str(dtype).split('.')[-1]} "
                    f"weights stay where they change by less than {largest / 2:.1g} to {largest:.1g} of themselves"
                )
    if lost:
        warnings.warn(
            f'rounding="nearest" loses the weight decay: {"; ".join(lost)}. Updates as small are lost too; pass '
            'rounding="stochastic", the default, or keep the weights in float32',
            stacklevel=4,  # the caller of the optimizer's constructor
        )


def refuse_flattened(parameter: Tensor, label: str) -> None:
    """Raise an error where FSDP1 or DeepSpeed ZeRO have made a vector of a parameter."""
    if hasattr(parameter, "_fsdp_flattened"):
        raise ValueError(f"{label} is flattened by FSDP1, so no matrix is left in it; use FSDP2 (fully_shard)")
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
        raise ValueError(f"{label} is partitioned by DeepSpeed ZeRO, which flattens matrices; use FSDP2 (fully_shard)")


def with_listed_parameters(param_group: Group) -> Group:
    """Return a copy of a group with its parameters in a list, and their names, if given, in another."""
    group = dict(param_group)
    if "params" not in group:
        raise ValueError(f"a parameter group has no 'params'; it says {', '.join(map(repr, group)) or 'nothing'}")
    params = group["params"]
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(f"params must be parameters, got a {type(params).__name__}; pass its parameters()")
    if isinstance(params, set):
        raise TypeError("params must be in a fixed order, got a set; pass a list")
    group["params"] = [params] if isinstance(params, Tensor) else list(params)
    pairs = [entry for entry in group["params"] if isinstance(entry, tuple)]
    if pairs:
        if len(pairs) < len(group["params"]):
            raise ValueError("params mixes named and unnamed parameters; name all or none")
        group["param_names"] = [name for name, _ in pairs]
        group["params"] = [parameter for _, parameter in pairs]
    return group


def unique_name(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return a group's name, or its algorithm's, with a number where other groups have it."""
    taken = [other["name"] for other in others]
    name = str(group.get("name", group["algorithm"]))
    candidates = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _refuse_unusual(parameter: Tensor, label: str) -> None:
    refuse_flattened(parameter, label)
    if parameter.layout != torch.strided:
        raise ValueError(f"{label} is stored as {parameter.layout}; only dense parameters can be updated")
    if not parameter.is_floating_point() or (parameter.requires_grad and parameter.itemsize < 2):
        raise ValueError(
            f"{label} is in {parameter.dtype}; only real parameters in float16, bfloat16, float32 or float64 can be "
            "updated. Leave it out of the groups; build_optimizer leaves out what does not require a gradient"
        )
