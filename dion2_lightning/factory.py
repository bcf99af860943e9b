"""From a model to its optimizer, and the arguments of both, each written down once."""

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Final, Literal

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from dion2_lightning.algorithms import ALGORITHMS, CHOICES, ChoiceName, EverySetting, algorithms_with
from dion2_lightning.algorithms.hyperparameters import (
    Rate,
    StepSettings,
    bind,
    described,
    method_takes,
    not_negative,
    setting,
    takes,
)
from dion2_lightning.compressed import compressed_parameters, refuse_without_replicas
from dion2_lightning.distributed.collectives import is_first_rank
from dion2_lightning.distributed.replicas import leave_to_ddp, leave_to_optimizer
from dion2_lightning.distributed.strategies import (
    call_before_saving,
    ddp_of,
    leaves_out_replicas,
    process_group_of,
    refuse_averaging_by_nobody,
    refuse_scaling_by_replica,
    refuse_wrappers_that_flatten,
    replace_clipping,
    strategy_of,
    trainer_of,
)
from dion2_lightning.matrices.layout import is_dtensor
from dion2_lightning.optimizer import MatrixOptimizer
from dion2_lightning.routing.late_parameters import check_after_steps
from dion2_lightning.routing.overrides import parse_overrides, parse_splits
from dion2_lightning.routing.replaced_parameters import check_before_steps
from dion2_lightning.routing.router import route_parameters

logger = logging.getLogger("dion2_lightning")
# As Lightning's and transformers' own: what it shows does not depend on the level of the root logger.
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)


TRAINER_HOOKS: Final[list[Callable[[Any], None]]] = []
"""Functions that are called with the Lightning Trainer of the model, if there is one; the first adds the callbacks."""


def _overrides(name: str, value: Any) -> None:
    parse_overrides(value)


def _splits(name: str, value: Any) -> None:
    parse_splits(value)


@dataclass(kw_only=True)
class CommonArguments(StepSettings, EverySetting):
    """What the optimizer's constructor and the factory both take, as plain data."""


@dataclass(kw_only=True)
class FactorySettings(CommonArguments):
    """The arguments of ``build_optimizer`` that are plain data."""

    algorithm: ChoiceName = setting(
        "dion2",
        'What updates the matrices. "dion2"; "dion3": Dion2 on output slices, with normalized neurons; "dion": updates '
        'of low rank, with error feedback; "muon": Dion2 with fraction 1, which is Muon; "normuon": Muon with '
        'normalized neurons; "adamw": the control, AdamW for all, with the groups, learning rates and weight decays as '
        "they would be.",
    )
    adamw_lr: Rate | None = setting(None, "Learning rate of everything that is no matrix. None is lr.", not_negative)
    adamw_weight_decay: Rate | None = setting(
        None,
        "Weight decay of embeddings, heads and other parameters that decay under AdamW; biases, norms and what else "
        "is no matrix never do. None is weight_decay.",
        not_negative,
    )
    overrides: Mapping[str, Any] | None = setting(
        None,
        'What to do with parameters whose names match a pattern: {"pattern": "dion2" | "dion3" | "dion" | "adamw" | '
        "{group options}}.",
        _overrides,
    )
    lora: Literal["adamw", "B", "both"] = setting(
        "both", 'Which LoRA factors count as matrices: "both", "B", or "adamw", none.'
    )
    splits: Mapping[str, str] | None = setting(
        None,
        "Which matrices lie side by side in weights whose names match a pattern, instead of what is found by itself: "
        '{"pattern": "q 2048 | k 512 | v 512"}, or "whole".',
        _splits,
    )
    per_head: bool = setting(
        False, "Whether each attention head is a matrix of its own, in the weights of q, k, v and the output."
    )


@dataclass(kw_only=True)
class _Orthonormalize:
    orthonormalize: Callable[[Tensor], Tensor] | None = setting(
        None, "A callable (batch, k, m) -> the same shape instead of Polar Express."
    )


@dataclass(kw_only=True)
class Dion2Arguments(_Orthonormalize, CommonArguments):
    """The arguments of :class:`Dion2`."""

    process_group: Any = setting(
        None,
        "The ranks that hold replicas of the plain parameters, with the same gradients, as under DDP: a "
        "torch.distributed.ProcessGroup. They share the work. Without it every rank updates its replicas by itself, "
        "with the same result. DTensors need none: their mesh says who shares them, but for replicas with "
        'sync="compressed".',
    )


@dataclass(kw_only=True)
class FactoryArguments(_Orthonormalize, FactorySettings):
    """The arguments of :func:`build_optimizer`."""

    strategy: object | None = setting(
        None,
        "What knows about the ranks: a Lightning Trainer, Strategy or LightningModule, a Fabric, an Accelerator, "
        "TrainingArguments, a ProcessGroup or a DeviceMesh. Under DDP the ranks then share the work; without it each "
        "updates its replica by itself, with the same result. FSDP2, HSDP and TP need none: DTensors carry their "
        "mesh. A model that a Lightning Trainer or Fabric runs knows it by itself; for a submodule pass the Trainer.",
    )


