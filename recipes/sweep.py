"""How a recipe's learning rates are chosen: the same search for Dion2 and for its AdamW control.

Every candidate runs with the first seed; the best of each optimizer then run with the others. Results go to a file as
they come, so a search that was cut off goes on where it stopped.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from recipes.comparison import TITLES, Result

Candidate = dict[str, Any]
Record = dict[str, Any]
Run = Callable[[Candidate, int, Path], Result]
"""Makes the run of a candidate with a seed, in a folder of its own."""


def search(
    optimizers: Sequence[list[Candidate]],
    run: Run,
    *,
    seeds: list[int],
    keep: int,
    by: Literal["accuracy", "loss"],
    results: Path,
) -> None:
    """Makes all runs that `results` lacks, then prints the table of them.

    Args:
        optimizers: The candidates of each optimizer: `algorithm`, `lr`, `adamw_lr` and, if it has one, `momentum`.
        run: Makes one run.
        seeds: The first one screens all candidates, the others decide among the best.
        keep: Candidates of each optimizer that run with the other seeds.
        by: What the best are best in.
        results: File that takes a line for each run.
    """
    first, *others = seeds
    for candidates in optimizers:
        for candidate in candidates:
            _make(candidate, first, run, results)
        for candidate in _best_first(candidates, first, by, results)[:keep]:
            for seed in others:
                _make(candidate, seed, run, results)
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


def _best_first(candidates: list[Candidate], seed: int, by: str, results: Path) -> list[Candidate]:
    def figure(candidate: Candidate) -> float:
        [record] = [record for record in _records(candidate, results) if record["seed"] == seed]
        value = float(record[by]) * (-1 if by == "accuracy" else 1)
        return value if math.isfinite(value) and math.isfinite(record["loss"]) else math.inf

    return sorted(candidates, key=figure)


def _print_markdown(candidates: list[Candidate], results: Path) -> None:
    print("\n| optimizer | momentum | lr | adamw_lr | held-out accuracy by seed, % | held-out loss by seed |")
    print("|---|---|---|---|---|---|")
    for candidate in candidates:
        records = sorted(_records(candidate, results), key=lambda record: record["seed"])
        accuracy = _list([100 * record["accuracy"] for record in records], ".1f")
        loss = _list([record["loss"] for record in records], ".3f")
        momentum, lr, adamw_lr = candidate.get("momentum", "-"), candidate["lr"], candidate["adamw_lr"]
        print(f"| {TITLES[candidate['algorithm']]} | {momentum} | {lr:g} | {adamw_lr:g} | {accuracy} | {loss} |")


def _list(values: list[float], form: str) -> str:
    text = ", ".join(format(value, form) for value in values)
    return f"{text} (mean {format(statistics.mean(values), form)})" if len(values) > 1 else text
