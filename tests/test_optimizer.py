"""The optimizer's rules: groups, state, step, copies. The update itself is tested in algorithms/test_dion2.py."""

import copy
import gc
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2, SelectionTracker
from tests.every_kind import fill, garbage_of_a_step, groups_of_every_kind


def groups_of(model: nn.Module, **settings) -> list[dict]:
    """Matrices to dion2, the rest to adamw, with names."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if p.ndim == 2], "name": "dion2", **settings},
        {"params": [(name, p) for name, p in named if p.ndim != 2], "name": "adamw", "algorithm": "adamw"},
    ]


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8)).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = model[0].weight.dtype
    inputs = torch.randn(16, 12, generator=generator).to(dtype)
    return (model(inputs).float() - torch.randn(16, 8, generator=generator)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_identical(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# Groups


def test_defaults_are_plain_data():
    """Everything in groups survives weights_only loading: no dtype objects, callables or process groups."""
    model = model_of()
    optimizer = Dion2(
        groups_of(model), orthonormalize=lambda x: x, state_dtype=torch.float64, orthonormalize_dtype="float32"
    )
    plain = (int, float, str, bool, tuple, list, type(None))
    for group in optimizer.param_groups:
        assert all(isinstance(value, plain) for name, value in group.items() if name != "params")
        assert isinstance(group["lr"], float)
    assert optimizer.param_groups[0]["state_dtype"] == "float64"
    assert optimizer.defaults.keys() <= {"lr", "differentiable"}  # no momentum or betas that schedulers would cycle


def test_a_bare_list_of_matrices_is_one_dion2_group():
    optimizer = Dion2([torch.nn.Parameter(torch.ones(4, 4))])
    assert [(group["name"], group["algorithm"]) for group in optimizer.param_groups] == [("dion2", "dion2")]


def test_groups_override_every_setting():
    overrides = {
        "lr": 1.0,
        "fraction": 0.5,
        "momentum": 0.1,
        "weight_decay": 0.2,
        "adjust_lr_fn": "none",
        "scale_lr_by_fraction": False,
        "select": "output",
        "nesterov": True,
        "normalize_neurons": True,
        "neuron_beta": 0.9,
        "skip_idle_experts": True,
        "cautious_weight_decay": True,
        "orthonormalize_dtype": "float32",
        "state_dtype": "float64",
        "rounding": "nearest",
        "rounding_seed": 3,
        "check_finite": True,
        "capturable": True,
    }
    of_adamw = {"lr": 2.0, "weight_decay": 0.3, "betas": (0.1, 0.2), "eps": 1e-3, "check_finite": True}
    of_adamw |= {"rounding": "nearest", "rounding_seed": 4, "cautious_weight_decay": True, "capturable": True}
    groups = [{"params": [torch.nn.Parameter(torch.ones(4, 4))], **overrides}]
    groups += [{"params": [torch.nn.Parameter(torch.ones(4))], "algorithm": "adamw", **of_adamw}]
    optimizer = Dion2(groups)
    entries = {"params", "algorithm", "name", "given_lr"}
    of_dion2 = overrides | {"batched": False, "transposed": False, "convolution": False, "splits": "whole"}
    for group, expected in zip(optimizer.param_groups, (of_dion2, of_adamw), strict=True):
        assert group.keys() == expected.keys() | entries
        assert all(group[name] == value for name, value in expected.items())


def test_constructor_settings_apply_to_added_groups_too():
    """Each group takes those that its algorithm has; an algorithm's own defaults come last."""
    optimizer = Dion2([torch.nn.Parameter(torch.ones(4, 4))], lr=0.5, momentum=0.1, betas=(0.1, 0.2))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "algorithm": "adamw"})
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 4))], "algorithm": "dion2"})
    matrices, rest, added = copied.param_groups
    assert (matrices["momentum"], rest["betas"], added["momentum"]) == (0.1, (0.1, 0.2), 0.1)
    assert rest["lr"] == added["lr"] == 0.5
    assert (rest["eps"], added["fraction"]) == (1e-8, 0.25)


