"""How fast a run goes, by a clock that the test moves."""

import pytest
import torch

from recipes import throughput
from recipes.throughput import WINDOW, Speedometer, peak_flops


class Clock:
    seconds = 0.0

    def read(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock.read)
    return clock


def test_pauses_do_not_count_and_steps_between_them_do(clock: Clock) -> None:
    """Each step takes two seconds, the last half of it on the accelerator while the next one is waited for."""
    speed = Speedometer(0.0, torch.device("cpu"), torch.float32)
    for step in range(1, WINDOW + 3):
        clock.seconds += 1
        speed.step(tokens=60)
        clock.seconds += 1
        expected = {} if step <= WINDOW else {"tokens_per_second": 30.0}
        assert speed.figures() == expected, step
        speed.pause()
        clock.seconds += 1000
        speed.go_on()


def test_what_comes_before_the_first_step_does_not_count(clock: Clock) -> None:
    speed = Speedometer(0.0, torch.device("cpu"), torch.float32)
    speed.pause()
    clock.seconds += 1000
    speed.go_on()
    for _ in range(WINDOW + 1):
        clock.seconds += 2
        speed.step(tokens=60)
    assert speed.figures() == {"tokens_per_second": 30.0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA X1", None)],
)
@pytest.mark.filterwarnings("ignore:FLOPs not found")
def test_peaks_leave_sparsity_out(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
