"""Compiled training steps: do they train as uncompiled ones do, with one graph break at the optimizer's step, or none?

CUDA graphs keep activations and gradients in memory of their own, which the next replay overwrites; the optimizer reads
gradients before it, and keeps none.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.gpu.machine import Timer
from benchmarks.gpu.section import Options, Row
from dion2_lightning import build_optimizer
from dion2_lightning.compiled import NOT_COMPILED

STEPS: Final = 10
WARM_UP: Final = 4
"""Steps in which torch may compile, and record CUDA graphs."""

WAYS: Final[dict[str, dict[str, Any]]] = {
    "graphs run as they are": {"backend": "eager"},
    "compiled kernels": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
}
"""What torch.compile is told. A CPU tries the first."""

PARTS: Final = {
    "model": {"graph breaks": 0, "capturable": False},
    "training step": {"graph breaks": 1, "capturable": False},
    "capturable training step": {"graph breaks": 0, "capturable": True},
}
"""What is compiled, and how often the graph breaks at each optimizer's step."""

TOLERANCE: Final = 1e-2
"""Of the losses, relative: compiled kernels round differently, and then a slice near the threshold may be selected."""

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Tensor]


def compare(options: Options) -> Iterator[Row]:
    """Yield a row for each way to compile the model, or a whole training step with the optimizer in it."""
    device = torch.device(options.device)
    expected, plain = train(training_step, device, options.tiny)
    yield {"compiled": "nothing", "by": None, "ms a step": 1e3 * plain, "loss": expected[-1]}
    for way, arguments in WAYS.items() if device.type == "cuda" else list(WAYS.items())[:1]:
        for part, expects in PARTS.items():
            make = with_compiled_model if part == "model" else with_everything_compiled
            torch._dynamo.reset()
            counters.clear()
            compiled_late: list[int] = []
            losses, seconds = train(
                make(arguments), device, options.tiny, compiled_late, capturable=bool(expects["capturable"])
            )
            at_step = sum(times for why, times in counters["graph_break"].items() if NOT_COMPILED in why)
            difference = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
            yield {
                "compiled": part,
                "by": way,
                "ms a step": 1e3 * seconds,
                "loss": losses[-1],
                "difference": difference,
                "graph breaks at step()": at_step,
                "compiled after the first steps": sum(compiled_late),
                "ok": difference < TOLERANCE and not any(compiled_late) and at_step == 2 * expects["graph breaks"],
            }


def train(
    step: Step,
    device: torch.device,
    tiny: bool,
    compiled_late: list[int] | None = None,
    *,
    capturable: bool = False,
) -> tuple[list[float], float]:
    """Train two models in turn, each with its optimizer, at rates that change with every step.

    Args:
        step: A training step.
        device: Of the models.
        tiny: Whether they are.
        compiled_late: Gets how many frames dynamo has compiled in each step after the first ones.
        capturable: Whether the optimizers' steps are, by learning rates that are tensors.

    Returns:
        The losses, and the median seconds of a later step.
    """
    width = 32 if tiny else 1024
    torch.manual_seed(0)
    trainings = []
    for lr in (1e-3, 3e-4):
        model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(device)
        rate = torch.tensor(lr, device=device) if capturable else lr
        trainings.append((model, build_optimizer(model, lr=rate, capturable=capturable)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for _, each in trainings]
    batch = torch.randn(4 * width, width, device=device)
    losses, timers = [], []
    for number in range(STEPS):
        before = counters["frames"]["total"]
        for model, optimizer in trainings:
            timers.append(Timer(device))
            with timers[-1]:
                losses.append(step(model, optimizer, batch).detach().clone())
        for schedule in schedules:
            schedule.step()
        if compiled_late is not None and number >= WARM_UP:
            compiled_late.append(counters["frames"]["total"] - before)
    seconds = [timer.seconds() for timer in timers[2 * WARM_UP :]]
    return torch.stack(losses).tolist(), sorted(seconds)[len(seconds) // 2]


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    """Take a training step, and return the loss before it."""
    optimizer.zero_grad()
    loss = (model(batch) - batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def with_everything_compiled(arguments: dict[str, Any]) -> Step:
    """Return the training step compiled as a whole."""
    step: Step = torch.compile(training_step, **arguments)
    return step


def with_compiled_model(arguments: dict[str, Any]) -> Step:
    """Return the training step with a compiled model, and the optimizer outside."""
    compiled: dict[nn.Module, Any] = {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
        if model not in compiled:
            compiled[model] = torch.compile(model, **arguments)
        return training_step(compiled[model], optimizer, batch)

    return step
