"""Hyperparameters, each written down once: a field with its type, default, check and description.

A settings class is a dataclass whose fields are made by :func:`setting`. Constructors and factories take their keyword
arguments from such classes (:func:`takes`), so signature, ``--help`` and documentation say the same everywhere.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")
D = TypeVar("D")

Check = Callable[[str, object], None]
"""``check(name, value)`` raises an error that begins with the name if the value is invalid."""

DType = Literal["bfloat16", "float32", "float64"]
DTYPES: Final[tuple[str, ...]] = get_args(DType)

_DTYPES_BY_TEXT: Final = {f"torch.{name}": name for name in DTYPES}

Rate = float | Tensor
"""A float, or with ``capturable`` a 0-d tensor on the parameters' device, which is changed in place."""

RATES: Final = ("lr", "weight_decay", "momentum", "adamw_lr", "adamw_weight_decay")
"""The settings that may be such tensors."""

PLACEHOLDER: Final = "**settings:"
"""Begins the line of a docstring in whose place the descriptions of settings are put."""


def setting(default: Any, description: str, check: Check | None = None) -> Any:
    """Return a dataclass field for a hyperparameter: its default, what it means, and a check of its values.

    What is declared as a bool or a Literal is checked by that, and one that may be None is not checked where it is.
    """
    return field(default=default, metadata={"check": check, "description": description})


def checks_of(settings: type) -> dict[str, Check]:
    """Return the checks of a settings class, by name."""
    return dict(_checks_of(settings))


@cache  # every step asks
def _checks_of(settings: type) -> dict[str, Check]:
    kinds = get_type_hints(settings)
    return {each.name: _check_of(kinds[each.name], each.metadata.get("check")) for each in fields(settings)}


def defaults_of(settings: type) -> dict[str, Any]:
    """Return the defaults of a settings class, by name."""
    return {each.name: each.default for each in fields(settings)}


def check_values(values: Mapping[str, Any], checks: Mapping[str, Check], prefix: str = "") -> None:
    """Check the values that have checks; errors begin with the prefix and the name.

    Of rates that are tensors, which ``capturable`` among the values allows, the host reads what they hold now.
    """
    for name, value in values.items():
        if name in checks:
            is_rate = name in RATES and isinstance(value, Tensor)
            checks[name](prefix + name, _read_rate(prefix + name, value, values) if is_rate else value)


def _read_rate(name: str, value: Tensor, values: Mapping[str, Any]) -> float:
    refuse_other_tensors(name, value, is_capturable=values.get("capturable") is True)
    return value.item()


def refuse_other_tensors(name: str, value: Tensor, *, is_capturable: bool) -> None:
    """Raise an error about a tensor that is no rate: without ``capturable``, or of another shape or kind."""
    if not is_capturable:
        raise TypeError(f"{name} must be a number, got a Tensor; pass a float, or capturable=True with it")
    if value.ndim or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a 0-d tensor of floating point, got shape {tuple(value.shape)} of {value.dtype}"
        )


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the rates that are tensors as the floats that they hold now; waits for their device."""
    return {
        name: value.item() if isinstance(value, Tensor) and not value.ndim else value for name, value in values.items()
    }


def set_rate(group: dict[str, Any], name: str, value: float) -> None:
    """Change a rate of a group: a tensor in place, as torch's schedulers do."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as data that every checkpoint format takes.

    ``torch.float32`` and its text are "float32"; numbers of other libraries, alone or in a tuple or a list, Python's.
    """
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str | torch.dtype):
        return _DTYPES_BY_TEXT.get(str(value), value)
    if isinstance(value, tuple | list) and value and isinstance(value[0], Real):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def bind(function: str, settings: type, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, as a settings class takes them; errors name the function that was called.

    Raises:
        TypeError: There is no argument of that name, there are too many, or one is given twice.
    """
    known = [each.name for each in fields(settings)]
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() has no argument {name!r}{did_you_mean(name, known)}")
    try:
        return inspect.signature(settings).bind(*args, **given).arguments
    except TypeError as error:
        raise TypeError(f"{function}() takes lr by its place, and all else by name: {error}") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the one that is nearest, or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def takes(
    settings: Callable[P, Any],
) -> Callable[[Callable[Concatenate[A, ...], R]], Callable[Concatenate[A, P], R]]:
    """Give a function the arguments of a settings class, after its own first one.

    Type checkers see them through the types of this decorator, everything else through the function's signature and
    docstring.

    Args:
        settings: A settings class. The function is called with what the caller passes: ``*args, **kwargs``.
    """

    def decorate(function: Callable[Concatenate[A, ...], R]) -> Callable[Concatenate[A, P], R]:
        _take(function, settings)
        return function

    return decorate


