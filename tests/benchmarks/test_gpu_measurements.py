"""The GPU check: timing of steps and of training, as far as a CPU can show it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks.gpu import compiled, step, training
from benchmarks.gpu.machine import Timer
from benchmarks.gpu.section import Options
from dion2_lightning import Dion2

CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps and waits for the device, in their order."""
    seen: list[str] = []
    monkeypatch.setattr(step, "synchronize", lambda _: seen.append("wait"))
    return seen


def test_every_step_that_is_timed_begins_on_an_idle_device(seen: list[str]) -> None:
    optimizers: Any = {name: SimpleNamespace(step=lambda name=name: seen.append(name)) for name in ("one", "other")}
    step._median_times(optimizers, CPU, rounds=1)
    assert seen == ["wait", "one", "wait", "other", "wait", "other", "wait", "one", "wait", "one", "wait", "other"]


def test_a_step_whose_phases_are_timed_begins_on_an_idle_device(seen: list[str]) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    optimizer = Dion2([weight])
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    step._phase_shares(optimizer, CPU)
    assert seen == ["step", "wait", "step"]


def test_launches_of_a_profiler_without_events_are_unknown() -> None:
    assert step._count_launches([]) == {"launches": None, "GPU busy, ms": None}
    seen = [
        SimpleNamespace(name="cudaLaunchKernel", device_type=DeviceType.CPU),
        SimpleNamespace(name="add", device_type=DeviceType.CUDA, time_range=SimpleNamespace(elapsed_us=lambda: 500.0)),
    ]
    assert step._count_launches(seen) == {"launches": 1, "GPU busy, ms": 0.5}


@pytest.mark.parametrize("loss", [2.0, math.inf, math.nan], ids=str)
def test_a_loss_that_is_not_finite_fails(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed_step(*_: Any) -> tuple[Timer, Timer, Tensor]:
        whole, own = Timer(CPU), Timer(CPU)
        with whole, own:
            pass
        return whole, own, torch.tensor(loss)

    monkeypatch.setattr(training, "OPTIMIZERS", {"AdamW": training.OPTIMIZERS["torch.optim.AdamW, fused"]})
    monkeypatch.setattr(training, "IN_BFLOAT16", ())
    monkeypatch.setattr(training, "timed_step", timed_step)
    options = Options("cpu", True, 60, "", "train")
    (row,) = training.train(options, name="smollm2-135m", rows=2, length=32)
    assert row["ok"] == (loss == 2.0)


@pytest.mark.parametrize(("tolerance", "ok"), [(compiled.TOLERANCE, True), (-1.0, False)])
def test_compiled_training_is_compared(tolerance: float, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "TOLERANCE", tolerance)
    plain, *rows = compiled.compare(Options("cpu", True, 60, "", "compiled"))
    assert [(row["compiled"], row["graph breaks at step()"]) for row in rows] == [("model", 0), ("training step", 2)]
    assert [row["loss"] for row in rows] == [plain["loss"]] * 2
    assert [row["ok"] for row in rows] == [ok] * 2