def test_names_of_groups_are_unique():
    """Lightning's LearningRateMonitor refuses a name twice."""
    optimizer = Dion2([{"params": [torch.nn.Parameter(torch.ones(4, 4))]} for _ in range(3)])
    assert [group["name"] for group in optimizer.param_groups] == ["dion2", "dion2-2", "dion2-3"]


def test_a_group_added_later_is_trained_and_its_state_created():
    first, second = torch.nn.Parameter(torch.ones(4, 8)), torch.nn.Parameter(torch.ones(8))
    optimizer = Dion2([first], lr=0.1)
    first.grad, second.grad = torch.ones(4, 8), torch.ones(8)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "algorithm": "adamw"})
    optimizer.step()
    assert (second != 1).all()
    assert set(optimizer.state[second]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_group_added_without_algorithm_is_refused_where_the_model_is_not_known():
    optimizer = Dion2([torch.nn.Parameter(torch.ones(4, 8))])
    with pytest.raises(ValueError, match=r"does not say which algorithm.*add_param_group\(\{'params'"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(8))]})
    assert len(optimizer.param_groups) == 1


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_state_is_lazy_complete_and_in_the_promised_precision(dtype):
    """At the first step every trainable parameter gets its state, gradient or not; frozen ones none."""
    model = model_of(dtype)
    model[0].bias.requires_grad_(False)
    optimizer = Dion2(groups_of(model))
    assert not optimizer.state
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    assert set(optimizer.state) == {model[0].weight, model[2].weight, model[2].bias}
    momentum = optimizer.state[model[0].weight]["momentum"]
    assert momentum.shape == model[0].weight.shape
    assert momentum.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert optimizer.state[model[2].bias]["exp_avg"].dtype == momentum.dtype
    assert optimizer.state[model[2].bias]["step"] == 0


@pytest.mark.parametrize("state_dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=repr)
def test_state_dtype_is_kept(state_dtype):
    parameter = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = Dion2([parameter], state_dtype=state_dtype)
    assert optimizer.param_groups[0]["state_dtype"] == "bfloat16"
    parameter.grad = torch.randn(4, 8)
    optimizer.step()
    assert optimizer.state[parameter]["momentum"].dtype == torch.bfloat16


@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_state_follows_a_parameter_that_is_cast(before, after):
    """``model.to(dtype)`` knows nothing of it. It trains on as an optimizer does whose state was cast by hand."""
    model = model_of(before)
    model[0].register_parameter("gain", nn.Parameter(torch.ones((), dtype=before)))
    model[0].register_forward_hook(lambda module, _, output: module.gain * output)
    optimizer = Dion2(groups_of(model), lr=0.05)
    train(model, optimizer, range(3))
    other_model = copy.deepcopy(model).to(after)
    other = Dion2(groups_of(other_model), lr=0.05)
    for parameter in other_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    other.param_groups[0]["lr"] = other.param_groups[1]["lr"] = 0.0
    other.step()  # creates the state, as one for this dtype, and does nothing else
    other.param_groups[0]["lr"] = other.param_groups[1]["lr"] = 0.05
    for parameter, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        for name, tensor in optimizer.state[parameter].items():
            other.state[twin][name].copy_(tensor)

    model.to(after)
    train(model, optimizer, range(3, 6))
    train(other_model, other, range(3, 6))
    assert_identical(snapshot(model), snapshot(other_model))
    for parameter, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        for name, tensor in other.state[twin].items():
            assert optimizer.state[parameter][name].dtype == tensor.dtype
            assert torch.equal(optimizer.state[parameter][name], tensor)


def test_gradients_are_not_kept_as_state():
    """DDP reuses the memory of gradients."""
    parameter = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = Dion2([parameter])
    parameter.grad = torch.ones(4, 8)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum"].clone()
    parameter.grad.fill_(float("nan"))
    assert torch.equal(optimizer.state[parameter]["momentum"], momentum)


def test_parameters_without_gradient_stay_as_they_are():
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    train(model, optimizer, range(3))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    optimizer.step()
    assert_identical(snapshot(model), before)
    after = optimizer.state_dict()["state"]
    for key, entries in state.items():
        assert all(torch.equal(value, after[key][name]) for name, value in entries.items())
    assert optimizer.selection_of(model[0].weight) is None


# Step


def test_closure_is_called_once_with_gradients_enabled():
    model, calls = model_of(), []
    optimizer = Dion2(groups_of(model))

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(loss_of(model_of(), 0).item())
    assert optimizer.step() is None


def test_accumulated_gradients_are_one_large_batch():
    """Two backward passes before a step are their sum."""
    whole, parts = model_of(), model_of()
    first, second = Dion2(groups_of(whole), lr=0.1), Dion2(groups_of(parts), lr=0.1)
    (loss_of(whole, 0) + loss_of(whole, 1)).backward()
    first.step()
    loss_of(parts, 0).backward()
    loss_of(parts, 1).backward()
    second.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_parameter_that_is_frozen_later_stays():
    weight, bias = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(6))
    optimizer = Dion2([{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}], lr=0.1)
    weight.grad, bias.grad = torch.ones(4, 6), torch.ones(6)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    optimizer.step()
    assert (weight == 1).all()
    assert (bias == 1).all()


