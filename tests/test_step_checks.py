"""What a step checks before it changes anything: settings, placements and gradients."""

import copy
import math

import pytest
import torch
from torch import nn

from dion2_lightning import Dion2
from tests.test_optimizer import assert_identical, groups_of, loss_of, model_of, snapshot, train


def test_init_step_creates_state_and_nothing_else():
    """torch.distributed.checkpoint creates an optimizer's state by a step with lr 0 and zero gradients."""
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    before = snapshot(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    assert_identical(snapshot(model), before)
    assert len(optimizer.state) == 4
    assert all(value.count_nonzero() == 0 for state in optimizer.state.values() for value in state.values())
    assert optimizer.selection_of(model[0].weight) is None


def test_a_parameter_that_leaves_or_joins_a_group_without_its_name():
    model = nn.Linear(4, 4)
    optimizer = Dion2([{"params": [*model.named_parameters()][:1], "name": "m"}], lr=0.1)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(4, 4)))
    for call in (optimizer.step, optimizer.observed_parameters):
        with pytest.raises(ValueError, match="group 'm': param_names has 1 names for 2 parameters; change both"):
            call()


def test_a_first_step_at_lr_zero_with_gradients_is_a_real_step():
    """As at the start of a warm-up: weights stay, momentum does not."""
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.0)
    before = snapshot(model)
    train(model, optimizer, range(1))
    assert_identical(snapshot(model), before)
    assert optimizer.state[model[0].weight]["momentum"].count_nonzero() > 0
    assert optimizer.state[model[0].bias]["step"] == 1
    assert optimizer.selection_of(model[0].weight).indices.shape == (3,)


def test_a_warm_up_from_zero_with_zero_gradients_is_real_where_others_move():
    """LoRA's A has a zero gradient at first, since B is zero; AdamW must count the step nonetheless."""
    first, second = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(6))
    control = torch.nn.Parameter(torch.ones(6))
    ours = Dion2([{"params": [first]}, {"params": [second], "algorithm": "adamw"}], lr=0.1)
    theirs = torch.optim.AdamW([control], lr=0.1, weight_decay=0.01, fused=True)
    for step in range(3):
        first.grad = torch.ones(4, 6)
        second.grad = torch.full((6,), float(step))
        control.grad = second.grad.clone()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * step
            optimizer.step()
    assert torch.equal(second, control)


@pytest.mark.parametrize("attribute", ["_fsdp_flattened", "ds_id"])
def test_parameters_that_are_flattened_after_construction_are_refused(attribute):
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Dion2([("w", parameter)])
    setattr(parameter, attribute, True)
    parameter.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"'w' is .* use FSDP2"):
        optimizer.step()


def test_check_finite_names_the_parameter_before_anything_is_touched():
    for value in (float("nan"), float("inf")):
        for index, name in ((0, "0.weight"), (3, "2.bias")):
            model = model_of()
            optimizer = Dion2(groups_of(model), lr=0.1, check_finite=True)
            train(model, optimizer, range(2))
            before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
            loss_of(model, 2).backward()
            list(model.parameters())[index].grad.view(-1)[3] = value
            with pytest.raises(FloatingPointError, match=f"'{name}' has a gradient with NaN or Inf"):
                optimizer.step()
            assert_identical(snapshot(model), before)
            after = optimizer.state_dict()["state"]
            for key, entries in state.items():
                assert all(torch.equal(value, after[key][entry]) for entry, value in entries.items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("select", "foo", "select must be one of 'shorter', 'output', got 'foo'"),
        ("check_finite", "skipp", "check_finite must be one of True, False, 'skip', got 'skipp'"),
        ("momentum", 1.5, r"momentum must lie in \[0, 1\), got 1.5"),
        ("fraction", 5.0, r"fraction must lie in \(0, 1\], got 5.0"),
        ("state_dtype", "float9", "state_dtype must be None or one of bfloat16, float32, float64"),
        ("algorithm", "adamw", "has no 'betas', which algorithm 'adamw' needs; a group's algorithm is chosen when it"),
        ("algorithm", "adam", "algorithm must be one of"),
        ("fraction", torch.tensor(0.5), "fraction must be a number, got a Tensor"),
        ("nesterov", torch.tensor(True), "nesterov must be True or False, got tensor"),
        ("lr", "0.1", "lr must be a number, got the str '0.1'"),
        ("weight_decay", None, "weight_decay must be a number, got a NoneType"),
        ("lr", float("nan"), "lr must be finite, got nan"),
    ],
)
def test_settings_that_are_changed_later_are_checked_before_anything_is_touched(name, value, message):
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    before = snapshot(model)
    kept, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    with pytest.raises((TypeError, ValueError), match=f"^group 'dion2': {message}"):
        optimizer.step()
    assert_identical(snapshot(model), before)
    optimizer.param_groups[0][name] = kept
    optimizer.step()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_a_precision_that_is_changed_later_may_be_said_in_three_ways(dtype):
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["state_dtype"] = optimizer.param_groups[0]["orthonormalize_dtype"] = dtype
    train(model, optimizer, range(1, 2))
    assert optimizer.state[model[0].weight]["momentum"].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["state_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_is_a_rounding_error_under_zero_is_no_error(name):
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.1)
    optimizer.param_groups[0][name] = -1e-20
    train(model, optimizer, range(1))


def test_a_sparse_gradient_of_a_frozen_parameter_is_no_error():
    embedding, linear = nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4)
    optimizer = Dion2([embedding.weight, linear.weight])
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    embedding.weight.requires_grad_(False)
    optimizer.step()


@pytest.mark.parametrize("settings", [{"max_grad_norm": 1.0}, {"check_finite": "skip"}, {"check_finite": True}])
def test_the_gradient_of_a_frozen_parameter_decides_nothing(settings):
    """Freezing a parameter leaves its gradient until ``zero_grad()``."""
    results = []
    for left in (None, math.nan):
        model = model_of()
        optimizer = Dion2(groups_of(model), lr=0.1, **settings)
        train(model, optimizer, range(1))
        model[0].weight.requires_grad_(False)
        loss_of(model, 1).backward()
        model[0].weight.grad = None if left is None else torch.full_like(model[0].weight, left)
        optimizer.step()
        assert optimizer.skipped_steps == 0
        results.append(snapshot(model))
    assert_identical(*results)


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = Dion2([("table", embedding.weight)])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'table' has a gradient stored as torch.sparse_coo; use sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("algorithm", ["dion2", "dion3", "dion", "adamw"])
@pytest.mark.parametrize("shape", [(40, 12), (10, 12), (12, 20)])
def test_a_parameter_that_was_resized_is_refused_before_anything_is_touched(algorithm, shape):
    """As transformers resizes a tied head: the fused AdamW would write beyond its state."""
    model = model_of()
    names = dict(model.named_parameters())
    other, resized = names.pop("2.weight"), names.pop("0.weight")
    groups = [{"params": [("2.weight", other), ("0.weight", resized)], "name": "its", "algorithm": algorithm}]
    groups.append({"params": [*names.items()], "algorithm": "adamw"})
    optimizer = Dion2(groups, lr=0.1, max_grad_norm=1.0)
    train(model, optimizer, range(2))
    resized.data = torch.ones(shape)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    message = (
        rf"group 'its': parameter '0.weight' has the shape \({shape[0]}, {shape[1]}\), .* still has \(20, 12\); build"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_identical(snapshot(model), before)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    del optimizer.state[resized]  # as the error advises
    optimizer.step()
    assert not torch.equal(resized, torch.ones(shape))
