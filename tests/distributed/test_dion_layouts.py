"""Dion on every layout: the same global gradients as one process gets, for 20 steps.

Every rank also trains the whole matrices by itself, and compares its part of momenta, of Q, and of what the weights
have moved.
"""

import math
import warnings
from functools import cache
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dion2_lightning import Dion2, SelectionTracker
from dion2_lightning.algorithms import dion_shared
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
    for name, rank_fraction in zip(NAMES, cycle(RANK_FRACTIONS), strict=False):
        own = (MATRICES[name] if name in MATRICES else STACKS[name])[1]
        kept = ("batched", "transposed", "convolution", "splits", "cautious_weight_decay")
        stored: dict[str, Any] = {key: own[key] for key in kept if key in own}
        group: dict[str, Any] = {"params": [(name, parameters[name])], "name": name, "rank_fraction": rank_fraction}
        groups.append(group | stored | {"algorithm": "dion"})
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
            for entry in states[name].keys() - {"momentum", "step"}:  # "Q", or one of each block
                found, expected = local(state[entry]), part_of(states[name][entry], state[entry])
                assert found.shape == expected.shape
                signs = (found * expected).sum(-2, keepdim=True).sign()  # a QR may choose either
                assert_near(found * signs, expected, states[name][entry])
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
    for share_replicas in (None, True):
        with errors_name_case(f"DDP, share_replicas={share_replicas}"):
            parameters = whole_parameters()
            train_and_compare(parameters, process_group=dist.group.WORLD, share_replicas=share_replicas)
            assert_equal_on_all_ranks(parameters)


