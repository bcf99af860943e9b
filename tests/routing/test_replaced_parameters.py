"""An optimizer that no longer trains its model, or not alone, says so instead of stepping."""

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_on_ranks


def make_model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))


def backward(model: nn.Module) -> Any:
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Dion2, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


REPLACED = (
    r"^parameter '0.weight', '0.bias' of this optimizer: the model has another parameter under the name, so a step"
)


def test_replaced_before_the_first_step() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    model[0] = nn.Linear(4, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=REPLACED):
        train(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_replaced_later() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    for layer in range(2):
        model[layer] = nn.Linear(*reversed(model[layer].weight.shape))
    with pytest.raises(RuntimeError, match=r"'0.weight', '1.weight', '0.bias' and 1 more of this optimizer"):
        train(model, optimizer)


def test_replaced_in_groups_and_not_in_the_model() -> None:
    model, other = make_model(), make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    optimizer.param_groups[0]["params"] = [layer.weight for layer in other]
    with pytest.raises(RuntimeError, match=r"'0.weight', '1.weight' of this optimizer"):
        train(model, optimizer)


def test_replaced_in_both_is_right() -> None:
    """As Accelerate does it: new parameters in the model, then in the groups, which become new objects."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    for layer in model:
        layer.weight, layer.bias = (nn.Parameter(p.detach().clone()) for p in (layer.weight, layer.bias))
    parameters = dict(model.named_parameters())
    optimizer.param_groups = [
        {**group, "params": [parameters[name] for name in group["param_names"]]} for group in optimizer.param_groups
    ]
    before = model[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model[0].requires_grad_(False),
        lambda model: model.to(torch.float64).float(),
        lambda model: setattr(model, "1", nn.Identity()),
        lambda model: model.append(nn.Linear(4, 4)),
    ],
    ids=["compiled", "frozen", "converted", "part taken out", "part added"],
)
def test_what_leaves_the_parameters_or_takes_some_away(change: Callable[[Any], object]) -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    change(model)
    train(model, optimizer, 2)


def shard_after_building() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"'0.weight'.* The model was sharded \(fully_shard\)"):
        train(model, optimizer)

    # Left unsharded after backward, as for accumulation: modules hold whole parameters, the optimizer their shards.
    model = make_model()
    fully_shard(model, mesh=mesh)
    model.set_reshard_after_backward(False)
    train(model, build_optimizer(model, lr=0.1), 2)


def test_sharded_after_building() -> None:
    run_on_ranks(2, shard_after_building)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by_closure", [True, False])
def test_replaced_later_though_gradients_say_nothing(set_to_none: bool, by_closure: bool) -> None:
    """Gradients of replaced parameters are zero, or not there until a closure has run, as in Lightning."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    model[0] = nn.Linear(4, 6)
    optimizer.zero_grad(set_to_none)
    with pytest.raises(RuntimeError, match=REPLACED):
        if by_closure:
            optimizer.step(lambda: backward(model))
        else:
            backward(model)
            optimizer.step()


def test_modules_that_hold_each_other() -> None:
    model = make_model()
    model[0].parent = model
    optimizer = build_optimizer(model[0], lr=0.1)
    train(nn.Sequential(model[0]), optimizer)


# Copies and the ends of lives


def test_copies_are_not_attached() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    both = copy.deepcopy({"model": model, "optimizer": optimizer})
    train(both["model"], both["optimizer"])
    train(model, optimizer)
    unpickled = pickle.loads(pickle.dumps(optimizer))
    unpickled.step()


def test_a_model_that_is_gone() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    optimizer.step()


def test_an_optimizer_that_is_gone() -> None:
    """Nothing keeps it or its state, though its parameters live; nor do they keep another from training them."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    gone = [weakref.ref(optimizer), weakref.ref(optimizer.state[model[0].weight]["momentum"])]
    del optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    train(model, build_optimizer(model, lr=0.1), 2)


def test_parameters_that_are_swapped() -> None:
    """As torch does it where a sharded model is moved: it refuses where something refers to a parameter weakly."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    optimizer.zero_grad()
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))
    train(model, optimizer)


def test_parameters_that_are_gone() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    gone = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert gone() is None


# Two optimizers


def test_two_optimizers_that_take_turns() -> None:
    model = make_model()
    first, second = build_optimizer(model, lr=0.1), build_optimizer(model[1], lr=0.1)
    train(model, first)
    train(model, second)
    with pytest.raises(RuntimeError, match=r"^parameter '1.weight', '1.bias' of this optimizer: another Dion2 has"):
        train(model, first)


def test_back_to_an_earlier_optimizer() -> None:
    """Weights and state of before a phase that went wrong: as if it had not been. Then the other is the one before."""
    model = make_model()
    first = build_optimizer(model, lr=0.1)
    train(model, first)
    saved = copy.deepcopy({"model": model.state_dict(), "first": first.state_dict()})
    train(model, first)
    expected = copy.deepcopy(model.state_dict())

    second = build_optimizer(model, lr=10.0)
    train(model, second)
    model.load_state_dict(saved["model"])
    with pytest.raises(RuntimeError, match=r"load its state: optimizer\.load_state_dict\(optimizer\.state_dict\(\)\)$"):
        train(model, first)
    first.load_state_dict(saved["first"])
    train(model, first)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    train(model, first)
    with pytest.raises(RuntimeError, match="another Dion2 has stepped the same parameters"):
        train(model, second)


def test_parameters_of_an_earlier_optimizer_that_are_added_later() -> None:
    """No turn is taken: the other's steps came before any of this one's on them."""
    model = make_model()
    train(model, build_optimizer(model, lr=0.1))
    optimizer = build_optimizer(model, lr=0.1)
    last = optimizer.param_groups[-1]
    optimizer.param_groups[-1:] = []
    train(model, optimizer)
    optimizer.param_groups.append(last)
    train(model, optimizer, 2)


def test_threads_that_train_their_own_models() -> None:
    def build_and_train(_: int) -> None:
        living = []  # every step of any of them would notice, if it looked at all that live
        for _ in range(30):
            model = make_model()
            living.append(build_optimizer(model, lr=0.1))
            train(model, living[-1], 3)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(build_and_train, range(6)))
    finally:
        sys.setswitchinterval(interval)


def test_a_new_phase_with_a_new_optimizer() -> None:
    """Also where the old one lives on, as in a notebook."""
    model = make_model()
    optimizers = []
    for _ in range(3):
        optimizers.append(build_optimizer(model, lr=0.1))
        train(model, optimizers[-1], 2)


def test_two_optimizers_on_two_parts() -> None:
    model = make_model()
    first, second = (build_optimizer(layer, lr=0.1) for layer in model)
    for _ in range(3):
        train(model, first)
        train(model, second)


def test_a_rehearsed_step_is_no_turn() -> None:
    """By such a step torch.distributed.checkpoint makes the state of an optimizer that is to be loaded or compared."""
    model = make_model()
    first, second = build_optimizer(model, lr=0.1), build_optimizer(model, lr=0.1)
    train(model, first)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    LambdaLR(second, lambda _: 0.0)
    second.step()
    train(model, first)


def test_a_closure_that_makes_the_gradients() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(lambda: backward(model))
