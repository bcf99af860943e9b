"""Rates that are tensors, in each framework: its schedulers and loggers take them, and losses are those of floats."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from dion2_lightning import Dion2Factory, build_optimizer
from tests.integrations.conftest import fresh_accelerator_state  # noqa: F401  a fixture
from tests.integrations.lightning_training import Llama, fit
from tests.integrations.resume import unwrapped
from tests.integrations.test_accelerate import loader_of, train_on
from tests.integrations.test_trainer import arguments, make_trainer
from tests.integrations.training import SETTINGS, make_model

RATES = ("lr", "adamw_lr", "momentum", "weight_decay")
STEPS = 4


def settings_of(*, tensors: bool) -> dict[str, Any]:
    """The common settings, with rates that float32 has."""
    rates = {name: torch.tensor(SETTINGS[name]) for name in RATES}
    if tensors:
        return {**SETTINGS, **rates, "capturable": True}
    return {**SETTINGS, **{name: value.item() for name, value in rates.items()}}


def halved(step: int) -> float:
    return 2.0**-step


def assert_filled(optimizer: Any, settings: dict[str, Any]) -> None:
    """The tensors that the optimizer was given are those that it has, and were changed."""
    groups = unwrapped(optimizer).param_groups
    assert groups[0]["lr"] is settings["lr"]
    assert all(isinstance(group["lr"], Tensor) for group in groups)
    assert 0 < settings["lr"] < SETTINGS["lr"]


class Halved(Llama):
    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, **self.settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, halved), "interval": "step"}}


def test_lightning(tmp_path: Path) -> None:
    losses = []
    for tensors in (True, False):
        settings = settings_of(tensors=tensors)
        logger = CSVLogger(tmp_path, name=str(tensors))
        module, trainer = fit(
            "one device",
            module_class=Halved,
            steps=STEPS,
            settings=settings,
            logger=logger,
            log_every_n_steps=1,
            callbacks=[LearningRateMonitor("step")],
        )
        losses.append(module.losses)
        if tensors:
            assert_filled(trainer.optimizers[0], settings)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rates = [float(row["lr-Dion2/dion2"]) for row in csv.DictReader(file)]
        assert rates == pytest.approx([SETTINGS["lr"] * halved(step) for step in range(STEPS)])
    assert losses[0] == losses[1]


def test_accelerate() -> None:
    losses = []
    for tensors in (True, False):
        settings = settings_of(tensors=tensors)
        accelerator = Accelerator(cpu=True)
        model = make_model()
        optimizer = build_optimizer(model, **settings, strategy=accelerator)
        model, optimizer, scheduler, loader = accelerator.prepare(
            model, optimizer, LambdaLR(optimizer, halved), loader_of(accelerator, STEPS)
        )
        losses.append(train_on(accelerator, loader, model, optimizer, scheduler))
        if tensors:
            assert_filled(optimizer, settings)
        assert float(scheduler.get_last_lr()[0]) == pytest.approx(SETTINGS["lr"] * halved(STEPS))
    assert losses[0] == losses[1]


def test_the_trainer(tmp_path: Path) -> None:
    """Its schedule is not one of halves, so that float32 rates are rounded."""
    losses = []
    for tensors in (True, False):
        settings = settings_of(tensors=tensors)
        args = arguments(tmp_path, steps=STEPS, lr_scheduler_type="linear")
        trainer = make_trainer(args, make_model(), (Dion2Factory, settings))
        trainer.train()
        losses.append(trainer.losses)
        if tensors:
            groups = unwrapped(trainer.optimizer).param_groups
            assert all(isinstance(group["lr"], Tensor) and group["lr"] == 0 for group in groups)
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert {type(rate) for rate in rates} == {float}
        assert rates == pytest.approx([SETTINGS["lr"] * (1 - step / STEPS) for step in range(STEPS)], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_distributed_checkpoint(tmp_path: Path) -> None:
    """It makes an optimizer create its state by a step with rates of its own, and reads into tensors that are there."""
    saved, settings = make_model(), settings_of(tensors=True)
    optimizer = build_optimizer(saved, **settings)
    saved(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    settings["lr"].fill_(0.125)
    dcp.save({"optimizer": get_optimizer_state_dict(saved, optimizer)}, checkpoint_id=tmp_path)
    model, others = make_model(), settings_of(tensors=True)
    resumed = build_optimizer(model, **others)
    state = {"optimizer": get_optimizer_state_dict(model, resumed)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, resumed, state["optimizer"])
    assert resumed.param_groups[0]["lr"] is others["lr"]
    assert others["lr"] == 0.125
    for parameter, its_twin in zip(model.parameters(), saved.parameters(), strict=True):
        for name, value in optimizer.state[its_twin].items():
            assert torch.equal(resumed.state[parameter][name], value)
