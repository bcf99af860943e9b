"""The search: every method's learning rates and momentum by the same rule, then the final runs with all seeds.

Every run is appended to a file as soon as it ends and never repeated, so an interrupted search resumes.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.methods import Candidate, Method
from benchmarks.convergence.tasks import Task
from benchmarks.convergence.training import Record, time_steps, train

SEARCH_SEED = 100
"""Seed of the search; the final runs have others."""

FACTOR = 1.5
"""Ratio of neighbouring learning rates."""

MARGIN = 0.005
"""How much lower the loss at a shorter memory has to be; losses of different seeds differ by more."""

PATIENCE = 2
"""The search ends after this many shorter memories in a row that are no better."""

TIMING = "step times"


class Study:
    """All runs of a task, finished or not.

    Args:
        task: What is trained.
        results: File with a line for each run.
        device: Where to train.
        seeds: Of the final runs.
    """

    def __init__(self, task: Task, results: Path, device: torch.device, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
        self.task = task
        self.results = results
        self.device = device
        self.seeds = seeds

    @property
    def records(self) -> list[Record]:
        """All runs in the file, those of other processes too."""
        return read_records(self.results)

    def run(self, names: list[str] | None = None) -> None:
        """Makes the missing runs of the search, the final runs, and the step times.

        Args:
            names: Of the methods to run (default: None, all).

        Raises:
            ValueError: If the task has no such method, or one that begins with the settings of another comes first.
        """
        known = [method.name for method in self.task.methods]
        if unknown := set(names or []) - set(known):
            raise ValueError(f"--methods: {self.task.name} has no {sorted(unknown)}, but {known}")
        chosen: dict[str, Candidate] = {}
        for method in sorted(self.task.methods, key=lambda method: method.like is not None):
            if names is not None and method.name not in names:
                continue
            self._check_order(method, names)
            candidates = self.search(method)
            chosen[method.name] = candidates[0]
            for seed in self.seeds:
                for candidate in candidates:
                    self.record(method, candidate, seed, self.task.steps)
                if method.in_depth:
                    self.record(method, candidates[0], seed, self.task.short_steps)
            if self.task.long_steps is not None and method.like is None:
                for candidate in candidates:
                    for seed in self.seeds[:2]:
                        self.record(method, candidate, seed, self.task.long_steps)
        baseline = self.task.methods[0].name
        if baseline in chosen and not chosen.keys() <= time_ratios(self.records).keys():
            by_method = {method: chosen[method.name] for method in self.task.methods if method.name in chosen}
            self._write({"method": TIMING, **time_steps(self.task, by_method, self.device)})

    def search(self, method: Method) -> list[Candidate]:
        """Returns the candidates of a method that get all seeds: the best, then perhaps those of the common momenta.

        The memory of the momentum is shortened until two lengths in a row are no better than the best one, by a
        margin; for each the learning rate of the matrices climbs, from where it was best before. In the end the
        learning rate of everything else climbs, if there is anything else. Where the task gives a momentum, the
        learning rate of the matrices alone climbs.
        """
        if method.like is not None:
            [model] = [each for each in self.task.methods if each.name == method.like]
            best = self._climb(method, self.search(model)[0], "lr")
            # If adamw_lr had no effect for the other method, it has not been searched yet.
            return [best if model.has_rest else self._climb(method, best, "adamw_lr")]
        start = self.task.starts[method.algorithm]
        if start.momentum:
            return [self._climb(method, start, "lr")]
        best_of: list[Candidate] = []
        without_progress = 0
        for rule in method.momenta:
            origin = best_of[-1] if best_of else start
            candidate = self._climb(method, replace(origin, momentum=rule), "lr")
            if not best_of or self.loss(method, candidate) <= self.loss(method, best_of[-1]) - MARGIN:
                best_of.append(candidate)
                without_progress = 0
                continue
            without_progress += 1
            if without_progress == PATIENCE:
                break
        best = self._climb(method, best_of[-1], "adamw_lr") if method.has_rest else best_of[-1]
        first_two = list(method.momenta)[:2] if method.in_depth else []
        common = [each for each in best_of if each.momentum in first_two]
        return [best, *(replace(each, adamw_lr=best.adamw_lr) for each in common if each.momentum != best.momentum)]

    def loss(self, method: Method, candidate: Candidate) -> float:
        """Returns the validation loss at the end of a run of the search."""
        return last_loss(self.record(method, candidate, SEARCH_SEED, self.task.search_steps))

    def record(self, method: Method, candidate: Candidate, seed: int, steps: int) -> Record:
        """Returns the record of a run, and makes the run if there is none."""
        arguments = {"method": method.name, **candidate.as_dict(), "seed": seed, "steps": steps}
        for record in self.records:
            if arguments.items() <= record.items():
                return record
        measure_every = steps if seed == SEARCH_SEED else self.task.measure_every
        return self._write(train(self.task, method, candidate, seed, steps, measure_every, self.device))

    def _check_order(self, method: Method, names: list[str] | None) -> None:
        """Raises an error where the method needs the search of another, which this call would make a second time."""
        finished = {record["method"] for record in self.records if record.get("seed") in self.seeds}
        if names is not None and method.like is not None and method.like not in {*names, *finished}:
            raise ValueError(f"--methods: {method.name} begins with the settings of {method.like}; run that first")

    def _climb(self, method: Method, candidate: Candidate, name: str) -> Candidate:
        """Moves one learning rate by factors while the loss falls."""
        start = self.task.starts[method.algorithm].as_dict()

        def neighbour(steps: int) -> Candidate:
            rates = {"lr": candidate.lr, "adamw_lr": candidate.adamw_lr}
            rates[name] = moved_rate(rates[name], steps, start[name])
            return replace(candidate, lr=rates["lr"], adamw_lr=rates["adamw_lr"])

        best, last = 0, None
        while best != last:
            last = best
            best = min((last, last - 1, last + 1), key=lambda each: self.loss(method, neighbour(each)))
        return neighbour(best)

    def _write(self, record: Record) -> Record:
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(_line(record), flush=True)
        return record


def time_ratios(records: list[Record]) -> dict[str, float]:
    """Returns the ratio of each method's step time to the first one's, as measured last; {} if it was not measured."""
    timed = [record["ratios"] for record in records if record["method"] == TIMING]
    return timed[-1] if timed else {}


def last_loss(record: Record) -> float:
    """Returns the validation loss at the end of a run, infinity if it is not finite."""
    loss = record["curve"][-1]["loss"]
    return math.inf if loss is None else float(loss)


def moved_rate(rate: float, steps: int, start: float) -> float:
    """Returns a learning rate some factors away, with two digits, on a grid that all climbs from a start share."""
    position = round(math.log(rate / start, FACTOR)) + steps
    return float(f"{start * FACTOR**position:.2g}")


def read_records(results: Path) -> list[Record]:
    """Returns the records of a file, [] if there is no file."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


def _line(record: Record) -> str:
    shown: dict[str, Any] = {name: value for name, value in record.items() if name != "curve"}
    if "curve" in record:
        shown |= record["curve"][-1]
    return json.dumps(shown)
