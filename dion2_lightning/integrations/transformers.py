"""The Hugging Face Trainer: what its ``optimizer_cls_and_kwargs`` takes.

The Trainer calls ``factory()(model, **kwargs)``, before or after the model is sharded, as the layout wants it. It hands
on nothing of its own, and values that come from a config file or a command line may be text.
"""

import difflib
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Final

import transformers
from accelerate.state import AcceleratorState, is_initialized
from packaging.version import Version
from torch import nn
from transformers import TrainingArguments

from dion2_lightning.algorithms.hyperparameters import method_takes
from dion2_lightning.distributed.strategies import process_group_of
from dion2_lightning.factory import Dion2, FactoryArguments, build_optimizer

OLDEST_TRANSFORMERS: Final = "5.2"
"""Its Trainer is the first that calls a factory with the model."""

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"Dion2Factory needs transformers {OLDEST_TRANSFORMERS} or later, found {transformers.__version__}, whose "
        "Trainer does not give a factory the model; upgrade it, or pass "
        "Trainer(..., optimizers=(build_optimizer(model, lr=...), None))"
    )

KINDS: Final[dict[str, Any]] = {
    name: kind for name, kind in typing.get_type_hints(FactoryArguments).items() if name != "_"
}
"""The arguments of build_optimizer beside the model, and their types."""

OPTION_KINDS: Final = {**KINDS, "batched": bool, "transposed": bool}
"""The same for the options of a group in ``overrides``."""

OTHER_NAMES: Final = {
    "learning_rate": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "args": "arguments",
    "training_args": "arguments",
}
"""What the Trainer and TrainingArguments call differently."""

TRUE: Final = ("true", "yes", "on", "1")
FALSE: Final = ("false", "no", "off", "0")
NONE: Final = ("none", "null", "")


class Dion2Factory:
    """Builds the optimizer when the Trainer asks for it.

    Example::

        Trainer(model, args, optimizer_cls_and_kwargs=(Dion2Factory, {"lr": 3e-4, "fraction": 0.25}))

        # lr, weight decay, betas and eps from args, and under DDP the ranks share the work:
        Trainer(model, args, optimizer_cls_and_kwargs=Dion2Factory.from_arguments(args, fraction=0.25))
    """

    @classmethod
    @method_takes(FactoryArguments)
    def from_arguments(
        cls, arguments: TrainingArguments, **settings: Any
    ) -> "tuple[type[Dion2Factory], dict[str, Any]]":
        """Return what ``optimizer_cls_and_kwargs`` takes, so that the optimizer follows the Trainer's arguments.

        ``learning_rate`` becomes ``lr``, of matrices and of everything else alike unless ``adamw_lr`` is given;
        ``weight_decay`` the weight decay of both; ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` belong to AdamW's
        side. ``optim_args``, such as ``"fraction=0.25,momentum=0.8"``, gives further arguments of
        :func:`~dion2_lightning.build_optimizer`. The arguments are also the ``strategy``.

        They are read when the Trainer asks for the optimizer, so that a hyperparameter search may change them.
        Settings that are passed beside them come first; the defaults below are for what nobody says.

        Args:
            arguments: The very TrainingArguments that the Trainer uses, or TRL's. TRL's trainers take their own kind,
                such as SFTConfig; of a plain TrainingArguments they make a new one, whose later changes are not seen.
            **settings: Arguments of :func:`~dion2_lightning.build_optimizer`.

        Returns:
            The factory, and its keyword arguments.

        Raises:
            TypeError: ``arguments`` is no TrainingArguments, or a setting has a type that is not taken.
            ValueError: A setting or an entry of ``optim_args`` is unknown or cannot be read.
        """
        _coerced({**_read(arguments), **settings})  # an error here is nearer to its cause than in the Trainer
        return cls, {"arguments": arguments, **settings}

    def __call__(self, model: nn.Module, *, arguments: TrainingArguments | None = None, **settings: Any) -> Dion2:
        """Build the optimizer.

        Args:
            model: As the Trainer has it: plain, sharded when it was loaded, or to be sharded later.
            arguments: TrainingArguments to read what ``settings`` do not say from, see :meth:`from_arguments`
                (default: None, nothing is read).
            **settings: Arguments of :func:`~dion2_lightning.build_optimizer`. Text is read as what the argument takes:
                ``"3e-4"``, ``"true"``, ``"none"``, ``"0.9,0.95"``.

        Returns:
            The optimizer of all trainable parameters.

        Raises:
            TypeError: An argument is missing or has a type that is not taken.
            ValueError: An argument is unknown, cannot be read or is out of range, or the Trainer runs under FSDP1 or
                DeepSpeed, which leave no matrices.
        """
        if arguments is not None:
            settings = {**_read(arguments), **settings}
        settings = _coerced(settings)
        if "lr" not in settings:
            raise TypeError(
                "lr is missing, and the Trainer does not hand on its learning_rate; pass "
                "optimizer_cls_and_kwargs=(Dion2Factory, {'lr': ...}) or Dion2Factory.from_arguments(args)"
            )
        _refuse_flattening(settings.get("strategy"))
        return build_optimizer(model, **settings)


