"""Rates that are tensors on every layout: the bits of floats, agreement between ranks, and what no CUDA graph holds."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dion2_lightning import Dion2
from dion2_lightning.algorithms.hyperparameters import set_rate
from dion2_lightning.matrices.layout import is_dtensor, local
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import CASES, groups_of, place, sharded, whole_parameters, whole_tensors

RATES = {"lr": 2.0**-6, "weight_decay": 0.125, "momentum": 0.9375}
LAYOUTS = ("FSDP2 on 2", "TP on 2, row-wise", "replicated on 2", "replicas")


def parameters_of(layout: str) -> dict[str, nn.Parameter]:
    return whole_parameters() if layout == "replicas" else sharded(CASES[layout])


def optimizer_of(layout: str, parameters: dict[str, nn.Parameter], rates: dict[str, Any], **settings: Any) -> Dion2:
    group = dist.group.WORLD if layout == "replicas" else None
    settings = {"share_replicas": True, "orthonormalize_dtype": "float32", **settings}
    return Dion2(groups_of(parameters), **rates, process_group=group, **settings)


def tensors() -> dict[str, Tensor]:
    return {name: torch.tensor(rate) for name, rate in RATES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    for name, gradient in whole_tensors(seed).items():
        parameter = parameters[name]
        placed = place(gradient, parameter.device_mesh, parameter.placements) if is_dtensor(parameter) else gradient
        parameter.grad = placed


def check_bits_of_floats(layout: str) -> None:
    trained = []
    for rates in (RATES, tensors()):
        parameters = parameters_of(layout)
        optimizer = optimizer_of(layout, parameters, rates, capturable=rates is not RATES)
        for step in range(4):
            for group in optimizer.param_groups:  # which have one tensor, but for the one with a rate of its own
                if group["name"] != "half":
                    set_rate(group, "lr", RATES["lr"] / 2**step)
            set_gradients(parameters, step)
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        trained.append([local(each).detach() for each in (*parameters.values(), *states)])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def check_agreement(layout: str) -> None:
    """Values are compared at the first step, and from then on that they are tensors."""
    parameters = parameters_of(layout)
    rates = tensors()
    if dist.get_rank() == 1:
        rates["lr"].fill_(0.5)
    optimizer = optimizer_of(layout, parameters, rates, capturable=True)
    set_gradients(parameters, 0)
    with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
        optimizer.step()
    rates["lr"].fill_(RATES["lr"])
    optimizer.step()
    if dist.get_rank() == 1:
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"])
    with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
        optimizer.step()


def check_refusals(layout: str) -> None:
    message = "has replicas, whose ranks talk" if layout == "replicas" else "is a DTensor on several ranks"
    parameters = parameters_of(layout)
    optimizer = optimizer_of(layout, parameters, tensors(), capturable=True)
    set_gradients(parameters, 0)
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dion2_lightning.optimizer.is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=f"a CUDA graph cannot hold this step of Dion2: .*{message}"):
            optimizer.step()
        if layout == "replicas":
            optimizer.share_replicas = False
            optimizer.step()


def check(layout: str) -> None:
    check_bits_of_floats(layout)
    check_agreement(layout)
    check_refusals(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensor_rates(layout: str) -> None:
    run_on_ranks(2, check, layout)
