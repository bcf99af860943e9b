"""Checkpoints that any layout can go on from: where they are, which of them are whole, and which fit a run."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LRScheduler

from dion2_lightning import SelectionLogger
from recipes.inputs import InputError
from recipes.pretraining.settings import Settings
from recipes.resuming import describe, refuse_changes

SEAL = "settings.json"
"""Written last: a folder that has it is whole."""

FREE = {
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
}
"""Settings that may change when a training goes on; all others decide what it computes."""


@dataclass(frozen=True)
class Checkpoints:
    """Everything that decides how a training goes on, to save and to load. Every rank calls its methods.

    Weights and the optimizer's state are kept by parameter names and in parts, each rank writing what it holds
    (torch.distributed.checkpoint). So a checkpoint loads on any number of ranks and under any layout; one of
    `Accelerator.save_state` does not go from FSDP to anything else or back, and lacks a tensor-parallel optimizer.
    """

    settings: Settings
    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    selection: SelectionLogger | None

    def save(self, step: int) -> None:
        """Saves a checkpoint, and removes the oldest where there are too many then."""
        folder = _folder(self.settings) / f"step-{step:08d}"
        dcp.save(self._divided_state(), checkpoint_id=folder)
        self.accelerator.save(self._common_state(), folder / "common.bin")
        torch.save(_random_state(self.accelerator.device), self._random_file(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal = {**describe(self.settings, FREE), "steps": self.settings.steps}
            (folder / SEAL).write_text(json.dumps(seal, indent=2), encoding="utf-8")
            for old in _whole(self.settings)[: -self.settings.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> int:
        """Restores the newest whole checkpoint and returns how many steps it has behind it.

        Dropout goes on with the same masks only on the number of ranks that saved it.

        Raises:
            InputError: If there is none, or it is of another training.
        """
        step, folder = _newest(self.settings)
        state = self._divided_state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        common = torch.load(folder / "common.bin", map_location="cpu", weights_only=True)
        for name, part in self._common_parts().items():
            part.load_state_dict(common[name])
        if self._random_file(folder).exists():
            _set_random_state(torch.load(self._random_file(folder), weights_only=True), self.accelerator.device)
        return step

    def _divided_state(self) -> dict[str, Any]:
        # Of the optimizer itself: Accelerate's wrapper may hold a GradScaler, which has no scale before the first step.
        weights, state = get_state_dict(self.model, self.optimizer.optimizer)
        return {"model": weights, "optimizer": state}

    def _common_parts(self) -> dict[str, Any]:
        parts = {"scheduler": self.scheduler, "selection": self.selection, "scaler": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _common_state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._common_parts().items()}

    def _random_file(self, folder: Path) -> Path:
        ranks = self.accelerator.num_processes
        return folder / f"random-{self.accelerator.process_index}-of-{ranks}.bin"


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


def _newest(settings: Settings) -> tuple[int, Path]:
    found = _whole(settings)
    if not found:
        raise InputError(f"--resume: there is no checkpoint in --output {settings.output}.")
    saved = json.loads((found[-1] / SEAL).read_text(encoding="utf-8"))
    refuse_changes(saved, describe(settings, FREE), f"the checkpoint {found[-1]}")
    step = int(found[-1].name.removeprefix("step-"))
    if step > settings.steps:
        raise InputError(f"--resume: {step} steps have been made already, --steps is {settings.steps}.")
    planned = saved["steps"]
    falls_after = planned - round(settings.decay * planned)
    if settings.steps != planned and step > falls_after:
        raise InputError(
            f"--resume --steps {settings.steps}: when {found[-1]} was saved the learning rate had begun to fall, after "
            f"step {falls_after} of {planned}, and would rise again. Give --steps {planned}, or remove the checkpoints "
            "after that step if there is one before it."
        )
    return step, found[-1]


def _folder(settings: Settings) -> Path:
    return settings.output / "checkpoints"


def _whole(settings: Settings) -> list[Path]:
    return sorted(seal.parent for seal in _folder(settings).glob(f"step-*/{SEAL}"))


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
