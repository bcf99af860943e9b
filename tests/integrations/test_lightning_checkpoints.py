"""Checkpoints in Lightning: exact resume under every strategy, from one strategy to another, and what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import dion2_lightning
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations.lightning_training import RANKS, fit, ranks_of
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, write_outcome

FILE = "checkpoint.ckpt"


class Kill(L.Callback):
    """Ends the process once the checkpoint is there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            kill_this_process()


def saving(folder: Path) -> ModelCheckpoint:
    """Save after ``STOP`` steps, as ``FILE``."""
    name = FILE.removesuffix(".ckpt")
    return ModelCheckpoint(folder, name, every_n_train_steps=STOP, save_top_k=-1, enable_version_counter=False)


def train_in_lightning(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    killed, resumed = phase is Phase.KILLED, phase is Phase.RESUMED
    module, trainer = fit(
        layout,
        kind,
        steps=STEPS,
        seed=1 if resumed else 0,
        checkpoint=folder / FILE if resumed else None,
        callbacks=[Kill(), saving(folder)] if killed else [],
        enable_checkpointing=killed,
    )
    write_outcome(folder, phase, module.named_parameters(), trainer.optimizers[0], module.losses)


@pytest.mark.parametrize("layout", ["one device", "DDP", "FSDP2", "FSDP2, sharded file", "TP", "FSDP2 x TP"])
def test_resume(layout: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train_in_lightning, "Lightning", layout, ranks_of(layout), tmp_path, record_property)
