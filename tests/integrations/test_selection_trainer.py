"""SelectionCallback in the Trainer: names and values by hand in every report, every layout, resuming, refusals."""

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from dion2_lightning import Dion2Factory, SelectionCallback, SelectionWarning
from dion2_lightning.monitoring.history import BINS, SelectionHistory
from dion2_lightning.monitoring.metrics import MEANINGS
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.huggingface import fsdp2_on_cpu
from tests.integrations.resume import STOP, unwrapped
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
from tests.integrations.test_trainer import FSDP, InOrder, arguments, make_trainer
from tests.integrations.test_trainer_distributed_config import make_mixture
from tests.integrations.training import SETTINGS, make_model
from tests.selection_histories import llama

STEPS = 8
SMOLLM2_SLICES = [576, 192, 192, 576, 576, 576, 576]
"""Of q, k, v, o, gate, up and down."""


class Recorder(TrainerCallback):
    """A reporter: keeps what it is given, by step."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append((state.global_step, {name: value for name, value in logs.items() if "dion2" in name}))


def trainer_by_hand(
    folder: Path, callbacks: list[TrainerCallback], parts: int = 1, algorithm: str = "dion2", **settings: Any
) -> Trainer:
    model = ByHand()
    chosen = {"per_device_train_batch_size": 1, "max_grad_norm": 0.0, **settings}
    trainer = InOrder(
        model,
        arguments(folder, steps=3, **chosen),
        train_dataset=[{"gradient": each} for each in gradients() for _ in range(parts)],
        optimizers=(optimizer_by_hand(model, algorithm=algorithm), None),
        callbacks=callbacks,
    )
    trainer.losses = []
    return trainer


def selection_of(entries: list[dict[str, float]]) -> list[tuple[float, dict[str, float]]]:
    """What entries of a log say of the selection, with their steps."""
    found = [(each["step"], {name: value for name, value in each.items() if "dion2" in name}) for each in entries]
    return [(step, metrics) for step, metrics in found if metrics]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_names_and_values_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the history, in TensorBoard, and in callbacks that stand before and behind it; beside the loss."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    before, behind = Recorder(), Recorder()
    callback = SelectionCallback(window=WINDOW, per_matrix=True)
    trainer = trainer_by_hand(tmp_path, [before, callback, behind], report_to=["tensorboard"])
    trainer.train()
    expected = [(step + 1, named(step, *EACH)) for step in range(3)]
    assert selection_of(trainer.state.log_history) == expected
    assert all("loss" in entry for entry in trainer.state.log_history[:3])
    for recorder in (before, behind):
        assert [entry for entry in recorder.logged if entry[1]] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in named(0, *EACH):
        scalars = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/{name}")]
        assert scalars == [(step, pytest.approx(metrics[name].expected)) for step, metrics in expected]
    assert callback.metrics.named(per_matrix=True) == named(2, *EACH)
    saved = SelectionHistory.load(tmp_path / "dion2_selection.json")
    assert points(saved) == points(callback.tracker.history)
    assert len(saved) == 3
    assert unwrapped(trainer.optimizer).observer is None


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("algorithm", PICTURES)
def test_pictures_are_written_and_sent(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the metrics of the algorithm."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    callback = SelectionCallback(pictures=True)
    trainer = trainer_by_hand(tmp_path, [callback], algorithm=algorithm, report_to=["tensorboard"], disable_tqdm=False)
    trainer.train()
    files, sent = PICTURES[algorithm]
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == files
    assert pictures_in(tmp_path / "tensorboard") == {name: [3] for name in sent}
    expected = OF_DION if algorithm == "dion" else {*named(0, *ALL)}
    assert [set(metrics) for _, metrics in selection_of(trainer.state.log_history)] == 3 * [expected]


class Quiet(TrainerCallback):
    """Decides that some steps are not logged."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log &= state.global_step not in self.steps


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("quiet", [2, 3])
def test_metrics_of_a_step_that_is_not_logged_are_in_the_history_alone(quiet: int, tmp_path: Path) -> None:
    """Not with the loss of the next step, and not in the summary, which is logged at the last step."""
    callback, reporter = SelectionCallback(window=WINDOW), Recorder()
    trainer = trainer_by_hand(tmp_path, [callback, Quiet(quiet), reporter])
    trainer.train()
    expected = [(step, named(step - 1, *ALL)) for step in (1, 2, 3) if step != quiet]
    assert selection_of(trainer.state.log_history) == expected
    assert [entry for entry in reporter.logged if entry[1]] == expected
    assert callback.tracker.history.steps == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_accumulated_batches_are_logged_once(tmp_path: Path) -> None:
    trainer = trainer_by_hand(tmp_path, [SelectionCallback(window=WINDOW)], parts=2, gradient_accumulation_steps=2)
    trainer.train()
    assert selection_of(trainer.state.log_history) == [(step + 1, named(step, *ALL)) for step in range(3)]


