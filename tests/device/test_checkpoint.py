"""A checkpoint saved on one device resumes on another, bit for bit."""

import pytest
import torch
from torch import Tensor

from dion2_lightning import Dion2, SelectionTracker
from tests.every_kind import fill, groups_of_every_kind, matrices_of, parameters_of, selections_of
from tests.test_state_dict import through_a_file

STEPS = 3


def make_optimizer_and_tracker(device: str) -> tuple[Dion2, SelectionTracker]:
    optimizer = Dion2(groups_of_every_kind(device), lr=0.1)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    return optimizer, tracker


def train(optimizer: Dion2, first: int) -> list[list[Tensor]]:
    """Take steps on gradients that do not depend on the weights; return what each selects."""
    selected = []
    for step in range(first, first + STEPS):
        fill(optimizer, gradients=step)
        optimizer.step()
        selected.append([indices.cpu() for indices in selections_of(optimizer)])
    return selected


def weights_and_state(optimizer: Dion2) -> list[Tensor]:
    """Weights and state, on the CPU."""
    states = (value for parameter in parameters_of(optimizer) for value in optimizer.state[parameter].values())
    return [tensor.detach().cpu() for tensor in (*parameters_of(optimizer), *states)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def transfer(
    optimizer: Dion2, tracker: SelectionTracker, device: str, map_location: str | None
) -> tuple[Dion2, SelectionTracker]:
    """Save both, and load them into new ones on ``device``; ``map_location`` is that of ``torch.load``."""
    loaded, loaded_tracker = make_optimizer_and_tracker(device)
    with torch.no_grad():
        for new, old in zip(parameters_of(loaded), parameters_of(optimizer), strict=True):
            new.copy_(old)
    loaded.load_state_dict(through_a_file(optimizer.state_dict(), map_location))
    loaded_tracker.load_state_dict(through_a_file(tracker.state_dict(), map_location))
    return loaded, loaded_tracker


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("map_location", ["cpu", None])
def test_to_the_cpu_and_back(device: str, map_location: str | None) -> None:
    optimizer, tracker = make_optimizer_and_tracker(device)
    fill(optimizer, weights=100)
    train(optimizer, first=0)
    on_cpu, tracker_on_cpu = transfer(optimizer, tracker, "cpu", map_location)
    assert_same(weights_and_state(on_cpu), weights_and_state(optimizer))
    back, tracker_back = transfer(on_cpu, tracker_on_cpu, device, map_location)
    assert_same(weights_and_state(back), weights_and_state(optimizer))
    for each in (optimizer, on_cpu, back):
        for parameter, state in each.state.items():
            assert {value.device for value in state.values()} == {parameter.device}

    expected = train(optimizer, first=STEPS)
    for each in (on_cpu, back):
        for found, wanted in zip(train(each, first=STEPS), expected, strict=True):
            assert_same(found, wanted)
    for each in (on_cpu, back):
        for matrix, other in zip(matrices_of(each), matrices_of(optimizer), strict=True):
            assert torch.equal(each.state[matrix]["momentum"].cpu(), optimizer.state[other]["momentum"].cpu())
    assert_same(weights_and_state(back), weights_and_state(optimizer))
    metrics, metrics_back = tracker.pop_metrics(), tracker_back.pop_metrics()
    assert metrics is not None
    assert metrics_back is not None
    # A GPU adds up the matrices of a stack in no fixed order.
    assert metrics_back.overall == pytest.approx(metrics.overall, rel=1e-9)
    assert metrics.step == metrics_back.step == 2 * STEPS


def test_weights_and_moments_that_were_moved_without_their_step_counts(gpu: str) -> None:
    """As Lightning does: to the CPU when training ends, back to the GPU when it continues."""
    optimizer, _ = make_optimizer_and_tracker(gpu)
    train(optimizer, first=0)
    for device in ("cpu", gpu):
        for parameter, state in optimizer.state.items():
            parameter.data, parameter.grad = parameter.data.to(device), None
            parameter.grad = torch.zeros_like(parameter)
            state.update({name: value.to(device) for name, value in state.items() if name != "step"})
        train(optimizer, first=STEPS)
        counts = [state["step"] for state in optimizer.state.values() if "step" in state]
        assert {count.device.type for count in counts} == {device}
    assert {count.item() for count in counts} == {3 * STEPS}


def test_a_model_that_was_moved_without_its_state(gpu: str) -> None:
    """As ``model.to(device)`` does after the first steps: it trains on as if all had been moved."""
    weights = []
    for moved_by_hand in (False, True):
        optimizer, _ = make_optimizer_and_tracker("cpu")
        fill(optimizer, weights=100)
        train(optimizer, first=0)
        for parameter, state in optimizer.state.items():
            parameter.data, parameter.grad = parameter.data.to(gpu), None
            parameter.grad = torch.zeros_like(parameter)
            if moved_by_hand:
                state.update({name: value.to(gpu) for name, value in state.items()})
        train(optimizer, first=STEPS)
        assert {each.device.type for state in optimizer.state.values() for each in state.values()} == {"cuda"}
        weights.append(weights_and_state(optimizer))
    assert_same(*weights)