@described(Dion2Arguments)
class Dion2(MatrixOptimizer):
    r"""Dion2, Dion3 or Dion for matrices and AdamW for everything else, in one optimizer.

    Each step selects from every matrix the ``fraction`` of rows or columns of its momentum with the largest L1 norms,
    orthonormalizes only those, decays their momentum and updates only those; weight decay touches every entry
    (Dion2, arXiv 2512.16928). With ``fraction=1`` this is Muon.

    .. math::
        M \leftarrow M + G, \quad
        K = \operatorname{top}_k \lVert M_i \rVert_1, \quad
        O = \operatorname{polar}(M_K), \quad
        M_K \leftarrow \mu M_K, \quad
        X \leftarrow (1 - \eta\lambda) X, \quad
        X_K \leftarrow X_K - \eta\, s\, \sqrt{n/k}\; O

    A selected slice alone decays, so ``momentum`` :math:`\mu` remembers about :math:`1/((1-\mu)\cdot\text{fraction})`
    steps: 0.95 at a quarter is 80. A short fine-tuning wants less; :math:`\mu^{n/k}`, 0.81 here, has Muon's horizon.

    A group says by ``algorithm`` what updates it, ``"dion2"`` (the default), ``"dion3"``, ``"dion"`` or ``"adamw"``,
    and may override every setting of its algorithm. Dion3 (arXiv 2608.11612) always selects output slices and
    normalizes the neurons of :math:`O`: each is divided by its running root mean square. Dion (arXiv 2504.05295)
    selects nothing: its update is a matrix of low rank. Groups of these three hold matrices, stored (out, in), or (in,
    out) if they say ``transposed=True``; with ``batched=True`` stacks of matrices, whose first axis counts them.
    :func:`~dion2_lightning.build_optimizer` makes such groups from a model.

    Args:
        params: Parameters, named parameters or groups of them, as for every ``torch.optim`` optimizer.
        **settings: The fields of :class:`Dion2Arguments`.

    Raises:
        TypeError: An argument or a group's entry has the wrong type.
        ValueError: An argument or a group's entry is out of range or unknown, or a parameter cannot be updated by its
            algorithm.

    Example::

        optimizer = Dion2(
            [
                {"params": matrices},
                {"params": embeddings, "algorithm": "adamw", "lr": 1e-3},
                {"params": biases_and_norms, "algorithm": "adamw", "weight_decay": 0.0},
            ],
            lr=3e-4,
        )
    """

    default_algorithm: ClassVar[str] = "dion2"

    @method_takes(Dion2Arguments)
    def __init__(self, params: ParamsT, *args: Any, **settings: Any) -> None:
        super().__init__(params, bind("Dion2", Dion2Arguments, args, settings))


