"""The examples of docs/huggingface.md run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from dion2_lightning import Dion2Factory, build_optimizer
from tests.integrations.training import BATCH, Sequences, make_model

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict[str, Any] = {
        "Accelerator": Accelerator,
        "Dion2Factory": Dion2Factory,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "build_optimizer": build_optimizer,
        "args": TrainingArguments("runs", report_to=[]),
        "dataset": Sequences(3),
        "loader": DataLoader(Sequences(3), BATCH),
        "model": make_model(),
    }
    exec(compile(example, str(PAGE), "exec"), names)
    optimizer = names["trainer"].optimizer if "trainer" in names else names.get("optimizer")
    if optimizer is not None:  # an example has trained
        assert {group["algorithm"] for group in optimizer.param_groups} == {"dion2", "adamw"}
        assert optimizer.state
