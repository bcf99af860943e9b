"""SelectionMonitor in real fits: names, values and steps by hand, every strategy, resuming, and what is refused."""

import csv
import inspect
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dion2_lightning import (
    Dion2,
    NamedOptimizerStates,
    SelectionCallback,
    SelectionLogger,
    SelectionMonitor,
    SelectionTracker,
    SelectionWarning,
    build_optimizer,
)
from dion2_lightning.monitoring.history import SelectionHistory
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.lightning_training import fit, make_trainer, ranks_of
from tests.integrations.selection import (
    ALL,
    EACH,
    OF_DION,
    PICTURES,
    WINDOW,
    ByHand,
    WithDeadLayer,
    assert_dead_layer_is_named_once,
    assert_same_metrics,
    gradients,
    named,
    optimizer_by_hand,
    pictures_in,
    points,
)
from tests.integrations.test_lightning_checkpoints import FILE, Saving
from tests.integrations.test_lightning_training import InjectInf, Pair, ScaledFloat32

STEPS = 8


class Module(L.LightningModule):
    """Takes a model's loss on batches of ``gradients``, each of them ``parts`` times."""

    def __init__(self, model: nn.Module | None = None, parts: int = 1, **group: Any) -> None:
        super().__init__()
        self.group = group
        self.model = ByHand() if model is None else model
        self.parts = parts

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(batch)["loss"]
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if isinstance(self.model, ByHand):
            return optimizer_by_hand(self.model, **self.group)
        return build_optimizer(self, lr=0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([each for each in gradients() for _ in range(self.parts)], batch_size=1)


def rows_of(logger: CSVLogger) -> dict[int, dict[str, float]]:
    """What a logger has written of the selection, by step; each name once a step."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("dion2/") and value:
                    assert name not in found[int(row["step"])], "logged twice"
                    found[int(row["step"])][name] = float(value)
    return dict(found)


def fit_by_hand(monitor: SelectionMonitor, parts: int = 1, algorithm: str = "dion2", **arguments: Any) -> L.Trainer:
    trainer = make_trainer("one device", 3, **{"gradient_clip_val": None, "log_every_n_steps": 1, **arguments})
    trainer.callbacks = [monitor, *trainer.callbacks]
    trainer.fit(Module(parts=parts, algorithm=algorithm))
    return trainer


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_names_and_values_by_hand(tmp_path: Path) -> None:
    """In two loggers, on the steps of the loss, and in callback_metrics, which choose the best checkpoint here."""
    loggers = [CSVLogger(tmp_path, "one"), CSVLogger(tmp_path, "other")]
    monitor = SelectionMonitor(window=WINDOW, per_matrix=True)
    best = ModelCheckpoint(
        tmp_path, "best", monitor="dion2/coverage", mode="max", every_n_train_steps=1, enable_version_counter=False
    )
    trainer = fit_by_hand(monitor, logger=loggers, callbacks=[best], enable_checkpointing=True)
    for logger in loggers:
        assert rows_of(logger) == {step: named(step, *EACH) for step in range(3)}
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["loss"]] == [0, 1, 2]
    selection = {name: value.item() for name, value in trainer.callback_metrics.items() if "dion2" in name}
    assert selection == named(2, *EACH)
    assert best.best_model_score == 0.5
    assert monitor.metrics.named(per_matrix=True) == named(2, *EACH)
    saved = SelectionHistory.load(Path(loggers[0].log_dir) / "dion2_selection.json")
    assert points(saved) == points(monitor.tracker.history)
    assert [point["coverage"] for point in saved.overall] == [0.25, 0.25, 0.5]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("algorithm", PICTURES)
def test_pictures_are_written_and_sent(algorithm: str, tmp_path: Path) -> None:
    """To the loggers that take images, and beside the history; metrics and progress bar are those of the algorithm."""
    board, csv = (
        TensorBoardLogger(tmp_path / "board", name="", version=""),
        CSVLogger(tmp_path / "csv", name="", version=""),
    )
    monitor = SelectionMonitor(every=1, pictures=True, save_to=tmp_path / "selection.json")
    trainer = fit_by_hand(monitor, algorithm=algorithm, logger=[csv, board])
    files, sent = PICTURES[algorithm]
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == files
    assert pictures_in(tmp_path / "board") == {name: [2] for name in sent}, "the step of the last metrics"
    assert [set(rows_of(csv)[step]) for step in range(3)] == 3 * [OF_DION if algorithm == "dion" else {*named(0, *ALL)}]
    shown = "captured_energy" if algorithm == "dion" else "coverage"
    assert trainer.progress_bar_metrics[shown] == monitor.metrics.overall[shown]


def test_pictures_without_a_place_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(
        SelectionWarning, match="SelectionMonitor: no pictures were made, because the history has no file"
    ):
        fit_by_hand(SelectionMonitor(every=1, pictures=True, save_to=False), logger=CSVLogger(tmp_path))


def test_accumulated_batches_are_logged_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = SelectionMonitor(window=WINDOW)
    fit_by_hand(monitor, parts=2, logger=logger, accumulate_grad_batches=2)
    assert rows_of(logger) == {step: named(step, *ALL) for step in range(3)}


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_intervals(tmp_path: Path) -> None:
    """The Trainer's own, and another."""
    every_two, every_three = CSVLogger(tmp_path, "two"), CSVLogger(tmp_path, "three")
    fit_by_hand(SelectionMonitor(window=WINDOW), logger=every_two, log_every_n_steps=2)
    fit_by_hand(SelectionMonitor(window=WINDOW, every=3), logger=every_three, log_every_n_steps=2)
    assert rows_of(every_two) == {1: named(1, *ALL)}
    assert rows_of(every_three) == {2: named(2, *ALL)}


def test_steps_that_the_grad_scaler_skips_are_not_logged(tmp_path: Path) -> None:
    """The fourth of eight is skipped; the metrics stay on the steps of the Trainer."""
    plugin = ScaledFloat32("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    logger, monitor = CSVLogger(tmp_path), SelectionMonitor()
    callbacks = [InjectInf(step=3), monitor]
    fit("one device", steps=8, plugins=[plugin], callbacks=callbacks, logger=logger, log_every_n_steps=2)
    assert plugin.scaler.get_scale() == 2.0
    assert list(rows_of(logger)) == [1, 5, 7]
    assert monitor.tracker.history.steps == [2, 5, 7]


class EveryOther(Pair):
    """Steps its first optimizer at even batches alone, and is not due at these where the interval is even."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers()[0], torch.optim.SGD(self.other.parameters(), lr=0.1)]


def test_steps_that_batches_do_not_take_are_logged_at_the_next(tmp_path: Path) -> None:
    """Under manual optimization a batch may take no step, and what is due then is due at the next one."""
    logger, monitor = CSVLogger(tmp_path), SelectionMonitor()
    callbacks = [NamedOptimizerStates(), monitor]
    arguments = {"gradient_clip_val": None, "callbacks": callbacks, "logger": logger, "log_every_n_steps": 2}
    make_trainer("one device", -1, max_epochs=2, **arguments).fit(EveryOther())
    assert monitor.tracker.step == 4
    assert monitor.tracker.history.steps == [2, 3, 4]
    assert list(rows_of(logger)) == [2, 3, 5]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_the_progress_bars_show_coverage(capfd: pytest.CaptureFixture[str]) -> None:
    for bar in (TQDMProgressBar(), RichProgressBar(leave=True)):
        for progress in (True, False):
            monitor = SelectionMonitor(window=WINDOW, every=3, progress=progress)
            fit_by_hand(monitor, callbacks=[bar], enable_progress_bar=True)
            shown = "".join(capfd.readouterr())
            assert ("coverage=0.5" in shown or "coverage: 0.5" in shown) == progress, (bar, shown)


# Where the history goes


class OneFolder(Logger):
    """A logger with one folder for all runs, as W&B's: runs differ in their versions."""

    name, version, save_dir = "runs", 7, ""

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_the_history_lies_where_lightning_keeps_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One run does not replace the file of another, and the log says where it is."""
    logger = OneFolder()
    logger.save_dir = str(tmp_path)
    checkpoints = ModelCheckpoint(save_last=True)
    caplog.set_level("INFO", "lightning.pytorch")
    fit_by_hand(SelectionMonitor(), logger=logger, callbacks=[checkpoints], enable_checkpointing=True)
    file = tmp_path / "runs" / "version_7" / "dion2_selection.json"
    assert Path(checkpoints.last_model_path).parents[1] == file.parent
    assert file.exists()
    said = [record.message for record in caplog.records if "history of the selection" in record.message]
    assert said == [f"SelectionMonitor: the history of the selection is in {file}"]


def test_a_remote_folder_does_not_end_the_training() -> None:
    logger = OneFolder()
    logger.save_dir = "s3://bucket"
    with pytest.warns(SelectionWarning, match="not saved, because save_to=True is 's3://bucket/runs/version_7', whi"):
        trainer = fit_by_hand(SelectionMonitor(), logger=logger)
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_fast_dev_run_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = SelectionMonitor(every=1)
    fit_by_hand(monitor, fast_dev_run=3, logger=True)
    assert len(monitor.tracker.history) == 3
    assert list(tmp_path.iterdir()) == []


# Strategies


def fit_llama(layout: str, **arguments: Any) -> tuple[SelectionMonitor, L.Trainer]:
    monitor = SelectionMonitor(window=3, orthogonality=True)
    _, trainer = fit(layout, steps=STEPS, log_every_n_steps=2, **{"callbacks": [monitor], **arguments})
    return monitor, trainer


def check_metrics(layout: str, expected: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelectionWarning)
        monitor, trainer = fit_llama(layout)
    assert_same_metrics(points(monitor.tracker.history), expected)
    # Every rank has them, so that what follows from them is decided alike.
    assert trainer.callback_metrics["dion2/coverage"].item() == pytest.approx(expected[-1][1]["coverage"])


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_metrics_are_the_same_under_every_strategy() -> None:
    expected = points(fit_llama("one device")[0].tracker.history)
    for layout in ("DDP", "FSDP2"):
        run_like_torchrun(ranks_of(layout), check_metrics, layout, expected)


# Resuming


def check_resume(layout: str, folder: Path) -> None:
    """A fit that is resumed by new objects has the metrics of one that was not interrupted, bit for bit."""
    warnings.simplefilter("ignore", SelectionWarning)
    whole = SelectionMonitor(window=3, save_to=folder / "whole.json")
    file = folder / "resumed" / "statistics.json"
    arguments: dict[str, Any] = {"steps": STEPS, "log_every_n_steps": 2}
    fit(layout, callbacks=[whole, Saving(folder)], **arguments)
    resumed = SelectionMonitor(window=3, save_to=file)
    _, trainer = fit(layout, seed=1, checkpoint=folder / FILE, callbacks=[resumed], **arguments)
    assert points(resumed.tracker.history) == points(whole.tracker.history)
    assert resumed.tracker.step == STEPS
    one, other = resumed.tracker.state_dict(), whole.tracker.state_dict()
    assert torch.equal(one["history"]["shares"], other["history"]["shares"])
    assert len(one["counts"]) == 14
    for name, counts in other["counts"].items():
        assert all(torch.equal(one["counts"][name][entry], value) for entry, value in counts.items())
    if trainer.is_global_zero:
        assert points(SelectionHistory.load(file)) == points(whole.tracker.history)


@pytest.mark.parametrize("layout", ["one device", "DDP", "FSDP2", "FSDP2, sharded file"])
def test_resume(layout: str, tmp_path: Path) -> None:
    run_like_torchrun(ranks_of(layout), check_resume, layout, tmp_path)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_the_optimizers_state_holds_none_of_it(tmp_path: Path) -> None:
    monitor = SelectionMonitor(save_to=tmp_path)
    _, trainer = fit("one device", steps=2, callbacks=[monitor], log_every_n_steps=1)
    trainer.save_checkpoint(tmp_path / FILE)
    checkpoint = torch.load(tmp_path / FILE, weights_only=True)
    assert checkpoint["callbacks"]["SelectionMonitor"]["step"] == 2
    entries = {entry for state in checkpoint["optimizer_states"][0]["state"].values() for entry in state}
    assert entries == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    assert (tmp_path / "dion2_selection.json").exists()


# Attaching


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_another_fit_starts_new_metrics_and_one_without_the_monitor_computes_none() -> None:
    monitor = SelectionMonitor(window=WINDOW)
    for _ in range(2):
        trainer = fit_by_hand(monitor)
        assert monitor.tracker.step == 3
        assert monitor.metrics.named() == named(2, *ALL)
        assert trainer.optimizers[0].observer is None


class Fails(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        assert trainer.optimizers[0].observer is not None
        raise ArithmeticError("injected")


def test_it_is_detached_after_an_exception() -> None:
    trainer = make_trainer("one device", 3, gradient_clip_val=None, callbacks=[SelectionMonitor(), Fails()])
    with pytest.raises(ArithmeticError, match="injected"):
        trainer.fit(Module())
    assert trainer.optimizers[0].observer is None


class FailsAgain(L.Callback):
    def on_exception(self, *_: Any) -> None:
        raise ArithmeticError("and once more")


class WithItsOptimizer(Module):
    """Trains with one optimizer in every fit."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = optimizer_by_hand(self.model)

    def configure_optimizers(self) -> Any:
        return self.optimizer


def test_another_monitor_replaces_one_that_was_left_attached() -> None:
    """An error in a callback's on_exception keeps later callbacks from detaching."""
    module, monitor, other = WithItsOptimizer(), SelectionMonitor(), SelectionMonitor(every=1)
    optimizer = module.optimizer
    arguments: dict[str, Any] = {"gradient_clip_val": None, "enable_progress_bar": False}
    trainer = make_trainer("one device", 3, callbacks=[FailsAgain(), monitor, Fails()], **arguments)
    with pytest.raises(ArithmeticError, match="and once more"):
        trainer.fit(module)
    assert optimizer.observer is monitor.tracker
    make_trainer("one device", 3, callbacks=[other], **arguments).fit(module)
    assert (monitor.tracker.step, other.tracker.step) == (1, 3)


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    """Lightning's wrapper is an instance of the optimizer's class; attributes set on it do not reach the optimizer."""
    optimizer = optimizer_by_hand(ByHand())
    wrapper = LightningOptimizer(optimizer)
    assert isinstance(wrapper, Dion2)
    tracker = SelectionTracker()
    tracker.attach(wrapper)
    assert optimizer.observer is tracker


class WithAdamW(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class AsControl(Module):
    def configure_optimizers(self) -> Any:
        return build_optimizer(self, lr=0.01, algorithm="adamw")


class Second(SelectionMonitor):
    """Lightning itself refuses two callbacks of one class that have a state."""


def test_what_is_refused() -> None:
    trainer = make_trainer("one device", 3, callbacks=[SelectionMonitor()])
    with pytest.raises(ValueError, match=r"SelectionMonitor: no Dion2 optimizer; found AdamW\. Make it with dion2_"):
        trainer.fit(WithAdamW())
    trainer = make_trainer("one device", 3, gradient_clip_val=None, callbacks=[SelectionMonitor()])
    with pytest.raises(ValueError, match="SelectionMonitor: tracks one Dion2 optimizer, found 2; leave it out"):
        trainer.fit(Pair())
    trainer = make_trainer("one device", 3, log_every_n_steps=0, callbacks=[SelectionMonitor()])
    with pytest.raises(ValueError, match="every=None follows the Trainer, whose log_every_n_steps is 0; pass every="):
        trainer.fit(Module())
    trainer = make_trainer("one device", 3, callbacks=[SelectionMonitor(save_to="s3://bucket/run")])
    with pytest.raises(ValueError, match="save_to is 's3://bucket/run', which is no local folder"):
        trainer.fit(Module())


@pytest.mark.parametrize(("place", "why"), [("file", "is a file"), ("file/a", "is a file"), ("a.json", "is a folder")])
def test_a_place_that_cannot_be_saved_to_is_refused_before_the_training(place: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.json").mkdir()
    trainer = make_trainer("one device", 3, callbacks=[SelectionMonitor(save_to=tmp_path / place)])
    with pytest.raises(ValueError, match=f"SelectionMonitor: save_to: the history cannot be saved as .*{why}"):
        trainer.fit(Module())
    assert trainer.global_step == 0


def test_the_last_of_two_monitors_records() -> None:
    first, second = SelectionMonitor(), Second(every=1)
    trainer = make_trainer("one device", 3, gradient_clip_val=None, callbacks=[first, second])
    with pytest.warns(SelectionWarning, match="Second replaces SelectionMonitor as the optimizer's observer"):
        trainer.fit(Module())
    assert (first.tracker.step, second.tracker.step) == (0, 3)
    assert first.metrics is None and second.metrics is not None


def test_the_control_without_matrices_has_nothing_to_show() -> None:
    monitor = SelectionMonitor()
    with pytest.warns(SelectionWarning, match="SelectionMonitor: no algorithm of the optimizer has metrics"):
        make_trainer("one device", 3, callbacks=[monitor]).fit(AsControl(WithDeadLayer()))
    assert monitor.metrics is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1 step, got 0"),
        ({"every": "10"}, TypeError, "every must be a whole number of steps, got '10'"),
        ({"window": 0}, ValueError, "window must be at least 1 step, got 0"),
        ({"per_matrix": 1}, TypeError, "per_matrix must be True or False, got 1"),
        ({"orthogonality": None}, TypeError, "orthogonality must be True or False, got None"),
        ({"save_to": None}, TypeError, "save_to must be a folder, a file, True or False, got None"),
        ({"progress": "tqdm"}, TypeError, "progress must be True or False, got 'tqdm'"),
        ({"pictures": "all"}, TypeError, "pictures must be True or False, got 'all'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SelectionMonitor(**arguments)


@pytest.mark.parametrize("callback", [SelectionMonitor, SelectionCallback, SelectionLogger])
def test_every_argument_is_in_signature_and_docstring(callback: type) -> None:
    arguments = list(inspect.signature(callback).parameters)
    assert {"every", "window", "per_matrix", "orthogonality", "save_to", "pictures"} <= set(arguments)
    described = inspect.getdoc(callback) or ""
    assert [name for name in arguments if f"    {name}: " not in described] == []


def test_configuration_files_set_the_arguments() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    options = ["--callback=dion2_lightning.SelectionMonitor", "--callback.every=5", "--callback.save_to=folder"]
    arguments = parser.parse_args(options).callback.init_args
    assert (arguments.every, arguments.save_to, arguments.window) == (5, "folder", 100)


def test_a_dead_layer_is_named_once() -> None:
    trainer = make_trainer("one device", 3, log_every_n_steps=1, callbacks=[SelectionMonitor()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Module(WithDeadLayer()))
    assert_dead_layer_is_named_once(caught, "model.dead.weight")
