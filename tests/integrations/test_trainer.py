"""The Hugging Face Trainer: a checkpoint resumes exactly under every layout, and the loop is the one by hand."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from dion2_lightning import Dion2Factory
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.huggingface import STATE_DICTS, fsdp2_on_cpu
from tests.integrations.resume import STEPS, STOP, WITH_DION3_AND_DION, Phase, check_resume, unwrapped, write_outcome
from tests.integrations.training import BATCH, MAX_NORM, SETTINGS, Sequences, make_model


class InOrder(Trainer):
    """Takes the sequences in order, and keeps the loss of every step on this rank."""

    losses: list[float]

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset)

    def compute_loss(self, *arguments: Any, **settings: Any) -> Any:
        loss = super().compute_loss(*arguments, **settings)
        if self.model.training:
            self.losses.append(loss.item())
        return loss


def arguments(folder: Path, ranks: int = 1, steps: int = STEPS, **settings: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": BATCH // ranks,
        "max_steps": steps,
        "max_grad_norm": MAX_NORM,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), seed=0, **{**chosen, **settings})


def make_trainer(args: TrainingArguments, model: nn.Module, pair: Any = None, **settings: Any) -> InOrder:
    pair = (Dion2Factory, {**SETTINGS, "strategy": args}) if pair is None else pair
    trainer = InOrder(model, args, train_dataset=Sequences(args.max_steps), optimizer_cls_and_kwargs=pair, **settings)
    trainer.losses = []
    return trainer


class KillAfterSaving(TrainerCallback):
    def on_save(self, *arguments: Any, **settings: Any) -> None:
        kill_this_process()


FSDP = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}

ADAMW = (torch.optim.AdamW, {"lr": SETTINGS["adamw_lr"], "weight_decay": SETTINGS["weight_decay"]})
"""The control."""


def train(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": "linear"}
    if layout in STATE_DICTS:
        fsdp2_on_cpu()
        settings |= {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": STATE_DICTS[layout]}}
    if phase is Phase.KILLED:
        settings |= {"save_strategy": "steps", "save_steps": STOP}
    args = arguments(folder, 1 if layout == "one device" else 2, **settings)
    model = make_model(seed=1 if phase is Phase.RESUMED else 0)
    ours = (Dion2Factory, {**SETTINGS, **WITH_DION3_AND_DION, "strategy": args})
    trainer = make_trainer(args, model, ADAMW if kind == "AdamW" else ours)
    if phase is Phase.KILLED:
        trainer.add_callback(KillAfterSaving())
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if phase is Phase.RESUMED else None)
    assert all(isinstance(parameter, DTensor) == (layout in STATE_DICTS) for parameter in trainer.model.parameters())
    write_outcome(folder, phase, trainer.model.named_parameters(), unwrapped(trainer.optimizer), trainer.losses)


@pytest.mark.parametrize(
    ("layout", "ranks"), [("one device", 1), ("DDP", 2), ("FSDP2, sharded", 2), ("FSDP2, full", 2)]
)
def test_resume(layout: str, ranks: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train, "Trainer", layout, ranks, tmp_path, record_property)


def loss_curve(steps: int) -> list[float]:
    """The losses of the training, over all ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments(Path(folder), ranks, steps), make_model())
        trainer.train()
    losses = torch.tensor(trainer.losses)
    return trainer.accelerator.reduce(losses, reduction="mean").tolist()


def test_the_curve_is_the_one_by_hand() -> None:
    test_plain_loop.check_curve(loss_curve)


def test_the_curve_of_two_ranks_is_the_one_by_hand() -> None:
    run_like_torchrun(2, test_plain_loop.check_curve, loss_curve)