def _refuse_flattening(strategy: object | None) -> None:
    """Raise an error where no matrix will be left, also where only Accelerate knows it.

    Its launcher can turn on FSDP1 or DeepSpeed without a word in the arguments, and DeepSpeed flattens after the
    optimizer was built. What the state says of the ranks is not used: that takes an explicit strategy.
    """
    process_group_of(strategy)
    if is_initialized():
        process_group_of(AcceleratorState())


def _read(arguments: TrainingArguments) -> dict[str, Any]:
    """What TrainingArguments say of the optimizer."""
    if not isinstance(arguments, TrainingArguments):
        raise TypeError(f"arguments must be the Trainer's TrainingArguments, got {type(arguments).__name__}")
    return {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "strategy": arguments,
        **_pairs(arguments.optim_args or ""),
    }


def _pairs(optim_args: str) -> dict[str, str]:
    pairs = {}
    for piece in filter(None, (piece.strip() for piece in optim_args.split(","))):
        name, separator, value = piece.partition("=")
        if not separator:
            raise ValueError(f"optim_args must be like 'fraction=0.25,momentum=0.8', got {piece!r} in {optim_args!r}")
        pairs[name.strip()] = value.strip()
    return pairs


def _coerced(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with text read as what build_optimizer takes, and nothing unknown among them."""
    for name in settings:
        if name not in KINDS:
            raise ValueError(f"unknown argument {name!r}{_hint(name)}")
    coerced = {name: _from_text(name, value, KINDS[name]) for name, value in settings.items()}
    if isinstance(coerced.get("overrides"), Mapping):
        coerced["overrides"] = {pattern: _options(pattern, it) for pattern, it in coerced["overrides"].items()}
    return coerced


def _hint(name: str) -> str:
    if name in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[name]!r}?"
    known = [*KINDS, "arguments"]
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _options(pattern: str, options: Any) -> Any:
    """A pattern's group options, the known ones read; the optimizer refuses the unknown ones by itself."""
    if not isinstance(options, Mapping):
        return options
    return {
        name: _from_text(f"overrides[{pattern!r}][{name!r}]", value, OPTION_KINDS.get(name, str))
        for name, value in options.items()
    }


def _from_text(name: str, value: Any, kind: Any) -> Any:
    """A value as its type wants it. What is not text is left as it is, to be checked where it is used."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)
    if tuple[float, float] in kinds:
        return _two_numbers(name, value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    words = [word for each in kinds if typing.get_origin(each) is typing.Literal for word in typing.get_args(each)]
    if text in words:
        return text  # "none" too: a rule of adjust_lr_fn is called so
    if NoneType in kinds and text.lower() in NONE:
        return None
    if bool in kinds:
        return _truth(name, text)
    if float in kinds:
        return _number(name, text)
    if words or str in kinds:
        return text  # the check of the argument says what it takes
    raise TypeError(f"{name} cannot be given as text, got {value!r}; pass the object itself")


def _two_numbers(name: str, value: Any) -> Any:
    parts = value.strip().strip("()[]").split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}; write them like '0.9,0.95'")
    return tuple(
        _number(f"{name}[{index}]", part) if isinstance(part, str) else part for index, part in enumerate(parts)
    )


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}; write it like '3e-4'") from None


def _truth(name: str, text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(f"{name} must be true or false, got {text!r}")
