"""SelectionLogger in loops under Accelerate: names and values by hand, skipped steps, resuming, refusals."""

import contextlib
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.utils.data import DataLoader

from dion2_lightning import SelectionLogger, SelectionTracker, SelectionWarning, build_optimizer
from dion2_lightning.monitoring.history import SelectionHistory
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.huggingface import make_accelerator
from tests.integrations.resume import STEPS, STOP
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
from tests.integrations.test_accelerate import loader_of
from tests.integrations.training import SETTINGS, make_model


class Tracker(GeneralTracker):
    """Keeps what it is given, by step."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> Any:
        return self.logged

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))


def tracked(**settings: Any) -> tuple[Accelerator, Tracker]:
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker, **settings)
    accelerator.init_trackers("run")
    return accelerator, tracker


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("is_prepared", [True, False])
def test_names_and_values_by_hand(parts: int, is_prepared: bool, tmp_path: Path) -> None:
    """Whether batches are accumulated or not, and the optimizer is given as it was built or as it was prepared."""
    accelerator, tracker = tracked(gradient_accumulation_steps=parts, project_dir=str(tmp_path))
    module = ByHand()
    built = optimizer_by_hand(module)
    model, optimizer = accelerator.prepare(module, built)
    seen = []
    options: dict[str, Any] = {"every": 1, "window": WINDOW, "per_matrix": True}
    with SelectionLogger(accelerator, optimizer if is_prepared else built, **options) as selection:
        for batch in DataLoader([each for each in gradients() for _ in range(parts)], batch_size=1):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            if (metrics := selection.log()) is not None:
                seen.append(metrics.overall["coverage"])
        was_attached = built.observer is selection.tracker
    assert was_attached and built.observer is None
    assert tracker.logged == [(step + 1, named(step, *EACH)) for step in range(3)]
    assert seen == [0.25, 0.25, 0.5]
    assert points(SelectionHistory.load(tmp_path / "dion2_selection.json")) == points(selection.tracker.history)


def test_interval_and_step(tmp_path: Path) -> None:
    accelerator, tracker = tracked()
    model = ByHand()
    optimizer = accelerator.prepare(optimizer_by_hand(model))
    selection = SelectionLogger(accelerator, optimizer, every=3, window=4, save_to=tmp_path / "new" / "run.json")
    for number, gradient in enumerate(gradients()):
        accelerator.backward(model(gradient)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        selection.log(step=100 + number)
    selection.close()
    (logged,) = tracker.logged
    assert logged == (102, {**named(2, *ALL)})
    assert SelectionHistory.load(tmp_path / "new" / "run.json").steps == [3]


@pytest.mark.parametrize("is_main", [True, False])
def test_the_main_process_alone_saves(is_main: bool, tmp_path: Path) -> None:
    accelerator, _ = tracked()
    model = ByHand()
    optimizer = accelerator.prepare(optimizer_by_hand(model))
    selection = SelectionLogger(accelerator, optimizer, every=1, save_to=tmp_path / "run.json")
    accelerator.backward(model(next(iter(gradients())))["loss"])
    optimizer.step()
    selection.log()
    with mock.patch.object(Accelerator, "is_main_process", is_main):
        selection.close()
    assert (tmp_path / "run.json").exists() == is_main


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("algorithm", PICTURES)
def test_pictures_are_written_and_sent(algorithm: str, tmp_path: Path) -> None:
    """When the loop ends; not after an exception, after which there is the history alone."""
    files, sent = PICTURES[algorithm]
    for fails in (False, True):
        folder = tmp_path / str(fails)
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
        accelerator.init_trackers("board")
        model = ByHand()
        optimizer = accelerator.prepare(optimizer_by_hand(model, algorithm=algorithm))
        seen = contextlib.suppress(ArithmeticError) if fails else contextlib.nullcontext()
        with seen, SelectionLogger(accelerator, optimizer, every=1, pictures=True) as selection:
            for gradient in gradients():
                accelerator.backward(model(gradient)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                metrics = selection.log()
            if fails:
                raise ArithmeticError("injected")
        accelerator.end_training()
        assert (folder / "dion2_selection.json").exists()
        assert {path.stem for path in (folder / "pictures").glob("*.png")} == (set() if fails else files)
        assert pictures_in(folder / "board") == ({} if fails else {name: [3] for name in sent})
        assert set(metrics.named()) == (OF_DION if algorithm == "dion" else {*named(0, *ALL)})


def test_steps_that_the_grad_scaler_skips_are_not_logged() -> None:
    accelerator, tracker = tracked()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = nn.Linear(8, 8)
    optimizer = accelerator.prepare(build_optimizer(model, lr=0.01))
    selection = SelectionLogger(accelerator, optimizer, every=1)
    for number in range(4):
        accelerator.backward(model(torch.ones(2, 8)).square().sum())
        if number == 1:
            model.weight.grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
        selection.log(step=number)
    assert [step for step, _ in tracker.logged] == [0, 2, 3]


def train(layout: str, folder: Path, start: int = 0) -> SelectionTracker:
    """Train from a step, with a checkpoint after ``STOP``; also the checkpoint's file is written on the way."""
    accelerator = make_accelerator(layout, project_dir=str(folder))
    model = make_model(seed=start)
    built = build_optimizer(model, **SETTINGS, strategy=accelerator)
    # Before prepare, which replaces the parameters under FSDP2.
    selection = SelectionLogger(accelerator, built, every=2, window=3)
    model, optimizer, loader = accelerator.prepare(model, built, loader_of(accelerator, STEPS))
    if start:
        accelerator.load_state(str(folder / "checkpoint"))
    for number, batch in enumerate(loader):
        if number < start:
            continue
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        selection.log()
        if number + 1 == STOP and not start:
            accelerator.save_state(str(folder / "checkpoint"))
            if accelerator.is_main_process:
                assert SelectionHistory.load(folder / "dion2_selection.json").steps == [2]
    selection.close()
    accelerator.free_memory()
    return selection.tracker


