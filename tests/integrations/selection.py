"""Shared by the tests of the selection callbacks: a training small enough to compute by hand, and comparisons."""

import math
import warnings
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dion2_lightning import Dion2, SelectionWarning
from dion2_lightning.monitoring.history import SelectionHistory

ROWS: Final = (0, 0, 2)
"""Which row of the 4 x 8 matrix each step selects."""

WINDOW: Final = 2


def gradients() -> list[Tensor]:
    """The gradient of each step: of one row; in the last step also of another, a third as large."""
    found = []
    for row in ROWS:
        gradient = torch.zeros(4, 8)
        gradient[row] = 3.0
        gradient[3] = 1.0 if row == 2 else 0.0
        found.append(gradient)
    return found


class ByHand(nn.Module):
    """One matrix, whose gradient is the batch, or the mean over its items."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))

    def forward(self, gradient: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * gradient).sum((-2, -1)).mean()}


def optimizer_by_hand(module: ByHand, **group: Any) -> Dion2:
    """Momentum 0; a selected row moves by its direction times sqrt(n / k) = 2."""
    settings: dict[str, Any] = {
        "momentum": 0.0,
        "weight_decay": 0.0,
        "adjust_lr_fn": "none",
        "orthonormalize_dtype": "float32",
    }
    optimizer = Dion2([{"params": [("weight", module.weight)], **group}], lr=1.0, **settings)
    optimizer.orthonormalize = lambda row: nn.functional.normalize(row, dim=-1)
    return optimizer


RMS: Final = math.sqrt(4 / 32)
METRICS: Final[list[dict[str, float]]] = [
    {
        "selected_fraction": 0.25, "coverage": 0.25, "staleness_mean": 0.75, "staleness_max": 1.0, "turnover": 1.0,
        "captured_mass": 1.0, "imbalance": 0.75, "update_rms": RMS,
    },
    {
        "selected_fraction": 0.25, "coverage": 0.25, "staleness_mean": 1.5, "staleness_max": 2.0, "turnover": 0.0,
        "captured_mass": 1.0, "imbalance": 0.75, "update_rms": RMS,
    },
    # Counts 0, 0, 1, 2: (-3 * 0 - 1 * 0 + 1 * 1 + 3 * 2) / (4 * 3) = 7 / 12. Waits 1, 3, 0, 3.
    {
        "selected_fraction": 0.25, "coverage": 0.5, "staleness_mean": 1.75, "staleness_max": 3.0, "turnover": 1.0,
        "captured_mass": 0.75, "imbalance": 7 / 12, "update_rms": RMS,
    },
]  # fmt: skip


def named(step: int, *prefixes: str) -> dict[str, Any]:
    """The expected metrics of a step (from 0) under the names that loggers get."""
    return {
        f"{prefix}/{name}": pytest.approx(value, rel=1e-6)
        for prefix in prefixes
        for name, value in METRICS[step].items()
    }


PICTURES: Final = {
    "dion2": ({"overview", "heatmap", "staleness", "updates"}, ["dion2/overview", "dion2/heatmap"]),
    "dion": ({"subspaces", "updates"}, ["dion2/subspaces"]),
}
"""The pictures of a run in files, and those that loggers get, by the algorithm of its matrix."""

OF_DION: Final = {"dion2/captured_energy", "dion2/subspace_turn", "dion2/update_rms"}
"""The names that loggers get of the matrix, whose update by Dion has rank 1."""

ALL: Final = ("dion2",)
"""The prefix of all matrices together; the one group has none."""

EACH: Final = (*ALL, "dion2/dion2/weight")
"""And of the one parameter."""


def points(history: SelectionHistory) -> list[Any]:
    """Steps and metrics of a history."""
    return list(zip(history.steps, history.overall, history.groups, history.parameters, strict=True))


def assert_same_metrics(found: Any, expected: Any) -> None:
    """Compare two results of :func:`points`: counts exactly, floats to rounding."""
    assert len(found) == len(expected) > 0
    for its, other in zip(found, expected, strict=True):
        assert its[0] == other[0]
        pairs = [(its[1], other[1]), *((its[2][name], other[2][name]) for name in other[2])]
        for mine, theirs in [*pairs, *zip(its[3], other[3], strict=True)]:
            assert list(mine) == list(theirs)
            for name, value in theirs.items():
                is_rounded = name in ("update_rms", "orthogonality_error", "captured_mass", "imbalance")
                assert mine[name] == (pytest.approx(value, rel=1e-3) if is_rounded else value), (its[0], name)


def pictures_in(folder: Path) -> dict[str, list[int]]:
    """The images that TensorBoard was sent, with their steps."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]}


def assert_dead_layer_is_named_once(caught: list[warnings.WarningMessage], name: str = "dead.weight") -> None:
    """Check the warnings of training :class:`WithDeadLayer` with metrics at every step."""
    messages = [str(each.message) for each in caught if each.category is SelectionWarning]
    assert len(messages) == 1
    assert messages[0].startswith(f"step 2, all-zero momentum: {name} (1 of 1 matrices); their gradients")


class WithDeadLayer(nn.Module):
    """Two layers, of which the loss multiplies one by 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.alive, self.dead = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, gradient: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.alive(gradient) + 0.0 * self.dead(gradient)).square().mean()}
