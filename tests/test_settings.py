"""The settings object: the same arguments as the factory's, from Python, a command line, YAML and a checkpoint."""

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dion2_lightning import OptimizerSettings, build_optimizer
from dion2_lightning.algorithms import ALGORITHMS, CHOICES
from dion2_lightning.algorithms.learning_rates import ADJUST_LR_FN
from dion2_lightning.routing.router import LORA_ROLES


def test_arguments_and_defaults_are_those_of_build_optimizer() -> None:
    arguments = dict(inspect.signature(build_optimizer).parameters)
    for name in ("model", "strategy", "orthonormalize"):  # no plain data
        del arguments[name]
    fields = {field.name: field.default for field in dataclasses.fields(OptimizerSettings)}
    assert list(fields) == list(arguments)
    assert fields == {name: arguments[name].default for name in fields}


def test_choices_are_those_that_are_taken() -> None:
    hints = get_type_hints(OptimizerSettings)

    def choices(name: str) -> set[Any]:
        parts = [part for part in get_args(hints[name]) if part is not type(None)]
        return set(get_args(parts[0])) if len(parts) == 1 else set(parts)

    assert choices("algorithm") == set(CHOICES)
    assert choices("lora") == set(LORA_ROLES)
    assert choices("adjust_lr_fn") == {name for name in ADJUST_LR_FN if name is not None}


def test_a_setting_of_several_algorithms_is_the_same_in_all() -> None:
    """Else one of them would take the default and the check of another, where settings stand together."""
    seen: dict[str, tuple[Any, ...]] = {}
    for algorithm in ALGORITHMS.values():
        hints = get_type_hints(algorithm.settings)
        for each in dataclasses.fields(algorithm.settings):
            said = (hints[each.name], each.default, *each.metadata.values())
            assert seen.setdefault(each.name, said) == said


def test_every_setting_is_described() -> None:
    described = inspect.getdoc(OptimizerSettings)
    assert described is not None
    assert all(f"\n    {field.name}: " in described for field in dataclasses.fields(OptimizerSettings))


def test_build_passes_everything_on() -> None:
    def orthonormalize(matrices: Tensor) -> Tensor:
        return matrices

    settings = OptimizerSettings(lr=0.1, fraction=0.5, adamw_lr=0.2, overrides={"1.weight": "adamw"}, lora="B")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = settings.build(model, orthonormalize=orthonormalize)
    matrices = optimizer.param_groups[0]
    assert (matrices["algorithm"], matrices["lr"], matrices["fraction"]) == ("dion2", 0.1, 0.5)
    assert {group["lr"] for group in optimizer.param_groups[1:]} == {0.2}
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert optimizer.orthonormalize is orthonormalize
    with pytest.raises(TypeError, match="strategy must be"):
        settings.build(model, strategy="ddp")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": "1e-3"}, TypeError, "^lr must be a number, got the str '1e-3'"),  # as plain YAML reads it
        ({"fraction": 2.0}, ValueError, r"^fraction must lie in \(0, 1\], got 2"),
        (
            {"algorithm": "sgd"},
            ValueError,
            "^algorithm must be one of 'dion2', 'dion3', 'dion', 'muon', 'normuon', 'adamw', got 'sgd'",
        ),
        ({"adamw_lr": -1.0}, ValueError, "^adamw_lr must be at least 0"),
        ({"lora": "A"}, ValueError, "^lora must be one of"),
        ({"betas": (0.9, 1.0)}, ValueError, "^betas"),
        ({"share_replicas": "yes"}, TypeError, "^share_replicas"),
        ({"overrides": ["*.bias"]}, TypeError, "^overrides must be a mapping from patterns of names, got list"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    """As build_optimizer refuses them, but where they are written."""
    with pytest.raises(error, match=message):
        OptimizerSettings(**settings)
    with pytest.raises(error, match=message):
        build_optimizer(nn.Linear(4, 4), **{"lr": 0.1, **settings})


class Model(L.LightningModule):
    """A model.

    Args:
        optimizer: How to train it.
        width: Of its layer.
    """

    def __init__(self, optimizer: OptimizerSettings, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.settings = optimizer
        self.layer = nn.Linear(width, width)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.settings.build(self)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(4, 8), batch_size=2)


QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns of them."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def run_cli(*arguments: str) -> LightningCLI:
    return LightningCLI(Model, args=list(arguments), run=False, save_config_callback=None, trainer_defaults=QUIET)


def test_command_line() -> None:
    cli = run_cli(
        "--model.optimizer.lr=1e-3",
        "--model.optimizer.fraction=0.5",
        "--model.optimizer.betas=[0.8,0.9]",
        "--model.optimizer.state_dtype=bfloat16",
        '--model.optimizer.overrides={"*.bias": {"lr": 0.5}}',
    )
    cli.trainer.fit(cli.model)
    groups = {name: g for g in cli.trainer.optimizers[0].param_groups for name in g["param_names"]}
    weight, bias = groups["layer.weight"], groups["layer.bias"]
    assert (weight["lr"], weight["fraction"]) == (1e-3, 0.5)
    assert tuple(bias["betas"]) == (0.8, 0.9)
    assert (weight["state_dtype"], bias["lr"]) == ("bfloat16", 0.5)


def test_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n  optimizer:\n    fraction: 0.5\n    overrides: {layer.weight: adamw}\n    adamw_lr: null\n"
    )
    cli = run_cli(f"--config={config}", "--model.optimizer.weight_decay=0.3")
    assert cli.model.settings == OptimizerSettings(fraction=0.5, overrides={"layer.weight": "adamw"}, weight_decay=0.3)


@pytest.mark.parametrize(
    "argument", ["--model.optimizer.fration=0.5", "--model.optimizer.algorithm=sgd", "--model.optimizer.lr=fast"]
)
def test_wrong_arguments_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(argument)
    assert argument.split("=")[0].rpartition(".")[2] in capsys.readouterr().err


def test_help_comes_from_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Learning rate of the groups that have none of their own" in shown
    assert "--model.optimizer.algorithm {dion2,dion3,dion,muon,normuon,adamw}" in shown


@pytest.mark.parametrize("by_cli", [True, False], ids=["CLI", "Python"])
def test_a_checkpoint_with_settings_among_its_hyperparameters(tmp_path: Path, by_cli: bool) -> None:
    """It loads with weights_only=True, in the Trainer and by load_from_checkpoint."""
    if by_cli:
        cli = run_cli("--model.optimizer.lr=0.5")
        model, trainer = cli.model, cli.trainer
    else:
        model, trainer = Model(OptimizerSettings(lr=0.5)), L.Trainer(**QUIET)
    trainer.fit(model)
    path = tmp_path / "checkpoint.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    loaded = Model.load_from_checkpoint(path, weights_only=True)
    assert loaded.settings == OptimizerSettings(lr=0.5)
    again = L.Trainer(**{**QUIET, "max_epochs": 2})
    again.fit(Model(OptimizerSettings(lr=0.1)), ckpt_path=path, weights_only=True)
    assert again.global_step == 4
    assert again.optimizers[0].param_groups[0]["lr"] == 0.5  # of the checkpoint, as with every optimizer