def assert_equal_on_all_ranks(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        others = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(others, parameter.detach().contiguous())
        assert all(torch.equal(parameter, other) for other in others), name


def check_shared_work() -> None:
    """Each replica multiplies its share, and gets P and R of the others: (long + short) r numbers a matrix."""
    shapes = {"tall": (96, 24), "wide": (24, 96), "square": (48, 48), "experts": (3, 32, 16), "half": (40, 20)}
    entries = {"tall": 120 * 6, "wide": 120 * 6, "square": 96 * 12, "experts": 3 * 48 * 4, "half": 60 * 5}
    observed = []
    for group, settings in ((None, {}), (dist.group.WORLD, {"share_replicas": True})):
        parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        groups = [{"params": [each], "batched": each[0] == "experts", "name": each[0]} for each in parameters.items()]
        optimizer = Dion2([{**each, "algorithm": "dion"} for each in groups], lr=0.1, process_group=group, **settings)
        tracker = SelectionTracker(every=1)
        tracker.attach(optimizer)
        gathered = mock.patch.object(dion_shared, "all_gather_single", wraps=dion_shared.all_gather_single)
        multiplied = mock.patch.object(dion_shared, "left_products", wraps=dion_shared.left_products)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            with gathered as sent, multiplied as worked:
                optimizer.step()
        observed.append(tracker.pop_metrics().named(per_matrix=True))
        if group is None:
            continue
        assert_equal_on_all_ranks(parameters)
        assert sent.call_count == 1
        received, own = sent.call_args.args
        assert received.numel() == group.size() * own.numel()
        assert max(entries.values()) <= own.numel() <= 0.6 * sum(entries.values())
        own_work = sum(len(call.args[0]) for call in worked.call_args_list)
        everyone = torch.tensor(own_work)
        dist.all_reduce(everyone)
        assert 0 < own_work < len(shapes)
        assert everyone == len(shapes)
    alone, shared = observed
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        assert shared[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def check_other_ways() -> None:
    """The other QR where it is not the default, and weights in bfloat16, rounded alike on whatever rank they are."""
    for name, qr in (("FSDP2 on 2", "qr"), ("TP on 2, row-wise", "rcqr")):
        with errors_name_case(f"{name}, {qr}"):
            train_and_compare(sharded(CASES[name]), steps=3, qr=qr)
    for name in ("FSDP2 on 2", "TP on 2, row-wise"):
        with errors_name_case(f"{name}, bfloat16"):
            train_and_compare(sharded(CASES[name], dtype=torch.bfloat16), steps=3)


def check_messages() -> None:
    """As many for eight matrices as for two; a sketch, r x r sums and R, or B Q: never a matrix."""
    mesh = init_device_mesh("cpu", (2,))
    shapes, entries = {"tall": (96, 24), "wide": (24, 96)}, (20 * 6 + 6 * 6 + 24 * 6) + (96 * 6 + 6)
    for layers in (1, 4):
        parameters = {
            f"{name} {layer}": nn.Parameter(place(torch.zeros(shape), mesh, (Shard(0),)))
            for layer in range(layers)
            for name, shape in shapes.items()
        }
        optimizer = Dion2([{"params": list(parameters.items()), "algorithm": "dion"}], lr=0.1)
        optimizer.step()  # compares the settings of ranks
        for parameter in parameters.values():
            parameter.grad = place(torch.randn(parameter.shape), mesh, (Shard(0),))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            optimizer.step()
        assert sent.call_count == 5
        header = 1 + len(parameters)
        assert sum(call.args[0].numel() for call in sent.call_args_list) == header + layers * entries


def check_momenta_without_rank() -> None:
    """All equal rows, for which randomized Cholesky QR fails, beside a matrix of full rank and one of zeros."""
    mesh = init_device_mesh("cpu", (2,))
    gradients = {"equal": torch.full((96, 24), 0.3), "full": torch.randn(96, 24, generator=torch.manual_seed(0))}
    gradients["zero"] = torch.zeros(96, 24)
    alone = {name: nn.Parameter(torch.zeros(96, 24)) for name in gradients}
    spread = {name: nn.Parameter(place(torch.zeros(96, 24), mesh, (Shard(0),))) for name in gradients}
    optimizers = [Dion2([{"params": list(each.items()), "algorithm": "dion"}], lr=0.1) for each in (alone, spread)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for name, gradient in gradients.items():
                alone[name].grad, spread[name].grad = gradient.clone(), place(gradient, mesh, (Shard(0),))
            for optimizer in optimizers:
                optimizer.step()
    assert [optimizer.fallbacks["rcqr"] for optimizer in optimizers] == [0, 3]
    assert len(caught) == 3
    for name, parameter in spread.items():
        expected = part_of(alone[name].detach(), parameter)
        torch.testing.assert_close(local(parameter).detach(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(optimizers[1].state[spread["zero"]]["Q"].full_tensor(), optimizers[0].state[alone["zero"]]["Q"])


def check_gradients_and_settings_that_differ() -> None:
    """One rank's gradient alone counts; one that no rank has changes nothing; drifted settings are an error on all."""
    mesh = init_device_mesh("cpu", (2,))
    names = ("of one rank", "of none")
    alone = {name: nn.Parameter(torch.ones(24, 12)) for name in names}
    spread = {name: nn.Parameter(place(torch.ones(24, 12), mesh, (Shard(0),))) for name in names}
    optimizers = [Dion2([{"params": list(each.items()), "algorithm": "dion"}], lr=0.1) for each in (alone, spread)]
    gradient = torch.randn(24, 12, generator=torch.manual_seed(0))
    gradient[12:] = 0
    alone["of one rank"].grad = gradient
    if dist.get_rank() == 0:
        spread["of one rank"].grad = place(gradient, mesh, (Shard(0),))
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in spread.items():
        expected = part_of(alone[name].detach(), parameter)
        torch.testing.assert_close(local(parameter).detach(), expected, rtol=1e-4, atol=1e-6)
    assert not optimizers[1].state[spread["of none"]]["momentum"].to_local().any()
    if dist.get_rank() == 0:
        optimizers[1].param_groups[0]["rank_multiple_of"] = 3  # the rank stays the same
    with pytest.raises(RuntimeError, match="disagree about their settings"):
        optimizers[1].step()


def check_replicas() -> None:
    """A gradient that some replicas lack is an error on all; else weights are those of one process, bit for bit."""
    alone, replica = nn.Parameter(torch.ones(24, 12)), nn.Parameter(torch.ones(24, 12))
    group = {"algorithm": "dion", "lr": 0.1}
    optimizers = [Dion2([{"params": [("w", alone)], **group}])]
    optimizers.append(Dion2([{"params": [("w", replica)], **group}], process_group=dist.group.WORLD))
    for seed in range(3):
        alone.grad = torch.randn(24, 12, generator=torch.manual_seed(seed))
        replica.grad = alone.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(alone, replica)
    if dist.get_rank() == 1:
        replica.grad = None
    with pytest.raises(RuntimeError, match="has a gradient on 1 of 2 ranks, so not in every replica"):
        optimizers[1].step()
    assert torch.equal(alone, replica)


def check_kernels_whose_channels_are_cut_unevenly() -> None:
    """Then ranks hold unequal numbers of columns, each a multiple of the taps, and none of them shares rows of Q."""
    mesh = init_device_mesh("cpu", (2,))
    for shape in ((64, 5, 3), (64, 1, 2), (64, 4, 3)):
        alone = nn.Parameter(torch.randn(shape, generator=torch.manual_seed(0)))
        spread = nn.Parameter(place(alone.detach(), mesh, (Shard(1),)))
        group = {"algorithm": "dion", "convolution": True, "lr": 0.1}
        optimizers = [Dion2([{"params": [("kernel", each)], **group}]) for each in (alone, spread)]
        for step in range(3):
            alone.grad = torch.randn(shape, generator=torch.manual_seed(1 + step))
            spread.grad = place(alone.grad, mesh, (Shard(1),))
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(spread.full_tensor(), alone.detach(), rtol=1e-4, atol=1e-5)
        optimizers[1].load_state_dict(optimizers[1].state_dict())


def check_kernels_that_replicas_share() -> None:
    """Whose longer axis is that of channels with all their taps: R and P have the rank that was asked for."""
    for rank_fraction in (0.01, 0.5):
        group = {"algorithm": "dion", "convolution": True, "lr": 0.1, "rank_fraction": rank_fraction}
        alone, shared = (
            [nn.Parameter(torch.randn(16, 16, 3, generator=torch.manual_seed(number))) for number in range(3)]
            for _ in range(2)
        )
        optimizers = [
            Dion2([{"params": alone, **group}]),
            Dion2([{"params": shared, **group}], process_group=dist.group.WORLD, share_replicas=True),
        ]
        for step in range(2):
            for number, parameters in enumerate(zip(alone, shared, strict=True)):
                for parameter in parameters:
                    parameter.grad = torch.randn(16, 16, 3, generator=torch.manual_seed(10 * step + number))
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


def check_fewer_experts_than_ranks() -> None:
    """Replicas of a stack share its work, also those ranks that hold no expert of it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    for experts in (1, 2):
        alone = nn.Parameter(torch.randn(experts, 12, 12, generator=torch.manual_seed(0)))
        spread = nn.Parameter(place(alone.detach(), mesh, (Replicate(), Shard(0))))
        group = {"algorithm": "dion", "batched": True, "lr": 0.1}
        optimizers = [Dion2([{"params": [("stack", alone)], **group}])]
        optimizers.append(Dion2([{"params": [("stack", spread)], **group}], share_replicas=True))
        for step in range(2):
            alone.grad = torch.randn(alone.shape, generator=torch.manual_seed(1 + step))
            spread.grad = place(alone.grad, mesh, (Replicate(), Shard(0)))
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(spread.full_tensor(), alone.detach(), rtol=1e-4, atol=1e-5)


def test_fewer_experts_than_ranks() -> None:
    run_on_ranks(4, check_fewer_experts_than_ranks)


def check_two_ranks() -> None:
    check_other_ways()
    check_messages()
    check_momenta_without_rank()
    check_gradients_and_settings_that_differ()
    check_replicas()
    check_shared_work()
    check_kernels_whose_channels_are_cut_unevenly()
    check_kernels_that_replicas_share()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layouts(ranks: int) -> None:
    run_on_ranks(ranks, check_layouts, ranks)


def test_on_two_ranks() -> None:
    run_on_ranks(2, check_two_ranks)
