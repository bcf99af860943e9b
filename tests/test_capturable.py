"""``capturable=True``: rates are tensors, which are changed in place, and a step has the bits of a step by floats."""

import copy
import itertools
import math
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2, SelectionTracker, build_optimizer
from dion2_lightning.algorithms.hyperparameters import RATES
from dion2_lightning.kernels.fused import is_capturing
from dion2_lightning.parameter_groups import refuse_misplaced_rates
from tests.every_kind import fill, groups_of_every_kind, parameters_of
from tests.test_skipped_steps import assert_equal, weights_and_state

RATES_OF_GROUPS = ("lr", "weight_decay", "momentum")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def groups() -> list[dict[str, Any]]:
    """Every kind of parameter; and weights in float64, momenta in half precision, and AdamW in every precision."""
    more: list[dict[str, Any]] = [
        {"params": [zeros(40, 96), zeros(96, 40)], "state_dtype": "bfloat16", "nesterov": True},
        {"params": [zeros(40, 96, dtype=torch.float64), zeros(96, 40, dtype=torch.float64)], "nesterov": True},
        {"params": [zeros(40, 96, dtype=torch.float64)], "algorithm": "dion"},
        {"params": [zeros(40, 96), zeros(96, 40, dtype=torch.float16)], "algorithm": "dion3"},
        {"params": [zeros(30, 8), zeros(9, dtype=torch.bfloat16)], "algorithm": "adamw", "cautious_weight_decay": True},
        {"params": [zeros(30, dtype=torch.float64)], "algorithm": "adamw"},
    ]
    return [*groups_of_every_kind("cpu"), *more]


def optimizer_of(*, tensors: torch.dtype | None, rates: tuple[str, ...] = RATES_OF_GROUPS, **settings: Any) -> Dion2:
    """Rates of each group are floats that float32 has, or tensors of a dtype."""
    values = {"lr": 0.1, "weight_decay": 0.25, "momentum": 0.75}
    exact = {name: torch.tensor(value, dtype=torch.float32).item() for name, value in values.items()}
    made = []
    for group in groups():
        has = rates if group.get("algorithm") != "adamw" else [name for name in rates if name != "momentum"]
        own: dict[str, Any] = {name: exact[name] for name in has}
        if tensors is not None:
            own = {name: torch.tensor(value, dtype=tensors) for name, value in own.items()}
        made.append({**group, **own})
    left = {name: value for name, value in exact.items() if name not in rates}
    optimizer = Dion2(made, **left, **settings, capturable=tensors is not None)
    fill(optimizer, weights=0)
    return optimizer


