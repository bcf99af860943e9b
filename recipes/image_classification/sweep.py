"""How the recipe's learning rates and momentum were chosen: the same search for Dion2 and for its AdamW control.

Every candidate runs with the first seed; the best of each optimizer then run with the others. Results go to a file as
they come, so a search that was cut off goes on where it stopped.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import auto_cli

from recipes.comparison import TITLES, Result
from recipes.image_classification.data import load_split
from recipes.image_classification.settings import Settings
from recipes.image_classification.train import train
from recipes.terminal import quiet_libraries

Candidate = dict[str, Any]
Record = dict[str, Any]
Run = Callable[[Candidate, int, Path], Result]
"""Makes the run of a candidate with a seed, in a folder of its own."""

ADAMW: list[Candidate] = [
    {"algorithm": "adamw", "beta1": 0.9, "lr": lr, "adamw_lr": adamw_lr}
    for lr, adamw_lr in [
        (5e-4, 5e-4),
        (1e-3, 1e-3),
        (2e-3, 2e-3),
        (4e-3, 4e-3),
        (8e-3, 8e-3),
        (2.8e-3, 2e-3),
    ]
]
DION2: list[Candidate] = [
    {"algorithm": "dion2", "momentum": momentum, "lr": lr, "adamw_lr": 2e-3}
    for momentum, lr in [
        (0.8, 2e-3),
        (0.8, 4e-3),
        (0.8, 8e-3),
        (0.8, 1.6e-2),
        (0.95, 4e-3),
        (0.95, 8e-3),
    ]
]


def sweep(seeds: list[int] | None = None, results: Path = Path("runs/image_sweep.jsonl")) -> None:
    """Searches learning rates and momentum of AdamW and of Dion2, with the recipe's defaults for everything else.

    Args:
        seeds: The first one screens all candidates; the best of each optimizer, by loss, runs with the others too. By
            default [0, 1, 2, 3].
        results: File that takes a line for each run.
    """
    quiet_libraries()
    split = load_split(Settings())

    def run(candidate: Candidate, seed: int, folder: Path) -> Result:
        settings = Settings(**candidate, seed=seed, output=folder, validate_every=Settings.steps)
        return train(settings, split, progress=False)

    search([ADAMW, DION2], run, seeds=seeds or [0, 1, 2, 3], results=results)


def search(optimizers: Sequence[list[Candidate]], run: Run, *, seeds: list[int], results: Path) -> None:
    """Makes all runs that `results` lacks, then prints the table of them.

    Args:
        optimizers: The candidates of each optimizer: `algorithm`, `lr`, `adamw_lr`, and `momentum` or AdamW's `beta1`.
        run: Makes one run.
        seeds: The first one screens all candidates; the one with the lowest loss also runs with the others.
        results: File that takes a line for each run.
    """
    first, *others = seeds
    for candidates in optimizers:
        for candidate in candidates:
            _make(candidate, first, run, results)
        best = min(candidates, key=lambda each: _loss(each, first, results))
        for seed in others:
            _make(best, seed, run, results)
    _print_markdown([candidate for candidates in optimizers for candidate in candidates], results)


def _make(candidate: Candidate, seed: int, run: Run, results: Path) -> None:
    if any(record["seed"] == seed for record in _records(candidate, results)):
        return
    with TemporaryDirectory() as folder:
        result = run(candidate, seed, Path(folder))
    record = {**candidate, "seed": seed, "accuracy": result.accuracy, "loss": result.loss}
    print(json.dumps(record), flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _records(candidate: Candidate, results: Path) -> list[Record]:
    lines = results.read_text().splitlines() if results.exists() else []
    return [record for record in map(json.loads, lines) if candidate.items() <= record.items()]


def _loss(candidate: Candidate, seed: int, results: Path) -> float:
    [loss] = [float(record["loss"]) for record in _records(candidate, results) if record["seed"] == seed]
    return loss if math.isfinite(loss) else math.inf


def _print_markdown(candidates: list[Candidate], results: Path) -> None:
    print("\n| optimizer | momentum | lr | adamw_lr | held-out accuracy by seed, % | held-out loss by seed |")
    print("|---|---|---|---|---|---|")
    for candidate in candidates:
        records = sorted(_records(candidate, results), key=lambda record: record["seed"])
        accuracy = _list([100 * record["accuracy"] for record in records], ".1f")
        loss = _list([record["loss"] for record in records], ".3f")
        momentum = candidate["momentum"] if "momentum" in candidate else f"beta1 {candidate['beta1']}"
        lr, adamw_lr = candidate["lr"], candidate["adamw_lr"]
        print(f"| {TITLES[candidate['algorithm']]} | {momentum} | {lr:g} | {adamw_lr:g} | {accuracy} | {loss} |")


def _list(values: list[float], form: str) -> str:
    text = ", ".join(format(value, form) for value in values)
    return f"{text} (mean {format(statistics.mean(values), form)})" if len(values) > 1 else text


if __name__ == "__main__":
    auto_cli(sweep)
