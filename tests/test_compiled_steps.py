"""``torch.compile`` of a step, and of a training step around it: one graph break, no recompiles, the same weights.

Dynamo is what could fail here, so graphs run by its backend ``"eager"``; benchmarks/gpu/compiled.py compiles kernels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dion2_lightning import Dion2, build_optimizer
from dion2_lightning.compiled import NOT_COMPILED

STEPS = 10
Training = tuple[nn.Module, Dion2]
Step = Callable[[nn.Module, Dion2, Tensor], Any]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_training(lr: float) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))
    return model, build_optimizer(model, lr=lr, fraction=0.5)


def training_step(model: nn.Module, optimizer: Dion2, batch: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def with_compiled_optimizer() -> Step:
    steps: dict[Dion2, Any] = {}

    def step(model: nn.Module, optimizer: Dion2, batch: Tensor) -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        if optimizer not in steps:
            steps[optimizer] = torch.compile(optimizer.step, backend="eager")
        steps[optimizer]()

    return step


def train_two(step: Step, after_each: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Train two models in turn, at learning rates that change with every step; return weights and momenta."""
    trainings = [make_training(lr=1e-2), make_training(lr=3e-3)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for _, each in trainings]
    for number in range(STEPS):
        for model, optimizer in trainings:
            step(model, optimizer, torch.randn(16, 12, generator=torch.Generator().manual_seed(number)))
        for schedule in schedules:
            schedule.step()
        after_each()
    states = [value for _, optimizer in trainings for state in optimizer.state.values() for value in state.values()]
    return [*(parameter for model, _ in trainings for parameter in model.parameters()), *states]


@pytest.mark.parametrize(
    "make_step",
    [with_compiled_optimizer, lambda: torch.compile(training_step, backend="eager")],
    ids=["optimizer.step", "training step"],
)
def test_two_optimizers_with_changing_rates(make_step: Callable[[], Step]) -> None:
    """Dynamo breaks the graph at each optimizer's step, once at most, and compiles nothing again when rates change."""
    counted = []

    def count() -> None:
        at_step = sum(times for why, times in counters["graph_break"].items() if NOT_COMPILED in why)
        counted.append((at_step, sum(counters["graph_break"].values()), counters["frames"]["total"]))

    trained = train_two(make_step(), count)
    plain = train_two(training_step)
    assert all(torch.equal(a, b) for a, b in zip(trained, plain, strict=True))
    assert counted == [counted[0]] * STEPS
    assert 0 < counted[0][0] <= 2


def test_one_graph_is_refused_before_anything_is_changed() -> None:
    model, optimizer = make_training(lr=1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.ones(16, 12)).sum().backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_hooks_run_once_in_a_compiled_step() -> None:
    model, optimizer = make_training(lr=1e-2)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    model(torch.ones(16, 12)).sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    assert called == ["before", "after"]


def test_what_a_closure_calls_stays_compiled() -> None:
    """As in Lightning, whose training step is the closure."""
    model, optimizer = make_training(lr=1e-2)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = compiled(torch.ones(16, 12)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert len(graphs) == 1
    assert losses[-1] < losses[0]