def method_takes(
    settings: Callable[P, Any],
) -> Callable[[Callable[Concatenate[A, B, ...], R]], Callable[Concatenate[A, B, P], R]]:
    """Do the same as :func:`takes` for a method, whose own arguments are ``self`` and one more."""

    def decorate(function: Callable[Concatenate[A, B, ...], R]) -> Callable[Concatenate[A, B, P], R]:
        _take(function, settings)
        return function

    return decorate


def described(settings: type) -> Callable[[D], D]:
    """Give a class or a function the descriptions of settings, in the line :data:`PLACEHOLDER` of its docstring."""

    def decorate(documented: D) -> D:
        documented.__doc__ = _with_descriptions(documented.__doc__ or "", settings)
        return documented

    return decorate


def _with_descriptions(docstring: str, settings: type) -> str:
    lines = docstring.split("\n")
    place = next(index for index, line in enumerate(lines) if line.strip().startswith(PLACEHOLDER))
    indent = len(lines[place]) - len(lines[place].lstrip())
    return "\n".join([*lines[:place], _descriptions(settings, indent), *lines[place + 1 :]])


def _take(function: Any, settings: Any) -> None:
    hints = get_type_hints(settings)
    own = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    taken = inspect.signature(settings).parameters.values()
    parameters = [*own, *(each.replace(annotation=hints[each.name]) for each in taken)]
    function.__signature__ = inspect.signature(function).replace(parameters=parameters)
    if PLACEHOLDER in (function.__doc__ or ""):
        described(settings)(function)


def _descriptions(settings: type, indent: int) -> str:
    return "\n".join(
        f"{' ' * indent}{each.name}: {each.metadata['description'].rstrip('.')} (default: {each.default!r})."
        for each in fields(settings)
    )


# Checks


def _check_of(kind: Any, check: Check | None) -> Check:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    choices = [choice for each in kinds if get_origin(each) is Literal for choice in get_args(each)]
    if bool in kinds and choices:
        choices = [True, False, *choices]
    elif check is None and bool in kinds:
        return flag_or_none if NoneType in kinds else flag
    if check is None and choices:
        return one_of([*choices, None] if NoneType in kinds else choices)
    if check is None:
        return lambda name, value: None  # of an object, checked by what uses it
    if NoneType not in kinds:
        return check
    return lambda name, value: None if value is None else check(name, value)


def number(name: str, value: object) -> float:
    """Raise an error unless the value is a number; return it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        found = f"the {type(value).__name__} {value!r}" if isinstance(value, str) else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be a number, got {found}; pass a float")
    return float(value)


def finite(name: str, value: object) -> None:
    """Raise an error unless the value is a finite number."""
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")


def not_negative(name: str, value: object) -> None:
    """Raise an error unless the value is a finite number of at least 0."""
    if not 0.0 <= number(name, value) < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def positive(name: str, value: object) -> None:
    """Raise an error unless the value is a finite number over 0."""
    if not 0.0 < number(name, value) < float("inf"):
        raise ValueError(f"{name} must be over 0 and finite, got {value}; None switches it off")


def whole_number(name: str, value: object) -> None:
    """Raise an error unless the value is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def share(name: str, value: object) -> None:
    """Raise an error unless the value lies in (0, 1]."""
    if not 0.0 < number(name, value) <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value}; 1 is the whole matrix")


