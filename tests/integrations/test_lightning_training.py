"""Training in Lightning: the same losses under every strategy, and whatever a Trainer does with an optimizer."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.distributed.ranks import run_like_torchrun
from tests.integrations import test_plain
from tests.integrations.lightning_training import fit, mean_over_ranks, ranks_of

STEPS = 20


def loss_curve(steps: int) -> list[float]:
    """The losses of the common training, by Lightning on one process."""
    module, _ = fit("one device", steps=steps)
    return module.losses


def test_loss_curve_is_that_of_a_loop_by_hand() -> None:
    assert loss_curve(STEPS) == pytest.approx(test_plain.loss_curve(STEPS), rel=1e-4)


def check_loss_curve(layout: str, expected: list[float], options: dict[str, Any]) -> None:
    module, trainer = fit(layout, steps=STEPS, options=options)
    assert mean_over_ranks(module.losses) == pytest.approx(expected, rel=1e-4)
    optimizer = trainer.optimizers[0]
    matrices = optimizer.param_groups[0]["params"]
    if layout == "DDP":
        assert optimizer.process_group is dist.group.WORLD  # nobody said strategy=
    else:
        assert optimizer.process_group is None
        assert all(isinstance(parameter, DTensor) for parameter in matrices)
    assert all(optimizer.selection_of(parameter) is not None for parameter in matrices)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("DDP", {}),
        ("DDP", {"static_graph": True, "gradient_as_bucket_view": True}),
        ("DDP", {"find_unused_parameters": True}),
        ("FSDP2", {}),
        ("TP", {}),
        ("FSDP2 x TP", {}),
    ],
    ids=str,
)
def test_every_strategy_has_the_loss_curve_of_one_device(layout: str, options: dict[str, Any]) -> None:
    expected = test_plain.loss_curve(STEPS)
    run_like_torchrun(ranks_of(layout), check_loss_curve, layout, expected, options)