def train(optimizer: Dion2, steps: int = 4) -> list[Tensor]:
    """Take steps at rates that a scheduler changes; one expert of each stack is idle now and then."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**-step)
    for seed in range(steps):
        fill(optimizer, gradients=seed)
        for parameter in parameters_of(optimizer):
            if parameter.ndim == 3 and seed % 2:
                parameter.grad[1].zero_()
        optimizer.step()
        schedule.step()
    return weights_and_state(optimizer)


@pytest.mark.parametrize("tensors", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"check_finite": "skip", "skip_idle_experts": True},
        {"cautious_weight_decay": True, "rounding": "nearest"},
        {"max_grad_norm": 1.0, "working_memory": 100_000},
    ],
    ids=str,
)
def test_tensors_have_the_bits_of_floats(tensors: torch.dtype, settings: dict[str, Any]) -> None:
    expected = train(optimizer_of(tensors=None, **settings))
    assert_equal(train(optimizer_of(tensors=tensors, **settings)), expected)


@pytest.mark.parametrize("name", RATES_OF_GROUPS)
def test_one_rate_may_be_a_tensor(name: str) -> None:
    expected = train(optimizer_of(tensors=None, rates=(name,)))
    assert_equal(train(optimizer_of(tensors=torch.float64, rates=(name,))), expected)


def test_adamw_is_that_of_torch() -> None:
    weights = [torch.linspace(-1, 1, 12) for _ in range(2)]
    ours, theirs = (nn.Parameter(weight) for weight in weights)
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    optimizer = Dion2([{"params": [ours], "algorithm": "adamw"}], lr=rates[0], weight_decay=0.5, capturable=True)
    control = torch.optim.AdamW([theirs], lr=rates[1], weight_decay=0.5, fused=True, capturable=True)
    for step in range(4):
        for each, parameter, lr in ((optimizer, ours, rates[0]), (control, theirs, rates[1])):
            lr.fill_(0.1 / (1 + step))
            parameter.grad = torch.sin(torch.arange(12.0) + step)
            each.step()
    assert torch.equal(ours, theirs)


def test_rates_of_build_optimizer() -> None:
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 12))
    rates = {name: torch.tensor(0.5**index) for index, name in enumerate(RATES)}
    optimizer = build_optimizer(model, **rates, capturable=True)
    matrices, rest, biases = optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"]) == (rates["lr"], rates["weight_decay"])
    assert matrices["momentum"] is rates["momentum"]
    assert (rest["lr"], rest["weight_decay"]) == (rates["adamw_lr"], rates["adamw_weight_decay"])
    assert biases["weight_decay"] == 0.0
    assert optimizer.is_capturable


def test_reduce_on_plateau_wants_a_tensor_for_each_group() -> None:
    """It multiplies a shared one once for every group, as in torch.optim.AdamW."""
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 12))
    optimizer = build_optimizer(model, lr=torch.tensor(0.5), capturable=True)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].clone()
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(2):
        model(torch.arange(6)).sum().backward()
        optimizer.step()
        schedule.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25] * 3


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (
            {"capturable": False},
            TypeError,
            "lr must be a number, got a Tensor; pass a float, or capturable=True",
        ),
        ({"lr": torch.ones(1)}, ValueError, r"lr must be a 0-d tensor of floating point, got shape \(1,\)"),
        ({"lr": torch.tensor(1)}, ValueError, r"lr must be a 0-d tensor of floating point, got .* torch.int64"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"momentum": torch.tensor(1.0)}, ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"fraction": torch.tensor(0.5)}, TypeError, "fraction must be a number, got a Tensor; pass a float"),
        ({"capturable": 1, "lr": 0.1}, TypeError, "capturable must be True or False, got 1"),
    ],
    ids=str,
)
def test_other_tensors_are_refused(group: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"group 0: {message}"):
        Dion2([{"params": [zeros(4, 6)], "lr": torch.tensor(0.1), "capturable": True, **group}])


def test_a_tensor_on_another_device_is_refused() -> None:
    optimizer = optimizer_of(tensors=torch.float32)
    optimizer.param_groups[2]["weight_decay"] = torch.tensor(0.1, device="meta")
    message = "'dion2-3': weight_decay is a tensor on 'meta' and parameter 0 on 'cpu'; put it on the parameters' device"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[2].update(weight_decay=torch.tensor(0.1), capturable=False)
    with pytest.raises(TypeError, match="'dion2-3': lr must be a number, got a Tensor"):
        optimizer.step()
    assert not optimizer.state


# Checkpoints and copies


def values_of(optimizer: Dion2, name: str = "lr") -> list[Any]:
    return [group[name] for group in optimizer.param_groups if name in group]


@pytest.mark.parametrize("saved_as", [torch.float32, None], ids=["tensors", "floats"])
def test_a_checkpoint_fills_the_tensors(saved_as: torch.dtype | None) -> None:
    """Rates, state and what was selected stay where they are, as captured graphs read and write them."""
    saved = optimizer_of(tensors=saved_as)
    expected = train(saved)
    optimizer = optimizer_of(tensors=torch.float32)
    train(optimizer, steps=2)
    tensors = [
        *(value for name in RATES_OF_GROUPS for value in values_of(optimizer, name)),
        *(value for state in optimizer.state.values() for value in state.values()),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for parameter, its_twin in zip(parameters_of(optimizer), parameters_of(saved), strict=True):
        parameter.data.copy_(its_twin.data)
    found = [
        *(value for name in RATES_OF_GROUPS for value in values_of(optimizer, name)),
        *(value for state in optimizer.state.values() for value in state.values()),
    ]
    assert all(one is other for one, other in zip(tensors, found, strict=True))
    for name in RATES_OF_GROUPS:
        assert [float(each) for each in values_of(optimizer, name)] == [float(each) for each in values_of(saved, name)]
    assert_equal(weights_and_state(optimizer), expected)
    fill(optimizer, gradients=9)
    fill(saved, gradients=9)
    optimizer.step()
    saved.step()
    assert_equal(weights_and_state(optimizer), weights_and_state(saved))


def test_what_a_checkpoint_lacks_starts_anew_in_its_tensors() -> None:
    saved, optimizer = (optimizer_of(tensors=torch.float32, normalize_neurons=True) for _ in range(2))
    for each in (saved, optimizer):
        train(each, steps=2)
    checkpoint = copy.deepcopy(saved.state_dict())
    lacking = list(checkpoint["state"])[::2]
    for key in lacking:
        del checkpoint["state"][key]
    tensors = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    with pytest.warns(UserWarning, match="the checkpoint has no state for"):
        optimizer.load_state_dict(checkpoint)
    for parameter, its_twin in zip(parameters_of(optimizer), parameters_of(saved), strict=True):
        state = optimizer.state[parameter]
        assert state.keys() == tensors[parameter].keys()
        assert all(state[entry] is tensor for entry, tensor in tensors[parameter].items())
        parameter.data.copy_(its_twin.data)
    control = optimizer_of(tensors=torch.float32, normalize_neurons=True)  # it has no tensors to keep
    for parameter, its_twin in zip(parameters_of(control), parameters_of(saved), strict=True):
        parameter.data.copy_(its_twin.data)
    with pytest.warns(UserWarning, match="the checkpoint has no state for"):
        control.load_state_dict(checkpoint)
    for each in (optimizer, control):
        fill(each, gradients=9)
        each.step()
    assert_equal(weights_and_state(optimizer), weights_and_state(control))


def test_floats_stay_floats_and_captured_is_a_setting_of_the_run() -> None:
    saved = optimizer_of(tensors=torch.float32)
    expected = train(saved)
    optimizer = optimizer_of(tensors=None)
    optimizer.load_state_dict(saved.state_dict())
    assert {type(value) for name in (*RATES_OF_GROUPS, "initial_lr") for value in values_of(optimizer, name)} == {float}
    assert not optimizer.is_capturable
    for parameter, its_twin in zip(parameters_of(optimizer), parameters_of(saved), strict=True):
        parameter.data.copy_(its_twin.data)
    assert_equal(weights_and_state(optimizer), expected)


def test_changed_rates_are_warned_of() -> None:
    saved = Dion2([zeros(4, 6)], lr=0.1)
    optimizer = Dion2([zeros(4, 6)], lr=torch.tensor(0.2), capturable=True)
    with pytest.warns(UserWarning, match=r"lr 0.1 instead of 0.2\d* \('dion2'\)"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)


def test_one_tensor_cannot_take_several_values() -> None:
    lr = torch.tensor(0.1)

    def two_groups(**settings: Any) -> Dion2:
        return Dion2([{"params": [zeros(4, 6)], "name": name} for name in ("a", "b")], **settings)

    saved, optimizer = two_groups(lr=0.1), two_groups(lr=lr, capturable=True)
    saved.param_groups[1]["lr"] = 0.3
    message = r"the groups 'a', 'b' have one tensor as their lr, and the checkpoint has \[0.1, 0.3\]"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert lr == torch.tensor(0.1)


def test_carry_over_keeps_the_tensors() -> None:
    saved = Dion2([zeros(4, 6)], lr=0.3)
    saved.step()
    lr = torch.tensor(0.1)
    optimizer = Dion2([{"params": [zeros(4, 6)], "algorithm": "dion3"}], lr=lr, capturable=True)
    with pytest.warns(UserWarning, match="starts anew: 'variance'"):
        optimizer.carry_over(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(0.1)


def unpickled(optimizer: Dion2) -> Dion2:
    other: Dion2 = pickle.loads(pickle.dumps(optimizer))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_copies_have_tensors_of_their_own(copied: Callable[[Dion2], Dion2]) -> None:
    optimizer = optimizer_of(tensors=torch.float32)
    optimizer.step()
    other = copied(optimizer)
    for lr in values_of(optimizer):
        lr.fill_(0.0)
    assert all(isinstance(lr, Tensor) and lr > 0 for lr in values_of(other))
    assert other.is_capturable
    for parameter in parameters_of(other):
        parameter.grad = torch.ones_like(parameter)
    before = weights_and_state(other)
    other.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters_of(other), strict=False))


def test_names_are_made_for_errors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step asks for each rate and parameter."""
    optimizer = optimizer_of(tensors=torch.float32)
    monkeypatch.delattr("dion2_lightning.parameter_groups.parameter_names")
    for group in optimizer.param_groups:
        refuse_misplaced_rates(group, "")