def test_a_failed_step_is_remembered_by_a_copy():
    parameter = torch.nn.Parameter(torch.ones(4, 6))

    def fail(submatrices: Tensor) -> Tensor:
        raise ArithmeticError("broken")

    optimizer = Dion2([parameter], orthonormalize=fail)
    saved = copy.deepcopy(optimizer.state_dict())
    parameter.grad = torch.ones(4, 6)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    with pytest.warns(UserWarning, match="orthonormalize"):
        other = copy.deepcopy(optimizer)
    for failed in (optimizer, other):
        with pytest.raises(RuntimeError, match="groups 'dion2' may be half updated"):
            failed.state_dict()
        with pytest.raises(RuntimeError, match="load model and optimizer from a checkpoint"):
            failed.step()
        failed.load_state_dict(saved)
        failed.state_dict()


def test_distributed_checkpoint_creates_the_state():
    """The real thing: get and set through torch.distributed.checkpoint, on weights that are loaded already."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model = model_of(torch.bfloat16)
        optimizer = Dion2(groups_of(model), lr=0.05)
        train(model, optimizer, range(3))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))

        resumed = copy.deepcopy(model)
        other = Dion2(groups_of(resumed), lr=0.05)
        before = snapshot(resumed)
        get_optimizer_state_dict(resumed, other, options=options)
        assert_identical(snapshot(resumed), before)
        set_optimizer_state_dict(resumed, other, saved, options=options)
        train(model, optimizer, range(3, 5))
        train(resumed, other, range(3, 5))
        assert_identical(snapshot(model), snapshot(resumed))


def test_grad_scaler_skips_a_step_with_infs_and_unscales_the_others():
    """The scaler skips by itself; a scaled step equals an unscaled one."""
    model, control = model_of(), model_of()
    optimizer, plain = Dion2(groups_of(model), lr=0.1), Dion2(groups_of(control), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, has_inf in enumerate([False, True, False]):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if has_inf:
            model[0].weight.grad[0, 0] = float("inf")
        before = snapshot(model)
        scaler.step(optimizer)
        scaler.update()
        if has_inf:
            assert_identical(snapshot(model), before)
        else:
            train(control, plain, range(step, step + 1))
    assert scaler.get_scale() == 2.0**9
    for a, b in zip(model.parameters(), control.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kernels", "foo", "kernels must be one of 'auto', 'torch', 'triton', got 'foo'"),
        ("share_replicas", "x", "share_replicas must be True, False or None, got 'x'"),
        ("working_memory", "1GB", "working_memory must be an integer, got '1GB'"),
        ("max_grad_norm", 0, "max_grad_norm must be over 0"),
        ("offload", "disk", "offload must be one of 'cpu', None, got 'disk'"),
    ],
)
def test_attributes_that_are_changed_later_are_checked(name, value, message):
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    setattr(optimizer, name, value)
    loss_of(model, 0).backward()
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        optimizer.step()


def test_custom_orthonormalization():
    seen = []

    def spy(submatrices: Tensor) -> Tensor:
        seen.append(tuple(submatrices.shape))
        return torch.ones_like(submatrices)

    parameters = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in range(2)] + [torch.nn.Parameter(torch.zeros(16, 8))]
    optimizer = Dion2(
        parameters, lr=0.5, weight_decay=0.0, adjust_lr_fn="none", scale_lr_by_fraction=False, orthonormalize=spy
    )
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert sorted(seen) == [(1, 2, 16), (2, 2, 16)]
    for parameter in parameters:
        assert parameter.sum() == -0.5 * 2 * 16
    with pytest.raises(ValueError, match=r"must return the shape it is given: got \(1, 1\)"):
        optimizer.orthonormalize = lambda _: torch.ones(1, 1)
        optimizer.step()


# The garbage collector


def test_python_looks_for_garbage_in_a_closure_and_not_in_a_step():
    model = model_of()
    enabled: dict[str, bool] = {}

    def orthonormalize(submatrices: Tensor) -> Tensor:
        enabled["step"] = gc.isenabled()
        return submatrices

    def closure() -> Tensor:
        enabled["closure"] = gc.isenabled()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    Dion2(groups_of(model), orthonormalize=orthonormalize).step(closure)
    assert enabled == {"closure": True, "step": False}
    assert gc.isenabled()


def test_the_garbage_collector_is_after_a_step_as_it_was_before():
    model = model_of()
    optimizer = Dion2(groups_of(model), check_finite=True)
    loss_of(model, 0).backward()
    gc.disable()
    try:
        optimizer.step()
        assert not gc.isenabled()
    finally:
        gc.enable()
    model[0].weight.grad.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert gc.isenabled()


@pytest.mark.parametrize("is_tracked", [False, True])
def test_a_step_leaves_no_garbage(is_tracked):
    """What only the collector could free would stay until it runs again."""
    optimizer = Dion2(groups_of_every_kind("cpu"), check_finite="skip", max_grad_norm=1.0)
    fill(optimizer, gradients=0)
    if is_tracked:
        SelectionTracker(every=1).attach(optimizer)
    for _ in range(2):  # the first imports
        optimizer.step()
    assert garbage_of_a_step(optimizer) == 0


# Selection


def test_selection_of():
    model = model_of()
    experts = torch.nn.Parameter(torch.zeros(3, 8, 12))
    optimizer = Dion2([*groups_of(model), {"params": [("experts", experts)], "batched": True}])
    assert optimizer.selection_of(model[0].weight) is None
    loss_of(model, 0).backward()
    experts.grad = torch.randn_like(experts)
    optimizer.step()
    selection = optimizer.selection_of(model[0].weight)
    assert (selection.axis, selection.indices.shape, selection.indices.dtype) == (1, (3,), torch.int64)
    assert optimizer.selection_of(experts).indices.shape == (3, 2)
    assert selection.indices.tolist() == sorted(selection.indices.tolist())
    for unknown in (model[0].bias, torch.nn.Parameter(torch.ones(3, 3))):
        with pytest.raises(ValueError, match="is in no group whose algorithm selects slices of matrices"):
            optimizer.selection_of(unknown)


def test_selection_is_not_saved():
    model = model_of()
    optimizer = Dion2(groups_of(model))
    train(model, optimizer, range(1))
    assert {name for state in optimizer.state_dict()["state"].values() for name in state} == {
        "momentum",
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


# Copies


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_trains_like_the_original(copied):
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    train(model, optimizer, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other_model, other = copied((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 4))
    assert_identical(snapshot(model), snapshot(other_model))


@pytest.mark.parametrize("attribute", ["orthonormalize", "process_group"])
def test_a_copy_names_what_was_not_copied(attribute):
    class NotCopyable:
        def __call__(self, submatrices: Tensor) -> Tensor:
            return submatrices

        def size(self) -> int:
            return 1

        def __reduce_ex__(self, _):
            raise TypeError("cannot be copied")

    model = model_of()
    optimizer = Dion2(groups_of(model), **{attribute: NotCopyable()})
    with pytest.warns(UserWarning, match=f"has lost its .*; set its attribute '{attribute}' again"):
        other = copy.deepcopy(optimizer)
    assert getattr(other, attribute) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(other)


# Schedulers


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False
        ),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        lambda optimizer: _from_transformers("cosine_with_min_lr", optimizer, {"min_lr": 1e-4}),
        lambda optimizer: _from_transformers("polynomial", optimizer, {}),
        lambda optimizer: _from_transformers("linear", optimizer, {}),
    ],
    ids=["cosine", "lambda", "one cycle", "plateau", "min lr", "polynomial", "linear"],
)
def test_schedulers_of_torch_and_transformers(scheduler):
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    schedule = scheduler(optimizer)
    rates = []
    for step in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        train(model, optimizer, range(step, step + 1))
        schedule.step(*([1.0] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    assert all(isinstance(rate, float) for pair in rates for rate in pair)
    assert all(first == second for first, second in rates)
    assert len({first for first, _ in rates}) > 2
    assert optimizer.selection_of(model[0].weight) is not None


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.2),
    ],
    ids=["one cycle", "cyclic"],
)
def test_schedulers_that_cycle_momentum_are_refused_by_torch(scheduler):
    """They would cycle AdamW's betas, and momentum by rules made for SGD; both have an option not to."""
    with pytest.raises(ValueError, match="cycle_momentum"):
        scheduler(Dion2(groups_of(model_of()), lr=0.1))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer, rates: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rates, total_steps=10, cycle_momentum=False
        ),
        lambda optimizer, rates: torch.optim.lr_scheduler.CyclicLR(
            optimizer, base_lr=[rate / 10 for rate in rates], max_lr=rates, step_size_up=4, cycle_momentum=False
        ),
        lambda optimizer, rates: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, min_lr=[rate / 10 for rate in rates]
        ),
    ],
    ids=["one cycle", "cyclic", "plateau"],
)
def test_schedulers_of_absolute_rates_take_one_for_each_group(scheduler):
    """One number would be the rate of all groups."""
    model = model_of()
    matrices, rest = groups_of(model)
    optimizer = Dion2([matrices, {**rest, "lr": 0.02}], lr=0.1)
    schedule = scheduler(optimizer, [group["lr"] for group in optimizer.param_groups])
    rates = []
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        schedule.step(*([1.0] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert len({first for first, _ in rates}) > 1
    assert all(second == pytest.approx(first / 5) for first, second in rates)


def _from_transformers(
    name: str, optimizer: torch.optim.Optimizer, options: dict
) -> torch.optim.lr_scheduler.LRScheduler:
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10, scheduler_specific_kwargs=options)


# Against torch.optim


def quintic(submatrices: Tensor) -> Tensor:
    """torch.optim.Muon's orthonormalization, in float64."""
    wide = submatrices if submatrices.shape[-2] <= submatrices.shape[-1] else submatrices.mT
    x = wide.double() / torch.linalg.matrix_norm(wide.double(), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide is submatrices else x.mT).to(submatrices.dtype)


def without_nesterov(rule: str) -> dict[str, Any]:
    return {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": rule, "nesterov": False}


MUON_DEFAULTS = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "original", "nesterov": True}


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (without_nesterov("original"), without_nesterov("original")),
        (without_nesterov("match_rms_adamw"), without_nesterov("match_rms_adamw")),
        (MUON_DEFAULTS, {}),
    ],
    ids=["original", "match_rms_adamw", "torch's defaults"],
)
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)], ids=str)
def test_fraction_one_is_muon(shape, own, given):
    """torch scales its buffer by 1 - momentum, which orthonormalization ignores; it computes in bfloat16: 1e-2."""
    torch.manual_seed(0)
    start = 0.02 * torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    dion2, muon = Dion2([ours], fraction=1.0, orthonormalize=quintic, **own), torch.optim.Muon([theirs], **given)
    mu = own["momentum"]
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        dion2.step()
        muon.step()
        # Ours decays after the update, so it is theirs a step further.
        momentum, buffer = dion2.state[ours]["momentum"] / mu, muon.state[theirs]["momentum_buffer"] / (1 - mu)
        torch.testing.assert_close(momentum, buffer, rtol=1e-6, atol=1e-6 * buffer.abs().max().item())
    moved = torch.linalg.norm(theirs - start)
    assert torch.linalg.norm(ours - theirs) / moved < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_groups_equal_torch_bit_for_bit(dtype):
    first, second = model_of(dtype), model_of(dtype)
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = Dion2([{"params": list(first.parameters()), "algorithm": "adamw", **settings}])
    theirs = torch.optim.AdamW(second.parameters(), fused=True, **settings)
    train(first, ours, range(10))
    train(second, theirs, range(10))
    assert_identical(snapshot(first), snapshot(second))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert ours.state[a].keys() == theirs.state[b].keys()
        assert all(torch.equal(ours.state[a][name], theirs.state[b][name]) for name in theirs.state[b])


