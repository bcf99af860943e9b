"""A new algorithm is one file and one line in the table: a toy trains, is saved, and resumes on other ranks.

It is momentum SGD on matrices, with two states: a momentum like the parameter, and the largest |gradient| that each
output row has seen, of shape (out, 1), by which the row's step is divided.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from dion2_lightning import Dion2, route_parameters
from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.algorithm import Algorithm, Member, StateTensor, StepContext, StepWork
from dion2_lightning.algorithms.hyperparameters import SharedSettings, decay_rate, setting
from dion2_lightning.matrices.layout import local, local_gradient
from tests.distributed.ranks import run_on_ranks


@dataclass(kw_only=True)
class ToySettings(SharedSettings):
    heaviness: float = setting(0.5, "Decay rate of the momentum.", decay_rate)


class Toy(Algorithm):
    name: ClassVar[str] = "toy"
    settings: ClassVar[type[SharedSettings]] = ToySettings
    needs_matrices: ClassVar[bool] = True

    def state(self, parameter: Any, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        placements = None
        if isinstance(parameter, DTensor):  # rows are spread as the parameter's are
            placements = tuple(each if each.is_shard(0) else Replicate() for each in parameter.placements)
        largest = StateTensor((parameter.shape[0], 1), torch.float32, parameter.device, placements)
        return {"momentum": StateTensor.like(parameter), "largest": largest}

    def step(self, members: Sequence[Member], context: StepContext) -> StepWork:
        return StepWork(local=[partial(self._update, member) for member in members])

    @staticmethod
    def _update(member: Member) -> None:
        gradient = local_gradient(member.parameter)
        if gradient is None:
            return
        momentum, largest = local(member.state["momentum"]), local(member.state["largest"])
        momentum.mul_(member.group["heaviness"]).add_(gradient)
        torch.maximum(largest, gradient.abs().amax(1, keepdim=True), out=largest)
        local(member.parameter).sub_(momentum / (largest + 1e-3), alpha=member.group["lr"])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))


def make_optimizer(model: nn.Module) -> Dion2:
    """Register the toy, as a package of an algorithm's author would, and build the optimizer."""
    ALGORITHMS.setdefault("toy", Toy())
    return Dion2(route_parameters(model, matrices="toy").param_groups(), lr=0.1)


def train(model: nn.Module, optimizer: Dion2, steps: range) -> None:
    for step in steps:
        batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: each.full_tensor() if isinstance(each, DTensor) else each.clone() for name, each in values.items()}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "toy", Toy())


def test_its_settings_are_known_and_checked() -> None:
    weight = [nn.Parameter(torch.ones(3, 4))]
    [group] = Dion2([{"params": weight, "algorithm": "toy"}], momentum=0.3).param_groups
    assert group["heaviness"] == 0.5
    assert "momentum" not in group
    with pytest.raises(ValueError, match=r"group 0: heaviness must lie in \[0, 1\), got 2"):
        Dion2([{"params": weight, "algorithm": "toy", "heaviness": 2.0}])
    with pytest.raises(ValueError, match="unknown entry 'fraction' of algorithm 'toy'; it belongs to 'dion2', 'dion3'"):
        Dion2([{"params": weight, "algorithm": "toy", "fraction": 0.5}])
    with pytest.raises(ValueError, match="is not a matrix, which algorithm 'toy' needs"):
        Dion2([{"params": [nn.Parameter(torch.ones(3))], "algorithm": "toy"}])


def test_it_trains_and_resumes_bit_for_bit() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    before = model(torch.ones(1, 8)).square().mean().item()
    train(model, optimizer, range(4))
    assert optimizer.state[model[0].weight]["largest"].shape == (12, 1)
    other = make_model()
    other.load_state_dict(model.state_dict())
    resumed = make_optimizer(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert all(torch.equal(one, another) for one, another in zip(model.parameters(), other.parameters(), strict=True))
    assert model(torch.ones(1, 8)).square().mean().item() < before


def check_training(folder: str) -> None:
    """Train as on one device, and save a checkpoint."""
    alone, model = make_model(), make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizers = [make_optimizer(alone), make_optimizer(model)]
    for each, optimizer in zip((alone, model), optimizers, strict=True):
        train(each, optimizer, range(4))
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(whole(model.state_dict())[name], expected, rtol=1e-5, atol=1e-6)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizers[1])}
    dcp.save(state, checkpoint_id=folder)
    saved = copy.deepcopy(optimizers[1].state_dict())
    entries = next(iter(saved["state"].values()))
    entries["largest"] = entries["largest"].redistribute(placements=[Replicate()])
    with pytest.raises(
        ValueError, match=r"'largest' is placed as \(Replicate.* this optimizer's as \(Shard.*; save what get_optim"
    ):
        optimizers[1].load_state_dict(saved)


def check_resuming(folder: str) -> None:
    """Load on another number of ranks; training continues as on one device."""
    alone, model = make_model(), make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ours, optimizer = make_optimizer(alone), make_optimizer(model)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(alone, ours, range(4))
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        found = whole(optimizer.state[parameter])
        for name, value in ours.state[expected].items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    train(alone, ours, range(4, 8))
    train(model, optimizer, range(4, 8))
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(whole(model.state_dict())[name], expected, rtol=1e-4, atol=1e-5)


def test_it_resumes_on_more_ranks_under_fsdp2(tmp_path: Path) -> None:
    run_on_ranks(2, check_training, str(tmp_path / "checkpoint"))
    run_on_ranks(3, check_resuming, str(tmp_path / "checkpoint"))
