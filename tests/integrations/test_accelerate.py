"""Accelerate: a checkpoint of save_state resumes exactly under every layout, and the loop is the one by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from tests.distributed.ranks import kill_this_process
from tests.integrations.huggingface import make_accelerator
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, make_optimizer, unwrapped, write_outcome
from tests.integrations.training import BATCH, MAX_NORM, Sequences, make_model


def loader_of(accelerator: Accelerator, steps: int) -> DataLoader[dict[str, torch.Tensor]]:
    """A step's ``BATCH`` sequences, dealt over the ranks in order."""
    return DataLoader(Sequences(steps), batch_size=BATCH // accelerator.num_processes)


def train_epoch(accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, batches: Any) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    accelerator = make_accelerator(layout)
    model = make_model(seed=1 if phase is Phase.RESUMED else 0)
    optimizer = make_optimizer(kind, model, strategy=accelerator)
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS * accelerator.num_processes)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, scheduler, loader_of(accelerator, STEPS)
    )
    if phase is Phase.RESUMED:
        accelerator.load_state(str(folder / "checkpoint"))
        loader = accelerator.skip_first_batches(loader, STOP)
    batches = list(loader)
    if phase is Phase.KILLED:
        train_epoch(accelerator, model, optimizer, scheduler, batches[:STOP])
        accelerator.save_state(str(folder / "checkpoint"))
        kill_this_process()
    losses = train_epoch(accelerator, model, optimizer, scheduler, batches)
    write_outcome(folder, phase, model.named_parameters(), unwrapped(optimizer), losses)


@pytest.mark.parametrize(
    ("layout", "ranks"), [("one device", 1), ("DDP", 2), ("FSDP2, sharded", 2), ("FSDP2, full", 2), ("HSDP", 4)]
)
def test_resume(layout: str, ranks: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train, "Accelerate", layout, ranks, tmp_path, record_property)
