"""The small training as a LightningModule, under every strategy that the tests of Lightning use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, Subset

import dion2_lightning
from tests.integrations.resume import make_optimizer
from tests.integrations.training import BATCH, MAX_NORM, Sequences, make_model

COLUMN_WISE: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_WISE: Final = ("self_attn.o_proj", "mlp.down_proj")

RANKS: Final = {
    "one device": (1, 1),
    "DDP": (2, 1),
    "FSDP2": (2, 1),
    "FSDP2, sharded file": (2, 1),
    "FSDP2, 4 ranks": (4, 1),
    "FSDP2, 4 ranks, sharded file": (4, 1),
    "TP": (1, 2),
    "FSDP2 x TP": (2, 2),
}
"""Data and tensor parallel ranks of each layout. A sharded file is a folder, into which every rank saves its part."""


def make_strategy(layout: str, **options: Any) -> Any:
    """Make the strategy of a layout; ``options`` are DDPStrategy's."""
    if layout == "one device":
        return "auto"
    if layout == "DDP":
        return DDPStrategy(**options)
    data_parallel, tensor_parallel = RANKS[layout]
    return ModelParallelStrategy(data_parallel, tensor_parallel, save_distributed_checkpoint="sharded" in layout)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the Llama over Lightning's mesh as it is shaped."""
    if mesh["tensor_parallel"].size() > 1:
        plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMN_WISE}
        plan |= {name: RowwiseParallel() for name in ROW_WISE}
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tensor_parallel"], plan)
    if mesh["data_parallel"].size() > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
    return model


class Llama(L.LightningModule):
    """The common training: Llama, the sequences in order, clipping, and a list of this rank's losses.

    Args:
        kind: Which optimizer, see ``make_optimizer``.
        layout: One of ``RANKS``.
        model: Made by ``make_model``.
        steps: In all.
        settings: Of the optimizer, over the common ones.
    """

    def __init__(self, kind: str, layout: str, model: nn.Module, steps: int, **settings: Any) -> None:
        super().__init__()
        self.kind, self.layout, self.settings = kind, layout, settings
        self.model = model.train()
        self.sequences = Sequences(steps)
        self.losses: list[float] = []

    def configure_model(self) -> None:
        is_parallel = any(isinstance(parameter, DTensor) for parameter in self.parameters())
        if ("FSDP2" in self.layout or "TP" in self.layout) and not is_parallel:
            parallelize(self.model, self.device_mesh)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.kind, self, **self.settings)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if "TP" in self.layout:  # torch cannot clip gradients on several meshes
            dion2_lightning.clip_grad_norm_(self.parameters(), MAX_NORM)
        else:
            self.clip_gradients(optimizer, *args, **kwargs)

    def train_dataloader(self) -> DataLoader:
        done = self.trainer.global_step  # a resumed run skips the batches it has seen
        pieces = Subset(self.sequences, range(done * BATCH, len(self.sequences)))
        replicas = RANKS[self.layout][0]
        # Lightning's own sampler shuffles.
        sampler: Any = None
        if replicas > 1:
            sampler = DistributedSampler(pieces, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(pieces, batch_size=BATCH // replicas, sampler=sampler)


class Scheduled(Llama):
    """The same with learning rates that change at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_trainer(layout: str, steps: int, *, options: dict[str, Any] | None = None, **arguments: Any) -> L.Trainer:
    """Make a quiet Trainer, on the CPU unless ``arguments`` say otherwise; ``options`` are DDPStrategy's."""
    data_parallel, tensor_parallel = RANKS[layout]
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": MAX_NORM,
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
    }
    return L.Trainer(
        devices=data_parallel * tensor_parallel,
        strategy=make_strategy(layout, **(options or {})),
        max_steps=steps,
        **{**quiet, **arguments},
    )


def fit(
    layout: str,
    kind: str = "Dion2",
    *,
    module_class: type[Llama] = Llama,
    steps: int = 6,
    seed: int = 0,
    checkpoint: Path | None = None,
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    change: Callable[[nn.Module], object] | None = None,
    **arguments: Any,
) -> tuple[Llama, L.Trainer]:
    """Train; return the module and the trainer, whose ``optimizers`` hold the optimizer.

    Args:
        layout: One of ``RANKS``.
        kind: Which optimizer.
        module_class: ``Llama`` or a subclass.
        steps: In all.
        seed: Of the model.
        checkpoint: To resume from.
        config: Of the model, see ``make_model``.
        settings: Of the optimizer.
        change: Called with the model before training.
        arguments: Of ``make_trainer``.
    """
    model = make_model(seed, **(config or {}))
    if change is not None:
        change(model)
    module = module_class(kind, layout, model, steps, **(settings or {}))
    trainer = make_trainer(layout, steps, **arguments)
    trainer.fit(module, ckpt_path=checkpoint)
    return module, trainer


def ranks_of(layout: str) -> int:
    data_parallel, tensor_parallel = RANKS[layout]
    return data_parallel * tensor_parallel


def mean_over_ranks(values: list[float]) -> list[float]:
    """The mean of each value over all ranks: of replicas' losses, that of the whole batch."""
    means = torch.tensor(values, dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(means)
        means /= torch.distributed.get_world_size()
    result: list[float] = means.tolist()
    return result
