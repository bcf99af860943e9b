"""A step never makes the host wait for the GPU, by torch's own detector.

tests/test_host_synchronisation.py checks every operation without a GPU.
"""

from typing import Any

import pytest
import torch

from dion2_lightning import Dion2, SelectionTracker, build_optimizer
from tests.device.host_sync import no_host_sync
from tests.every_kind import fill, groups_of_every_kind
from tests.integrations.training import BATCH, SETTINGS, Sequences, make_model

STEPS = 4


def step_on(optimizer: Dion2, steps: int = STEPS) -> None:
    """Take steps with new gradients; the first step of all, which creates the state, has to be over."""
    for step in range(steps):
        fill(optimizer, gradients=step)
        with no_host_sync("cuda"):
            optimizer.step()


@pytest.mark.parametrize("check_finite", [False, "skip"])
def test_matrices_of_every_kind_and_adamw(check_finite: Any, gpu: str) -> None:
    optimizer = Dion2(groups_of_every_kind(gpu), lr=0.1, check_finite=check_finite)
    optimizer.step()
    step_on(optimizer)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_steps_that_are_tracked(gpu: str) -> None:
    """Metrics are due at every second step; only popping them waits."""
    optimizer = Dion2(groups_of_every_kind(gpu), lr=0.1)
    tracker = SelectionTracker(every=2, orthogonality=True)
    tracker.attach(optimizer)
    optimizer.step()
    for due in (True, False, True):
        step_on(optimizer, steps=1)
        assert (tracker.pop_metrics() is not None) == due


def test_a_language_model(gpu: str) -> None:
    model = make_model(hidden_size=128, intermediate_size=256).to(gpu)
    optimizer = build_optimizer(model, **{**SETTINGS, "orthonormalize_dtype": None})
    for step, batch in enumerate(Sequences(STEPS).pieces.to(gpu).split(BATCH)):
        model(input_ids=batch, labels=batch).loss.backward()
        with no_host_sync(gpu if step else "cpu"):
            optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("copy", ["to the host", "to the device"])
def test_the_detector_detects(copy: str, gpu: str) -> None:
    def orthonormalize(stack: torch.Tensor) -> torch.Tensor:
        return stack * stack.sum().item() if copy == "to the host" else stack * torch.ones(1).to(gpu)

    optimizer = Dion2(groups_of_every_kind(gpu), lr=0.1, orthonormalize=orthonormalize)
    optimizer.step()
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync(gpu):
        optimizer.step()
    assert torch.cuda.get_sync_debug_mode() == 0