def check_resume(layout: str, folder: Path, expected: Any) -> None:
    """The metrics are those of one process, and a resumed loop has those of one that was not interrupted."""
    warnings.simplefilter("ignore", SelectionWarning)
    whole = train(layout, folder)
    if expected is not None:
        assert_same_metrics(points(whole.history), expected)
    resumed = train(layout, folder, start=STOP)
    assert points(resumed.history) == points(whole.history)
    assert torch.equal(resumed.history.shares, whole.history.shares)
    one, other = (each.state_dict()["counts"] for each in (resumed, whole))
    assert len(one) == 14
    assert all(torch.equal(one[name][entry], other[name][entry]) for name in other for entry in other[name])


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_resume(tmp_path: Path) -> None:
    check_resume("one device", tmp_path, None)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_resume_under_fsdp2(tmp_path: Path) -> None:
    expected = points(train("one device", tmp_path / "one").history)
    run_like_torchrun(2, check_resume, "FSDP2, sharded", tmp_path / "two", expected)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_new_logger_replaces_an_older_one(tmp_path: Path) -> None:
    """One that an exception left open: in checkpoints and in the file too."""
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    model = ByHand()
    built = accelerator.prepare(optimizer_by_hand(model))
    earlier, later = gradients()[:1], gradients()

    def train(selection: SelectionLogger, batches: Any) -> None:
        for gradient in batches:
            accelerator.backward(model(gradient)["loss"])
            built.step()
            built.zero_grad()
            selection.log()

    before = SelectionLogger(accelerator, built, every=1)
    train(before, earlier)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    after = SelectionLogger(accelerator, built, every=1)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert after.tracker.history.steps == [1]
    train(after, later)
    after.close()
    before.close()
    accelerator.save_state(str(tmp_path / "another"))
    assert SelectionHistory.load(tmp_path / "dion2_selection.json").steps == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_try_that_ran_out_of_memory_leaves_no_logger_in_checkpoints(tmp_path: Path) -> None:
    """As find_executable_batch_size tries again: with another model and optimizer, and the same accelerator."""
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    tries = 0

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size: int) -> None:
        nonlocal tries
        tries += 1
        accelerator.free_memory()
        model, optimizer = accelerator.prepare(model := ByHand(), optimizer_by_hand(model))
        with SelectionLogger(accelerator, optimizer, every=1) as selection:
            if tries == 1:
                raise RuntimeError("CUDA out of memory.")
            accelerator.backward(model(gradients()[0])["loss"])
            optimizer.step()
            selection.log()
            accelerator.save_state(str(tmp_path / "checkpoint"))

    train()
    assert tries == 2
    other = Accelerator(cpu=True, project_dir=tmp_path)
    model, optimizer = other.prepare(model := ByHand(), optimizer_by_hand(model))
    with SelectionLogger(other, optimizer, every=1) as selection:
        other.load_state(str(tmp_path / "checkpoint"))
        assert selection.tracker.history.steps == [1]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_loggers_that_are_replaced_in_checkpoints() -> None:
    """Those of the same optimizer, and closed ones of another that the accelerator has let go of."""
    accelerator = Accelerator(cpu=True)
    gone, live, own = (accelerator.prepare(optimizer_by_hand(ByHand())) for _ in range(3))
    loggers = [SelectionLogger(accelerator, optimizer) for optimizer in (gone, live, own)]
    for logger in loggers[:2]:
        logger.close()
    accelerator._optimizers.remove(gone)
    newest = SelectionLogger(accelerator, own)
    assert accelerator._custom_objects == [newest, loggers[1]]


