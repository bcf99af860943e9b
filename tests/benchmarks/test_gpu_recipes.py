"""How the GPU check calls the recipes, what it reads from their logs, and which problems it finds there."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import recipes
from benchmarks.gpu.recipes import (
    CHECKPOINT,
    RECIPES,
    Call,
    Recipe,
    calls_of,
    command_line,
    make_call,
    problem_of,
    read_log,
    summary_of,
    texts_per_second,
)
from benchmarks.gpu.section import Options
from recipes.image_classification.settings import Settings as ImageSettings
from recipes.inputs import read_settings
from recipes.pretraining.settings import Settings as PretrainingSettings
from recipes.supervised_fine_tuning.settings import Settings as FineTuningSettings
from recipes.supervised_fine_tuning.with_lightning import LightningSettings
from recipes.text_classification.settings import Settings as TextSettings
from recipes.throughput import WINDOW

SETTINGS: dict[str, Any] = {
    "pretraining": PretrainingSettings,
    "sft-trainer": FineTuningSettings,
    "sft-lightning": LightningSettings,
    "sft-accelerate": FineTuningSettings,
    "text": TextSettings,
    "images": ImageSettings,
}

WRITES_A_CHECKPOINT = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir()
(folder / "step-24").touch()
time.sleep(float(sys.argv[sys.argv.index("--seconds") + 1]))
"""

LOG = [
    {"step": 4, "train_loss": 3.0},
    {"step": 8, "train_loss": 2.0, "tokens_per_second": 500.0, "model_flops_utilisation": 0.4, "peak_memory_gb": 7.0},
]


def test_the_summary_has_the_last_values() -> None:
    expected = {"losses": 2, "first loss": 3.0, "last loss": 2.0, "a second": 500.0, "unit": "tokens", "MFU": 0.4}
    assert summary_of(LOG) == {**expected, "peak GB": 7.0}
    assert summary_of([])["last loss"] is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "\n".join(map(json.dumps, LOG))),
        ("trainer_state.json", json.dumps({"log_history": LOG})),
        (
            "metrics.csv",
            "step,train_loss,tokens_per_second,model_flops_utilisation,peak_memory_gb\n4,3,,,\n8,2,500,0.4,7\n",
        ),
    ],
)
def test_logs_of_every_framework(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    assert read_log(tmp_path) == LOG


def test_the_mean_that_the_trainer_logs_at_its_end_is_no_loss_of_a_step() -> None:
    log = [{"step": 4, "loss": 3.0}, {"step": 8, "loss": 2.0}, {"step": 8, "train_loss": 2.6}]
    assert summary_of(log)["last loss"] == 2.0


def test_a_run_without_a_log(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


@pytest.mark.parametrize(
    ("log", "before", "on_gpu", "message"),
    [
        (LOG, [], True, ""),
        ([*LOG[1:], {"step": 12, "train_loss": 1.9}], LOG, False, ""),
        (LOG[:1], [], False, "training losses: [3.0]"),
        ([LOG[0], {"train_loss": 3.0}], [], False, "training losses: [3.0, 3.0]"),
        ([LOG[0], {"train_loss": math.nan}], [], False, "training losses: [3.0, nan]"),
        ([{"train_loss": 2.9}, {"train_loss": 2.8}], LOG, False, "it resumed with a loss of 2.9"),
        ([{"train_loss": 3.0}, {"train_loss": 2.95}], [{"train_loss": 3.0}, {"train_loss": 2.98}], False, ""),
        ([LOG[0], {"train_loss": 2.0}], [], True, "it did not run on a GPU"),
    ],
)
def test_problems(log: list[dict[str, Any]], before: list[dict[str, Any]], on_gpu: bool, message: str) -> None:
    found = problem_of(log, before, on_gpu)
    assert found.startswith(message)
    assert bool(found) == bool(message)


def test_the_speed_of_text_classification_comes_from_its_table() -> None:
    table = "            held-out loss   a step\nDion2    0.5   32 ms\nAdamW    0.6   16 ms\n"
    assert texts_per_second(table, "dion2", 64) == 2000
    assert texts_per_second(table, "adamw", 64) == 4000
    assert texts_per_second("", "dion2", 64) is None


def options(folder: Path, device: str = "cpu", tiny: bool = False) -> Options:
    made = Options(device, tiny, 60, str(folder / "results.jsonl"), "section")
    made.folder.mkdir(parents=True)
    return made


@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "large"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_take_their_arguments(
    name: str, tiny: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "shared_files", lambda _: tmp_path)
    calls = calls_of(RECIPES[name], options(tmp_path, "cuda", tiny))
    settings = [read_settings(SETTINGS[name], command_line(call.arguments)) for call in calls]
    first_only = tiny and not name.startswith("sft")
    assert [each.resume for each in settings] == ([False] if first_only else [False, True])
    assert [call.interrupted for call in calls] == [not each.resume for each in settings]
    assert all(each.checkpoint_every == CHECKPOINT for each in settings)
    assert all(
        WINDOW + 1 < CHECKPOINT and each.steps - CHECKPOINT > WINDOW + 1 for each in settings
    )  # both log a speed


class TestMakeCall:
    def make(self, folder: Path, script: str, seconds: float, interrupted: bool) -> tuple[str, str]:
        recipe = Recipe(["-c", script], "step-*", lambda _: [])
        return make_call(recipe, Call("", {"seconds": seconds}, interrupted), folder / "run", options(folder))

    def test_is_interrupted_after_its_checkpoint(self, tmp_path: Path) -> None:
        start = time.monotonic()
        assert self.make(tmp_path, WRITES_A_CHECKPOINT, 60, interrupted=True)[1] == ""
        assert time.monotonic() - start < 30

    def test_is_not_interrupted_otherwise(self, tmp_path: Path) -> None:
        printed, problem = self.make(tmp_path, WRITES_A_CHECKPOINT + "print('through')", 0, interrupted=False)
        assert printed.endswith("through\n")
        assert problem == ""

    def test_one_that_fails_right_after_its_checkpoint_was_not_interrupted(self, tmp_path: Path) -> None:
        script = WRITES_A_CHECKPOINT + "sys.exit('error: the last file')"
        _, problem = self.make(tmp_path, script, 0.05, interrupted=True)
        assert problem == "ended by itself with code 1: error: the last file"

    def test_says_how_it_failed(self, tmp_path: Path) -> None:
        _, problem = self.make(tmp_path, "import sys; sys.exit('error: no such thing')", 0, interrupted=True)
        assert problem == "ended by itself with code 1: error: no such thing"