AUTOCAST = [{}, {"algorithm": "dion3"}, {"algorithm": "dion", "qr": "rcqr"}, {"check_finite": "skip"}]


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", AUTOCAST, ids=str)
def test_a_step_inside_an_autocast_block(settings: dict[str, Any], dtype: torch.dtype, rounded: torch.dtype) -> None:
    """As under Lightning's manual optimization: nothing more is rounded. A closure is evaluated in the block."""

    def weights_after_steps(is_inside: bool) -> list[nn.Parameter]:
        weights = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((40, 24), (40, 24), (24, 96), (9,))]
        groups = [{"params": weights[:3], **settings}, {"params": weights[3:], "algorithm": "adamw"}]
        optimizer = Dion2(groups, lr=0.1, orthonormalize_dtype="bfloat16", max_grad_norm=1.0)

        def closure() -> float:
            assert torch.is_autocast_enabled("cpu") == is_inside
            for number, parameter in enumerate(weights):
                parameter.grad = torch.randn(parameter.shape, generator=torch.manual_seed(number)).to(dtype)
            return 0.0

        with torch.autocast("cpu", rounded, enabled=is_inside):
            for _ in range(2):
                optimizer.step(closure)
        return weights

    assert all(torch.equal(*pair) for pair in zip(*map(weights_after_steps, (False, True)), strict=True))