def test_later_groups_get_the_tensors_of_the_first() -> None:
    lr = torch.tensor(0.1)
    optimizer = Dion2([zeros(4, 6)], lr=lr, capturable=True)
    optimizer.add_param_group({"params": [zeros(6, 4)], "algorithm": "adamw"})
    assert all(each is lr for each in values_of(optimizer))


def test_what_a_step_leaves_stays_where_it_is() -> None:
    """A replay writes the selection, the norm and the count of skipped steps where the capture has."""
    optimizer = optimizer_of(tensors=torch.float32, max_grad_norm=1.0, check_finite="skip")
    matrix = optimizer.param_groups[0]["params"][0]
    seen = []
    for seed in range(3):
        fill(optimizer, gradients=seed)
        if seed == 2:
            matrix.grad[0, 0] = math.nan
        optimizer.step()
        left = optimizer.selection_of(matrix).indices, optimizer.grad_norm, optimizer._skipped_steps
        seen.append((left, [each.clone() for each in left]))
    for (first, _), (second, _) in itertools.pairwise(seen):
        assert all(one is other for one, other in zip(first, second, strict=True))
    assert not torch.equal(seen[0][1][0], seen[1][1][0])
    assert [values[2].item() for _, values in seen] == [0, 0, 1]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    last, _ = seen[-1]
    kept = optimizer.selection_of(matrix).indices, optimizer.grad_norm, optimizer._skipped_steps
    assert all(one is other for one, other in zip(last, kept, strict=True))
    matrix.grad = None  # its tensor must live on: a graph may still write to it
    optimizer.step()
    assert optimizer.selection_of(matrix) is None
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert optimizer.selection_of(matrix).indices is last[0]
    control = optimizer_of(tensors=None, max_grad_norm=1.0)
    fill(control, gradients=0)
    control.step()
    assert torch.equal(control.selection_of(control.param_groups[0]["params"][0]).indices, seen[0][1][0])
    assert torch.equal(control.grad_norm, seen[0][1][1])


