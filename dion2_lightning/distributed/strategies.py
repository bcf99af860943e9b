"""What a training framework's strategy says about the ranks: who holds replicas of the plain parameters.

Under FSDP2, HSDP and TP the parameters are DTensors and say it themselves. Under DDP they are plain, and a plain
parameter cannot tell a replica from an independent model: sharing work between the latter would overwrite weights. Nor
does DistributedDataParallel around a model say that gradients are equal on all ranks: they are not in local steps
(``no_sync``), nor under a communication hook that does something else. So a group comes from an explicit strategy only,
the user's, or that of the Trainer or Fabric that runs the model. The frameworks are recognised by class and package,
without importing them.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch import Tensor, nn

from dion2_lightning.distributed.clipping import clip_grad_norm_
from dion2_lightning.distributed.replicas import unaveraged_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LIGHTNING: Final = ("lightning", "pytorch_lightning", "lightning_fabric")
"""The packages that Lightning comes in."""

_BEFORE_PARAMETERS: Final = ("configure_callbacks", "prepare_data", "setup", "configure_model")
"""The hooks of a LightningModule during which its parameters may still be replaced."""

ALTERNATIVE: Final = "flattens matrices into vectors, so no matrix is left to update; use FSDP2 (fully_shard) instead"


def process_group_of(strategy: object | None) -> "ProcessGroup | None":
    """Return the ranks that hold replicas of which no DTensor tells; None where there is one rank or DTensors say it.

    Those are replicas of plain parameters, or of shards where FSDP2 does not know that there are others.
    """
    if strategy is None:
        return None
    for name, (packages, read) in _READERS.items():
        if _is(strategy, name, *packages):
            return read(strategy)
    raise TypeError(
        "strategy must be a Lightning Trainer, Strategy or LightningModule, a Fabric, an Accelerator, "
        f"TrainingArguments, a ProcessGroup, a DeviceMesh or None, got {type(strategy).__name__}"
    )


def strategy_of(model: Any) -> Any | None:
    """Return the strategy of the Lightning Trainer or Fabric that runs a model, or None where none does.

    A LightningModule that has yet to make its parameters in ``configure_model`` gets an error.
    """
    model = _unwrapped(model)
    if _is(model, "_FabricModule", *_LIGHTNING):
        return model._strategy
    lightning_module = _class_of(model, "LightningModule", *_LIGHTNING)
    if lightning_module is None:
        return None
    if model.fabric is not None:
        return model.fabric.strategy
    trainer = trainer_of(model)
    if type(model).configure_model is not lightning_module.configure_model:
        _refuse_before_configure_model(model, trainer)
    return trainer


def trainer_of(known: Any) -> Any | None:
    """Return the Lightning Trainer of a Trainer, a LightningModule or a Strategy, or None where there is none."""
    known = _unwrapped(known)
    if _is(known, "Trainer", *_LIGHTNING):
        return known
    if _is(known, "Strategy", *_LIGHTNING):  # Fabric's has no module
        known = getattr(known, "lightning_module", None)
    if not _is(known, "LightningModule", *_LIGHTNING) or known.fabric is not None:
        return None
    try:
        return known.trainer
    except RuntimeError:  # how Lightning says that there is none
        return None


def _unwrapped(model: Any) -> Any:
    """A model without what torch has wrapped around it; anything else as it is."""
    if _is(model, "OptimizedModule", "torch"):
        return _unwrapped(model._orig_mod)
    if _is(model, "DistributedDataParallel", "torch"):
        return _unwrapped(model.module)
    return model


def _refuse_before_configure_model(model: Any, trainer: Any | None) -> None:
    name = type(model).__name__
    if trainer is None:
        raise ValueError(
            f"model {name} is in no Trainer yet, and there its hook configure_model makes or shards its parameters: "
            "build the optimizer in configure_optimizers (with LightningCLI by OptimizerSettings as an argument of the "
            "model, not by --optimizer). If you have called configure_model yourself, to train in a loop of your own, "
            "say so by strategy=: SingleDeviceStrategy() of Lightning, or a Fabric, a ProcessGroup or a DeviceMesh"
        )
    if model._current_fx_name in _BEFORE_PARAMETERS:
        raise ValueError(
            f"model {name} is in its hook {model._current_fx_name}, and configure_model may still make or shard its "
            "parameters: build the optimizer in configure_optimizers"
        )


def ddp_of(model: Any, strategy: object | None) -> Any | None:
    """Return the DistributedDataParallel that runs a model already, or None."""
    if _is(model, "OptimizedModule", "torch"):
        return ddp_of(model._orig_mod, strategy)
    if _is(model, "_FabricModule", *_LIGHTNING):
        return ddp_of(model._forward_module, None)
    trainer = trainer_of(strategy) or trainer_of(model)
    candidates = [model, None if trainer is None else trainer.strategy.model]
    return next((each for each in candidates if _is(each, "DistributedDataParallel", "torch")), None)


def refuse_scaling_by_replica(strategy: Any) -> None:
    """Raise an error where a framework scales gradients, or skips steps, by what one replica sees of them.

    That is clipping by their norm and loss scaling, where gradients are not averaged.
    """
    name, clipping, off = "", None, ""
    if _is(strategy, "TrainingArguments", "transformers"):
        name, clipping, off, scales = "max_grad_norm", strategy.max_grad_norm, "0.0", strategy.fp16
    elif _is(strategy, "Accelerator", "accelerate") or _is(strategy, "AcceleratorState", "accelerate"):
        scales = strategy.mixed_precision == "fp16"
    else:
        trainer = trainer_of(strategy)
        if trainer is not None:
            name, clipping, off = "gradient_clip_val", trainer.gradient_clip_val, "None"
        lightning = getattr(strategy if trainer is None else trainer, "strategy", strategy)
        precision = getattr(lightning, "precision_plugin", getattr(lightning, "precision", None))
        scales = getattr(precision, "scaler", None) is not None
    if clipping:
        raise ValueError(
            f"{name}={clipping} clips each replica by its own gradients where sync='compressed'; set {name}={off}, and "
            f"pass max_grad_norm={clipping} to the optimizer, which clips all alike"
        )
    if scales:
        raise ValueError(
            "loss scaling, of float16, skips a step on the replica that overflows alone where sync='compressed'; train "
            "in bfloat16, or with sync='full'"
        )


def leaves_out_replicas(strategy: Any) -> bool:
    """Return whether a framework has FSDP2 shard over each replica alone, so that it averages nothing over others."""
    kinds = {"Accelerator": "accelerate", "AcceleratorState": "accelerate", "TrainingArguments": "transformers"}
    if not any(_is(strategy, name, package) for name, package in kinds.items()):
        return False
    return _replicas_beside_fsdp2(strategy) is not None


def refuse_averaging_by_nobody(strategy: Any) -> None:
    """Raise an error where FSDP2 leaves the averaging over replicas to an optimizer that does none.

    Accelerate's own state tells it where no strategy does.
    """
    for known in (strategy, _accelerate_state()):
        if leaves_out_replicas(known):
            raise ValueError(
                f"{type(known.parallelism_config).__name__} keeps FSDP2 from averaging gradients over replicas, and "
                "sync='full' needs them averaged; pass sync='compressed', or ParallelismConfig in its place"
            )


def _accelerate_state() -> Any:
    """The AcceleratorState of this process, or None where there is none."""
    state: Any = sys.modules.get("accelerate.state")
    return state.AcceleratorState() if state is not None and state.is_initialized() else None


def replace_clipping(strategy: Any, replicas: Callable[[], "Mapping[Tensor, ProcessGroup]"]) -> None:
    """Have Accelerate's ``clip_grad_norm_`` clip replicas alike, as long as the method's object lives.

    Args:
        strategy: An Accelerator; of others nothing is replaced.
        replicas: The method ``replicas`` of an optimizer. A call without one of its parameters stays Accelerate's.
    """
    if not _is(strategy, "Accelerator", "accelerate"):
        return
    reference, before = weakref.WeakMethod(replicas), strategy.clip_grad_norm_

    @functools.wraps(before)
    def clip(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        known, everything = reference(), list(parameters)
        apart = {} if known is None else known()
        if not any(parameter in apart for parameter in everything):
            clipped: Tensor | None = before(everything, max_norm, norm_type)
            return clipped
        return clip_grad_norm_(everything, max_norm, norm_type, replicas=apart)

    strategy.clip_grad_norm_ = clip


def call_before_saving(strategy: Any, method: Callable[[], None]) -> None:
    """Have Accelerate call a method on every rank before it saves a state, as long as the method's object lives.

    Its own hook comes too late: under FSDP2 the optimizers have been saved by then.
    """
    if not _is(strategy, "Accelerator", "accelerate"):
        return
    reference, save_state = weakref.WeakMethod(method), strategy.save_state

    @functools.wraps(save_state)
    def save_state_afterwards(*arguments: Any, **settings: Any) -> Any:
        known = reference()
        if known is not None:
            known()
        return save_state(*arguments, **settings)

    strategy.save_state = save_state_afterwards


def refuse_wrappers_that_flatten(model: nn.Module) -> None:
    """Raise an error where a model, or a part of it, is wrapped by FSDP1 or DeepSpeed."""
    for module in model.modules():
        if _is(module, "FullyShardedDataParallel", "torch"):
            # With use_orig_params too: its parameters look whole, but a rank's share of their storage is flat.
            raise ValueError(f"model holds a FullyShardedDataParallel (FSDP1), which {ALTERNATIVE}")
        if _class_of(module, "DeepSpeedEngine") is not None:
            raise ValueError(f"model is a {type(module).__name__} (DeepSpeed), which {ALTERNATIVE}")


def _is(thing: object, name: str, *packages: str) -> bool:
    return _class_of(thing, name, *packages) is not None


def _class_of(thing: object, name: str, *packages: str) -> Any | None:
    """The class of a name from one of the packages, or from any, that something is an instance of."""
    for kind in type(thing).__mro__:
        if kind.__name__ == name and (not packages or kind.__module__.split(".")[0] in packages):
            return kind
    return None


def _of_lightning_module(module: Any) -> "ProcessGroup | None":
    runs_it = module.trainer if module.fabric is None else module.fabric  # Lightning's error, where neither does
    return _of_lightning_strategy(runs_it.strategy)


def _of_lightning_strategy(strategy: Any) -> "ProcessGroup | None":
    names = [kind.__name__ for kind in type(strategy).__mro__]
    if "FSDPStrategy" in names:
        raise ValueError(f"strategy {names[0]} (FSDP1) {ALTERNATIVE}: ModelParallelStrategy")
    if "DeepSpeedStrategy" in names:
        raise ValueError(f"strategy {names[0]} {ALTERNATIVE}: ModelParallelStrategy")
    if "DDPStrategy" in names:
        return _of_ddp_strategy(strategy)
    if "ModelParallelStrategy" in names or names[0].startswith("SingleDevice") or _world() is None:
        return None
    raise ValueError(f"strategy {names[0]} is not supported on several ranks; use DDPStrategy or ModelParallelStrategy")


def _of_ddp_strategy(strategy: Any) -> "ProcessGroup | None":
    """The ranks among which gradients are averaged, or None where something else may be done with them."""
    wrapped: Any = getattr(strategy, "model", None)  # of Lightning's; Fabric's keeps no model
    options = getattr(strategy, "_ddp_kwargs", {})
    # Some hooks leave the same gradients on all ranks, some do not, and which one this is cannot be read from it.
    if any(getattr(strategy, f"_{name}", None) is not None for name in ("ddp_comm_hook", "model_averaging_period")):
        return None
    if _is(wrapped, "DistributedDataParallel", "torch"):
        is_known = not wrapped._comm_hooks or unaveraged_of(wrapped) is not None
        return _of_several_ranks(wrapped.process_group) if is_known else None
    if options.get("process_group") is not None:
        return _of_several_ranks(options["process_group"])
    if options.get("device_mesh") is not None:
        return _of_several_ranks(options["device_mesh"].get_group())
    return _world()


def _of_accelerator(accelerator: Any) -> "ProcessGroup | None":
    name = str(accelerator.distributed_type).rpartition(".")[2]
    if name == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(
            f"strategy Accelerator with FSDP1 {ALTERNATIVE}: FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if name in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"strategy Accelerator with {name} {ALTERNATIVE}")
    return _world() if name.startswith("MULTI_") else _replicas_beside_fsdp2(accelerator)


def _of_training_arguments(arguments: Any) -> "ProcessGroup | None":
    if getattr(arguments, "deepspeed", None):
        raise ValueError(f"strategy TrainingArguments with deepspeed {ALTERNATIVE}")
    if getattr(arguments, "fsdp", None):
        config = arguments.fsdp_config or {}
        if int(config.get("version", 2)) != 2:  # 2 is the default of transformers
            raise ValueError(f'strategy TrainingArguments with FSDP1 {ALTERNATIVE}: fsdp_config={{"version": 2}}')
        return _replicas_beside_fsdp2(arguments)
    # Accelerate's launcher turns FSDP on without a word in the arguments.
    return _replicas_beside_fsdp2(arguments) or (_world() if arguments.world_size > 1 else None)


def _replicas_beside_fsdp2(strategy: Any) -> "ProcessGroup | None":
    """The ranks that hold replicas of shards where Accelerate's mesh has them and FSDP2 is not given that dimension."""
    config = strategy.parallelism_config
    is_hsdp = config is not None and config.dp_replicate_enabled and config.dp_shard_cp_dim_names
    if not is_hsdp or "dp_replicate" in config.fsdp_dim_names:
        return None
    if config.device_mesh is None:
        raise ValueError(
            f"strategy {type(strategy).__name__} has a {type(config).__name__} whose mesh is not there yet; make the "
            "Trainer first, which makes the mesh, and have it call Dion2Factory"
        )
    group: ProcessGroup = config.device_mesh["dp_replicate"].get_group()
    return group


