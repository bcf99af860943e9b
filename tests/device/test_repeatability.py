"""Under ``torch.use_deterministic_algorithms`` nothing is refused, and two runs are the same bit for bit."""

import pytest
import torch
from torch import Tensor

from dion2_lightning import Dion2, SelectionTracker, clip_grad_norm_
from tests.device.test_checkpoint import assert_same, everything
from tests.every_kind import fill, groups_of_every_kind, parameters_of

STEPS = 5


def train(device: str) -> tuple[list[Tensor], dict[str, float]]:
    """Return weights and state, and the figures of the last step."""
    optimizer = Dion2(groups_of_every_kind(device), lr=0.1)
    fill(optimizer, weights=100)
    statistics = SelectionTracker(every=1, orthogonality=True)
    statistics.attach(optimizer)
    for step in range(STEPS):
        fill(optimizer, gradients=step)
        clip_grad_norm_(parameters_of(optimizer), 1.0)
        optimizer.step()
        figures = statistics.pop_metrics()
    assert figures is not None
    return everything(optimizer), dict(figures.overall)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.usefixtures("deterministic_mode_is_restored")
def test_two_runs_are_the_same(device: str) -> None:
    """New memory is filled with NaN then, so what is read before it is written shows too."""
    torch.set_deterministic_debug_mode("error")
    assert torch.utils.deterministic.fill_uninitialized_memory
    first, figures = train(device)
    second, other_figures = train(device)
    assert_same(second, first)
    assert other_figures == figures
    assert all(tensor.isfinite().all() for tensor in first)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.usefixtures("deterministic_mode_is_restored")
def test_the_result_is_that_of_the_fast_algorithms(device: str) -> None:
    """No two entries of what is moved meet in one place, so the order in which they arrive cannot matter."""
    fast, _ = train(device)
    torch.set_deterministic_debug_mode("error")
    repeatable, _ = train(device)
    assert_same(repeatable, fast)
