"""Dion on every layout: the same global gradients as one process gets, for 20 steps.

Every rank also trains the whole matrices by itself, and compares its part of momenta, of Q, and of what the weights
have moved.
"""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dion2_lightning import Dion2
from dion2_lightning.matrices.layout import local
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import (
    CASES,
    MATRICES,
    STACKS,
    errors_name_case,
    part_of,
    place,
    sharded,
    whole_parameters,
    whole_tensors,
)

STEPS = 20
NAMES = [*MATRICES, *STACKS]
RANK_FRACTIONS = [0.25, 0.5, 0.125, 0.25, 1.0, 1.0, 0.25]


def optimizer_of(parameters: dict[str, nn.Parameter], **settings: Any) -> Dion2:
    """A group for each matrix, with ranks from an eighth to all of it."""
    groups = []
    for name, rank_fraction in zip(NAMES, 2 * RANK_FRACTIONS, strict=True):
        own = {**MATRICES, **STACKS}[name][1]
        stored = {key: own[key] for key in ("batched", "transposed") if key in own}
        group = {"params": [(name, parameters[name])], "name": name, "rank_fraction": rank_fraction}
        groups.append({**group, **stored, "algorithm": "dion"})
    return Dion2(groups, lr=0.02, weight_decay=0.1, **settings)


def train(parameters: dict[str, nn.Parameter], optimizer: Dion2, steps: int) -> None:
    for step in range(steps):
        for name, values in whole_tensors(seed=100 + step).items():
            parameter = parameters[name]
            gradient = values.to(parameter.dtype)
            if isinstance(parameter, DTensor):
                parameter.grad = place(gradient, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = gradient.clone()
        optimizer.step()


@cache
def trained_alone(dtype: torch.dtype, steps: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The weights and the state of one process."""
    alone = whole_parameters(dtype=dtype)
    optimizer = optimizer_of(alone, qr="qr")
    train(alone, optimizer, steps)
    return {name: each.detach() for name, each in alone.items()}, {name: optimizer.state[alone[name]] for name in NAMES}


def train_and_compare(parameters: dict[str, nn.Parameter], steps: int = STEPS, **settings: Any) -> Dion2:
    dtype = parameters["odd"].dtype
    starts = whole_parameters(dtype=dtype)
    weights, states = trained_alone(dtype, steps)
    optimizer = optimizer_of(parameters, **settings)
    train(parameters, optimizer, steps)

    def assert_near(found: Tensor, expected: Tensor, whole: Tensor) -> None:
        assert torch.linalg.norm(found.float() - expected.float()) <= 1e-4 * torch.linalg.norm(whole.float())

    for name in NAMES:
        parameter, state = parameters[name], optimizer.state[parameters[name]]
        with errors_name_case(name):
            expected = states[name]["momentum"]
            assert_near(local(state["momentum"]), part_of(expected, state["momentum"]), expected)
            expected = part_of(states[name]["Q"], state["Q"])
            assert local(state["Q"]).shape == expected.shape
            signs = (local(state["Q"]) * expected).sum(-2, keepdim=True).sign()  # a QR may choose either
            assert_near(local(state["Q"]) * signs, expected, states[name]["Q"])
            start, end = starts[name].detach(), weights[name]
            if dtype == torch.float32:
                moved = local(parameter).detach() - part_of(start, parameter)
                assert_near(moved, part_of(end - start, parameter), end - start)
            else:  # with the same random bits: the other way only where float32 is at the edge
                differ = local(parameter).detach() != part_of(end, parameter)
                assert differ.sum() <= 0.03 * end.numel()
    return optimizer


def check_layouts(ranks: int) -> None:
    """Every layout of this many ranks, in one set of processes: starting them takes longer than a layout."""
    for name, case in CASES.items():
        if math.prod(case.mesh) == ranks:
            with errors_name_case(name):
                assert not train_and_compare(sharded(case)).fallbacks
    with errors_name_case("DDP"):
        train_and_compare(whole_parameters(), process_group=dist.group.WORLD)


def check_other_ways() -> None:
    """The other QR where it is not the default, and weights in bfloat16, rounded alike on whatever rank they are."""
    for name, qr in (("FSDP2 on 2", "qr"), ("TP on 2, row-wise", "rcqr")):
        with errors_name_case(f"{name}, {qr}"):
            train_and_compare(sharded(CASES[name]), steps=3, qr=qr)
    for name in ("FSDP2 on 2", "TP on 2, row-wise"):
        with errors_name_case(f"{name}, bfloat16"):
            train_and_compare(sharded(CASES[name], dtype=torch.bfloat16), steps=3)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layouts(ranks: int) -> None:
    run_on_ranks(ranks, check_layouts, ranks)


def test_other_ways() -> None:
    run_on_ranks(2, check_other_ways)
