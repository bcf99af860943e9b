"""``offload="cpu"``: the same bits as without, on a twin of a second device.

What is copied when and to where, and that nobody waits: tests/test_host_synchronisation.py, on fake CUDA tensors.
"""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2, SelectionTracker, build_optimizer
from dion2_lightning.offload import Lanes, OffloadedTensor
from tests.every_kind import fill, groups_of_every_kind, parameters_of, selections_of
from tests.second_device import SecondDevice, offloading_on_a_cpu

STEPS = 4
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one visit": (2**28, {}),
    "several visits": (2**17, {}),
    "a visit for each parameter": (1, {}),
    "skipped steps": (2**17, {"check_finite": "skip"}),
    "cautious decay": (2**17, {"cautious_weight_decay": True, "weight_decay": 1.0}),
}
"""The working memory without offloading, and settings."""


@pytest.fixture
def second_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondDevice]:
    with offloading_on_a_cpu(monkeypatch) as device:
        yield device


@pytest.fixture
def deterministic() -> Iterator[None]:
    """On a CPU the last bits of products depend on what is multiplied together, unless one asks for the opposite."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def optimizer_of(offload: str | None, **settings: Any) -> Dion2:
    optimizer = Dion2(groups_of_every_kind("cpu"), **{"lr": 0.1, **settings}, offload=offload)
    fill(optimizer, weights=0)
    return optimizer


def train(optimizer: Dion2, first: int, last: int) -> list[Any]:
    """Take some steps, the second one with a gradient that is not finite; return the metrics of each."""
    tracker, metrics = SelectionTracker(every=1), []
    tracker.attach(optimizer)
    for step in range(first, last):
        fill(optimizer, gradients=step + 1)
        if step == 1 and optimizer.param_groups[0]["check_finite"] == "skip":
            next(parameters_of(optimizer)).grad[0, 0] = math.inf
        optimizer.step()
        metrics.append(tracker.pop_metrics())
    tracker.detach()
    return metrics


def contents(optimizer: Dion2) -> list[Tensor]:
    """Weights, state and selections."""
    state = optimizer.state_dict()["state"].values()
    return [
        *(parameter.detach() for parameter in parameters_of(optimizer)),
        *(tensor for entries in state for _, tensor in sorted(entries.items())),
        *selections_of(optimizer),
    ]


def assert_equal(found: Dion2, expected: Dion2) -> None:
    for one, other in zip(contents(found), contents(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize(("memory", "settings"), CASES.values(), ids=CASES)
def test_the_bits_are_the_same(
    memory: int, settings: dict[str, Any], second_device: SecondDevice, deterministic: None
) -> None:
    """Weights, state, selections and metrics, also after a resume from a checkpoint.

    One half of the working memory is for the state that is fetched. The other half cuts stacks of matrices and entries
    of AdamW as all of it does without offloading, and what is cut has other sums and last bits.
    """
    plain = optimizer_of(None, working_memory=memory, **settings)
    twin = optimizer_of("cpu", working_memory=2 * memory, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dion2_lightning.offload.is_away", lambda *_: False)
        expected = train(plain, 0, STEPS // 2) + train(plain, STEPS // 2, STEPS)
    found = train(twin, 0, STEPS // 2)
    resumed = optimizer_of("cpu", working_memory=2 * memory, **settings)
    for old, new in zip(parameters_of(twin), parameters_of(resumed), strict=True):
        new.data.copy_(old)
    resumed.load_state_dict(copy.deepcopy(twin.state_dict()))
    found += train(resumed, STEPS // 2, STEPS)
    assert found == expected
    assert_equal(resumed, plain)
    entries = sum(tensor.numel() for state in plain.state.values() for tensor in state.values() if tensor.ndim)
    assert sum(second_device.fetched) == STEPS * entries


def use_at_once(lanes: Lanes, arrived: torch.Event) -> None:
    pass


def take_back_at_once(lanes: Lanes, tensors: list[OffloadedTensor]) -> None:
    with torch.cuda.stream(lanes._outgoing):
        for tensor in tensors:
            tensor.leave()


@pytest.mark.parametrize("without_wait", [use_at_once, take_back_at_once])
def test_the_twin_shows_a_missing_wait(
    without_wait: Callable[..., None], second_device: SecondDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until somebody waits, the host has the state of before the step."""
    optimizer = Dion2([nn.Parameter(torch.ones(4, 6))], lr=0.1, offload="cpu")
    [parameter] = parameters_of(optimizer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum"]
    assert not momentum.any()
    assert optimizer.state_dict()["state"][0]["momentum"].any()
    monkeypatch.setattr(Lanes, without_wait.__name__.removesuffix("_at_once"), without_wait)
    optimizer.step()
    optimizer.step()
    assert parameter.isnan().any()


@pytest.mark.parametrize("change", ["copied", "pickled", "moved back", "in another precision", "loaded"])
def test_what_reads_the_state_waits_for_it(change: str, second_device: SecondDevice) -> None:
    optimizer = Dion2([nn.Parameter(torch.ones(4, 6))], lr=0.1, momentum=0.0, fraction=1.0, offload="cpu")
    [parameter] = parameters_of(optimizer)
    parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()
    if change == "loaded":
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        optimizer.load_state_dict(before)
    elif change in ("copied", "pickled"):
        optimizer = copy.deepcopy(optimizer) if change == "copied" else pickle.loads(pickle.dumps(optimizer))
        assert optimizer.offload == "cpu"
    else:
        name, value = ("state_dtype", "float64") if change == "in another precision" else ("momentum", 0.5)
        optimizer.param_groups[0][name] = value
        optimizer.step()
        assert (optimizer.state_dict()["state"][0]["momentum"] == 1.5).all()
        return
    [parameter] = parameters_of(optimizer)
    assert (optimizer.state[parameter]["momentum"] == 1.0).all()


def test_parameters_on_the_host_have_their_state_beside_them() -> None:
    """As under FSDP2's CPUOffloadPolicy: there is nothing to do."""
    plain, offloaded = optimizer_of(None), optimizer_of("cpu")
    for optimizer in (plain, offloaded):
        for step in range(2):
            fill(optimizer, gradients=step)
            optimizer.step()
    assert_equal(offloaded, plain)


def test_the_argument() -> None:
    model = nn.Linear(4, 6)
    assert build_optimizer(model, offload="cpu").offload == "cpu"
    assert build_optimizer(model).offload is None
    with pytest.raises(ValueError, match="offload must be one of 'cpu', None, got 'disk'"):
        build_optimizer(model, offload="disk")


def test_other_devices_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(4, 6, device="meta"))
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match="parameter 0 is on 'meta', from where offload='cpu' moves no state"):
        Dion2([parameter], offload="cpu").step()
