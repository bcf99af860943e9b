"""The share of each phase in the time of a step of Dion2 or Dion3, on any device."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.machine import Timer, synchronize
from dion2_lightning import Dion2
from dion2_lightning.algorithms import dion2, neurons

FUNCTIONS: dict[tuple[ModuleType, str], str] = {
    (dion2, "accumulate_and_sum"): "accumulate, norms",
    (dion2, "select"): "select",
    (dion2, "take"): "gather and decay",
    (dion2, "polar_factors"): "orthonormalize",
    (neurons, "square_sums"): "neurons",
    (neurons, "factors"): "neurons",
    (dion2, "shrink"): "weight decay",
    (dion2, "apply"): "apply",
}
"""Functions that ``algorithms/dion2.py`` calls, and their phases; Triton decays the weights in "apply"."""

PHASES = [*dict.fromkeys(FUNCTIONS.values())]
"""Names in reports."""


def shares_of_phases(optimizer: Dion2, device: torch.device) -> dict[str, float]:
    """Return the share of each phase in the time of a step, in percent; "rest" is what remains."""
    timers: dict[str, list[Timer]] = defaultdict(list)
    whole = Timer(device)
    with _timed(timers, device):
        optimizer.step()
        timers.clear()
        synchronize(device)
        with whole:
            optimizer.step()
    total = whole.seconds()
    shares = {name: 100 * sum(timer.seconds() for timer in timers[name]) / total for name in PHASES}
    return {**shares, "rest": 100 - sum(shares.values())}


@contextmanager
def _timed(timers: dict[str, list[Timer]], device: torch.device) -> Iterator[None]:
    """Time every call of the update's functions."""

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            timers[phase].append(Timer(device))
            with timers[phase][-1]:
                return function(*arguments)

        return call

    before = {place: getattr(*place) for place in FUNCTIONS}
    for place, function in before.items():
        setattr(*place, timed(function, FUNCTIONS[place]))
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)
