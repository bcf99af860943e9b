"""Under ``torch.use_deterministic_algorithms`` no operation is refused, and two runs are identical."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from dion2_lightning import Dion2, SelectionTracker, clip_grad_norm_
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from tests.device.test_checkpoint import assert_same, weights_and_state
from tests.every_kind import fill, groups_of_every_kind, parameters_of

STEPS = 5


def train(device: str) -> tuple[list[Tensor], dict[str, float]]:
    """Return weights and state, and the metrics of the last step."""
    optimizer = Dion2(groups_of_every_kind(device), lr=0.1)
    fill(optimizer, weights=100)
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    for step in range(STEPS):
        fill(optimizer, gradients=step)
        clip_grad_norm_(parameters_of(optimizer), 1.0)
        optimizer.step()
        metrics = tracker.pop_metrics()
    assert metrics is not None
    return weights_and_state(optimizer), dict(metrics.overall)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.usefixtures("deterministic_mode_is_restored")
def test_two_runs_are_the_same(device: str) -> None:
    """In this mode torch fills new memory with NaN, so reading uninitialized memory would show too."""
    torch.set_deterministic_debug_mode("error")
    assert torch.utils.deterministic.fill_uninitialized_memory
    first, metrics = train(device)
    second, other_metrics = train(device)
    assert_same(second, first)
    assert other_metrics == metrics
    assert all(tensor.isfinite().all() for tensor in first)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.usefixtures("deterministic_mode_is_restored")
def test_deterministic_algorithms_change_nothing(device: str) -> None:
    """No scatter of a step writes two values to one place, so their order cannot matter.

    On a CPU this mode also orthonormalizes matrices one by one, which rounds otherwise: here both runs do.
    """
    with mock.patch.object(MatrixUpdate, "goes_alone", True):
        fast, _ = train(device)
        torch.set_deterministic_debug_mode("error")
        deterministic, _ = train(device)
    assert_same(deterministic, fast)
