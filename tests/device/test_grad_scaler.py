"""Mixed precision with a GradScaler: a step that it skips leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import SelectionTracker, build_optimizer
from tests.device.test_checkpoint import assert_same, everything

STEPS, SKIPPED = 5, 2


def counts_of(statistics: SelectionTracker) -> list[Tensor]:
    """Copies of what is counted."""
    return [tensor for entry in statistics.state_dict()["counts"].values() for tensor in entry.values()]


def loss_of(model: nn.Module, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(64, size, generator=generator).to(device) for size in (96, 40))
    # A CPU is slow in float16, but the scaler works alike.
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        outputs = model(inputs)
        assert outputs.dtype == (torch.float16 if device == "cuda" else torch.float32)
        return (outputs.float() - targets).square().mean()


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_step_with_an_infinite_gradient_is_skipped(device: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.LayerNorm(160), nn.Linear(160, 40)).to(device)
    optimizer = build_optimizer(model, lr=0.02, overrides={"3.weight": "dion2"})
    statistics = SelectionTracker(every=1)
    statistics.attach(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, device)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if step == SKIPPED:
            model[0].weight.grad[3, 5] = torch.inf
        before, counts = copy.deepcopy(everything(optimizer)), counts_of(statistics)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == SKIPPED:
            assert_same(everything(optimizer), before)
            assert_same(counts_of(statistics), counts)
            assert statistics.pop_metrics() is None
            assert scaler.get_scale() == 2.0**7
        else:
            assert not all(torch.equal(now, then) for now, then in zip(everything(optimizer), before, strict=False))
            assert statistics.pop_metrics().step == statistics.step
    assert statistics.step == STEPS - 1
    assert losses[SKIPPED + 1] == losses[SKIPPED]
    assert losses[-1] < 0.8 * losses[0]