def _of_mesh(mesh: Any) -> "ProcessGroup | None":
    if mesh.ndim > 1 and mesh.mesh_dim_names is None:
        raise ValueError(
            f"strategy {mesh} has several dimensions without mesh_dim_names; name them, or pass a ProcessGroup"
        )
    group: ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    return group


def _world() -> "ProcessGroup | None":
    return _of_several_ranks(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None


def _of_several_ranks(group: "ProcessGroup | None") -> "ProcessGroup | None":
    return group if dist.get_world_size(group) > 1 else None


_READERS: Final[dict[str, tuple[tuple[str, ...], Callable[[Any], "ProcessGroup | None"]]]] = {
    "ProcessGroup": (("torch",), lambda group: group),
    "DeviceMesh": (("torch",), _of_mesh),
    "Accelerator": (("accelerate",), _of_accelerator),
    "AcceleratorState": (("accelerate",), _of_accelerator),
    "TrainingArguments": (("transformers",), _of_training_arguments),
    "Trainer": (_LIGHTNING, lambda trainer: _of_lightning_strategy(trainer.strategy)),
    "LightningModule": (_LIGHTNING, _of_lightning_module),
    "Fabric": (_LIGHTNING, lambda fabric: _of_lightning_strategy(fabric.strategy)),
    "Strategy": (_LIGHTNING, _of_lightning_strategy),
}
"""What ``strategy`` takes: the name of its class, the packages that have such a class, and how its group is read."""
