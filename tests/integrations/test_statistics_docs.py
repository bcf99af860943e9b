"""The examples of docs/statistics.md run as they stand there, one after the other."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import dion2_lightning
from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.metrics import MEANINGS
from tests.integrations.lightning_training import Llama
from tests.integrations.training import BATCH, Sequences, make_model

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
STEPS = 20


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arguments = {"use_cpu": True, "report_to": [], "max_steps": STEPS, "save_strategy": "no", "logging_steps": 500}
    selection = ("SelectionTracker", "SelectionMonitor", "SelectionCallback", "SelectionLogger")
    names: dict[str, Any] = {
        name: getattr(dion2_lightning, name) for name in ("build_optimizer", "Dion2Factory", *selection)
    }
    names |= {"L": L, "Accelerator": Accelerator, "Trainer": Trainer, "SelectionHistory": SelectionHistory}
    lightning, trainer, accelerate, plain, history = EXAMPLES
    text = Sequences(STEPS)

    names["module"] = Llama("Dion2", "one device", make_model(), STEPS)
    exec(compile(lightning, str(PAGE), "exec"), names)
    assert 0 < names["trainer"].callback_metrics["dion2/coverage"] <= 1

    names |= {"model": make_model(), "args": TrainingArguments("runs", **arguments), "dataset": text}
    exec(compile(trainer, str(PAGE), "exec"), names)
    assert [entry["step"] for entry in names["trainer"].state.log_history if "dion2/coverage" in entry] == [10, 20]
    (tmp_path / "runs" / "dion2_selection.json").unlink()

    names |= {"model": make_model(), "loader": DataLoader(text, BATCH)}
    exec(compile(accelerate, str(PAGE), "exec"), names)

    names |= {"model": make_model(), "loader": DataLoader(Sequences(10), BATCH)}
    names["optimizer"] = names["build_optimizer"](names["model"], lr=3e-4)
    capsys.readouterr()
    exec(compile(plain, str(PAGE), "exec"), names)
    coverage, turnover = map(float, capsys.readouterr().out.split())
    assert 0 < coverage <= 1 and 0 <= turnover <= 1

    exec(compile(history, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.startswith("[10, 20] [0.")


def test_every_metric_is_explained() -> None:
    assert {name for name in MEANINGS if f"`{name}`" not in PAGE.read_text()} == set()
