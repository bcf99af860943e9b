"""The factory: one call from a model to the optimizer that trains it."""

import importlib
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from dion2_lightning.distributed.strategies import (
    process_group_of,
    refuse_wrappers_that_flatten,
    strategy_of,
    trainer_of,
)
from dion2_lightning.optimizer import Dion2
from dion2_lightning.parameter_groups import check_settings
from dion2_lightning.routing.replaced_parameters import check_before_steps
from dion2_lightning.routing.router import check_lora, route_parameters

logger = logging.getLogger("dion2_lightning")

HEADLINES: Final = {
    "dion2": "Dion2 and AdamW",
    "muon": "Muon (dion2 groups at fraction 1) and AdamW",
    "adamw": "AdamW (dion2 groups too)",
}
"""What ``algorithm`` takes, and how the report is headed."""


def build_optimizer(
    model: nn.Module,
    lr: float,
    *,
    algorithm: str = "dion2",
    fraction: float = 0.25,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    adjust_lr_fn: str | None = "match_rms_adamw",
    scale_lr_by_fraction: bool = True,
    select: str = "shorter",
    orthonormalize: Callable[[Tensor], Tensor] | None = None,
    orthonormalize_dtype: torch.dtype | str | None = None,
    state_dtype: torch.dtype | str | None = None,
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    check_finite: bool = False,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    lora: str = "adamw",
    strategy: object | None = None,
    share_replicas: bool | None = None,
) -> Dion2:
    """Split a model's parameters into matrices and everything else, and build the optimizer for both.

    The matrices of linear operators are updated by Dion2; embeddings, heads, norms, biases and the rest by AdamW
    (:func:`~dion2_lightning.route_parameters`). The decisions are logged once, on rank zero, at level INFO to the
    logger ``dion2_lightning``.

    Args:
        model: Any module; ``self`` in Lightning's ``configure_optimizers``.
        lr: Learning rate of the matrices, and of everything else unless ``adamw_lr`` is given.
        algorithm: What updates the matrices. ``"dion2"``; ``"muon"``: the same with ``fraction`` 1, which is Muon
            without Nesterov momentum; ``"adamw"``: the control, AdamW for all, with the groups, learning rates and
            weight decays as they would be (default: ``"dion2"``).
        fraction: Share of each matrix's slices to update every step, in (0, 1]; applies to ``"dion2"`` (default: 0.25).
        momentum: Decay rate of the matrices' momentum (default: 0.95).
        weight_decay: Of the matrices, decoupled (default: 0.01).
        adjust_lr_fn: The scale of a matrix's update, see :class:`~dion2_lightning.Dion2` (default:
            ``"match_rms_adamw"``).
        scale_lr_by_fraction: Whether one ``lr`` fits every fraction (default: True).
        select: ``"shorter"`` axis, or ``"output"`` slices (default: ``"shorter"``).
        orthonormalize: A callable instead of Polar Express (default: None).
        orthonormalize_dtype: Its precision (default: None, by hardware).
        state_dtype: Precision of the momentum (default: None, float32 for half-precision parameters).
        adamw_lr: Learning rate of everything else (default: None, ``lr``).
        adamw_weight_decay: Of embeddings, heads and other parameters that decay under AdamW; biases, norms and scalars
            never do (default: None, ``weight_decay``).
        betas: AdamW's decay rates (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator (default: 1e-8).
        check_finite: Refuse gradients with NaN or Inf, at the price of a synchronisation every step (default: False).
        overrides: ``{"pattern": "dion2" | "adamw" | {group options}}`` by parameter names (default: None).
        lora: Which LoRA factors are updated by Dion2: ``"adamw"`` none, ``"B"``, ``"both"`` (default: ``"adamw"``).
        strategy: What knows about the ranks: a Lightning Trainer, Strategy or LightningModule, a Fabric, an
            Accelerator, TrainingArguments, a ProcessGroup or a DeviceMesh. Under DDP the ranks then share the work;
            without it each updates its replica by itself, with the same result. FSDP2, HSDP and TP need none: the
            parameters' meshes say all. A model that a Lightning Trainer or Fabric runs knows it by itself; with a part
            of one, pass the Trainer. A Trainer that is found so gets the callbacks that this optimizer needs in it
            (:mod:`dion2_lightning.integrations.lightning_hooks`) (default: None).
        share_replicas: Whether ranks that hold replicas, as under DDP and HSDP, share the work on them: True, False, or
            None, where it saves more than sending the results costs (default: None).

    Returns:
        A :class:`~dion2_lightning.Dion2` with named groups, the matrices first.

    Raises:
        TypeError: An argument of the wrong type, or a ``strategy`` of an unknown kind.
        ValueError: An argument out of range, a pattern that matches nothing, a model without trainable parameters, or a
            strategy or wrapper that leaves no matrices, such as FSDP1 and DeepSpeed ZeRO; or a LightningModule that
            has yet to make its parameters in ``configure_model``.

    A step of the optimizer raises RuntimeError where the model has replaced parameters since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_arguments(
        {
            "lr": lr,
            "algorithm": algorithm,
            "fraction": fraction,
            "weight_decay": weight_decay,
            "adamw_lr": adamw_lr,
            "adamw_weight_decay": adamw_weight_decay,
            "overrides": overrides,
            "lora": lora,
        }
    )
    adamw_lr = lr if adamw_lr is None else adamw_lr
    adamw_weight_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    refuse_wrappers_that_flatten(model)
    process_group = process_group_of(strategy_of(model) if strategy is None else strategy)

    matrices = "adamw" if algorithm == "adamw" else "dion2"
    rest = {"lr": adamw_lr, "weight_decay": adamw_weight_decay}
    routing = route_parameters(model, overrides=overrides, lora=lora, matrices=matrices)
    optimizer = Dion2(
        routing.param_groups(rest=rest),
        lr,
        fraction=1.0 if algorithm == "muon" else fraction,
        momentum=momentum,
        weight_decay=weight_decay,
        adjust_lr_fn=adjust_lr_fn,
        scale_lr_by_fraction=scale_lr_by_fraction,
        select=select,
        orthonormalize=orthonormalize,
        orthonormalize_dtype=orthonormalize_dtype,
        state_dtype=state_dtype,
        betas=betas,
        eps=eps,
        check_finite=check_finite,
        process_group=process_group,
        share_replicas=share_replicas,
    )

    model_reference = weakref.ref(model)

    def route_added(parameters: list[Tensor]) -> list[dict[str, Any]]:
        known = model_reference()
        if known is None:
            raise ValueError(
                "the added group does not say its algorithm, and the model it would be looked up in is gone"
            )
        routing = route_parameters(known, overrides=overrides, lora=lora, matrices=matrices)
        added = routing.param_groups(only=parameters, rest=rest)
        if sum(len(group["params"]) for group in added) < len(parameters):
            raise ValueError("the added group holds parameters that are not in the model, or frozen; say its algorithm")
        return added

    optimizer.route_parameters = route_added
    check_before_steps(optimizer, model)
    _add_callbacks(trainer_of(model) or trainer_of(strategy))
    if _is_rank_zero():
        logger.info("%s for %s\n%s", HEADLINES[algorithm], type(model).__name__, routing.report())
    return optimizer


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check arguments of :func:`build_optimizer` that can be checked without a model, whichever of them are given.

    Args:
        arguments: By name.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value out of its range.
    """
    algorithm = arguments.get("algorithm", "dion2")
    if algorithm not in HEADLINES:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, HEADLINES))}, got {algorithm!r}")
    check_settings({name: value for name, value in arguments.items() if name != "algorithm"})
    for name in ("lr", "weight_decay"):
        if arguments.get(f"adamw_{name}") is not None:
            check_settings({name: arguments[f"adamw_{name}"]}, where="adamw_")
    check_lora(arguments.get("lora", "adamw"))
    overrides = arguments.get("overrides")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a mapping from patterns of names, got {type(overrides).__name__}")


def _add_callbacks(trainer: Any | None) -> None:
    """Add what a Lightning Trainer needs to keep each state with its parameter, which nobody would miss in time.

    Only a program that has imported Lightning has a Trainer, so importing here costs nobody else anything. Trainers
    that are not found here have the first callback all the same, by Lightning's entry point in ``pyproject.toml``.
    """
    if trainer is not None:
        importlib.import_module("dion2_lightning.integrations.lightning_hooks").add_callbacks(trainer)


def _is_rank_zero() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", 0)) == 0
