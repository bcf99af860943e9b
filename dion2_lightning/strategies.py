"""What a training framework's strategy says about the ranks: who holds replicas of the plain parameters.

Under FSDP2, HSDP and TP the parameters are DTensors and say it themselves. Under DDP they are plain, and a plain
parameter cannot tell a replica from an independent model: sharing work between the latter would overwrite weights. So a
group comes from an explicit strategy only. The frameworks are recognised by class and package, without importing them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALTERNATIVE: Final = "flattens matrices into vectors, so no matrix is left to update; use FSDP2 (fully_shard) instead"


def process_group_of(strategy: object | None) -> "ProcessGroup | None":
    """Return the ranks that hold replicas of the plain parameters; None where there is one rank or DTensors say it.

    Args:
        strategy: A Lightning Trainer, Strategy or LightningModule, a Fabric, an Accelerator, TrainingArguments, a
            ProcessGroup, a DeviceMesh, or None.

    Raises:
        TypeError: It is of another kind.
        ValueError: It is FSDP1, DeepSpeed or another strategy under which no matrix is left.
    """
    if strategy is None:
        return None
    for kind in type(strategy).__mro__:
        read = _READERS.get((kind.__name__, kind.__module__.split(".")[0]))
        if read is not None:
            return read(strategy)
    raise TypeError(
        "strategy must be a Lightning Trainer, Strategy or LightningModule, a Fabric, an Accelerator, "
        f"TrainingArguments, a ProcessGroup, a DeviceMesh or None, got {type(strategy).__name__}"
    )


def _of_lightning_strategy(strategy: Any) -> "ProcessGroup | None":
    names = [kind.__name__ for kind in type(strategy).__mro__]
    if "FSDPStrategy" in names:
        raise ValueError(f"strategy {names[0]} (FSDP1) {ALTERNATIVE}: ModelParallelStrategy")
    if "DeepSpeedStrategy" in names:
        raise ValueError(f"strategy {names[0]} {ALTERNATIVE}: ModelParallelStrategy")
    if "DDPStrategy" in names:
        return _world()
    if "ModelParallelStrategy" in names or names[0].startswith("SingleDevice") or _world() is None:
        return None
    raise ValueError(f"strategy {names[0]} is not supported on several ranks; use DDPStrategy or ModelParallelStrategy")


def _of_accelerator(accelerator: Any) -> "ProcessGroup | None":
    name = str(accelerator.distributed_type).rpartition(".")[2]
    if name == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(
            f"strategy Accelerator with FSDP1 {ALTERNATIVE}: FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if name in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"strategy Accelerator with {name} {ALTERNATIVE}")
    return _world() if name.startswith("MULTI_") else None


def _of_training_arguments(arguments: Any) -> "ProcessGroup | None":
    if getattr(arguments, "deepspeed", None):
        raise ValueError(f"strategy TrainingArguments with deepspeed {ALTERNATIVE}")
    if getattr(arguments, "fsdp", None):
        config = arguments.fsdp_config or {}
        if int(config.get("version", 2)) != 2:  # 2 is the default of transformers
            raise ValueError(f'strategy TrainingArguments with FSDP1 {ALTERNATIVE}: fsdp_config={{"version": 2}}')
        return None
    return _world() if arguments.world_size > 1 else None


def _of_mesh(mesh: Any) -> "ProcessGroup | None":
    if mesh.ndim > 1 and mesh.mesh_dim_names is None:
        raise ValueError(
            f"strategy {mesh} has several dimensions without mesh_dim_names; name them, or pass a ProcessGroup"
        )
    group: ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    return group


def _world() -> "ProcessGroup | None":
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


_READERS: Final[dict[tuple[str, str], Callable[[Any], "ProcessGroup | None"]]] = {
    ("ProcessGroup", "torch"): lambda group: group,
    ("DeviceMesh", "torch"): _of_mesh,
    ("Accelerator", "accelerate"): _of_accelerator,
    ("AcceleratorState", "accelerate"): _of_accelerator,
    ("TrainingArguments", "transformers"): _of_training_arguments,
    ("Trainer", "lightning"): lambda trainer: _of_lightning_strategy(trainer.strategy),
    ("Trainer", "pytorch_lightning"): lambda trainer: _of_lightning_strategy(trainer.strategy),
    ("LightningModule", "lightning"): lambda module: _of_lightning_strategy(module.trainer.strategy),
    ("LightningModule", "pytorch_lightning"): lambda module: _of_lightning_strategy(module.trainer.strategy),
    ("Fabric", "lightning"): lambda fabric: _of_lightning_strategy(fabric.strategy),
    ("Fabric", "lightning_fabric"): lambda fabric: _of_lightning_strategy(fabric.strategy),
    ("Strategy", "lightning"): _of_lightning_strategy,
    ("Strategy", "pytorch_lightning"): _of_lightning_strategy,
    ("Strategy", "lightning_fabric"): _of_lightning_strategy,
}
"""What ``strategy`` takes, by class and package, and how its group is read."""
