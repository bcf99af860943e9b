"""Saving and loading: exact, matched by name, and refused whole where something does not fit."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from dion2_lightning import Dion2, build_optimizer, with_parameter_names
from tests.test_optimizer import assert_identical, groups_of, model_of, snapshot, train


def through_a_file(state_dict: dict, map_location: str | None = None) -> dict:
    """Save and load as the Trainer does: with weights_only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, map_location, weights_only=True)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_equals_uninterrupted(dtype, stop):
    """Bit for bit, also with a float32 momentum of bfloat16 parameters, which torch's own load would round."""
    model = model_of(dtype)
    optimizer = Dion2(groups_of(model), lr=0.05)
    train(model, optimizer, range(stop))
    weights, saved = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, optimizer, range(stop, 8))

    resumed = model_of(dtype)
    resumed.load_state_dict(weights)
    other = Dion2(groups_of(resumed), lr=123.0)
    other.load_state_dict(saved)
    assert other.state[resumed[0].weight]["momentum"].dtype == torch.float32
    train(resumed, other, range(stop, 8))
    assert_identical(snapshot(model), snapshot(resumed))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[a][name], other.state[b][name]) for name in optimizer.state[a])


def three_matrices_after_one_step() -> tuple[nn.Module, Dion2]:
    """Three matrices of one shape, whose momenta could be swapped unnoticed, after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = Dion2(groups_of(model), lr=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def assert_same_state(optimizer: Dion2, model: nn.Module, other: Dion2, other_model: nn.Module) -> None:
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert optimizer.state[a].keys() == other.state[b].keys()
        assert all(torch.equal(value, other.state[b][name]) for name, value in optimizer.state[a].items())


def test_parameters_in_another_order_are_matched_by_name():
    model, optimizer = three_matrices_after_one_step()
    other_model = copy.deepcopy(model)
    groups = groups_of(other_model)
    for group in groups:
        group["params"].reverse()
    other = Dion2(groups[::-1], lr=0.05)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, model, other, other_model)
    assert other.param_groups[1]["param_names"] == ["2.weight", "1.weight", "0.weight"]
    again = Dion2(groups_of(model), lr=0.05)
    again.load_state_dict(other.state_dict())
    assert_same_state(again, model, other, other_model)


def test_names_instead_of_numbers():
    model, optimizer = three_matrices_after_one_step()
    saved = optimizer.state_dict()
    names = {
        i: name
        for group in saved["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }
    named = {
        "state": {names[i]: state for i, state in saved["state"].items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]][::-1], "param_names": group["param_names"][::-1]}
            for group in saved["param_groups"]
        ],
    }
    for group in named["param_groups"][:1]:
        del group["param_names"]  # the ids are names already
    other_model = copy.deepcopy(model)
    other = Dion2(groups_of(other_model), lr=0.05)
    other.load_state_dict(named)
    assert_same_state(optimizer, model, other, other_model)


def test_without_names_position_counts():
    model, optimizer = three_matrices_after_one_step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    other_model = copy.deepcopy(model)
    other = Dion2(groups_of(other_model), lr=0.05)
    other.load_state_dict(saved)
    assert_same_state(optimizer, model, other, other_model)
    assert other.param_groups[0]["param_names"] == ["0.weight", "1.weight", "2.weight"]


def test_settings_the_checkpoint_does_not_know_keep_their_present_value():
    """A checkpoint of an older version lacks newer settings; those it has come back."""
    model, optimizer = three_matrices_after_one_step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in ("fraction", "batched", "algorithm"):
            group.pop(name, None)
    other = Dion2(groups_of(model), lr=1.0, fraction=0.5)
    other.load_state_dict(saved)
    assert [group["lr"] for group in other.param_groups] == [0.05, 0.05]
    assert [group.get("fraction") for group in other.param_groups] == [0.5, None]
    assert [group["algorithm"] for group in other.param_groups] == ["dion2", "adamw"]


def test_a_fresh_optimizer_can_be_saved_and_loaded():
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.05)
    saved = optimizer.state_dict()
    train(model, optimizer, range(2))
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    assert optimizer.selection_of(model[0].weight) is None


def test_load_hooks_may_rewrite_the_state_dict():
    """Accelerate and others do so."""
    model, optimizer = three_matrices_after_one_step()
    other_model = copy.deepcopy(model)
    other = Dion2(groups_of(other_model), lr=0.05)
    other.register_load_state_dict_pre_hook(lambda _, incoming: incoming["wrapped"])
    other.load_state_dict({"wrapped": optimizer.state_dict()})
    assert_same_state(optimizer, model, other, other_model)


class Stack(nn.Module):
    """Matrices of one shape, defined in the order of the letters."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(8, 8, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in "abc":
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def momenta_of(model: nn.Module, optimizer: Dion2) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[parameter]["momentum"] for name, parameter in model.named_parameters()}


