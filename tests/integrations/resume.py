"""Train, save, kill, resume in a new process, compare: the test of every framework under every layout.

The control is ``torch.optim.AdamW``. Both must resume bit for bit: a control that does not would say that the framework
itself is not deterministic, and so far every one is.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.training import SETTINGS

STOP: Final = 3
"""Steps before the checkpoint."""

STEPS: Final = 6
"""Steps in all."""

OPTIMIZERS: Final = ("AdamW", "Dion2, Dion3 and Dion")

WITH_DION3_AND_DION: Final = {
    "overrides": {
        "*.layers.1.mlp.*_proj.weight": {"algorithm": "dion3", "nesterov": True, "cautious_weight_decay": True},
        "*.layers.1.self_attn.*_proj.weight": {"algorithm": "dion", "cautious_weight_decay": True},
    }
}
"""Settings with which Dion2 trains one layer, and Dion3 and Dion the other."""


class Phase(Enum):
    """What a call of a training does."""

    UNINTERRUPTED = "uninterrupted"
    """``STEPS`` steps."""
    KILLED = "killed"
    """``STOP`` steps of the same ``STEPS``, a checkpoint, and the end of the process by ``kill_this_process``."""
    RESUMED = "resumed"
    """The checkpoint, then the other steps."""


Training = Callable[[str, str, Phase, Path], None]
"""``training(layout, optimizer, phase, folder)`` runs on every rank, keeps its checkpoint in the folder, and, unless
it is killed, ends with :func:`write_outcome`."""


def make_optimizer(kind: str, model: nn.Module, strategy: object | None = None, **settings: Any) -> Optimizer:
    """Make one of ``OPTIMIZERS``, or Dion2 alone."""
    if kind == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=SETTINGS["adamw_lr"], weight_decay=SETTINGS["weight_decay"])
    others = WITH_DION3_AND_DION if kind == "Dion2, Dion3 and Dion" else {}
    return build_optimizer(model, strategy=strategy, **{**SETTINGS, **others, **settings})


def write_outcome(
    folder: Path, phase: Phase, named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer, losses: list[float]
) -> None:
    """Write weights, state and losses, whole and the same under every layout. All ranks call it.

    Args:
        folder: Where.
        phase: What has ended.
        named: The model's parameters, under names that do not differ between the phases.
        optimizer: As it was built, out of the framework's wrapper.
        losses: Of this phase's steps, on this rank.
    """
    outcome: dict[str, Any] = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in named:
        outcome[name] = _whole(parameter)
        for entry, value in optimizer.state[parameter].items():
            outcome[f"{name}: {entry}"] = _whole(value)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(outcome, folder / f"{phase.value} {rank}.pt")
    if dist.is_initialized():
        dist.barrier()  # a rank may read what another wrote


def check_resume(
    training: Training,
    framework: str,
    layout: str,
    ranks: int,
    folder: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Run one cell of the table: both optimizers, all phases, no difference."""
    differences = {}
    for kind in OPTIMIZERS:
        kind_folder = folder / kind
        kind_folder.mkdir(parents=True)
        for phase in Phase:
            run_like_torchrun(ranks, training, layout, kind, phase, kind_folder, killed=phase is Phase.KILLED)
        differences[kind] = max(_difference(kind_folder, rank) for rank in range(ranks))
    record_property("resume", [framework, layout, ranks, *(differences[kind] for kind in OPTIMIZERS)])
    assert differences == dict.fromkeys(OPTIMIZERS, 0)


def _difference(folder: Path, rank: int) -> float:
    """The largest difference of any two entries; 0 where all is the same bit for bit."""
    whole, resumed = (torch.load(folder / f"{p.value} {rank}.pt") for p in (Phase.UNINTERRUPTED, Phase.RESUMED))
    assert len(resumed["losses"]) == STEPS - STOP
    assert len(whole["losses"]) == STEPS
    whole["losses"] = whole["losses"][STOP:]
    assert whole.keys() == resumed.keys()
    assert all(whole[name].dtype == resumed[name].dtype for name in whole)
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    return max((whole[name].double() - resumed[name].double()).abs().max().item() for name in whole)


def _whole(tensor: Any) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return torch.as_tensor(whole).detach().cpu().clone()


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that a framework has wrapped."""
    while type(optimizer) not in (Dion2, torch.optim.AdamW):  # Fabric's wrapper is an instance of both
        optimizer = optimizer.optimizer
    return optimizer
