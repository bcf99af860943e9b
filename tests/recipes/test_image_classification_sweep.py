"""The search behind the defaults, with runs that are made up."""

import math
from pathlib import Path
from typing import Any

import pytest

from recipes.comparison import Result
from recipes.image_classification.sweep import search

CANDIDATES = [{"algorithm": "dion2", "momentum": 0.8, "lr": lr, "adamw_lr": 1e-3} for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
LOSSES = {1e-3: 0.5, 2e-3: math.nan, 4e-3: 0.2, 8e-3: math.inf}


class Runs:
    """Makes up results and remembers what was asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[float, int]] = []

    def __call__(self, candidate: dict[str, Any], seed: int, folder: Path) -> Result:
        self.made.append((candidate["lr"], seed))
        loss = LOSSES[candidate["lr"]]
        return Result(candidate, accuracy=1 - candidate["lr"], loss=loss, step_seconds=None)


def test_the_best_gets_the_other_seeds_and_runs_that_diverged_do_not(tmp_path: Path) -> None:
    runs = Runs()
    search([CANDIDATES], runs, seeds=[0, 1, 2], results=tmp_path / "results.jsonl")
    assert runs.made == [*((candidate["lr"], 0) for candidate in CANDIDATES), (4e-3, 1), (4e-3, 2)]


def test_a_search_that_was_cut_off_makes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    search([CANDIDATES], Runs(), seeds=[0, 1], results=results)
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")
    capsys.readouterr()
    runs = Runs()
    search([CANDIDATES], runs, seeds=[0, 1], results=results)
    assert runs.made == [(4e-3, 1)]
    assert results.read_text().splitlines() == lines
    assert (
        "| Dion2 | 0.8 | 0.004 | 0.001 | 99.6, 99.6 (mean 99.6) | 0.200, 0.200 (mean 0.200) |"
        in capsys.readouterr().out
    )


def test_the_table_calls_the_first_beta_of_adamw_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = {"algorithm": "adamw", "beta1": 0.7, "lr": 4e-3, "adamw_lr": 1e-3}
    search([[candidate]], Runs(), seeds=[0], results=tmp_path / "results.jsonl")
    assert "| AdamW | beta1 0.7 | 0.004 | 0.001 | 99.6 | 0.200 |" in capsys.readouterr().out
