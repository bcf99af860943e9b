"""TRL: SFTTrainer takes the same factory as the Trainer, with its own arguments and with LoRA."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer
from trl import SFTConfig, SFTTrainer

from dion2_lightning import Dion2, Dion2Factory, SelectionCallback
from tests.integrations import test_plain_loop
from tests.integrations.resume import unwrapped
from tests.integrations.test_trainer import InOrder
from tests.integrations.training import BATCH, LENGTH, MAX_NORM, SETTINGS, Sequences, make_model

STEPS = 5


class SFTInOrder(SFTTrainer):
    _get_train_sampler = InOrder._get_train_sampler


def make_trainer(folder: Path, pair: Any = None, **settings: Any) -> SFTTrainer:
    args = SFTConfig(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        max_length=LENGTH,
        max_grad_norm=MAX_NORM,
        learning_rate=SETTINGS["lr"],
        weight_decay=SETTINGS["weight_decay"],
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    pair = pair or Dion2Factory.from_arguments(args, **{key: SETTINGS[key] for key in FROM_SETTINGS})
    data = Dataset.from_dict({"input_ids": Sequences(STEPS).pieces.tolist()})
    return SFTInOrder(
        make_model(),
        args,
        train_dataset=data,
        processing_class=ByT5Tokenizer(),
        optimizer_cls_and_kwargs=pair,
        **settings,
    )


FROM_SETTINGS = ("adamw_lr", "fraction", "momentum", "orthonormalize_dtype")


def test_the_curve_is_the_one_by_hand(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert isinstance(unwrapped(trainer.optimizer), Dion2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-4)


def test_the_selection_is_logged_with_the_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[SelectionCallback()])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    assert all(0 < entry["dion2/coverage"] <= 1 and "mean_token_accuracy" in entry for entry in entries)


def test_lora(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    pair = (Dion2Factory, {"lr": "1e-3", "lora": "B"})
    trainer = make_trainer(tmp_path, pair, peft_config=config)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [(group["algorithm"], len(group["params"])) for group in groups] == [("dion2", 4), ("adamw", 4)]
    for name, parameter in trainer.model.named_parameters():
        assert (parameter != before[name]).any() == ("lora_" in name), name
