"""No framework: a loop by hand, which the frameworks' results are compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.distributed.ranks import kill_this_process
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, make_optimizer, write_outcome
from tests.integrations.training import BATCH, MAX_NORM, Sequences, make_model


def train_by_hand(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    model = make_model(seed=1 if phase is Phase.RESUMED else 0)
    optimizer = make_optimizer(kind, model)
    checkpoint = folder / "checkpoint.pt"
    first = 0
    if phase is Phase.RESUMED:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = STOP
    losses = []
    for batch in Sequences(STEPS).pieces.split(BATCH)[first:]:
        losses.append(train_step(model, optimizer, batch))
        if phase is Phase.KILLED and len(losses) == STOP:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
            kill_this_process()
    write_outcome(folder, phase, model.named_parameters(), optimizer, losses)


def test_resume(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train_by_hand, "none", "one device", 1, tmp_path, record_property)


def loss_curve(steps: int, model: nn.Module | None = None) -> list[float]:
    """The losses of the common training, by hand: what every framework has to reproduce; of ``make_model()``."""
    model = make_model() if model is None else model
    optimizer = make_optimizer("Dion2", model)
    return [train_step(model, optimizer, batch) for batch in Sequences(steps).pieces.split(BATCH)]


def check_curve(curve: Callable[[int], list[float]]) -> None:
    """A framework's losses, of so many steps, are those by hand."""
    assert curve(20) == pytest.approx(loss_curve(20), abs=1e-4)


def train_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> float:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_the_common_training_learns() -> None:
    losses = loss_curve(20)
    assert losses[-1] < 0.8 * losses[0]
