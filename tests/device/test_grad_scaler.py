"""Mixed precision with a GradScaler: a step that it skips changes nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import SelectionTracker, build_optimizer
from tests.device.test_checkpoint import assert_same, weights_and_state

STEPS, SKIPPED = 5, 2


def counts_of(tracker: SelectionTracker) -> list[Tensor]:
    """Copies of the counters of all parameters."""
    return [tensor for entry in tracker.state_dict()["counts"].values() for tensor in entry.values()]


def loss_of(model: nn.Module, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(64, size, generator=generator).to(device) for size in (96, 40))
    # float16 is slow on a CPU, and the scaler does the same without it.
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        outputs = model(inputs)
        assert outputs.dtype == (torch.float16 if device == "cuda" else torch.float32)
        return (outputs.float() - targets).square().mean()


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_step_with_an_infinite_gradient_is_skipped(device: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.LayerNorm(160), nn.Linear(160, 40)).to(device)
    optimizer = build_optimizer(model, lr=0.02, overrides={"3.weight": "dion2"})
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, device)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if step == SKIPPED:
            model[0].weight.grad[3, 5] = torch.inf
        before, counts = copy.deepcopy(weights_and_state(optimizer)), counts_of(tracker)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == SKIPPED:
            assert_same(weights_and_state(optimizer), before)
            assert_same(counts_of(tracker), counts)
            assert tracker.pop_metrics() is None
            assert scaler.get_scale() == 2.0**7
        else:
            assert not all(
                torch.equal(now, then) for now, then in zip(weights_and_state(optimizer), before, strict=False)
            )
            assert tracker.pop_metrics().step == tracker.step
    assert tracker.step == STEPS - 1
    assert losses[SKIPPED + 1] == losses[SKIPPED]
    assert losses[-1] < 0.8 * losses[0]
