"""Checkpoints of a run: where they are, which of them are whole, and whether one fits the run that goes on."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from recipes.inputs import InputError
from recipes.pretraining.settings import Settings

SEAL = "training.json"
"""Written last: a folder that has it is whole. Holds what the training was asked for."""

FREE = (
    "micro_batch_size",
    "steps",
    "precision",
    "gradient_checkpointing",
    "compile",
    "tokenizing_processes",
    "output",
    "log_every",
    "log_with",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
)
"""Settings that may differ when a training goes on; all others decide what it computes."""


def save_checkpoint(accelerator: Accelerator, settings: Settings, step: int) -> None:
    """Saves everything that decides how the training goes on, and removes checkpoints that are too many."""
    folder = _folder(settings) / f"step-{step:08d}"
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / SEAL).write_text(json.dumps(_description(accelerator, settings), indent=2), encoding="utf-8")
        for old in _whole(settings)[: -settings.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, settings: Settings) -> int:
    """Restores the newest whole checkpoint and returns how many steps it has behind it.

    Raises:
        InputError: If there is none, or it is of another training.
    """
    found = _whole(settings)
    if not found:
        raise InputError(f"--resume: there is no checkpoint in --output {settings.output}.")
    step = int(found[-1].name.removeprefix("step-"))
    _check_fit(json.loads((found[-1] / SEAL).read_text(encoding="utf-8")), _description(accelerator, settings))
    if step > settings.steps:
        raise InputError(f"--resume: the newest checkpoint has {step} steps behind it, --steps is {settings.steps}.")
    accelerator.load_state(str(found[-1]))
    # A batch may have another number of parts now, and begins with its first.
    accelerator.step = 0
    return step


def refuse_old_checkpoints(settings: Settings) -> None:
    """Makes sure that a new run does not mix its checkpoints with those of another.

    Raises:
        InputError: If there are some.
    """
    if _whole(settings):
        raise InputError(
            f"--output {settings.output} holds checkpoints. Go on with --resume true, give another folder, or remove "
            f"{_folder(settings)}."
        )


def _folder(settings: Settings) -> Path:
    return settings.output / "checkpoints"


def _whole(settings: Settings) -> list[Path]:
    return sorted(seal.parent for seal in _folder(settings).glob(f"step-*/{SEAL}"))


def _description(accelerator: Accelerator, settings: Settings) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(settings).items() if name not in FREE}
    layout = "FSDP" if accelerator.is_fsdp2 else "DDP" if accelerator.num_processes > 1 else "one process"
    # Through JSON and back, as what is read will have been.
    described: dict[str, Any] = json.loads(json.dumps({**asked, "launched as": layout}))
    return described


def _check_fit(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    optimizer, wanted = saved.pop("optimizer"), asked.pop("optimizer")
    saved |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    asked |= {f"optimizer.{name}": value for name, value in wanted.items()}
    different = [name for name in asked if saved.get(name) != asked[name]]
    if different:
        changes = "; ".join(f"{name} was {saved.get(name)!r} and is {asked[name]!r}" for name in different)
        raise InputError(f"--resume: the checkpoint is of another training: {changes}.")
