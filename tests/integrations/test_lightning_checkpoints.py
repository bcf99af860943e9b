"""Checkpoints in Lightning: exact resume under every strategy, from one strategy to another, and what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import dion2_lightning
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations.lightning_training import RANKS, fit, ranks_of
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, write_outcome

FILE = "checkpoint.ckpt"


class Kill(L.Callback):
    """Ends the process once the checkpoint is there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            kill_this_process()


def saving(folder: Path) -> ModelCheckpoint:
    """Save after ``STOP`` steps, as ``FILE``."""
    name = FILE.removesuffix(".ckpt")
    return ModelCheckpoint(folder, name, every_n_train_steps=STOP, save_top_k=-1, enable_version_counter=False)


def train_in_lightning(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    killed, resumed = phase is Phase.KILLED, phase is Phase.RESUMED
    module, trainer = fit(
        layout,
        kind,
        steps=STEPS,
        seed=1 if resumed else 0,
        checkpoint=folder / FILE if resumed else None,
        callbacks=[Kill(), saving(folder)] if killed else [],
        enable_checkpointing=killed,
    )
    write_outcome(folder, phase, module.named_parameters(), trainer.optimizers[0], module.losses)


@pytest.mark.parametrize("layout", ["one device", "DDP", "FSDP2", "FSDP2, sharded file", "TP", "FSDP2 x TP"])
def test_resume(layout: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train_in_lightning, "Lightning", layout, ranks_of(layout), tmp_path, record_property)


# From one strategy to another

TWO_GROUPS_OF_MATRICES = {"overrides": {"*.layers.1.*_proj.weight": {"lr": 1e-3}}}
"""With equal shapes in both groups, and the parameters of neither in one piece of the model."""


def make_awkward(model: nn.Module) -> None:
    """A frozen matrix, and one that never has a gradient."""
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    model.model.unused = nn.Linear(32, 32, bias=False)


def train_awkward(layout: str, seed: int, checkpoint: Path | None = None, save: Path | None = None) -> None:
    """Train ``STOP`` steps, or load what has; save; write weights and state by name."""
    module, trainer = fit(
        layout,
        steps=STOP,
        seed=seed,
        checkpoint=checkpoint,
        config={"tie_word_embeddings": True},
        settings=TWO_GROUPS_OF_MATRICES,
        change=make_awkward,
        options={"find_unused_parameters": True},
        callbacks=[saving(save)] if save is not None else [],
        enable_checkpointing=save is not None,
    )
    assert len(module.losses) == (0 if checkpoint is not None else STOP)
    if checkpoint is not None and save is not None:
        trainer.save_checkpoint(save / FILE)
    optimizer = trainer.optimizers[0]
    assert [group["algorithm"] for group in optimizer.param_groups].count("dion2") == 2
    folder = save if checkpoint is None else checkpoint.parent / f"loaded by {layout}"
    folder.mkdir(exist_ok=True)
    write_outcome(folder, Phase.UNINTERRUPTED, module.named_parameters(), optimizer, [])


def outcome(folder: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = torch.load(folder / f"{Phase.UNINTERRUPTED.value} 0.pt")
    return result


def check_same(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    assert any("momentum" in name for name in saved)
    assert "model.model.unused.weight: momentum" in saved
    assert loaded.keys() == saved.keys()
    for name, expected in saved.items():
        assert torch.equal(loaded[name], expected), name


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint that a layout has saved, once."""
    folders: dict[str, Path] = {}

    def folder_of(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("saved")
            run_like_torchrun(ranks_of(layout), train_awkward, layout, 0, None, folders[layout])
        return folders[layout]

    return folder_of


@pytest.mark.parametrize(
    ("saving_layout", "loading_layout"),
    [
        ("one device", "FSDP2"),
        ("one device", "DDP"),
        ("one device", "TP"),
        ("one device", "FSDP2 x TP"),
        ("DDP", "FSDP2"),
        ("DDP", "one device"),
        ("FSDP2", "one device"),
        ("FSDP2", "DDP"),
        ("FSDP2", "FSDP2, 4 ranks"),
        ("TP", "FSDP2"),
        ("FSDP2 x TP", "one device"),
        ("FSDP2, sharded file", "FSDP2 x TP"),
    ],
)
def test_every_state_comes_back_to_its_parameter(
    saved_by: Callable[[str], Path], saving_layout: str, loading_layout: str
) -> None:
    folder = saved_by(saving_layout)
    run_like_torchrun(ranks_of(loading_layout), train_awkward, loading_layout, 1, folder / FILE)
    check_same(outcome(folder / f"loaded by {loading_layout}"), outcome(folder))


def test_sharded_files_from_two_ranks_to_four_and_back(saved_by: Callable[[str], Path], tmp_path: Path) -> None:
    two, four = "FSDP2, sharded file", "FSDP2, 4 ranks, sharded file"
    folder = saved_by(two)
    run_like_torchrun(4, train_awkward, four, 1, folder / FILE, tmp_path)
    check_same(outcome(folder / f"loaded by {four}"), outcome(folder))
    run_like_torchrun(2, train_awkward, two, 2, tmp_path / FILE)
    check_same(outcome(tmp_path / f"loaded by {two}"), outcome(folder))
