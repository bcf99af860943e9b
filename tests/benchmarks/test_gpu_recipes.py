"""What the check for GPUs reads out of a recipe's log, and when it says that something is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.recipes import figures, read_log, texts_per_second, wrong

LOG = [
    {"step": 4, "train_loss": 3.0},
    {"step": 8, "train_loss": 2.0, "tokens_per_second": 500.0, "model_flops_utilisation": 0.4, "peak_memory_gb": 7.0},
]


def test_figures_are_the_last_that_were_logged() -> None:
    expected = {"losses": 2, "first loss": 3.0, "last loss": 2.0, "a second": 500.0, "unit": "tokens", "MFU": 0.4}
    assert figures(LOG) == {**expected, "peak GB": 7.0}
    assert figures([])["last loss"] is None


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
        ([{"train_loss": 2.9}, {"train_loss": 2.8}], LOG, False, "it went on with a loss of 2.9"),
        ([LOG[0], {"train_loss": 2.0}], [], True, "it has not been on a GPU"),
    ],
)
def test_what_is_wrong(log: list[dict[str, Any]], before: list[dict[str, Any]], on_gpu: bool, message: str) -> None:
    found = wrong(log, before, on_gpu)
    assert found.startswith(message)
    assert bool(found) == bool(message)


def test_the_speed_of_text_classification_is_made_of_its_table() -> None:
    table = "            held-out loss   a step\nDion2    0.5   32 ms\nAdamW    0.6   16 ms\n"
    assert texts_per_second(table, "dion2") == 2000
    assert texts_per_second(table, "adamw") == 4000
    assert texts_per_second("", "dion2") is None