# What a CUDA graph cannot hold


def as_it_is(optimizer: Dion2) -> None:
    pass


def with_a_tracker(optimizer: Dion2) -> None:
    SelectionTracker().attach(optimizer)


def with_state_on_the_host(optimizer: Dion2) -> None:
    optimizer.offload = "cpu"


def with_triton(optimizer: Dion2) -> None:
    optimizer.kernels = "triton"


def with_replicas(**attributes: Any) -> Callable[[Dion2], None]:
    """As far as a refusal, which comes before anything is sent."""

    def change(optimizer: Dion2) -> None:
        ranks = types.SimpleNamespace(groups=lambda _: ["two ranks"])
        optimizer.__dict__.update(_ranks=lambda: ranks, **attributes)

    return change


def with_compressed_replicas(optimizer: Dion2) -> None:
    with_replicas()(optimizer)
    optimizer.param_groups[4]["sync"] = "compressed"


def with_replicas_of_skipped_steps(**attributes: Any) -> Callable[[Dion2], None]:
    def change(optimizer: Dion2) -> None:
        optimizer.param_groups[0]["check_finite"] = "skip"
        optimizer.__dict__["_skipped_steps"] = optimizer._left_in_place("skipped_steps", torch.zeros(()))
        with_replicas(**attributes)(optimizer)

    return change