def test_a_device_that_autocast_does_not_know() -> None:
    parameter = nn.Parameter(torch.ones(3, device="meta"))
    parameter.grad = torch.ones(3, device="meta")
    Dion2([{"params": [parameter], "algorithm": "adamw"}]).step()


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (nn.Linear(4, 4), TypeError, r"params must be parameters or groups, got a Linear; build_optimizer\(model"),
        ({nn.Parameter(torch.ones(4, 4))}, TypeError, "params must be in a fixed order, got a set"),
        ([{"lr": 0.1}], ValueError, "a parameter group has no 'params'; it says 'algorithm', 'lr'"),
        ([{"params": nn.Linear(4, 4)}], TypeError, r"params must be parameters, got a Linear; pass its parameters\(\)"),
    ],
)
def test_what_is_no_list_of_parameters(params, error, message):
    with pytest.raises(error, match=message):
        Dion2(params)


@pytest.mark.parametrize("as_group", [False, True])
def test_a_list_of_parameters_that_is_a_module(as_group):
    parameters = nn.ParameterList([torch.ones(4, 4)])
    optimizer = Dion2([{"params": parameters}] if as_group else parameters)
    assert optimizer.param_groups[0]["params"] == list(parameters)


def test_the_selection_of_what_is_no_parameter():
    model = model_of()
    with pytest.raises(TypeError, match="parameter must be a parameter of a group, got str"):
        Dion2(groups_of(model)).selection_of("0.weight")
