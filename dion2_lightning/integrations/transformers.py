"""The Hugging Face Trainer: what its ``optimizer_cls_and_kwargs`` takes, and a callback for compressed replicas.

The Trainer calls ``factory()(model, **kwargs)``, before or after the model is sharded, as the layout wants it. It
passes no arguments of its own, and values that come from a config file or a command line may be text.
"""

import ast
from collections.abc import Mapping
from typing import Any, Final

import transformers
from accelerate.state import AcceleratorState, is_initialized
from packaging.version import Version
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dion2_lightning.algorithms.hyperparameters import checks_of, did_you_mean, method_takes
from dion2_lightning.distributed.strategies import process_group_of
from dion2_lightning.factory import Dion2, FactoryArguments, build_optimizer
from dion2_lightning.monitoring.tracker import without_wrapper
from dion2_lightning.optimizer import MatrixOptimizer

OLDEST_TRANSFORMERS: Final = "5.2"
"""Its Trainer is the first that calls a factory with the model."""

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"Dion2Factory needs transformers {OLDEST_TRANSFORMERS} or later, found {transformers.__version__}, whose "
        "Trainer does not give a factory the model; upgrade it, or pass "
        "Trainer(..., optimizers=(build_optimizer(model, lr=...), None))"
    )

CHECKS: Final = checks_of(FactoryArguments)
"""The checks of build_optimizer's arguments, by name."""

KNOWN: Final = (*CHECKS, "arguments")

OBJECTS: Final = ("orthonormalize", "strategy")
"""The arguments that text can only say to be None."""

OTHER_NAMES: Final = {
    "learning_rate": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "args": "arguments",
    "training_args": "arguments",
}
"""What the Trainer and TrainingArguments call differently."""

WORDS: Final = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("none", "null", ""), None),
}
"""How configuration files write True, False and None."""


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
        FactoryArguments(**_parsed({**_read(arguments), **settings}))  # an error here is nearer to its cause
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
        settings = _parsed(settings)
        if "lr" not in settings:
            raise TypeError(
                "lr is missing, and the Trainer does not hand on its learning_rate; pass "
                "optimizer_cls_and_kwargs=(Dion2Factory, {'lr': ...}) or Dion2Factory.from_arguments(args)"
            )
        _refuse_flattening(settings.get("strategy"))
        return build_optimizer(model, **settings)


class SynchronizeCallback(TrainerCallback):
    """Average the momenta that replicas keep apart with ``sync="compressed"``, before each checkpoint of the Trainer.

    Without it, the Trainer's next checkpoint ends with an error. Put it last, so that it sees what other callbacks
    decide.

    Example::

        args = TrainingArguments(..., max_grad_norm=0)
        factory = Dion2Factory.from_arguments(args, algorithm="dion", sync="compressed", max_grad_norm=1.0)
        Trainer(model, args, optimizer_cls_and_kwargs=factory, callbacks=[SynchronizeCallback()])
    """

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Average where the Trainer is about to save."""
        if control.should_save:
            _synchronize(kwargs["optimizer"])

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Average where the Trainer is about to save."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Average where the Trainer may be about to save, as ``save_strategy="best"`` decides after an evaluation."""
        if args.save_strategy == SaveStrategy.BEST:
            _synchronize(kwargs["optimizer"])


def _synchronize(optimizer: Any) -> None:
    optimizer = without_wrapper(optimizer)
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.synchronize()


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
    """Read the keywords of a call; a word without quotes stays as it is."""
    try:
        call = ast.parse(f"_({optim_args})", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            pairs = {each.arg: ast.unparse(each.value) for each in call.keywords if each.arg is not None}
            if len(pairs) == len(call.keywords):
                return pairs
    except SyntaxError:
        pass
    raise ValueError(
        f"optim_args must be like 'fraction=0.25,momentum=0.8', a value with a comma in parentheses, got {optim_args!r}"
    )


def _parsed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with text read as what it stands for, and nothing unknown among them."""
    for name in settings:
        if name not in CHECKS:
            hint = f"; did you mean {OTHER_NAMES[name]!r}?" if name in OTHER_NAMES else did_you_mean(name, KNOWN)
            raise ValueError(f"unknown argument {name!r}{hint}")
    parsed = {name: _from_text(name, value) for name, value in settings.items()}
    if isinstance(parsed.get("overrides"), Mapping):
        parsed["overrides"] = {
            pattern: {name: _from_text(name, value) for name, value in options.items()}
            if isinstance(options, Mapping)
            else options
            for pattern, options in parsed["overrides"].items()
        }
    return parsed


def _from_text(name: str, value: Any) -> Any:
    """Read a value that is text: kept if its argument takes it, else read as Python's, else left to be refused."""
    if isinstance(value, list | tuple):
        return tuple(_from_text("", each) for each in value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        if name in CHECKS and name not in OBJECTS:
            CHECKS[name](name, text)
            return text  # the name of a rule or a dtype; "none" too is a rule of adjust_lr_fn
    except (TypeError, ValueError):
        pass
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
