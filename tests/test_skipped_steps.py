"""``check_finite="skip"``: a step with a bad gradient changes nothing, and others are what they would be without it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2, build_optimizer
from dion2_lightning.algorithms import adamw
from tests.every_kind import fill, groups_of_every_kind, parameters_of

BAD = [math.nan, math.inf, -math.inf]


def optimizer_of(device: str = "cpu", **settings: Any) -> Dion2:
    """Every kind of parameter; also momentum in half precision, in both memory orders, and weights in float64."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        parameter.grad = torch.zeros_like(parameter)
        return parameter

    more = [
        {"params": [zeros(40, 96), zeros(96, 40)], "state_dtype": "bfloat16", "nesterov": True},
        {
            "params": [zeros(40, 96, dtype=torch.float64), zeros(96, 40, dtype=torch.float64)],
            "normalize_neurons": True,
            "cautious_weight_decay": True,
        },
        {"params": [zeros(30, 8)], "algorithm": "adamw", "cautious_weight_decay": True},
    ]
    optimizer = Dion2([*groups_of_every_kind(device), *more], lr=0.1, weight_decay=0.1, **settings)
    fill(optimizer, weights=0)
    return optimizer


PARAMETERS = len([*parameters_of(optimizer_of())])


def step(optimizer: Dion2, seed: int, bad: tuple[int, float] | None = None) -> None:
    """Take a step; ``bad`` says which parameter's gradient has a bad entry, and what it is."""
    fill(optimizer, gradients=seed)
    if bad is not None:
        gradient = [*parameters_of(optimizer)][bad[0]].grad
        gradient[torch.unravel_index(torch.tensor(7), gradient.shape)] = bad[1]
    optimizer.step()


def weights_and_state(optimizer: Dion2) -> list[Tensor]:
    parameters = [*parameters_of(optimizer)]
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return copy.deepcopy([*(parameter.detach() for parameter in parameters), *states])


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_good_gradients(device: str = "cpu") -> None:
    """No bit of a step is changed."""
    optimizer, control = optimizer_of(device, check_finite="skip"), optimizer_of(device)
    for seed in range(4):
        step(optimizer, seed)
        step(control, seed)
        assert_equal(weights_and_state(optimizer), weights_and_state(control))
    assert optimizer.skipped_steps == 0


def check_bad_gradient(index: int, taken_before: int, device: str = "cpu") -> None:
    """A step with a bad gradient changes nothing, and the next ones are those of a run without it."""
    optimizer, control = optimizer_of(device, check_finite="skip"), optimizer_of(device)
    for seed in range(taken_before):
        step(optimizer, seed)
        step(control, seed)
    weights = copy.deepcopy([parameter.detach() for parameter in parameters_of(optimizer)])
    for value in BAD:
        step(optimizer, 99, (index, value))
    assert optimizer.skipped_steps == len(BAD)
    assert_equal(weights_and_state(optimizer)[: len(weights)], weights)
    for seed in range(2, 4):
        step(optimizer, seed)
        step(control, seed)
        assert_equal(weights_and_state(optimizer), weights_and_state(control))


def test_good_gradients() -> None:
    check_good_gradients()


@pytest.mark.parametrize("taken_before", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("index", range(PARAMETERS))
def test_a_bad_gradient(index: int, taken_before: int) -> None:
    check_bad_gradient(index, taken_before)


def test_one_inf_without_the_check() -> None:
    """What it prevents: the selected quarter of a matrix is NaN after one step; AdamW loses one entry."""
    lost = {}
    for algorithm in ("dion2", "adamw"):
        for check_finite in (False, "skip"):
            weight = nn.Parameter(torch.ones(64, 128))
            optimizer = Dion2([{"params": [weight], "algorithm": algorithm}], lr=0.01, check_finite=check_finite)
            weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
            weight.grad[3, 5] = math.inf
            optimizer.step()
            lost[algorithm, check_finite] = weight.isnan().sum().item()
    assert lost == {("dion2", False): 16 * 128, ("dion2", "skip"): 0, ("adamw", False): 1, ("adamw", "skip"): 0}


def test_every_group_is_skipped_and_only_some_are_checked() -> None:
    matrix, bias = nn.Parameter(torch.ones(8, 12)), nn.Parameter(torch.ones(8))
    groups: list[dict[str, Any]] = [
        {"params": [matrix], "check_finite": "skip"},
        {"params": [bias], "algorithm": "adamw"},
    ]
    optimizer = Dion2(groups, lr=0.1)
    matrix.grad, bias.grad = torch.full((8, 12), math.nan), torch.ones(8)
    optimizer.step()
    assert (matrix == 1).all()
    assert (bias == 1).all()
    matrix.grad, bias.grad = torch.ones(8, 12), torch.full((8,), math.nan)
    optimizer.step()
    assert matrix.isfinite().all()
    assert (matrix != 1).any()
    assert bias.isnan().all()
    assert optimizer.skipped_steps == 1


def test_where_torch_has_no_fused_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other kernels skip nothing by themselves."""
    monkeypatch.setattr(adamw, "_is_fused", lambda _: False)
    optimizer, control = optimizer_of(check_finite="skip"), optimizer_of()
    for seed, bad in enumerate([None, (0, math.nan), None]):
        step(optimizer, seed, bad)
        if bad is None:
            step(control, seed)
    assert optimizer.skipped_steps == 1
    assert_equal(weights_and_state(optimizer), weights_and_state(control))


@pytest.mark.parametrize("check_finite", [True, "skip"])
def test_a_grad_scaler_skips_before_the_optimizer_is_asked(check_finite: Any) -> None:
    """Nothing is raised for the infinities by which it finds its scale, and nothing counted."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 8))
    optimizer = build_optimizer(model, lr=0.1, check_finite=check_finite)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for has_inf in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 12)).square().mean()).backward()
        if has_inf:
            model[0].weight.grad[0, 0] = math.inf
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert (changed == []) == has_inf
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped_steps == 0


def test_a_copy_counts_anew() -> None:
    optimizer = optimizer_of(check_finite="skip")
    step(optimizer, 0, (0, math.nan))
    other = copy.deepcopy(optimizer)
    assert (optimizer.skipped_steps, other.skipped_steps) == (1, 0)
    for parameter in parameters_of(other):
        parameter.grad = torch.full_like(parameter, math.nan)
    other.step()
    assert (optimizer.skipped_steps, other.skipped_steps) == (1, 1)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_load_goes_on_counting(capturable: bool) -> None:
    optimizer = optimizer_of(check_finite="skip", capturable=capturable)
    optimizer.fallbacks["qr"] = 2
    fallbacks = optimizer.fallbacks
    checkpoint = copy.deepcopy(optimizer.state_dict())
    step(optimizer, 0, (0, math.nan))
    optimizer.load_state_dict(checkpoint)
    assert optimizer.skipped_steps == 1
    step(optimizer, 1, (0, math.nan))
    assert optimizer.skipped_steps == 2
    assert optimizer.fallbacks is fallbacks == {"qr": 2}


def test_gradients_that_are_missing_or_empty() -> None:
    optimizer = optimizer_of(check_finite="skip")
    optimizer.zero_grad()
    optimizer.step()
    empty = nn.Parameter(torch.ones(0))
    optimizer.add_param_group({"params": [empty], "algorithm": "adamw"})
    empty.grad = torch.ones(0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