def cast(optimizer: Dion2) -> None:
    parameter = optimizer.param_groups[1]["params"][1]
    parameter.grad = None
    parameter.data = parameter.data.double()
    parameter.grad = torch.ones_like(parameter)


def with_other_settings(group: int, **settings: Any) -> Callable[[Dion2], None]:
    return lambda optimizer: optimizer.param_groups[group].update(settings)


def without_state(optimizer: Dion2) -> None:
    del optimizer.state[optimizer.param_groups[1]["params"][1]]


def with_a_new_group(optimizer: Dion2) -> None:
    optimizer.add_param_group({"params": [zeros(4)], "algorithm": "adamw"})
    for parameter in optimizer.param_groups[-1]["params"]:
        optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": zeros(4).data, "exp_avg_sq": zeros(4).data}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_tracker, "statistics are collected by Python, which no replay runs; detach the SelectionTracker"),
        (with_state_on_the_host, "offload='cpu' brings the state from the host and back; set offload to None"),
        (with_other_settings(2, capturable=False), "group 'dion2-3' is not capturable; pass capturable=True"),
        (with_other_settings(0, check_finite=True), "check_finite=True of group 'dion2' waits for the device"),
        (
            with_other_settings(4, qr="rcqr"),
            "group 'dion': with qr='rcqr' the host reads whether a matrix needs",
        ),
        (without_state, "group 'dion2-2': parameter 1 has no state yet; take a step before the capture"),
        (cast, "state of group 'dion2-2': parameter 1 changes in this step; take a step before the capture"),
        (with_other_settings(0, state_dtype="float64"), "state of group 'dion2': parameter 0 changes in this step"),
        (with_other_settings(0, normalize_neurons=True), "state of group 'dion2': parameter 0 changes in this step"),
        (
            with_other_settings(0, check_finite="skip"),
            "it is the first in which group 'dion2' skips bad gradients, and would count them anew in every replay",
        ),
        (with_triton, "kernels='triton' reads tables that are gone by a replay; pass kernels='torch' or 'auto'"),
        (with_replicas(), "group 'dion2': parameter 0 has replicas, .* in it; pass share_replicas=False$"),
        (with_replicas_of_skipped_steps(share_replicas=False), "group 'dion2': .* in it; pass check_finite=False$"),
        (with_replicas_of_skipped_steps(), "group 'dion2': .*; pass share_replicas=False and check_finite=False$"),
        (with_compressed_replicas, "with sync='compressed' the ranks that hold replicas of group 'dion2': .*; capture"),
        (with_a_new_group, "groups are new, or were loaded; take a step before the capture"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_refused_in_a_capture(
    change: Callable[[Dion2], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = optimizer_of(tensors=torch.float32)
    optimizer.step()
    before = weights_and_state(optimizer)
    monkeypatch.setattr("dion2_lightning.optimizer.is_capturing", lambda: True)
    optimizer.step()
    assert len(before) == len(weights_and_state(optimizer))
    change(optimizer)
    before = copy.deepcopy([parameter.detach() for parameter in parameters_of(optimizer)])
    with pytest.raises(RuntimeError, match=f"a CUDA graph cannot hold this step of Dion2: {message}"):
        optimizer.step()
    assert_equal([parameter.detach() for parameter in parameters_of(optimizer)], before)


@pytest.mark.parametrize("is_initialized", [True, False])
@pytest.mark.parametrize("is_current_stream_capturing", [True, False])
def test_whether_a_step_is_captured(
    is_initialized: bool, is_current_stream_capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_current_stream_capturing)
    assert is_capturing() == (is_initialized and is_current_stream_capturing)
