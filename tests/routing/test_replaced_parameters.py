"""An optimizer whose model has replaced the parameters says so instead of stepping."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


def test_replaced_in_model_and_optimizer() -> None:
    """As Accelerate does: new parameters in the model, then new groups with them."""
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
@pytest.mark.filterwarnings("ignore:parameter '2.weight', '2.bias' of the model gets gradients")  # the part added
def test_changes_that_replace_no_parameter(change: Callable[[Any], object]) -> None:
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

    # Not resharded after backward, as for accumulation: modules hold whole parameters, the optimizer their shards.
    model = make_model()
    fully_shard(model, mesh=mesh)
    model.set_reshard_after_backward(False)
    train(model, build_optimizer(model, lr=0.1), 2)


def test_sharded_after_building() -> None:
    run_on_ranks(2, shard_after_building)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by_closure", [True, False])
def test_replaced_later_whatever_the_gradients(set_to_none: bool, by_closure: bool) -> None:
    """The old parameters' gradients are zero or None, in Lightning until the closure has run."""
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


# Copies, and deleted models and optimizers


def test_copies_are_not_checked() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    both = copy.deepcopy({"model": model, "optimizer": optimizer})
    train(both["model"], both["optimizer"])
    train(model, optimizer)
    unpickled = pickle.loads(pickle.dumps(optimizer))
    unpickled.step()


def test_a_deleted_model() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    deleted = weakref.ref(model)
    del model
    gc.collect()
    assert deleted() is None
    optimizer.step()


def test_a_deleted_optimizer() -> None:
    """Its parameters keep neither it nor its state alive, and another optimizer can train them."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    deleted = [weakref.ref(optimizer), weakref.ref(optimizer.state[model[0].weight]["momentum"])]
    del optimizer
    gc.collect()
    assert [reference() for reference in deleted] == [None, None]
    train(model, build_optimizer(model, lr=0.1), 2)


def test_parameters_that_are_swapped() -> None:
    """As torch does when a sharded model is moved; it raises an error if a parameter has weak references."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    optimizer.zero_grad()
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))
    train(model, optimizer)


def test_deleted_parameters() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    train(model, optimizer)
    deleted = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert deleted() is None


def test_a_closure_that_makes_the_gradients() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(lambda: backward(model))