def positive_integer(name: str, value: object) -> None:
    """Raise an error unless the value is an integer of at least 1."""
    whole_number(name, value)
    if number(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def decay_rate(name: str, value: object) -> None:
    """Raise an error unless the value lies in [0, 1)."""
    if not 0.0 <= number(name, value) < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def two_decay_rates(name: str, value: object) -> None:
    """Raise an error unless the value is a pair of numbers in [0, 1)."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    for index, rate in enumerate(value):
        decay_rate(f"{name}[{index}]", rate)


def flag(name: str, value: object) -> None:
    """Raise an error unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def flag_or_none(name: str, value: object) -> None:
    """Raise an error unless the value is True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")


def one_of(choices: Iterable[object]) -> Check:
    """Return a check for strings, or None, of a list."""
    allowed = tuple(choices)

    def check(name: str, value: object) -> None:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    return check


def dtype(name: str, value: object) -> None:
    """Raise an error unless the value is None or the name of a dtype, or the dtype itself."""
    if value is not None and str(value).removeprefix("torch.") not in DTYPES:
        raise ValueError(
            f"{name} must be None or one of {', '.join(DTYPES)}, as a string or torch.dtype, got {value!r}"
        )


@dataclass
class SharedSettings:
    """The hyperparameters that every algorithm has. Like all settings classes it checks its values when it is made."""

    lr: Rate = setting(3e-4, "Learning rate of the groups that have none of their own.", not_negative)
    _: KW_ONLY
    weight_decay: Rate = setting(
        0.01, "Decoupled weight decay: a step multiplies the weights of a group by 1 - lr * weight_decay.", not_negative
    )
    cautious_weight_decay: bool = setting(
        False,
        "Leave the weight decay out of weights that their update pushes away from zero (arXiv 2510.12402). Slices that "
        "Dion2 and Dion3 do not select have no update; there the momentum decides.",
    )
    check_finite: bool | Literal["skip"] = setting(
        False,
        "What to do when a gradient holds NaN or Inf. True raises an error that names the parameter, before any weight "
        'or state is changed, and waits for the device every step. "skip" leaves the step out, on all ranks that '
        "share parameters with this one, without waiting; skipped_steps counts them.",
    )
    capturable: bool = setting(
        False,
        "Take steps that a CUDA graph can hold, and torch.compile without a break of its graph. lr, weight_decay and "
        "momentum, adamw_lr and adamw_weight_decay may then be 0-d tensors on the device of the parameters, which are "
        "changed in place, as torch's schedulers do; a float is a constant of a captured step.",
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_values(vars(self), checks_of(type(self)))


@dataclass(kw_only=True)
class RoundingSettings(SharedSettings):
    """The hyperparameters of algorithms that keep weights or state in half precision."""

    rounding: Literal["stochastic", "nearest"] = setting(
        "stochastic",
        'How bfloat16 and float16 weights, and a momentum in bfloat16, are rounded after every step: "stochastic", up '
        'or down at random, so that small steps count on average; "nearest", where steps of less than half a last bit '
        "are lost. Nothing else is rounded.",
    )
    rounding_seed: int = setting(
        0,
        "Which random bits stochastic rounding takes, and Dion's Q at first: a number for each repetition of a run.",
        whole_number,
    )


@dataclass(kw_only=True)
class MatrixSettings(RoundingSettings):
    """The hyperparameters of algorithms that make an orthonormal update of a part of the momentum."""

    momentum: Rate = setting(
        0.95,
        "Decay rate of the momentum, in [0, 1). Only the part that a step takes its update from decays: in Dion2 the "
        "selected slices, in Dion what a matrix of low rank captures.",
        decay_rate,
    )
    adjust_lr_fn: Literal["match_rms_adamw", "original", "spectral", "none"] | None = setting(
        "match_rms_adamw",
        "The scale of a matrix's update. \"match_rms_adamw\": 0.2 sqrt(max(out, in)), AdamW's learning rates carry "
        'over (arXiv 2502.16982); "original" or None: sqrt(max(1, out/in)), as in torch.optim.Muon; "spectral": '
        'sqrt(out/in), the authors\' with scale_lr_by_fraction=False; "none": 1.',
    )
    scale_lr_by_fraction: bool = setting(
        True,
        "Multiply the orthonormal update, not the weight decay, by sqrt(n/k), so that one learning rate fits every "
        "fraction (Dion3, arXiv 2608.11612); in Dion by sqrt(n/r), n being the shorter axis and r the rank. False is "
        "the papers' literal rule: users of the authors' code keep their learning rate with False.",
    )
    skip_idle_experts: bool = setting(
        False,
        "Leave a matrix of a stack, such as an expert without tokens, as it is when its gradient is zero: its weights, "
        "which do not decay either, and its state. False updates it by the momentum that it has.",
    )


@dataclass(kw_only=True)
class StepSettings:
    """How an optimizer takes its steps, whatever its groups say: its attributes of these names."""

    share_replicas: bool | None = setting(
        None,
        "Whether ranks that hold replicas, as under DDP and HSDP, share the work on them: True, False, or None, where "
        "it saves more than sending the results costs. For Dion None never shares, and True does under DDP, and of "
        "stacks that are sharded by expert.",
    )
    max_grad_norm: float | None = setting(
        None,
        'To which norm of all gradients together a step clips them. With sync="compressed" pass it instead of clipping '
        "before the step, which would scale each replica by its own norm.",
        positive,
    )
    working_memory: int | None = setting(
        None,
        "How many bytes a step may take beside weights, gradients and state; always as many as the largest matrix "
        "needs. Fewer make it slower: it goes over the matrices in more turns. None is 15% of the bytes of the weights "
        "that a rank holds, and at least 256 MiB; on a CPU what no other rank shares takes 64 MiB at once.",
        positive_integer,
    )
    kernels: Literal["auto", "torch", "triton"] = setting(
        "auto",
        'What goes over the memory of the matrices of Dion2 and Dion3: "torch", operations of torch; "triton", kernels '
        'that make each pass once for all matrices, with the same result; "auto", these on CUDA devices where Triton '
        "is installed. Matrices in float64, and interleaved blocks, are left to torch.",
    )
    offload: Literal["cpu"] | None = setting(
        None,
        'Where the state is kept between steps. "cpu": in pinned memory of the host, so that it costs no memory of a '
        "GPU. A step brings it to the GPU, that of some parameters at a time and within working_memory, and takes it "
        "back, without waiting. The result is the same but for rounding. State of parameters on the CPU is there "
        "anyway. None keeps it beside the parameters.",
    )
