"""Supervised fine-tuning with Lightning.

python recipes/supervised_fine_tuning/with_lightning.py --help
torchrun --nproc_per_node 2 recipes/supervised_fine_tuning/with_lightning.py --devices 2 --strategy fsdp2
"""

import inspect
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from dion2_lightning import SelectionMonitor
from recipes.batches import RemainingBatches, TrainingLoader
from recipes.inputs import InputError, check_positive
from recipes.selection_page import look_every
from recipes.supervised_fine_tuning.command import (
    begin_run,
    check_rows,
    keep_checkpoint,
    run,
    selection_file,
    selects,
    show_outcome,
    tell,
)
from recipes.supervised_fine_tuning.data import Data, PackedConversations, collate_for, load_data
from recipes.supervised_fine_tuning.encoding import IGNORED
from recipes.supervised_fine_tuning.model import autocast_dtype, count_flops_per_token, load_model, save_model
from recipes.supervised_fine_tuning.settings import Settings, run_folder
from recipes.throughput import Speedometer

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LightningSettings(Settings):
    # The docstring goes on where that of Settings ends; Python 3.13 takes its indentation away, older versions do not.
    __doc__ = f"""{inspect.getdoc(Settings)}
    strategy: How processes share the work: "ddp" replicates the model, "fsdp2" shards it.
    devices: Processes on each machine.
    nodes: Machines.
"""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    devices: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "devices", "nodes")


def fine_tune(settings: LightningSettings) -> float:
    """Trains, and leaves the model, metrics and a checkpoint in the run's folder; returns the held-out loss.

    Raises:
        InputError: If a setting asks for something that cannot be done.
    """
    folder = run_folder(settings)
    ranks = settings.devices * settings.nodes
    refuse_other_launch(ranks)
    done, last = begin_run(settings, "lightning", ranks)
    model, tokenizer = load_model(settings)
    data = load_data(settings, tokenizer, ranks)
    check_rows(settings, data.train)
    module = FineTuner(model, data, settings)
    selection = None
    if selects(settings):
        selection = SelectionMonitor(every=look_every(settings.steps), save_to=selection_file(settings))
    # The logger would replace the metrics of what is resumed.
    metrics = "" if last is None else f"resumed-{done}"
    trainer = Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=make_strategy(settings),
        precision="bf16-mixed" if autocast_dtype(settings) == torch.bfloat16 else "32-true",
        max_steps=settings.steps,
        accumulate_grad_batches=settings.accumulation,
        gradient_clip_val=settings.max_norm,
        use_distributed_sampler=False,
        val_check_interval=settings.validate_every * settings.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # all that is held out, before training
        logger=CSVLogger(folder, name="", version=metrics, flush_logs_every_n_steps=1),
        callbacks=selection,
        enable_checkpointing=False,  # the module saves: after whole steps, and what was measured
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=last)
    if done == settings.steps:  # nothing was left to do
        trainer.validate(module, verbose=False)
    save_model(model, tokenizer, folder / "model")
    show_outcome(settings, module.reached, None if selection is None else selection.tracker.history)
    return module.reached


def refuse_other_launch(ranks: int) -> None:
    """Raises an error where a launcher has started another number of processes: each would train by itself.

    Raises:
        InputError: If it has.
    """
    launched = int(os.environ.get("WORLD_SIZE", ranks))
    if launched != ranks:
        raise InputError(
            f"--devices, --nodes: they make {ranks} processes, the launcher started {launched}. Give --devices the "
            "processes on each machine."
        )


def make_strategy(settings: LightningSettings) -> Strategy | str:
    """Returns what shares the work between processes; nothing to share for one."""
    if settings.strategy == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=settings.devices * settings.nodes, tensor_parallel_size=1)
    return DDPStrategy() if settings.devices * settings.nodes > 1 else "auto"


