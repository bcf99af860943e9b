"""How the recipe's learning rates were chosen: the same search for Dion2 and for its AdamW control.

Every candidate runs with the first seed; the most accurate of each optimizer then run with the others. Results go to a
file as they come, so a sweep that was cut off goes on where it stopped.
"""

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import auto_cli

from recipes.text_classification.data import Split, load_split
from recipes.text_classification.settings import Settings
from recipes.text_classification.train import TITLES, quiet_libraries, train

Candidate = dict[str, Any]
Record = dict[str, Any]

ADAMW: list[Candidate] = [
    {"algorithm": "adamw", "lr": lr, "adamw_lr": adamw_lr}
    for lr, adamw_lr in [(2e-4, 8e-4), (4e-4, 4e-4), (4e-4, 8e-4), (8e-4, 8e-4), (4e-4, 1.6e-3), (8e-4, 1.6e-3)]
]
DION2: list[Candidate] = [
    {"algorithm": "dion2", "momentum": momentum, "lr": lr, "adamw_lr": adamw_lr}
    for momentum, lr, adamw_lr in [
        (0.8, 8e-4, 8e-4),
        (0.8, 1.6e-3, 8e-4),
        (0.8, 1.6e-3, 1.6e-3),
        (0.8, 3.2e-3, 1.6e-3),
        (0.95, 1.6e-3, 8e-4),
        (0.95, 1.6e-3, 1.6e-3),
    ]
]


def sweep(seeds: list[int] | None = None, keep: int = 4, results: Path = Path("runs/sweep.jsonl")) -> None:
    """Searches the learning rates of Dion2 and of AdamW, with the recipe's defaults for everything else.

    Args:
        seeds: The first one screens all candidates, the others decide among the best. By default [0, 1, 2].
        keep: Candidates of each optimizer that run with the other seeds.
        results: File that takes a line for each run.
    """
    first, *others = seeds or [0, 1, 2]
    quiet_libraries()
    split = load_split(Settings())
    for candidates in (ADAMW, DION2):
        for candidate in candidates:
            _run(candidate, first, split, results)
        for candidate in _best(candidates, first, results)[:keep]:
            for seed in others:
                _run(candidate, seed, split, results)
    _print_markdown(results)


def _run(candidate: Candidate, seed: int, split: Split, results: Path) -> None:
    if any(record["seed"] == seed for record in _records(candidate, results)):
        return
    with TemporaryDirectory() as folder:
        settings = Settings(**candidate, seed=seed, output=Path(folder), validate_every=Settings.steps)
        result = train(settings, split, progress=False)
    record = {**candidate, "seed": seed, "accuracy": result.accuracy, "loss": result.loss}
    print(json.dumps(record), flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _records(candidate: Candidate, results: Path) -> list[Record]:
    lines = results.read_text().splitlines() if results.exists() else []
    return [record for record in map(json.loads, lines) if candidate.items() <= record.items()]


def _best(candidates: list[Candidate], seed: int, results: Path) -> list[Candidate]:
    def accuracy(candidate: Candidate) -> float:
        [record] = [record for record in _records(candidate, results) if record["seed"] == seed]
        return float(record["accuracy"])

    return sorted(candidates, key=accuracy, reverse=True)


def _print_markdown(results: Path) -> None:
    print("\n| optimizer | momentum | lr | adamw_lr | held-out accuracy by seed, % | held-out loss by seed |")
    print("|---|---|---|---|---|---|")
    for candidate in [*ADAMW, *DION2]:
        records = sorted(_records(candidate, results), key=lambda record: record["seed"])
        accuracy = _list([100 * record["accuracy"] for record in records], ".1f")
        loss = _list([record["loss"] for record in records], ".3f")
        momentum, lr, adamw_lr = candidate.get("momentum", "-"), candidate["lr"], candidate["adamw_lr"]
        print(f"| {TITLES[candidate['algorithm']]} | {momentum} | {lr:g} | {adamw_lr:g} | {accuracy} | {loss} |")


def _list(values: list[float], form: str) -> str:
    text = ", ".join(format(value, form) for value in values)
    return f"{text} (mean {format(statistics.mean(values), form)})" if len(values) > 1 else text


if __name__ == "__main__":
    auto_cli(sweep)
