"""Supervised fine-tuning with Lightning. Every argument of its Trainer is one of the command.

python recipes/supervised_fine_tuning/with_lightning.py --help
python recipes/supervised_fine_tuning/with_lightning.py --trainer.devices 8
"""

import math
from pathlib import Path
from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from trl.trainer import add_fused_lm_head
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dion2_lightning import OptimizerSettings, SelectionMonitor
from recipes.offline_models import SMOLLM2, model_folder
from recipes.supervised_fine_tuning.data import DataSettings, load_rows
from recipes.supervised_fine_tuning.model import IGNORED, check_packing, pad_rows

ON_GPU = torch.cuda.is_available()
OPTIMIZER = OptimizerSettings(lr=4e-4, adamw_lr=9e-5, momentum=0.81, fraction=0.25)

DEFAULTS: dict[str, Any] = {
    "accelerator": "cuda" if ON_GPU else "cpu",
    "precision": "bf16-mixed" if ON_GPU else "32-true",
    "devices": 1,
    "max_steps": 24,
    "val_check_interval": 12,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "logger": lazy_instance(CSVLogger, save_dir="runs/supervised_fine_tuning", name="lightning"),
}


class FineTuner(LightningModule):
    """A causal language model.

    Args:
        model: "smollm2", a name on the hub, or a folder.
        attention: Of transformers: sdpa, eager, flash_attention_2, ...
        optimizer: The optimizer.
    """

    def __init__(self, model: str = SMOLLM2, attention: str = "sdpa", optimizer: OptimizerSettings = OPTIMIZER) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.settings = optimizer
        self.net = AutoModelForCausalLM.from_pretrained(
            model_folder(model), dtype=torch.float32, attn_implementation=attention
        ).train()
        check_packing(self.net)
        add_fused_lm_head(self.net)  # the loss without the logits of the whole vocabulary, as SFTTrainer computes it
        self.tokens = 0

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in [each for each in self.net.modules() if type(each).__name__ in self.net._no_split_modules]:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        optimizer = self.settings.build(self)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss, tokens = self._sums(batch)
        self.tokens += tokens
        self.log("train_loss", loss / tokens, prog_bar=True)
        return loss * self.trainer.accumulate_grad_batches  # Lightning divides by it

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Sums become the mean over the step's tokens with labels; ranks' gradients are averaged already.
        tokens = self.trainer.strategy.reduce(torch.tensor(float(self.tokens), device=self.device), reduce_op="mean")
        for parameter in self.net.parameters():
            if parameter.grad is not None:
                parameter.grad /= tokens.item()
        self.tokens = 0

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        loss, tokens = self._sums(batch)
        self.log("val_loss", loss / max(tokens, 1), batch_size=tokens, sync_dist=True)  # weighted by the tokens

    def _sums(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The summed loss, and the tokens that have labels."""
        loss: Tensor = self.net(**batch, fused_lm_head=True, num_items_in_batch=1).loss
        return loss, int((batch["labels"] != IGNORED).sum())


class Command(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(DataSettings, "conversations")
        parser.add_argument("--batch_size", type=int, default=2, help="Rows that a process reads at a time.")
        parser.add_argument("--ckpt_path", default=None, help="Checkpoint to go on from.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.every_n_train_steps": 500, "checkpoint.save_last": True})


def main() -> None:
    tokens = ThroughputMonitor(lambda batch: 1, lambda batch: batch["input_ids"].numel())
    defaults = {**DEFAULTS, "callbacks": [SelectionMonitor(save_to=True), tokens]}
    cli = Command(FineTuner, run=False, auto_configure_optimizers=False, trainer_defaults=defaults)
    trainer, settings = cli.trainer, cli.config_init
    tokenizer = AutoTokenizer.from_pretrained(model_folder(cli.model.hparams.model))
    train, validation = load_rows(settings.conversations, tokenizer)
    validation = pad_rows(validation, settings.batch_size * trainer.world_size)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    rank, ranks = trainer.global_rank, trainer.world_size
    sampler: DistributedSampler[Any] = DistributedSampler(train, ranks, rank, shuffle=False)  # shuffled already
    # It resumes in the middle of an epoch.
    loader = StatefulDataLoader(train, settings.batch_size, sampler=sampler, collate_fn=collate)
    validation_loader = DataLoader(validation, settings.batch_size, collate_fn=collate)
    if settings.ckpt_path is None:
        trainer.validate(cli.model, validation_loader)
    trainer.fit(cli.model, loader, validation_loader, ckpt_path=settings.ckpt_path)
    folder = Path(str(trainer.log_dir)) / "model"
    weights = get_model_state_dict(cli.model.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        cli.model.net.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        print(f"The model is in {folder}.")


if __name__ == "__main__":
    main()