class FineTuner(LightningModule):
    """A causal language model, trained on the answers of conversations.

    Args:
        model: As `load_model` returns it.
        data: Of the run.
        settings: Of the run.
    """

    def __init__(self, model: PreTrainedModel, data: Data, settings: LightningSettings) -> None:
        super().__init__()
        self.model = model
        self.data = data
        self.settings = settings
        self.collate = collate_for(settings.attention)
        self.flops_per_token = count_flops_per_token(model, settings.length)
        self.reached = math.nan

    def configure_model(self) -> None:
        if self.settings.strategy == "fsdp2" and not hasattr(self.model, "unshard"):
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            blocks = set(self.model._no_split_modules)
            for block in [each for each in self.model.modules() if type(each).__name__ in blocks]:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        try:
            optimizer = settings.optimizer.build(self)
        except ValueError as error:
            raise InputError(f"--optimizer: {error}") from error
        schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * settings.steps), settings.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> TrainingLoader:
        return TrainingLoader(self.data.train, RemainingBatches(self._batches(self.data.train)), self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        rows = self.data.held_out
        return DataLoader(rows, batch_sampler=self._batches(rows), collate_fn=self.collate)

    def on_fit_start(self) -> None:
        dtype = autocast_dtype(self.settings)
        self.speed = Speedometer(self.flops_per_token, self.device, dtype, self.trainer.world_size)

    def on_train_start(self) -> None:
        self.steps_done = self.told = self.trainer.global_step
        self.total = torch.zeros((), device=self.device)  # of the steps since the last line

    def training_step(self, batch: Batch, _: int) -> Tensor:
        # The step's mean over tokens, wherever they are: ranks' gradients are averaged, so their share of it is
        # multiplied by their number; Lightning divides by the accumulation.
        share: Tensor = self.model(**batch, num_items_in_batch=self.data.targets[self.trainer.global_step]).loss
        self.total += share.detach()
        return share * self.trainer.world_size * self.settings.accumulation

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.steps_done:
            return  # gradients are being accumulated
        self.steps_done = self.trainer.global_step
        self.speed.step(round(self.data.tokens[self.steps_done - 1] / self.trainer.world_size))
        if self.steps_done % self.settings.log_every == 0:
            total = self.trainer.strategy.reduce(self.total, reduce_op="sum").item()
            loss = total / (self.steps_done - self.told)
            self._tell({"train_loss": loss, "lr": self.rate, **self.speed.figures()})
            self.total.zero_()
            self.told = self.steps_done
        if self.steps_done == self.settings.steps:
            self.trainer.should_stop = True  # so that Lightning measures once more
        elif self.steps_done % self.settings.validate_every:
            self._save_checkpoint()  # else after the measurement

    def on_validation_start(self) -> None:
        self.held_out = torch.zeros(2, dtype=torch.float64, device=self.device)  # summed loss, tokens
        self.speed.pause()

    def validation_step(self, batch: Batch, _: int) -> None:
        tokens = (batch["labels"] != IGNORED).sum()
        loss = self.model(**batch, num_items_in_batch=1).loss  # the sum over tokens
        self.held_out += torch.stack([loss.double(), tokens])

    def on_validation_epoch_end(self) -> None:
        loss, tokens = self.trainer.strategy.reduce(self.held_out, reduce_op="sum").tolist()
        self.reached = loss / tokens
        self._tell({"held_out_loss": self.reached})

    def on_validation_end(self) -> None:
        self.speed.go_on()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._save_checkpoint()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # As in the middle of on_train_batch_end, after a measurement too: else Lightning goes on with its own step
        # one behind, unless it would measure there again.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["completed"] = counts["processed"] - 1

    def _save_checkpoint(self) -> None:
        """Writes everything that the run needs to go on, where that is due, and removes older checkpoints then."""
        if self.steps_done % self.settings.checkpoint_every and self.steps_done != self.settings.steps:
            return
        self.speed.pause()
        unfinished = run_folder(self.settings) / "checkpoints" / "unfinished"
        self.trainer.save_checkpoint(unfinished)
        if self.trainer.is_global_zero:
            keep_checkpoint(unfinished, self.steps_done)
        self.trainer.strategy.barrier()
        self.speed.go_on()

    def _batches(self, rows: PackedConversations) -> list[list[int]]:
        """The numbers of this rank's rows: each batch takes the next ones, and the ranks take batches in turn."""
        size = self.settings.batch_size
        batches = [list(range(start, start + size)) for start in range(0, len(rows), size)]
        return batches[self.global_rank :: self.trainer.world_size]

    def _tell(self, metrics: dict[str, float]) -> None:
        for each in self.loggers:
            each.log_metrics(metrics, self.trainer.global_step)
        if self.trainer.is_global_zero:
            tell(self.trainer.global_step, metrics)


if __name__ == "__main__":
    run(fine_tune, LightningSettings)
