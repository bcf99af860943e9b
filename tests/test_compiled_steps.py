"""``torch.compile`` of a step, and of a training step around it: no recompiles, and the same weights.

The graph breaks once at a step; with ``capturable=True`` not at all. Dynamo is what could fail here, so most graphs run
by its backend ``"eager"``; benchmarks/gpu/compiled.py compiles kernels.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dion2_lightning import Dion2, SelectionTracker, build_optimizer
from dion2_lightning.compiled import NOT_COMPILED
from tests.every_kind import fill, groups_of_every_kind, parameters_of, selections_of
from tests.test_skipped_steps import assert_equal, weights_and_state

STEPS = 10
Training = tuple[nn.Module, Dion2]
Step = Callable[[nn.Module, Dion2, Tensor], Any]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_training(lr: float | Tensor, **settings: Any) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))
    return model, build_optimizer(model, lr=lr, fraction=0.5, **settings)


def training_step(model: nn.Module, optimizer: Dion2, batch: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def with_compiled_optimizer(**arguments: Any) -> Step:
    steps: dict[Dion2, Any] = {}

    def step(model: nn.Module, optimizer: Dion2, batch: Tensor) -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        if optimizer not in steps:
            steps[optimizer] = torch.compile(optimizer.step, **{"backend": "eager", **arguments})
        steps[optimizer]()

    return step


def train_two(
    step: Step, after_each: Callable[[], None] = lambda: None, *, tensors: bool = False, **settings: Any
) -> list[Tensor]:
    """Train two models in turn, at learning rates that change with every step; return weights and momenta."""
    rates = [torch.tensor(lr) if tensors else lr for lr in (1e-2, 3e-3)]
    trainings = [make_training(lr=lr, **settings) for lr in rates]
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


# capturable=True: the step is an operator of the graph


BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    return name


def breaks_at_step() -> int:
    """Graph breaks that are neither at ``zero_grad()`` nor at ``backward()``, where torch breaks by itself."""
    of_torch = ("Optimizer.zero_grad", "Tensor.backward()")
    return sum(times for why, times in counters["graph_break"].items() if not any(each in why for each in of_torch))


def count_graphs(counted: list[tuple[int, int]]) -> None:
    counted.append((breaks_at_step(), counters["stats"]["unique_graphs"]))


@pytest.mark.parametrize("tensors", [True, False], ids=["tensors", "floats"])
def test_capturable_steps_are_one_graph(tensors: bool, backend: str) -> None:
    """Rates are seen as schedulers change them. Nothing is compiled again, but once where the rates are floats."""
    counted: list[tuple[int, int]] = []
    step = with_compiled_optimizer(backend=backend, fullgraph=True)
    trained = train_two(step, lambda: count_graphs(counted), tensors=tensors, capturable=True)
    assert_equal(trained, train_two(training_step, tensors=tensors, capturable=True))
    check_graphs(counted, tensors)


@pytest.mark.parametrize("tensors", [True, False], ids=["tensors", "floats"])
@pytest.mark.parametrize("backend", BACKENDS[:2])  # inductor's kernels of the model would round differently
def test_capturable_steps_break_no_training_step(backend: str, tensors: bool) -> None:
    counted: list[tuple[int, int]] = []
    step: Step = torch.compile(training_step, backend=backend)
    trained = train_two(step, lambda: count_graphs(counted), tensors=tensors, capturable=True)
    assert_equal(trained, train_two(training_step, tensors=tensors, capturable=True))
    check_graphs(counted, tensors)


def check_graphs(counted: list[tuple[int, int]], tensors: bool) -> None:
    assert counted[2:] == [counted[2]] * (STEPS - 2)
    assert (counted[0] == counted[-1]) == tensors
    assert counted[-1][0] == 0 < counted[0][1]


def test_every_kind_in_one_graph(backend: str) -> None:
    def optimizer_of() -> Dion2:
        rates = {name: torch.tensor(0.1) for name in ("lr", "weight_decay", "momentum")}
        optimizer = Dion2(groups_of_every_kind("cpu"), **rates, capturable=True, max_grad_norm=1.0)
        fill(optimizer, weights=0)
        return optimizer

    optimizer, control = optimizer_of(), optimizer_of()
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    for seed in range(3):
        for each, its_step in ((optimizer, step), (control, control.step)):
            fill(each, gradients=seed)
            each.param_groups[0]["lr"].fill_(0.1 / (1 + seed))
            its_step()
        assert_equal(weights_and_state(optimizer), weights_and_state(control))
        for found, expected in zip(parameters_of(optimizer), parameters_of(control), strict=True):
            assert torch.equal(found.grad, expected.grad)  # clipped
        for indices, its_twin in zip(selections_of(optimizer), selections_of(control), strict=True):
            assert torch.equal(indices, its_twin)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_the_graph_changes_before_is_seen(backend: str) -> None:
    """In a graph without mutations gradients and rates are then other tensors than those that the optimizer has."""

    def change_and_step(optimizer: Dion2) -> Tensor:
        matrix = optimizer.param_groups[0]["params"][0]
        before = matrix.clone()
        matrix.grad.mul_(0.5)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        optimizer.step()
        return matrix - before

    changes = []
    for function in (change_and_step, torch.compile(change_and_step, backend=backend, fullgraph=True)):
        model, optimizer = make_training(torch.tensor(0.1), capturable=True)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                changes.append(function(optimizer))
        changes += [optimizer.param_groups[0]["lr"], *weights_and_state(optimizer)]
    half = len(changes) // 2
    assert all(torch.equal(a, b) for a, b in zip(changes[:half], changes[half:], strict=True))
    assert changes[0].any()


def test_gradients_that_the_graph_assigns_are_seen(backend: str) -> None:
    """Also that one has none: the parameters' ``grad`` is set only after the graph has run."""

    def assign_and_step(optimizer: Dion2, gradients: list[Tensor | None]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    results = []
    for function in (assign_and_step, torch.compile(assign_and_step, backend=backend, fullgraph=True)):
        _, optimizer = make_training(torch.tensor(0.1), capturable=True)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            shapes = [parameter.shape for parameter in parameters_of(optimizer)]
            gradients: list[Tensor | None] = [torch.randn(shape, generator=generator) for shape in shapes]
            gradients[step] = None
            with torch.no_grad():
                function(optimizer, gradients)
        results.append(weights_and_state(optimizer))
    assert_equal(*results)


def test_loaded_and_replaced_state_is_seen() -> None:
    model, optimizer = make_training(torch.tensor(0.1), capturable=True)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)

    def one_step() -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step()
        entries = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
        return copy.deepcopy([*(parameter.detach() for parameter in model.parameters()), *entries])

    one_step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = one_step()
    for load in (optimizer.load_state_dict, optimizer.carry_over):
        load(copy.deepcopy(saved))
        model.load_state_dict(weights)
        assert_equal(one_step(), expected)
    optimizer.load_state_dict(copy.deepcopy(saved))
    model.load_state_dict(weights)
    for state in optimizer.state.values():
        state.update({name: tensor.clone() for name, tensor in state.items()})
    assert_equal(one_step(), expected)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(saved))
        model.load_state_dict(weights)
        assert_equal(one_step(), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_hooks_and_statistics_in_one_graph() -> None:
    model, optimizer = make_training(1e-2, capturable=True)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for number in range(2):
        model(torch.ones(16, 12)).sum().backward()
        step()
        assert called == ["before", "after"] * (number + 1)
        assert tracker.pop_metrics() is not None


def test_an_error_leaves_the_tensors_as_they_were() -> None:
    model, optimizer = make_training(torch.tensor(0.1), capturable=True, check_finite=True)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    kept = [(parameter.data_ptr(), parameter.grad) for parameter in model.parameters()]
    before = weights_and_state(optimizer) if optimizer.state else None
    with pytest.raises(FloatingPointError, match="has a gradient with NaN or Inf"):
        step()
    assert before is None
    for parameter, (address, gradient) in zip(model.parameters(), kept, strict=True):
        assert parameter.data_ptr() == address
        assert parameter.grad is gradient


def test_a_closure_breaks_the_graph() -> None:
    _, optimizer = make_training(1e-2, capturable=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no closure, no offload and no DTensors"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)(lambda: torch.ones(()))


def test_state_on_the_host_breaks_the_graph() -> None:
    """A step puts copies in the state's place, and a graph would keep what was there before."""
    _, optimizer = make_training(1e-2, capturable=True, offload="cpu")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no closure, no offload and no DTensors"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_state_that_moves_to_the_host_later_breaks_the_graph() -> None:
    _, optimizer = make_training(1e-2, capturable=True)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    step()
    optimizer.offload = "cpu"
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no closure, no offload and no DTensors"):
        step()


def test_state_that_a_compiled_step_replaces_is_no_silent_loss() -> None:
    """By "aot_eager": a graph of "eager" that raises leaves torch.no_grad() on."""
    model, optimizer = make_training(torch.tensor(0.1), capturable=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    step()
    saved = copy.deepcopy(optimizer.state_dict())
    hook = optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(state_dtype="float64"))
    with pytest.raises(RuntimeError, match="has replaced state that its graph has, as where a hook changes settings"):
        step()
    hook.remove()
    with pytest.raises(RuntimeError, match=r"an earlier compiled step\(\) failed partway through"):
        step()
    optimizer.load_state_dict(saved)
    step()


@pytest.mark.parametrize("call", [lambda step: step(None), lambda step: step(closure=None)])
def test_no_closure_may_be_said(call: Callable[[Any], None]) -> None:
    """As Accelerate says it in every step."""
    _, optimizer = make_training(1e-2, capturable=True)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    torch.compile(lambda: call(optimizer.step), backend="eager", fullgraph=True)()
    assert breaks_at_step() == 0


def test_frozen_parameters_get_no_state() -> None:
    """A checkpoint with an empty one could not be loaded."""
    model, optimizer = make_training(1e-2, capturable=True)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert frozen not in optimizer.state
    _, resumed = make_training(1e-2)
    resumed.param_groups[0]["params"][0].requires_grad_(False)
    resumed.load_state_dict(optimizer.state_dict())
