"""What a parameter group may say, and which parameters it may hold.

Every check comes before anything is changed, and its error names the argument or parameter, what was found, and what to
do.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.learning_rates import ADJUST_LR_FN
from dion2_lightning.kernels.precision import has_float64

ALGORITHMS: Final = ("dion2", "adamw")
SELECT: Final = ("shorter", "output")
DTYPES: Final = ("bfloat16", "float32", "float64")
ENTRIES: Final = ("params", "param_names", "name", "algorithm", "batched", "transposed", "initial_lr")
"""What a group may hold beside the settings; ``initial_lr`` is the schedulers'."""


def check_settings(settings: Mapping[str, Any], where: str = "") -> None:
    """Check the values of settings, whichever of them are given.

    Args:
        settings: Constructor arguments or entries of a group, by name.
        where: Said in front of an error, such as ``"group 'dion2': "`` (default: nothing).

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value out of its range.
    """
    for name, value in settings.items():
        if name in CHECKS:
            CHECKS[name](where + name, value)


def check_names(group: Mapping[str, Any], settings: Iterable[str], where: str) -> None:
    """Refuse an entry of a group that nothing would read."""
    known = [*ENTRIES, *settings]
    for name in group:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where}unknown entry {name!r}{hint}")


def check_parameters(group: Mapping[str, Any], taken: Collection[Tensor], where: str) -> None:
    """Refuse a group's parameters that its algorithm has no update for, or that would be updated twice.

    Args:
        group: With its parameters in a list, and all settings.
        taken: The parameters of the other groups.
        where: Said in front of an error.
    """
    parameters, names = group["params"], parameter_names(group)
    if not parameters:
        raise ValueError(f"{where}the parameter list is empty; leave the group out")
    if len(names) != len(parameters):
        raise ValueError(f"{where}param_names has {len(names)} names for {len(parameters)} parameters")
    seen: set[Tensor] = set()
    for parameter, name in zip(parameters, names, strict=True):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{where}{name} must be a tensor, got {type(parameter).__name__}")
        if parameter in seen:
            raise ValueError(f"{where}{name} stands in the group twice; pass every parameter once")
        if parameter in taken:
            raise ValueError(f"{where}{name} is in another group already; pass every parameter once")
        seen.add(parameter)
        _check_parameter(parameter, f"{where}{name} of shape {tuple(parameter.shape)}", group)


def parameter_names(group: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of a group's parameters, or what stands in for them in a message."""
    given = group.get("param_names")
    if given is not None:
        return [f"parameter {name!r}" for name in given]
    return [f"parameter {index}" for index in range(len(group["params"]))]


def plain_dtype(dtype: torch.dtype | str | None) -> str | None:
    """Return a dtype as plain data, which survives every checkpoint format: ``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.") if dtype is not None else None


def refuse_flattened(parameter: Tensor, what: str) -> None:
    """Raise an error where FSDP1 or DeepSpeed ZeRO have made a vector of a parameter."""
    if hasattr(parameter, "_fsdp_flattened"):
        raise ValueError(f"{what} is flattened by FSDP1, so no matrix is left in it; use FSDP2 (fully_shard)")
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"{what} is partitioned by DeepSpeed ZeRO, which flattens matrices; use FSDP2 (fully_shard)")


def refuse_float64(parameter: Tensor, what: str, group: Mapping[str, Any]) -> None:
    """Raise an error where a matrix group asks for float64 on a device that has none."""
    if has_float64(parameter.device):
        return
    for name in ("orthonormalize_dtype", "state_dtype"):
        if group[name] == "float64":
            raise ValueError(
                f"{what} is on {parameter.device.type!r}, which has no float64, and {name} is 'float64'; choose "
                "'float32', or None, the default"
            )


def _check_parameter(parameter: Tensor, what: str, group: Mapping[str, Any]) -> None:
    refuse_flattened(parameter, what)
    if parameter.layout != torch.strided:
        raise ValueError(f"{what} is stored as {parameter.layout}; only dense parameters can be updated")
    if not parameter.is_floating_point():
        raise ValueError(f"{what} is {parameter.dtype}; only real floating-point parameters can be updated")
    if group["algorithm"] == "adamw":
        return
    refuse_float64(parameter, what, group)
    if parameter.numel() == 0:
        raise ValueError(f"{what} has no entries, so there is no matrix to update; leave it out")
    dimensions = 3 if group["batched"] else 2
    if parameter.ndim != dimensions:
        form = "a stack of matrices (count, rows, columns)" if group["batched"] else "a matrix"
        hint = "; for a stack of matrices set batched=True in its group" if parameter.ndim == 3 else ""
        raise ValueError(
            f"{what} is not {form}, which algorithm 'dion2' needs; put it into a group with algorithm='adamw', or let "
            f"build_optimizer(model, lr=...) split the model{hint}"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        found = f"the {type(value).__name__} {value!r}" if isinstance(value, str) else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be a number, got {found}; pass a float")
    return float(value)


def _not_negative(name: str, value: object) -> None:
    if not 0.0 <= _number(name, value) < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def _share(name: str, value: object) -> None:
    if not 0.0 < _number(name, value) <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value}; 1 selects every slice")


def _decay_rate(name: str, value: object) -> None:
    if not 0.0 <= _number(name, value) < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def _two_decay_rates(name: str, value: object) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    for index, rate in enumerate(value):
        _decay_rate(f"{name}[{index}]", rate)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _one_of(*choices: object) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise ValueError(f"{name} must be one of {', '.join(repr(choice) for choice in choices)}, got {value!r}")

    return check


def _dtype(name: str, value: object) -> None:
    if value is not None and str(value).removeprefix("torch.") not in DTYPES:
        raise ValueError(
            f"{name} must be None or one of {', '.join(DTYPES)}, as a string or torch.dtype, got {value!r}"
        )


CHECKS: Final[dict[str, Callable[[str, object], None]]] = {
    "lr": _not_negative,
    "fraction": _share,
    "momentum": _decay_rate,
    "weight_decay": _not_negative,
    "adjust_lr_fn": _one_of(*ADJUST_LR_FN),
    "scale_lr_by_fraction": _flag,
    "select": _one_of(*SELECT),
    "orthonormalize_dtype": _dtype,
    "state_dtype": _dtype,
    "betas": _two_decay_rates,
    "eps": _not_negative,
    "check_finite": _flag,
    "algorithm": _one_of(*ALGORITHMS),
    "batched": _flag,
    "transposed": _flag,
    "share_replicas": lambda name, value: None if value is None else _flag(name, value),
}