def test_intervals(tmp_path: Path) -> None:
    """The Trainer's own, the first step included or not, and another, at which the loss is then logged too."""
    for settings, every, steps in (
        ({"logging_steps": 2}, None, [2]),
        ({"logging_steps": 2, "logging_first_step": True}, None, [1, 2]),
        ({"logging_steps": 100}, 3, [3]),
        ({"logging_strategy": "epoch"}, 2, [2]),
        ({"logging_strategy": "no"}, 2, [2]),
    ):
        trainer = trainer_by_hand(tmp_path, [SelectionCallback(window=WINDOW, every=every)], **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SelectionWarning)
            trainer.train()
        entries = trainer.state.log_history
        assert selection_of(entries) == [(step, named(step - 1, *ALL)) for step in steps]
        assert [entry["step"] for entry in entries if "dion2/coverage" in entry and "loss" in entry] == steps


class InjectInf(TrainerCallback):
    """Makes a gradient infinite at one step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            model.lm_head.weight.grad[0, 0] = torch.inf


def test_steps_that_the_grad_scaler_skips_are_not_logged(tmp_path: Path) -> None:
    callback = SelectionCallback()
    trainer = make_trainer(arguments(tmp_path, steps=STEPS, logging_steps=2), make_model(), callbacks=[callback])
    trainer.add_callback(InjectInf())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0
    assert [step for step, _ in selection_of(trainer.state.log_history)] == [2, 6, 8]
    assert callback.tracker.history.steps == [2, 5, 7]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_the_progress_bar_shows_coverage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        callback = SelectionCallback(window=WINDOW, every=3, progress=progress)
        trainer_by_hand(tmp_path, [callback], disable_tqdm=False).train()
        shown = "".join(capfd.readouterr())
        assert ("coverage=0.5" in shown) == progress
        assert ("loss=" in shown) == progress


# Layouts


def train_llama(
    folder: Path, ranks: int = 1, checkpoint: Path | None = None, **settings: Any
) -> tuple[SelectionCallback, InOrder]:
    callback = SelectionCallback(window=3, orthogonality=True)
    args = arguments(folder, ranks, STEPS, **{"logging_steps": 2, "lr_scheduler_type": "linear", **settings})
    trainer = make_trainer(args, make_model(seed=0 if checkpoint is None else 1), callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return callback, trainer


def check_fsdp2(folder: Path, expected: Any) -> None:
    warnings.simplefilter("ignore", SelectionWarning)
    fsdp2_on_cpu()
    callback, trainer = train_llama(folder, 2, fsdp=True, fsdp_config=FSDP)
    assert_same_metrics(points(callback.tracker.history), expected)
    logged = [metrics["dion2/coverage"] for _, metrics in selection_of(trainer.state.log_history)]
    assert logged == [point[1]["coverage"] for point in expected]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_metrics_under_fsdp2_are_those_of_one_process(tmp_path: Path) -> None:
    run_like_torchrun(2, check_fsdp2, tmp_path, points(train_llama(tmp_path)[0].tracker.history))


# Resuming


def check_resume(ranks: int, folder: Path) -> SelectionCallback:
    """With the Trainer's flag, by which it makes new callbacks, and without it."""
    whole, trainer = train_llama(folder, ranks, save_strategy="steps", save_steps=STOP)
    expected = selection_of(trainer.state.log_history)
    for flag in (False, True):
        given, resumed = train_llama(
            folder,
            ranks,
            folder / f"checkpoint-{STOP}",
            restore_callback_states_from_checkpoint=flag,
        )
        assert selection_of(resumed.state.log_history) == expected
        (found,) = (each for each in resumed.callback_handler.callbacks if isinstance(each, SelectionCallback))
        assert (found is given) == (not flag)
        assert points(found.tracker.history) == points(whole.tracker.history)
        assert torch.equal(found.tracker.history.shares, whole.tracker.history.shares)
        assert found.tracker.window == 3 and found.tracker.orthogonality
        one, other = (each.tracker.state_dict()["counts"] for each in (found, whole))
        assert len(one) == 14
        assert all(torch.equal(one[name][entry], other[name][entry]) for name in other for entry in other[name])
    return whole


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_resume(tmp_path: Path) -> None:
    check_resume(1, tmp_path)
    state = json.loads((tmp_path / f"checkpoint-{STOP}" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["SelectionCallback"]
    assert saved["args"]["window"] == 3
    assert saved["args"].keys() == inspect.signature(SelectionCallback).parameters.keys()
    restored = SelectionCallback.from_state(saved)
    assert restored.tracker.step == STOP
    assert restored.tracker.window == 3
    optimizer = torch.load(tmp_path / f"checkpoint-{STOP}" / "optimizer.pt", weights_only=True)
    entries = {entry for its in optimizer["state"].values() for entry in its}
    assert entries == {"momentum", "step", "exp_avg", "exp_avg_sq"}


def check_ddp(folder: Path, expected: Any) -> None:
    warnings.simplefilter("ignore", SelectionWarning)
    assert_same_metrics(points(check_resume(2, folder).tracker.history), expected)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_metrics_under_ddp_are_those_of_one_process_also_after_a_resume(tmp_path: Path) -> None:
    run_like_torchrun(2, check_ddp, tmp_path, points(train_llama(tmp_path)[0].tracker.history))


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_checkpoint_from_before_the_callback_was_there(tmp_path: Path) -> None:
    """It starts to count there, and the Trainer, which expects an entry of every callback, goes on to save."""
    args = arguments(tmp_path, steps=4, save_strategy="steps", save_steps=2)
    make_trainer(args, make_model()).train()
    callback = SelectionCallback()
    resumed = make_trainer(args, make_model(), callbacks=[callback])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.tracker.step == 2
    assert [step for step, _ in selection_of(resumed.state.log_history)] == [3, 4]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert SelectionCallback.from_state(state["stateful_callbacks"]["SelectionCallback"]).tracker.step == 2


class Counted(TrainerCallback, ExportableState):
    """Counts how often the Trainer asks for a state by itself."""

    def __init__(self) -> None:
        self.calls = 0

    def state(self) -> dict[str, Any]:
        self.calls += 1
        return {"args": {}, "attributes": {}}


class CountedSelection(SelectionCallback):
    calls = 0

    def state(self) -> dict[str, Any]:
        self.calls += 1
        return super().state()


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_the_state_is_packed_only_where_the_trainer_asks_for_it(tmp_path: Path) -> None:
    """It takes a second where a run was long and a model large."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        callback, counted = CountedSelection(), Counted()
        trainer = trainer_by_hand(tmp_path, [callback, counted], **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert callback.calls == counted.calls > 0


def test_a_checkpoint_of_a_large_model_is_bounded() -> None:
    """To 5 MB for SmolLM2-135M's 210 matrices, with metrics, shares and counts that cannot be compressed.

    Nothing is lost but points of the history's past.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = [["dion2", name, 1, slices, 0] for name, slices in zip(llama(30), 30 * SMOLLM2_SLICES, strict=True)]
    points, steps = 256, 10**4
    names = [name for name in MEANINGS if name not in ("captured_energy", "subspace_turn", "rank_use")]
    values = torch.rand(points, len(kinds), len(names), generator=generator, dtype=torch.float64).tolist()
    parameters = [[{n: float(f"{v:.6g}") for n, v in zip(names, each, strict=True)} for each in p] for p in values]
    counts = {
        f"{group}/{name}": {
            entry: torch.randint(steps, (matrices, slices), generator=generator, dtype=torch.int32)
            for entry in ("last", "hits")
        }
        for group, name, matrices, slices, _ in kinds
    }
    history = {
        "window": 100,
        "steps": [steps * (point + 1) // points for point in range(points)],
        "overall": [point[0] for point in parameters],
        "groups": [{"dion2": point[0]} for point in parameters],
        "parameters": parameters,
        "kinds": kinds,
        "shares": torch.randint(256, (points, len(kinds), BINS), generator=generator, dtype=torch.uint8),
        "counts": torch.rand(len(kinds), BINS, generator=generator, dtype=torch.float64),
        "hits": torch.rand(len(kinds), BINS, generator=generator, dtype=torch.float64),
    }
    callback, resumed = SelectionCallback(), SelectionCallback()
    callback.tracker.load_state_dict({"step": steps, "counts": counts, "history": history, "warned": []})
    saved = callback.state()
    assert len(json.dumps(saved)) < 5e6
    resumed.saved = saved["attributes"]["saved"]
    state = resumed.tracker.state_dict()
    assert state["step"] == steps
    assert all(
        torch.equal(state["counts"][name][entry], counts[name][entry]) for name in counts for entry in counts[name]
    )
    for name in ("counts", "hits"):
        assert torch.equal(state["history"][name], history[name])
    assert state["history"]["parameters"][-1] == parameters[-1]
    kept = torch.tensor([0, *state["history"]["steps"]]).diff()
    assert len(kept) > 100 and kept.max() <= 2 * kept.min() + 1
    assert len(callback.tracker.history) == points


class SaveLate(TrainerCallback):
    """Asks for a checkpoint of step 3 when the other callbacks no longer notice."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= state.global_step == 3


def train_mixture(folder: Path, checkpoint: Path | None = None, **settings: Any) -> SelectionCallback:
    callback = SelectionCallback(window=3)
    fsdp = {"transformer_layer_cls_to_wrap": "Qwen3MoeDecoderLayer"}
    args = arguments(folder, 2, 4, fsdp=True, fsdp_config=fsdp, **settings)
    trainer = make_trainer(args, make_mixture(), callbacks=[callback, SaveLate()])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return callback


def check_experts(folder: Path) -> None:
    """Ranks hold different experts, and the Trainer asks one rank alone for the state."""
    fsdp2_on_cpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = train_mixture(folder, save_strategy="steps", save_steps=2)
    late = [str(each.message) for each in caught if "not planned when the step ended" in str(each.message)]
    assert [message.partition(":")[0] for message in late] == ([] if dist.get_rank() else ["step 3"])
    assert all("so it holds the counts of step 2; set control.should_save in a callback" in each for each in late)
    assert whole.tracker.state_is_spread
    warnings.simplefilter("ignore", SelectionWarning)
    resumed = train_mixture(folder, folder / "checkpoint-2")
    assert points(resumed.tracker.history) == points(whole.tracker.history)
    one, other = (each.tracker.state_dict()["counts"] for each in (resumed, whole))
    assert all(torch.equal(one[name][entry], other[name][entry]) for name in other for entry in other[name])


def test_resume_experts_under_fsdp2(tmp_path: Path) -> None:
    run_like_torchrun(2, check_experts, tmp_path)


# Attaching


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_another_training_starts_anew(tmp_path: Path) -> None:
    callback = SelectionCallback(window=WINDOW)
    trainer = trainer_by_hand(tmp_path, [callback])
    for _ in range(2):
        trainer.train()
        assert callback.tracker.step == 3
        assert (callback.metrics.overall["coverage"], callback.metrics.overall["staleness_max"]) == (0.5, 3.0)


class Crash(TrainerCallback):
    """Ends the training by an exception."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise ArithmeticError("injected")


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_after_a_crash_another_callback_replaces_the_one_that_was_left(tmp_path: Path) -> None:
    """A Trainer tells its callbacks of no exception, so the callback stays attached."""
    crashed, after = SelectionCallback(), SelectionCallback(window=WINDOW)
    trainer = trainer_by_hand(tmp_path, [crashed, Crash()])
    with pytest.raises(ArithmeticError, match="injected"):
        trainer.train()
    assert unwrapped(trainer.optimizer).observer is crashed.tracker
    for each in (crashed, Crash):
        trainer.remove_callback(each)
    trainer.add_callback(after)
    trainer.train()
    assert (crashed.tracker.step, after.tracker.step) == (1, 3)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_the_last_of_two_callbacks_records(tmp_path: Path) -> None:
    first, second = SelectionCallback(), SelectionCallback(window=WINDOW)
    trainer = trainer_by_hand(tmp_path, [first, second])
    with pytest.warns(SelectionWarning, match="SelectionCallback replaces SelectionCallback as the optim"):
        trainer.train()
    assert selection_of(trainer.state.log_history) == [(step + 1, named(step, *ALL)) for step in range(3)]
    records = [each.tracker.step for each in trainer.callback_handler.callbacks if isinstance(each, SelectionCallback)]
    assert sorted(records) == [0, 3]


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_folder_that_is_not_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is no reason to end a training."""
    monkeypatch.chdir(tmp_path)
    trainer = trainer_by_hand(Path("run"), [SelectionCallback(every=1)])
    trainer.args.output_dir = "s3://bucket/run"
    with pytest.warns(SelectionWarning, match="history is not saved, because save_to=True is 's3://bucket/run', which"):
        trainer.train()
    assert trainer.state.global_step == 3
    trainer = trainer_by_hand(tmp_path, [SelectionCallback(save_to="s3://bucket/run")])
    with pytest.raises(ValueError, match="SelectionCallback: save_to is 's3://bucket/run', which is no local folder"):
        trainer.train()


def test_what_is_refused(tmp_path: Path) -> None:
    pair = (torch.optim.AdamW, {"lr": 1e-3})
    trainer = make_trainer(arguments(tmp_path), make_model(), pair, callbacks=[SelectionCallback()])
    with pytest.raises(ValueError, match=r"SelectionCallback: no Dion2 optimizer; found AdamW\. Make it with"):
        trainer.train()
    args = arguments(tmp_path, logging_strategy="epoch")
    trainer = make_trainer(args, make_model(), callbacks=[SelectionCallback()])
    with pytest.raises(ValueError, match="every=None follows logging_steps, but logging_strategy is 'epoch'; pass ev"):
        trainer.train()
    with pytest.raises(RuntimeError, match="SelectionCallback must be called by a Trainer"):
        SelectionCallback().on_train_begin(arguments(tmp_path), trainer.state, trainer.control)
    with pytest.raises(TypeError, match="progress must be True or False, got 'yes'"):
        SelectionCallback(progress="yes")
    with pytest.raises(ValueError, match="every must be at least 1 step, got -1"):
        SelectionCallback(every=-1)


def test_a_dead_layer_is_named_once(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, logging_steps=1, save_strategy="no"
    )
    model: nn.Module = WithDeadLayer()
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"gradient": each} for each in gradients()],
        optimizer_cls_and_kwargs=(Dion2Factory, SETTINGS),
        callbacks=[SelectionCallback(save_to=False)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert_dead_layer_is_named_once(caught)
    assert not (tmp_path / "dion2_selection.json").exists()