@takes(FactoryArguments)
def build_optimizer(model: nn.Module, *args: Any, **settings: Any) -> Dion2:
    """Split a model's parameters into matrices and everything else, and build the optimizer for both.

    The matrices of linear operators are updated by Dion2; embeddings, heads, norms, biases and the rest by AdamW
    (:func:`~dion2_lightning.route_parameters`). How much goes where is said once, on rank zero, in a line of the logger
    ``dion2_lightning`` at level INFO, which goes to stderr where no logging is configured. At level DEBUG it logs every
    decision. Where nothing goes to Dion2, a warning says why, and what changes that.

    A Lightning Trainer that runs the model, or is the ``strategy``, gets the callback that this optimizer needs in it,
    :class:`~dion2_lightning.NamedOptimizerStates`.

    Args:
        model: Any module; ``self`` in Lightning's ``configure_optimizers``.
        *args: ``lr`` alone may be passed by its place.
        **settings: The fields of :class:`FactoryArguments`.

    Returns:
        A :class:`~dion2_lightning.Dion2` with named groups, the matrices first.

    Raises:
        TypeError: An argument of the wrong type, or a ``strategy`` of an unknown kind.
        ValueError: An argument out of range, or of another algorithm, a pattern that matches nothing, a model without
            trainable parameters, or a strategy or wrapper that leaves no matrices, such as FSDP1 and DeepSpeed ZeRO; or
            a LightningModule that has yet to make its parameters in ``configure_model``.

    A step of the optimizer raises RuntimeError where the model has replaced parameters since, and warns of parameters
    that get gradients and that nothing trains, such as those that were frozen when it was built.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    arguments = FactoryArguments(**bind("build_optimizer", FactoryArguments, args, settings))
    choice = CHOICES[arguments.algorithm]
    refuse_wrappers_that_flatten(model)
    strategy = strategy_of(model) if arguments.strategy is None else arguments.strategy
    process_group = process_group_of(strategy)

    rest = {
        "lr": arguments.lr if arguments.adamw_lr is None else arguments.adamw_lr,
        "weight_decay": (
            arguments.weight_decay if arguments.adamw_weight_decay is None else arguments.adamw_weight_decay
        ),
    }
    route = partial(
        route_parameters,
        overrides=arguments.overrides,
        lora=arguments.lora,
        splits=arguments.splits,
        per_head=arguments.per_head,
        matrices=choice.matrices,
        control=choice.control,
    )
    routing = route(model)
    _refuse_unused(arguments, {choice.matrices, *routing.algorithms, *(each.algorithm for each in routing.decisions)})
    given = {each.name: getattr(arguments, each.name) for each in fields(CommonArguments)} | dict(choice.settings)
    optimizer = Dion2(
        routing.param_groups(rest=rest),
        **given,
        orthonormalize=arguments.orthonormalize,
        process_group=process_group,
    )

    _share_out_averaging(optimizer, model, strategy)

    model_reference = weakref.ref(model)

    def route_added(parameters: list[Tensor], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        known = model_reference()
        if known is None:
            raise ValueError(
                "the added group does not say its algorithm, and the model it would be looked up in is gone"
            )
        if len(set(parameters)) < len(parameters):
            raise ValueError("the added group holds a parameter twice; pass every parameter once")
        groups = route(known, refuse_unmatched=False).param_groups(only=parameters, rest=rest, options=options)
        if sum(len(group["params"]) for group in groups) < len(parameters):
            raise ValueError(
                "the added group holds parameters that are not in the model, or frozen; name them and say their "
                "algorithm: add_param_group({'params': [(name, parameter)], 'algorithm': ...})"
            )
        return groups

    optimizer.route_parameters = route_added
    check_before_steps(optimizer, model)
    if is_first_rank():
        check_after_steps(optimizer, model)
    trainer = trainer_of(model) or trainer_of(arguments.strategy)
    if trainer is not None:
        for prepare in TRAINER_HOOKS:
            prepare(trainer)
    if is_first_rank():
        title = f"{choice.headline} for {type(model).__name__}"
        _log(logging.INFO, f"{title}: {routing.summary()}")
        _log(logging.DEBUG, f"{title}\n{routing.report()}")
        if routing.why_no_matrices is not None and not choice.control:
            advice = 'If AdamW is what you want, algorithm="adamw" says so.'
            warnings.warn(f"{type(model).__name__}: {routing.why_no_matrices} {advice}", stacklevel=2)
    return optimizer


def _share_out_averaging(optimizer: Dion2, model: nn.Module, strategy: object | None) -> None:
    """Say to DDP which gradients it averages over replicas, and which are the optimizer's."""
    module = ddp_of(model, strategy) or model
    compressed = [parameter for _, parameter in compressed_parameters(optimizer.param_groups)]
    others = {parameter for group in optimizer.param_groups for parameter in group["params"]}.difference(compressed)
    leave_to_ddp(module, others)
    if not optimizer.is_compressing:
        refuse_averaging_by_nobody(strategy)
        return
    group = refuse_without_replicas([], optimizer.process_group, optimizer.share_replicas)
    refuse_scaling_by_replica(strategy)
    if not leaves_out_replicas(strategy):  # else there will be no DDP
        plain_ones = [parameter for parameter in compressed if not is_dtensor(parameter)]
        weakref.finalize(optimizer, leave_to_optimizer(module, plain_ones, group)).atexit = False
    call_before_saving(strategy, optimizer.synchronize)
    replace_clipping(strategy, optimizer.replicas)
    if not compressed and is_first_rank():
        warnings.warn(
            "sync='compressed' compresses nothing: no matrix has P and R of fewer bytes than its gradient; "
            "a lower rank_fraction makes them smaller",
            stacklevel=3,
        )


def _refuse_unused(arguments: FactoryArguments, algorithms: set[str]) -> None:
    """Refuse a setting that is not at its default, where the choice of algorithm sets it, or none has it."""
    if arguments.orthonormalize is not None and not any(ALGORITHMS[name].orthonormalizes for name in algorithms):
        raise ValueError(f"orthonormalize has no effect with algorithm {arguments.algorithm!r}; remove it")
    chosen = CHOICES[arguments.algorithm].settings
    for each in fields(EverySetting):
        value, owners = getattr(arguments, each.name), algorithms_with(each.name)
        if value not in (each.default, chosen.get(each.name, value)):
            raise ValueError(
                f"{each.name} is {chosen[each.name]!r} with algorithm {arguments.algorithm!r}, got {value!r}; remove it"
            )
        if value != each.default and algorithms.isdisjoint(owners):
            raise ValueError(
                f"{each.name}={value!r} is no setting of algorithm {arguments.algorithm!r}; it belongs to "
                f"{', '.join(map(repr, owners))}, remove it"
            )


def _log(level: int, message: str) -> None:
    """Log, or, where no logging is configured, print to stderr, as logging itself does with warnings."""
    if logger.hasHandlers():
        logger.log(level, message)
    elif logger.isEnabledFor(level):
        print(message, file=sys.stderr)
