"""One run, and the time of a step of several methods in turn."""

import copy
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.methods import Candidate, Method
from benchmarks.convergence.tasks import Batch, Task
from dion2_lightning import Dion2, build_optimizer

MAX_GRADIENT_NORM = 1.0

Record = dict[str, Any]


def train(
    task: Task, method: Method, candidate: Candidate, seed: int, steps: int, measure_every: int, device: torch.device
) -> Record:
    """Trains from the start and returns what happened, as plain data.

    Returns:
        The arguments; `curve`: for each measured step its number and the task's measures of the validation data, None
        where one is not finite; `seconds`: of the training steps alone, on a machine that may have been busy.
    """
    torch.manual_seed(seed)
    model = task.model().to(device).train()
    optimizer = _optimizer(task, method, candidate, model)
    schedule = task.schedule(optimizer, steps)
    curve: list[Record] = []
    seconds = 0.0
    for step, batch in enumerate(task.batches(seed, steps), start=1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        start = _now(device)
        _step(task, model, optimizer, batch)
        schedule.step()
        seconds += _now(device) - start
        if step % measure_every == 0 or step == steps:
            curve.append({"step": step, **_measure(task, model, device)})
    return {
        "method": method.name,
        **candidate.as_dict(),
        "seed": seed,
        "steps": steps,
        "curve": curve,
        "seconds": round(seconds, 1),
        **machine(device),
    }


def time_steps(
    task: Task, candidates: Mapping[Method, Candidate], device: torch.device, rounds: int = 8, steps: int = 3
) -> Record:
    """Times whole training steps of several methods, in turn in one process, on the same batch.

    Args:
        task: What to train.
        candidates: Methods and their settings; the first is what the others are compared with.
        device: Where.
        rounds: How often each takes its turn.
        steps: Of a turn.

    Returns:
        `milliseconds`: the median over the rounds of a step's time, by method. `ratios`: the median over the rounds of
        the ratio to the first method in the same round.
    """
    [batch] = task.batches(0, 1)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    torch.manual_seed(0)
    model = task.model().to(device).train()
    turns = []
    for method, candidate in candidates.items():
        own = copy.deepcopy(model)
        turns.append((method.name, own, _optimizer(task, method, candidate, own)))
    for _, own, optimizer in turns:
        _step(task, own, optimizer, batch)  # makes the state
    times: dict[str, list[float]] = {method.name: [] for method in candidates}
    for number in range(rounds):
        for name, own, optimizer in turns if number % 2 else reversed(turns):
            start = _now(device)
            for _ in range(steps):
                _step(task, own, optimizer, batch)
            times[name].append((_now(device) - start) / steps)
    base = times[turns[0][0]]
    return {
        "milliseconds": {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()},
        "ratios": {
            name: round(statistics.median(own / first for own, first in zip(each, base, strict=True)), 4)
            for name, each in times.items()
        },
        **machine(device),
    }


def machine(device: torch.device) -> Record:
    """Returns where and when a run is made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _optimizer(task: Task, method: Method, candidate: Candidate, model: nn.Module) -> Dion2:
    settings = {**method.settings, **candidate.settings(method, task.betas)}
    return build_optimizer(model, **settings, weight_decay=task.weight_decay, overrides=task.overrides(method))


def _step(task: Task, model: nn.Module, optimizer: Dion2, batch: Batch) -> None:
    with _precision(batch):
        loss = task.loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _measure(task: Task, model: nn.Module, device: torch.device) -> Record:
    model.eval()
    with torch.no_grad():
        measures = task.measure(model, device)
    model.train()
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


@contextmanager
def _precision(batch: Batch) -> Iterator[None]:
    """On a GPU products are taken in bfloat16, as one trains there."""
    device = batch["input_ids"].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
