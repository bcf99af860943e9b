"""The host does not wait for a GPU while it steps, by torch's own detector.

Without a GPU, tests/test_host_synchronisation.py looks at every operation.
"""

import pytest
import torch

from dion2_lightning import Dion2, SelectionTracker, build_optimizer
from tests.device.waiting import no_waiting
from tests.every_kind import fill, groups_of_every_kind
from tests.integrations.training import BATCH, SETTINGS, Sequences, make_model

STEPS = 4


def step_on(optimizer: Dion2, steps: int = STEPS) -> None:
    """Step on other gradients each time; the first step, which creates the state, is taken before."""
    for step in range(steps):
        fill(optimizer, gradients=step)
        with no_waiting("cuda"):
            optimizer.step()


def test_matrices_of_every_kind_and_adamw(gpu: str) -> None:
    optimizer = Dion2(groups_of_every_kind(gpu), lr=0.1)
    optimizer.step()
    step_on(optimizer)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_steps_that_statistics_look_on(gpu: str) -> None:
    """Figures are due at every second step; only taking them waits."""
    optimizer = Dion2(groups_of_every_kind(gpu), lr=0.1)
    statistics = SelectionTracker(every=2, orthogonality=True)
    statistics.attach(optimizer)
    optimizer.step()
    for due in (True, False, True):
        step_on(optimizer, steps=1)
        assert (statistics.pop_metrics() is not None) == due


def test_a_language_model(gpu: str) -> None:
    model = make_model(hidden_size=128, intermediate_size=256).to(gpu)
    optimizer = build_optimizer(model, **{**SETTINGS, "orthonormalize_dtype": None})
    for step, batch in enumerate(Sequences(STEPS).pieces.to(gpu).split(BATCH)):
        model(input_ids=batch, labels=batch).loss.backward()
        with no_waiting(gpu if step else "cpu"):
            optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("planted", ["reads", "sends"])
def test_the_detector_detects(planted: str, gpu: str) -> None:
    def orthonormalize(stack: torch.Tensor) -> torch.Tensor:
        return stack * stack.sum().item() if planted == "reads" else stack * torch.ones(1).to(gpu)

    optimizer = Dion2(groups_of_every_kind(gpu), lr=0.1, orthonormalize=orthonormalize)
    optimizer.step()
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(gpu):
        optimizer.step()
    assert torch.cuda.get_sync_debug_mode() == 0