def after_one_step(order: str) -> tuple[nn.Module, Dion2]:
    model = Stack(order)
    optimizer = build_optimizer(model, lr=0.1)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["nested", "flat", "full"])
def test_modules_that_are_defined_in_another_order(form, tmp_path):
    """torch.distributed.checkpoint reorders ``params`` to the present model, but not ``param_names``."""
    options = StateDictOptions(full_state_dict=form == "full", flatten_optimizer_state_dict=form == "flat")
    torch.manual_seed(0)
    model, optimizer = after_one_step("abc")
    other_model = Stack("cba")
    other = build_optimizer(other_model, lr=0.1)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if form != "full":
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "saved", no_dist=True)
        loaded = {"optimizer": get_optimizer_state_dict(other_model, other, options=options)}
        dcp.load(loaded, checkpoint_id=tmp_path / "saved", no_dist=True)
        saved = loaded["optimizer"]
    set_optimizer_state_dict(other_model, other, saved, options=options)
    found, expected = momenta_of(other_model, other), momenta_of(model, optimizer)
    assert all(torch.equal(found[name], momentum) for name, momentum in expected.items())


def test_names_with_a_prefix():
    """Frameworks save the names of a whole module, of which the optimizer may know a part."""
    model, optimizer = after_one_step("abc")
    saved = optimizer.state_dict()
    [group] = saved["param_groups"]
    whole = [f"module.net.{name}" for name in group["param_names"]]
    named = {
        "state": {whole[number]: state for number, state in saved["state"].items()},
        "param_groups": [{**group, "params": whole, "param_names": group["param_names"][::-1]}],
    }
    other_model = Stack("abc")
    other = build_optimizer(other_model, lr=0.1)
    other.load_state_dict(named)
    found, expected = momenta_of(other_model, other), momenta_of(model, optimizer)
    assert all(torch.equal(found[name], momentum) for name, momentum in expected.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_refused_checkpoint_that_was_read_into_the_state(tmp_path):
    """The state is a mixture of both, so the optimizer must not step."""
    model, optimizer = after_one_step("abc")
    optimizer.param_groups[0]["fraction"] = 7.0
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    other_model, other = after_one_step("abc")
    good = copy.deepcopy(other.state_dict())
    loaded = {"optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(loaded, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(ValueError, match=r"the checkpoint's fraction must lie in \(0, 1\], got 7.0"):
        set_optimizer_state_dict(other_model, other, loaded["optimizer"])
    with pytest.raises(RuntimeError, match=r"an earlier load_state_dict\(\) failed"):
        other.step()
    other.load_state_dict(good)
    other.step()


def test_parameters_without_state_in_the_checkpoint():
    """They were frozen when it was saved: they start without state, with a warning."""
    model, optimizer = three_matrices_after_one_step()
    saved = optimizer.state_dict()
    del saved["state"][1]
    other_model = copy.deepcopy(model)
    other = Dion2(groups_of(other_model), lr=0.05)
    with pytest.warns(UserWarning, match="the checkpoint has no state for parameter '1.weight', as of what was frozen"):
        other.load_state_dict(saved)
    assert other_model[1].weight not in other.state
    assert other_model[0].weight in other.state


def split_for_torch(model):
    """The groups without what torch's AdamW does not know."""
    return [{"params": [parameter for _, parameter in group["params"]]} for group in groups_of(model)]


def of_another_optimizer(saved):
    saved["state"].clear()
    for group in saved["param_groups"]:
        del group["algorithm"]
        group |= {"dampening": 0, "foreach": None}


def setting_out_of_range(saved):
    saved["param_groups"][0]["momentum"] = 1.5


def too_many_names(saved):
    saved["param_groups"][0]["param_names"].append("0.weight")


def other_shape(saved):
    saved["state"][0]["momentum"] = torch.zeros(3, 3)


def other_algorithm(saved):
    saved["param_groups"][0]["algorithm"] = "adamw"


def missing_group(saved):
    del saved["param_groups"][1]


def missing_parameter(saved):
    saved["param_groups"][0]["params"].pop()


def other_names(saved):
    saved["param_groups"][0]["param_names"][0] = "encoder.weight"


def foreign_state(saved):
    saved["state"][0] = {"momentum_buffer": torch.zeros(8, 8)}


def no_groups(saved):
    del saved["param_groups"]


def test_rates_that_a_step_takes_are_loaded_too():
    """A schedule may leave a rounding error under zero."""
    model, optimizer = three_matrices_after_one_step()
    optimizer.param_groups[0].update(lr=-1e-20, weight_decay=-1e-20)
    optimizer.step()
    other = Dion2(groups_of(copy.deepcopy(model)), lr=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == other.param_groups[0]["weight_decay"] == -1e-20
    other.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="the checkpoint's lr must be finite, got nan"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            other_shape,
            r"group 'dion2': parameter '0.weight': the checkpoint's 'momentum' has shape \(3, 3\)",
        ),
        (
            other_algorithm,
            r"group 'dion2': the checkpoint's algorithm is 'adamw', this optimizer's 'dion2'; build .* of that run",
        ),
        (
            missing_group,
            r"the checkpoint has 1 groups, \['dion2'\]; this optimizer 2, \['dion2', 'adamw'\]; .*; else build .*",
        ),
        (
            missing_parameter,
            "group 'dion2': the checkpoint has 2 parameters, this optimizer 3; .* build .* that run",
        ),
        (other_names, "only in the checkpoint: encoder.weight; only in this optimizer: 0.weight. To load by position"),
        (
            foreign_state,
            r"the checkpoint holds \['momentum_buffer'\] for it, algorithm 'dion2'.* \['momentum', 'step'\]; .* alone",
        ),
        (
            of_another_optimizer,
            "of another optimizer: its groups say no algorithm and have dampening, foreach. .* load the model's weigh",
        ),
        (setting_out_of_range, r"group 'dion2': the checkpoint's momentum must lie in \[0, 1\), got 1.5"),
        (too_many_names, "the checkpoint has 4 names for 3 parameters; it is damaged"),
        (no_groups, "the checkpoint has no 'param_groups'; pass what state_dict"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_checkpoints_are_refused_and_change_nothing(damage, message):
    model, optimizer = three_matrices_after_one_step()
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    other_model = copy.deepcopy(model)
    other = Dion2(groups_of(other_model), lr=0.9)
    for parameter in other_model.parameters():
        parameter.grad = torch.randn_like(parameter)
    other.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


@pytest.mark.parametrize("groups", [lambda model: list(model.parameters()), split_for_torch], ids=["one", "as ours"])
def test_torch_adamw_checkpoints_are_refused_with_advice(groups):
    model = model_of()
    adamw = torch.optim.AdamW(groups(model))
    train(model, adamw, range(1))
    message = (
        "^the checkpoint is of another optimizer: its groups say no algorithm and have amsgrad, .* Its state does not "
        r"fit; load the model's weights alone: in Lightning load_from_checkpoint\(\) .* without resume_from_checkpoint$"
    )
    with pytest.raises(ValueError, match=message):
        Dion2(groups_of(model)).load_state_dict(adamw.state_dict())


# Settings that are not the checkpoint's


def warnings_of_loading(optimizer: Dion2, saved: dict) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    return [str(each.message) for each in caught]


def test_settings_that_the_checkpoint_replaces_are_named():
    model, optimizer = three_matrices_after_one_step()
    settings = {"lr": 0.01, "fraction": 0.5, "momentum": 0.8, "betas": (0.8, 0.9)}
    other = Dion2(groups_of(model), **settings)
    [said] = warnings_of_loading(other, optimizer.state_dict())
    assert said == (
        "the checkpoint's settings replace those that this optimizer was given: lr 0.05 instead of 0.01 ('dion2', "
        "'adamw'); momentum 0.95 instead of 0.8 ('dion2'); fraction 0.25 instead of 0.5 ('dion2'); betas (0.9, 0.999) "
        "instead of (0.8, 0.9) ('adamw'). To go on with the given ones, set them in optimizer.param_groups after "
        "loading. Where a scheduler changes lr, multiply lr and initial_lr of each group, and the scheduler's "
        "base_lrs, by the new rate over the old one"
    )
    matrices, rest = other.param_groups
    assert (matrices["lr"], matrices["fraction"], matrices["momentum"]) == (0.05, 0.25, 0.95)
    assert (rest["lr"], rest["betas"]) == (0.05, (0.9, 0.999))


def test_of_an_added_group_and_of_a_copy_too():
    model, optimizer = three_matrices_after_one_step()
    groups = groups_of(model)
    other = Dion2(groups[:1], lr=0.05)
    other.add_param_group({**groups[1], "eps": 1e-6})
    for each in (other, copy.deepcopy(other)):
        [said] = warnings_of_loading(each, optimizer.state_dict())
        assert "eps 1e-08 instead of 1e-06 ('adamw')." in said


def test_the_rates_that_a_schedule_begins_with_are_compared():
    """Some begin with rates of their own; what they have made of them by now is no change."""

    def scheduled(model, max_lr, steps):
        optimizer = Dion2(groups_of(model), lr=max_lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [max_lr] * 2, total_steps=9, cycle_momentum=False)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer

    model, _ = three_matrices_after_one_step()
    saved = scheduled(model, 0.05, steps=3).state_dict()
    assert warnings_of_loading(scheduled(model, 0.05, steps=0), saved) == []
    [said] = warnings_of_loading(scheduled(model, 0.025, steps=0), saved)
    assert "lr 0.002 instead of 0.001 ('dion2', 'adamw')." in said


@pytest.mark.parametrize("scheduled", ["both", "saved", "neither"])
def test_nothing_is_said_of_the_same_settings(scheduled):
    """A schedule has changed the saved learning rate, and a finder the present one; pairs may come back as lists."""
    model, optimizer = three_matrices_after_one_step()
    if scheduled != "neither":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scheduler.step()
    saved = optimizer.state_dict()
    saved["param_groups"][1]["betas"] = list(saved["param_groups"][1]["betas"])
    other = Dion2(groups_of(model), lr=0.05, state_dtype=torch.float32)
    if scheduled == "both":
        torch.optim.lr_scheduler.StepLR(other, 1)
    for group in other.param_groups:
        group["lr"] = 1e-8
    saved["param_groups"][0]["state_dtype"] = "float32"
    assert warnings_of_loading(other, saved) == []
    assert [group["lr"] for group in other.param_groups] == pytest.approx(
        [0.05 if scheduled == "neither" else 0.005] * 2
    )


def test_one_rank_says_it(monkeypatch):
    model, optimizer = three_matrices_after_one_step()
    monkeypatch.setenv("RANK", "1")
    assert warnings_of_loading(Dion2(groups_of(model), lr=1.0), optimizer.state_dict()) == []


def test_the_saved_state_dict_is_not_changed_by_loading_it():
    model, optimizer = three_matrices_after_one_step()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    Dion2(groups_of(model)).load_state_dict(saved)
    assert saved["param_groups"] == before["param_groups"]
    assert saved["state"].keys() == before["state"].keys()


def trained(algorithm: str, **settings) -> tuple[nn.Module, Dion2]:
    model = model_of(torch.float32)
    optimizer = build_optimizer(model, 0.05, algorithm=algorithm, **settings)
    train(model, optimizer, range(3))
    return model, optimizer


def test_a_checkpoint_of_another_algorithm_is_refused_and_its_momentum_carried_over():
    """By name, as the groups are others; and under the settings of the new run."""
    model, optimizer = trained("dion2")
    other = build_optimizer(model, 0.01, algorithm="dion3")
    with pytest.raises(ValueError, match=r"'dion3': the checkpoint's algorithm is 'dion2', .* call .*carry_over"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    other.param_groups[0]["lr"] = 0.001
    with pytest.warns(UserWarning, match="this starts anew: 'variance' of parameter '0.weight'") as record:
        other.carry_over(through_a_file(optimizer.state_dict()))
    assert len(record) == 1
    assert other.param_groups[0]["lr"] == 0.001
    for parameter in model.parameters():
        found, saved = other.state[parameter], optimizer.state[parameter]
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert found.get("variance", torch.zeros(1)).count_nonzero() == 0
    train(model, other, range(3, 5))

    with warnings.catch_warnings(action="error"):  # back: nothing is missing
        optimizer.carry_over(other.state_dict())
    assert optimizer.state[model[0].weight].keys() == {"momentum", "step"}
    train(model, optimizer, range(5, 7))


def test_normuon_to_muon_and_back():
    """One algorithm, other settings: loading takes those of the checkpoint, carrying over keeps the present ones."""
    model, normuon = trained("normuon")
    with pytest.warns(UserWarning, match="normalize_neurons True instead of False"):
        muon = build_optimizer(model, 0.05, algorithm="muon")
        muon.load_state_dict(normuon.state_dict())
    assert torch.equal(muon.state[model[0].weight]["variance"], normuon.state[model[0].weight]["variance"])
    dion3 = build_optimizer(model, 0.05, algorithm="dion3")
    with pytest.warns(UserWarning, match="'variance' of"):  # which is of another size there
        dion3.carry_over(normuon.state_dict())
    assert dion3.state[model[0].weight]["variance"].count_nonzero() == 0
    muon = build_optimizer(model, 0.05, algorithm="muon")
    muon.carry_over(normuon.state_dict())
    assert muon.state[model[0].weight].keys() == {"momentum", "step"}
    with pytest.warns(UserWarning, match="'variance' of"):
        normuon.carry_over(muon.state_dict())
    train(model, normuon, range(3, 5))


def test_dion_goes_on_with_another_rank():
    """With its momentum; Q has another shape and starts anew, from another place for another seed."""
    model, quarter = trained("dion")
    halves = [build_optimizer(model, 0.05, algorithm="dion", rank_fraction=0.5, rounding_seed=seed) for seed in (0, 1)]
    for half in halves:
        with pytest.warns(UserWarning, match="'Q' of parameter '0.weight'"):
            half.carry_over(quarter.state_dict())
        assert torch.equal(half.state[model[0].weight]["momentum"], quarter.state[model[0].weight]["momentum"])
    assert not torch.equal(*(half.state[model[0].weight]["Q"] for half in halves))
    train(model, halves[0], range(3, 5))


def test_what_is_carried_over_is_found_by_name():
    """Also where the ids are names, in another order than param_names, as torch.distributed.checkpoint has them."""
    model, optimizer = trained("dion2")
    saved = optimizer.state_dict()
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    saved["state"] = {names[key]: value for key, value in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = group["param_names"][::-1]
    other = build_optimizer(model, 0.01, algorithm="muon")
    other.carry_over(saved)
    for parameter in model.parameters():
        assert all(
            torch.equal(value, other.state[parameter][name]) for name, value in optimizer.state[parameter].items()
        )


def test_a_muon_checkpoint_from_before_neurons_were_normalized_is_refused_with_the_way_out():
    model, muon = trained("muon")
    saved = muon.state_dict()
    for group in saved["param_groups"]:
        group.pop("normalize_neurons", None)
    normuon = build_optimizer(model, 0.05, algorithm="normuon")
    with pytest.raises(ValueError, match=r"needs \['momentum', 'step', 'variance'\]; to go on .* carry_over"):
        normuon.load_state_dict(saved)
    with pytest.warns(UserWarning, match="'variance' of"):
        normuon.carry_over(saved)
    train(model, normuon, range(3, 5))


def test_what_cannot_be_carried_over():
    model, adamw = trained("adamw")
    dion3 = build_optimizer(model, 0.05, algorithm="dion3")
    with pytest.raises(ValueError, match=r"'0.weight' has the state of algorithm 'adamw' .* 'dion3' cannot go on"):
        dion3.carry_over(adamw.state_dict())
    saved = trained("dion2")[1].state_dict()
    momentum = saved["state"][0].pop("momentum")
    with pytest.raises(ValueError, match=r"'0.weight': the checkpoint holds \['step'\] for it, and not momentum"):
        dion3.carry_over(saved)
    saved["state"][0]["momentum"] = momentum
    saved["param_groups"][0]["param_names"][0] = "another"
    with pytest.raises(ValueError, match=r"has no parameters of the names 0\.weight;"):
        dion3.carry_over(saved)
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="the checkpoint has 3 parameters, this optimizer 4;"):
        dion3.carry_over(saved)
    with pytest.raises(ValueError, match="is of another optimizer"):
        dion3.carry_over(torch.optim.AdamW(model.parameters()).state_dict())
    assert not dion3.state


def test_neurons_are_normalized_from_now_on():
    """A setting that is switched on or off in a live group gains or loses its state, in the shape of each parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5))
    optimizer = build_optimizer(model, 0.05)
    for is_on in (False, True, False):
        optimizer.param_groups[0]["normalize_neurons"] = is_on
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        states = [optimizer.state[layer.weight] for layer in model]
        assert [state["variance"].shape if is_on else None for state in states] == (
            [(12, 1), (5, 1)] if is_on else [None, None]
        )
        assert all(("variance" in state) == is_on for state in states)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def averaging(optimizer):
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.001)  # writes initial_lr anew
    return cosine


@pytest.mark.parametrize("make", [plateau, averaging])
def test_what_schedules_and_frameworks_make_of_a_rate_is_no_change(make):
    """A rate by hand neither; another rate in the script is one, also to go on from there once more."""
    model, optimizer = three_matrices_after_one_step()
    schedule = make(optimizer)
    for _ in range(3):
        optimizer.step()
        schedule.step(*([1.0] if make is plateau else []))
    optimizer.param_groups[0]["lr"] *= 0.5
    saved = optimizer.state_dict()
    lr = saved["param_groups"][0]["given_lr"]
    for scheduled in (False, True):
        same, other, third = (Dion2(groups_of(model), lr=rate) for rate in (lr, 2 * lr, 2 * lr))
        if scheduled:
            for each in (same, other, third):
                make(each)
        assert warnings_of_loading(same, saved) == []
        for each, its_saved in ((other, saved), (third, same.state_dict())):
            [said] = warnings_of_loading(each, its_saved)
            assert f"lr {lr} instead of {2 * lr} (" in said


def test_a_rate_that_is_set_after_a_load_as_its_warning_advises():
    model, optimizer = three_matrices_after_one_step()
    saved = optimizer.state_dict()
    lr = saved["param_groups"][0]["lr"]
    resumed = Dion2(groups_of(model), lr=2 * lr)
    assert len(warnings_of_loading(resumed, saved)) == 1
    for group in resumed.param_groups:
        group["lr"] = 2 * lr
    assert warnings_of_loading(Dion2(groups_of(model), lr=2 * lr), resumed.state_dict()) == []
    [said] = warnings_of_loading(Dion2(groups_of(model), lr=3 * lr), resumed.state_dict())
    assert f"lr {lr} instead of {3 * lr} (" in said


def fused(splits: str, algorithm: str = "dion3") -> tuple[nn.Parameter, Dion2]:
    weight = nn.Parameter(torch.randn(24, 10, generator=torch.manual_seed(0)))
    group = {"params": [("qkv", weight)], "name": "its", "splits": splits, "algorithm": algorithm}
    optimizer = Dion2([group], lr=0.1)
    weight.grad = torch.randn(24, 10, generator=torch.manual_seed(1))
    optimizer.step()
    return weight, optimizer


def test_splits_of_a_checkpoint_that_do_not_fit_are_refused() -> None:
    _, old = fused("q 12 | k 6 | v 6")
    saved = old.state_dict()
    saved["param_groups"][0]["splits"] = "q 9 | k 9"
    weight, optimizer = fused("q 12 | k 6 | v 6")
    before = optimizer.state[weight]["momentum"].clone()
    with pytest.raises(
        ValueError, match=r"^with the checkpoint's settings .*'its'.* what its splits say: 'q 9 \| k 9'"
    ):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[weight]["momentum"], before)
    assert optimizer.param_groups[0]["splits"] == "q 12 | k 6 | v 6"


@pytest.mark.parametrize("algorithm", ["dion2", "dion3", "dion"])
def test_blocks_resume_bit_for_bit(algorithm: str) -> None:
    weight, optimizer = fused("4 x (q 2 | k 2 | v 2)", algorithm)
    other, resumed = fused("4 x (q 2 | k 2 | v 2)", algorithm)
    for step in range(3):
        weight.grad = torch.randn(24, 10, generator=torch.manual_seed(10 + step))
        optimizer.step()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        other.copy_(weight)
    for step in range(3):
        for each, its_optimizer in ((weight, optimizer), (other, resumed)):
            each.grad = torch.randn(24, 10, generator=torch.manual_seed(20 + step))
            its_optimizer.step()
    assert torch.equal(weight, other)


def test_momenta_of_a_whole_weight_are_carried_over_to_its_blocks() -> None:
    weight, old = fused("whole")
    _, optimizer = fused("q 12 | k 6 | v 6")
    momentum = old.state[weight]["momentum"].clone()
    with pytest.warns(UserWarning, match="this starts anew: 'variance' of parameter 'qkv'"):
        optimizer.carry_over(old.state_dict())
    (other,) = optimizer.param_groups[0]["params"]
    assert torch.equal(optimizer.state[other]["momentum"], momentum)
    assert optimizer.param_groups[0]["splits"] == "q 12 | k 6 | v 6"


SCHEDULES: dict[str, Callable[[Dion2], Any]] = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, 5, 0.5),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20),
    "function": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scheduled_rate_goes_on_as_the_warning_advises(schedule):
    """Multiplied everywhere, it is that of a run that has begun with the new rate."""

    def scheduled(lr):
        model, _ = three_matrices_after_one_step()
        optimizer = Dion2(groups_of(model), lr=lr)
        return optimizer, SCHEDULES[schedule](optimizer)

    def rates_of(optimizer, scheduler, steps):
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    old, old_scheduler = scheduled(0.1)
    wanted, wanted_scheduler = scheduled(0.01)
    rates_of(old, old_scheduler, 8)
    rates_of(wanted, wanted_scheduler, 8)
    optimizer, scheduler = scheduled(0.01)
    [said] = warnings_of_loading(optimizer, old.state_dict())
    assert "multiply lr and initial_lr of each group, and the scheduler's base_lrs, by the new rate" in said
    scheduler.load_state_dict(old_scheduler.state_dict())
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
        group["initial_lr"] *= 0.1
    scheduler.base_lrs = [rate * 0.1 for rate in scheduler.base_lrs]
    assert rates_of(optimizer, scheduler, 9) == pytest.approx(rates_of(wanted, wanted_scheduler, 9))
    assert warnings_of_loading(optimizer, optimizer.state_dict()) == []


def test_a_rate_of_zero_where_a_schedule_has_ended_is_named():
    """Without a schedule here, nothing would move."""
    model, _ = three_matrices_after_one_step()
    optimizer = Dion2(groups_of(model), lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other = Dion2(groups_of(model), lr=0.1)
    [said] = warnings_of_loading(other, optimizer.state_dict())
    assert "lr 0.0 instead of 0.1 ('dion2', 'adamw')." in said
    lr_scheduler.CosineAnnealingLR(other, 8)
    assert warnings_of_loading(other, optimizer.state_dict()) == []


# Names that are not the optimizer's


def named(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Parameter]]:
    return [(prefix + name, parameter) for name, parameter in model.named_parameters() if "weight" in name]


def assert_equal_states(first: Dion2, second: Dion2) -> None:
    assert first.state.keys() == second.state.keys()
    for parameter, state in first.state.items():
        assert_identical(list(state.values()), list(second.state[parameter].values()))


def test_the_prefixes_of_wrappers_do_not_matter():
    model, _ = three_matrices_after_one_step()
    optimizer, other = Dion2(named(model, "module."), lr=0.05), Dion2(named(model)[::-1], lr=0.05)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert_equal_states(optimizer, other)


def test_names_of_the_file_in_another_order_than_those_of_the_module():
    """As torch.distributed.checkpoint leaves them: ids in the present order, param_names in the file's."""
    model, _ = three_matrices_after_one_step()
    optimizer = Dion2(named(model, "module."), lr=0.05)
    optimizer.step()
    saved = optimizer.state_dict()
    [group] = saved["param_groups"]
    ids = [name for name, _ in named(model)]
    state = {name: saved["state"][number] for name, number in zip(ids, group["params"], strict=True)}
    turned = {**group, "params": ids, "param_names": group["param_names"][::-1]}
    other = Dion2(named(model, "module."), lr=0.05)
    other.load_state_dict({"state": state, "param_groups": [turned]})
    assert_equal_states(optimizer, other)
    with_own_names = Dion2(named(model, "own "), lr=0.05)
    own = {**turned, "param_names": [f"own {name}" for name in ids[::-1]]}
    with pytest.raises(ValueError, match="has its parameters by names that are not the optimizer's, and in another"):
        with_own_names.load_state_dict({"state": state, "param_groups": [own]})


def test_names_that_only_a_prefix_tells_apart():
    """As of a teacher that is called module."""
    model = nn.ModuleDict({"layer": nn.Linear(8, 8, bias=False)})
    model.register_module("module", nn.ModuleDict({"layer": nn.Linear(8, 8, bias=False)}))
    optimizer, other = Dion2(named(model), lr=0.05), Dion2(named(model)[::-1], lr=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for saved in (optimizer.state_dict(), get_optimizer_state_dict(model, optimizer)):
        other.load_state_dict(saved)
        assert_equal_states(optimizer, other)


def test_a_part_of_the_module_with_names_that_end_alike():
    """Through torch.distributed.checkpoint, which names parameters by the whole module, in another order."""
    layers = {"norm": nn.Linear(8, 8, bias=False), "layer": nn.ModuleDict({"norm": nn.Linear(8, 8, bias=False)})}
    model = nn.ModuleDict({"model": nn.ModuleDict(layers)})
    part = model["model"]
    optimizer, other = Dion2(named(part), lr=0.05), Dion2(named(part)[::-1], lr=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    set_optimizer_state_dict(model, other, get_optimizer_state_dict(model, optimizer))
    assert_equal_states(optimizer, other)
    directly = Dion2(named(part)[::-1], lr=0.05)
    directly.load_state_dict(get_optimizer_state_dict(model, optimizer))
    assert_equal_states(optimizer, directly)


@pytest.mark.parametrize("another", [{"1.weight": {"lr": 0.1}}, {"0.weight": {"lr": 0.1}, "1.weight": {"lr": 0.2}}])
def test_other_groups_through_torch_distributed_checkpoint(another):
    """It puts parameters into the present groups, with the settings of whatever group it finds."""
    model, _ = three_matrices_after_one_step()
    optimizer = build_optimizer(model, lr=0.02, overrides={"0.weight": {"lr": 0.1}})
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    other = build_optimizer(model, lr=0.02, overrides=another)
    with pytest.raises(ValueError, match=r"the names of the parameters differ|has no settings for group"):
        set_optimizer_state_dict(model, other, saved)


def test_to_load_by_position_names_become_numbers():
    """Where the file has names for numbers, as Lightning's has, the advice says so; done, it loads."""
    model, _ = three_matrices_after_one_step()
    optimizer, other = Dion2(named(model), lr=0.05), Dion2(named(model, "other "), lr=0.05)
    optimizer.step()
    saved = with_parameter_names(optimizer.state_dict(), optimizer, model)
    with pytest.raises(ValueError, match="groups, and number the parameters, in the groups and in the state"):
        other.load_state_dict(saved)
    [group] = saved["param_groups"]
    del group["param_names"]
    state = {number: saved["state"][name] for number, name in enumerate(group["params"])}
    other.load_state_dict({"state": state, "param_groups": [{**group, "params": [0, 1, 2]}]})
    assert_equal_states(optimizer, other)


# What else may be there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_after_the_load_have_the_last_word(dtype):
    model = model_of(dtype)
    optimizer = Dion2(groups_of(model), lr=0.05)
    train(model, optimizer, range(1))

    def forget(optimizer):
        assert any(state["momentum"].any() for state in optimizer.state.values() if "momentum" in state)
        for state in optimizer.state.values():
            for entry in ("momentum", "exp_avg"):
                if entry in state:
                    state[entry].zero_()

    optimizer.register_load_state_dict_post_hook(forget)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any(state["momentum"].any() for state in optimizer.state.values() if "momentum" in state)


def test_state_of_no_parameter():
    _, optimizer = three_matrices_after_one_step()
    optimizer.state["epoch"] = 3
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["epoch"] == 3


def test_numbers_of_numpy_are_saved_as_numbers():
    """Else nothing loads them that takes weights alone."""
    model, _ = three_matrices_after_one_step()
    settings = {"lr": np.float64(0.05), "momentum": np.float32(0.5), "rounding_seed": np.int64(3)}
    optimizer = Dion2(groups_of(model), **settings, betas=(np.float64(0.5), np.float64(0.75)))
    optimizer.step()
    loaded = through_a_file(optimizer.state_dict())["param_groups"]
    assert [type(loaded[0][name]) for name in settings] == [float, float, int]
    assert loaded[1]["betas"] == (0.5, 0.75)


def test_a_load_does_not_depend_on_the_default_device():
    """As where a model is made without memory, in a block that saves time."""
    model = model_of()
    optimizer = Dion2(groups_of(model), lr=0.05)
    train(model, optimizer, range(2))
    resumed = Dion2(groups_of(model), lr=0.05)
    with torch.device("meta"):
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for parameter in model.parameters():
        for name, tensor in optimizer.state[parameter].items():
            assert torch.equal(resumed.state[parameter][name], tensor)