def test_a_logger_that_was_replaced_or_closed_refuses_to_log() -> None:
    accelerator, built = Accelerator(cpu=True), optimizer_by_hand(ByHand())
    before = SelectionLogger(accelerator, built)
    with pytest.warns(SelectionWarning, match="SelectionLogger replaces SelectionLogger as the optimizer's observer"):
        after = SelectionLogger(accelerator, built)
    assert built.observer is after.tracker
    after.log()
    with pytest.raises(RuntimeError, match="SelectionLogger: it was closed, or another observer has replaced it"):
        before.log()
    before.close()
    assert built.observer is after.tracker
    after.close()
    assert not after.tracker.is_attached
    with pytest.raises(RuntimeError, match="SelectionLogger: it was closed"):
        after.log()


def test_a_folder_that_is_not_on_this_machine() -> None:
    """By default it is no reason to end a training."""
    accelerator = Accelerator(cpu=True, project_dir="s3://bucket")
    with pytest.warns(SelectionWarning, match="history is not saved, because save_to=True is 's3://bucket', which"):
        SelectionLogger(accelerator, optimizer_by_hand(ByHand())).close()
    with pytest.raises(ValueError, match="SelectionLogger: save_to is 's3://bucket/run', which is no local folder"):
        SelectionLogger(accelerator, optimizer_by_hand(ByHand()), save_to="s3://bucket/run")


def test_what_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    other = accelerator.prepare(torch.optim.SGD(ByHand().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"SelectionLogger: no Dion2 optimizer; found SGD\. Make it with dion2_light"):
        SelectionLogger(accelerator, other)
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        SelectionLogger(accelerator, optimizer_by_hand(ByHand()), every=0)


def test_a_dead_layer_is_named_once() -> None:
    accelerator = Accelerator(cpu=True)
    model = WithDeadLayer()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, lr=0.01))
    selection = SelectionLogger(accelerator, optimizer, every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for gradient in gradients():
            accelerator.backward(model(gradient)["loss"])
            optimizer.step()
            selection.log()
    assert_dead_layer_is_named_once(caught)
