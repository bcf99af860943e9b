"""Accelerate: a checkpoint of save_state resumes exactly under every layout, and the loop is the one by hand."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from dion2_lightning import build_optimizer
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.huggingface import make_accelerator
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, make_optimizer, unwrapped, write_outcome
from tests.integrations.training import BATCH, MAX_NORM, SETTINGS, Sequences, make_model

LAYOUTS = {
    "one device": None,
    "DDP": None,
    "FSDP2, sharded": (Shard(0),),
    "FSDP2, full": (Shard(0),),
    "HSDP": (Replicate(), Shard(0)),
}
"""Where every parameter must lie."""


def placements(parameter: nn.Parameter) -> tuple[Placement, ...] | None:
    return getattr(parameter, "placements", None)


def loader_of(accelerator: Accelerator, steps: int) -> DataLoader[dict[str, torch.Tensor]]:
    """A step's ``BATCH`` sequences, dealt over the ranks in order."""
    return DataLoader(Sequences(steps), batch_size=BATCH // accelerator.num_processes)


def train_on(
    accelerator: Accelerator, batches: Iterable[Any], model: nn.Module, optimizer: Any, scheduler: Any = None
) -> list[float]:
    """Return each step's loss, on this rank."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_curve(steps: int) -> list[float]:
    """The losses of the training, over all ranks."""
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = build_optimizer(model, **SETTINGS, strategy=accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(accelerator, steps))
    losses = torch.tensor(train_on(accelerator, loader, model, optimizer))
    return accelerator.reduce(losses, reduction="mean").tolist()


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
    assert {placements(parameter) for parameter in model.parameters()} == {LAYOUTS[layout]}
    batches = list(loader)
    if phase is Phase.KILLED:
        train_on(accelerator, batches[:STOP], model, optimizer, scheduler)
        accelerator.save_state(str(folder / "checkpoint"))
        kill_this_process()
    losses = train_on(accelerator, batches, model, optimizer, scheduler)
    write_outcome(folder, phase, model.named_parameters(), unwrapped(optimizer), losses)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume(layout: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    ranks = {"one device": 1, "HSDP": 4}.get(layout, 2)
    check_resume(train, "Accelerate", layout, ranks, tmp_path, record_property)


def test_the_curve_is_the_one_by_hand() -> None:
    test_plain_loop.check_curve(loss_curve)


def test_the_curve_of_two_ranks_is_the_one_by_hand() -> None:
    run_like_torchrun(2, test_plain_loop.check_curve, loss_curve)
