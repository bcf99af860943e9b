"""A parameter that gets gradients and that no optimizer trains is named, with the call that adds it."""

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_on_ranks

LATE = "^no optimizer trains some parameters of the model that get gradients.*for name in \\['0.weight', '0.bias'\\]"


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


def backward(model: nn.Module) -> Any:
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Dion2, steps: int = 1) -> None:
    for _ in range(steps):
        model.zero_grad()
        backward(model)
        optimizer.step()


def unfrozen_after_building(model: Any) -> Dion2:
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, lr=1e-2)
    model[0].requires_grad_(True)
    return optimizer


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_unfrozen_after_building() -> None:
    """The second step shows that nothing has changed it since the first; the call in the warning trains it.

    And nothing else, such as what another optimizer trains.
    """
    model = make_model()
    optimizer = unfrozen_after_building(model)
    model.append(nn.Linear(4, 4))
    other = torch.optim.AdamW(model[3].parameters())
    with no_warning():
        train(model, optimizer)
    with pytest.warns(UserWarning, match=LATE) as caught:
        train(model, optimizer, steps=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__

    [call] = re.findall(r"optimizer\.add_param_group\(.*?\}\)", str(caught[0].message))
    eval(call, {"optimizer": optimizer, "model": model})
    groups = {group["name"]: group["param_names"] for group in optimizer.param_groups}
    assert groups == {
        "dion2": ["2.weight"],
        "adamw-no-decay": ["2.bias"],
        "dion2-2": ["0.weight"],
        "adamw-no-decay-2": ["0.bias"],
    }
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with no_warning():
        train(model, optimizer, steps=3)
        other.step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_added_to_the_model_after_building() -> None:
    model = make_model()
    optimizer = build_optimizer(model, lr=1e-2)
    model.append(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=re.escape("for name in ['3.weight', '3.bias']")):
        train(model, optimizer, steps=2)


def test_the_gradients_of_a_closure() -> None:
    """Which are there after the step, and not before it."""
    model = make_model()
    optimizer = unfrozen_after_building(model)

    def closure() -> Any:
        model.zero_grad()
        return backward(model)

    with pytest.warns(UserWarning, match=LATE):
        for _ in range(2):
            optimizer.step(closure)


def test_all_are_named() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[1:].requires_grad_(False)
    optimizer = build_optimizer(model, lr=1e-2)
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"\['1.weight', '1.bias', '2.weight', '2.bias', '3.weight', '3.bias'\]"):
        train(model, optimizer, steps=2)


# What is trained elsewhere, or not meant to be trained


@pytest.mark.parametrize("every", [1, 3], ids=["in turn", "less often"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda parameters, lr: Dion2([*parameters][:1], lr=lr)])
def test_two_optimizers_of_one_model(make: Callable[..., torch.optim.Optimizer], every: int) -> None:
    """As in a GAN, whose generator's loss gives the discriminator gradients too."""
    model = make_model()
    optimizer = unfrozen_after_building(model)
    other = make(model[0].parameters(), lr=1e-2)
    held = [parameter for group in other.param_groups for parameter in group["params"]]
    for parameter in set(model[0].parameters()) - set(held):
        parameter.requires_grad_(False)
    with no_warning():
        for step in range(7):
            train(model, optimizer)
            if step % every == 0:
                other.step()


def test_a_parameter_that_is_changed_by_hand() -> None:
    model = make_model()
    optimizer = unfrozen_after_building(model)
    with no_warning():
        for _ in range(4):
            train(model, optimizer)
            with torch.no_grad():
                for parameter in model[0].parameters():
                    parameter -= 0.01 * parameter.grad


@pytest.mark.parametrize("change", [lambda model: model[0].requires_grad_(False), lambda model: model[0].zero_grad()])
def test_a_parameter_without_a_gradient_or_frozen_again(change: Callable[[Any], object]) -> None:
    model = make_model()
    optimizer = unfrozen_after_building(model)
    with no_warning():
        for _ in range(4):
            model.zero_grad()
            backward(model)
            change(model)
            optimizer.step()
            model[0].requires_grad_(True)


def test_a_deleted_model() -> None:
    model = make_model()
    optimizer = unfrozen_after_building(model)
    train(model, optimizer)
    late = model[0].weight
    del model
    gc.collect()
    late.grad = torch.ones_like(late)
    with no_warning():
        optimizer.step()


# Several ranks


def check_on_shards() -> None:
    """The first rank warns for all of them, and of nothing that is trained."""
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    fully_shard(model, mesh=mesh)
    optimizer = unfrozen_after_building(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, steps=3)
    assert [bool(re.match(LATE, str(each.message))) for each in caught] == [True] * (dist.get_rank() == 0)

    # Modules may hold whole parameters at the step, and the optimizer their shards.
    model = make_model()
    fully_shard(model, mesh=mesh)
    model.set_reshard_after_backward(False)
    optimizer = build_optimizer(model, lr=1e-2)
    with no_warning():
        train(model, optimizer, steps=3)


def test_on_shards() -> None:
    run_on_ranks(2, check_on_shards)
