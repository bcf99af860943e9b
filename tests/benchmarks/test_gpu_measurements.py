"""The GPU check: timing of steps and of training, as far as a CPU can show it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks import phases
from benchmarks.gpu import captured, compiled, step, training
from benchmarks.gpu.flops import peak_flops, training_flops
from benchmarks.gpu.machine import Timer
from benchmarks.gpu.section import Options
from dion2_lightning import Dion2
from dion2_lightning.algorithms import neurons

CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps and waits for the device, in their order."""
    seen: list[str] = []
    for module in (step, phases):
        monkeypatch.setattr(module, "synchronize", lambda _: seen.append("wait"))
    return seen


def test_every_step_is_timed_from_an_idle_device_to_an_idle_device(
    seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the state that leaves on other streams."""
    monkeypatch.setattr(Timer, "_record", lambda _, index: seen.append(("begin", "end")[index]))
    monkeypatch.setattr(Timer, "seconds", lambda _: 1.0)
    optimizers: Any = {name: SimpleNamespace(step=lambda name=name: seen.append(name)) for name in ("one", "other")}
    step.median_times(optimizers, CPU, rounds=1)
    in_turn = ("one", "other", "other", "one", "one", "other")
    assert seen == [event for name in in_turn for event in ("wait", "begin", name, "wait", "end")]


def test_a_step_whose_phases_are_timed_begins_on_an_idle_device(seen: list[str]) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    optimizer = Dion2([weight])
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    phases.shares_of_phases(optimizer, CPU)
    assert seen == ["step", "wait", "step"]


def test_neurons_are_a_phase() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    before = neurons.factors
    shares = phases.shares_of_phases(Dion2([weight], normalize_neurons=True), CPU)
    assert shares["neurons"] > 0.0
    assert sum(shares.values()) == pytest.approx(100.0)
    assert neurons.factors is before


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
    breaks = [("model", 0), ("training step", 2), ("capturable training step", 0)]
    assert [(row["compiled"], row["graph breaks at step()"]) for row in rows] == breaks
    assert [row["loss"] for row in rows] == [plain["loss"], plain["loss"], pytest.approx(plain["loss"], rel=1e-4)]
    assert [row["ok"] for row in rows] == [ok] * 3


def test_captured_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU rates that are tensors are, and each capture is skipped by name."""
    options = Options("cpu", True, 60, "", "captured")
    rows = list(captured.compare(options))
    assert [(row["step of"], row["rates"]) for row in rows] == [
        (way, rates) for way in captured.WAYS for rates in ("tensors", "tensors, captured")
    ]
    assert all(row["ok"] for row in rows[::2])
    assert {row["skipped"] for row in rows[1::2]} == {"a CUDA graph needs a GPU"}
    monkeypatch.setattr(Tensor, "fill_", lambda tensor, _: tensor)  # the rates stay as they are
    assert not any(row["ok"] for row in list(captured.compare(options))[::2])


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA X1", None)],
)
@pytest.mark.filterwarnings("ignore:FLOPs not found")
def test_peaks_leave_sparsity_out(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_step_takes_three_forward_passes() -> None:
    """Two layers of width 48 with feed-forward layers of 128, and a head of 256; attention on 3 heads of 16."""
    model = training.make_model("smollm2-135m", Options("cpu", True, 60, "", "train"), 32, torch.float32)
    products = 2 * (4 * 48 * 48 + 3 * 48 * 128) + 48 * 256
    attention = 2 * 2 * 3 * 32 * 16
    expected = 3 * 2 * 5 * 32 * (products + attention)
    assert training_flops(model, torch.zeros(5, 32, dtype=torch.long)) == pytest.approx(expected, rel=1e-3)
