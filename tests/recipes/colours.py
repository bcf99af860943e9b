"""Short conversations about colours, for a model with few words; and an end to what Accelerate remembers."""

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from recipes.offline_data import as_messages

ROWS = 100
WORDS = ("red", "green", "blue", "white")


def row(number: int) -> dict[str, str]:
    answer = " ".join(WORDS[(number + index) % len(WORDS)] for index in range(1 + number % 9))
    return {"prompt": f"Which colour is number {number}?", "completion": answer}


def chat(number: int) -> dict[str, list[dict[str, str]]]:
    return as_messages(**row(number))


def talk(number: int) -> list[dict[str, str]]:
    return [*chat(number)["prompt"], *chat(number)["completion"]]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def forget_accelerators() -> None:
    """Let the next Accelerator of this process be made as if it were the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
