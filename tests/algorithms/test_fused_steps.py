"""Whole steps by the kernels of Triton, in its interpreter on a CPU, against the same steps by operations of torch."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dion2_lightning import Dion2, SelectionTracker
from dion2_lightning.kernels import fused
from tests.distributed.ranks import run_on_ranks
from tests.every_kind import fill, groups_of_every_kind, matrices_of, selections_of

STEPS = 2

IS_MISSING = fused.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(IS_MISSING is not None, reason=str(IS_MISSING))


def trained(kernels: str, **settings: Any) -> Dion2:
    """Take steps on matrices of every kind; one is idle, where that counts."""
    groups = [group for group in groups_of_every_kind("cpu") if group.get("algorithm", "dion2") == "dion2"]
    optimizer = Dion2(groups, lr=0.1, weight_decay=0.1, kernels=kernels, **settings)
    fill(optimizer, weights=0)
    for step in range(STEPS):
        fill(optimizer, gradients=1 + step)
        for parameter in matrices_of(optimizer):
            if parameter.ndim == 3:
                parameter.grad[1] = 0.0
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "settings",
    [
        {"skip_idle_experts": True, "check_finite": "skip"},
        {"nesterov": True, "cautious_weight_decay": True, "normalize_neurons": True, "fraction": 0.5},
        {"skip_idle_experts": True, "check_finite": "skip", "normalize_neurons": True},
    ],
    ids=["idle experts and gates", "nesterov, cautious, neurons", "idle experts and gates, neurons"],
)
def test_steps_have_the_same_bits(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, apply = list[torch.Tensor](), fused.apply

    def spy(weights: list[torch.Tensor], *others: Any, **named: Any) -> None:
        calls.extend(weights)
        apply(weights, *others, **named)

    monkeypatch.setattr(fused, "apply", spy)
    expected = trained("torch", **settings)
    assert not calls
    found = trained("triton", **settings)
    assert len(calls) >= STEPS * 11
    pairs = zip(matrices_of(found), matrices_of(expected), strict=True)
    for number, (weight, other) in enumerate(pairs):
        assert torch.equal(weight, other), f"weight {number}"
        for name, value in found.state[weight].items():
            assert torch.equal(value, expected.state[other][name]), f"{name} of weight {number}"
    for one, other in zip(selections_of(found), selections_of(expected), strict=True):
        assert torch.equal(one, other)


def alike(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Weights of some kinds, several of each; of one kind two are not like the others."""

    def weights(count: int, *shape: int) -> list[nn.Parameter]:
        return [nn.Parameter(torch.empty(shape, dtype=dtype)) for _ in range(count)]

    return [
        {"params": weights(5, 24, 16), "lr": 0.05},  # slices are columns
        {"params": weights(2, 24, 16), "lr": 0.1},
        {"params": weights(3, 16, 24)},
        {"params": weights(1, 16, 24), "momentum": 0.5},
        {"params": weights(1, 16, 24), "weight_decay": 0.5},
        {"params": weights(1, 16, 24), "nesterov": True},
        {"params": weights(1, 16, 24), "normalize_neurons": True, "neuron_beta": 0.5},
        {"params": weights(3, 4, 16, 24), "batched": True},
        {"params": weights(3, 32, 24), "splits": "head 2*8 | rest 16"},
        {"params": weights(3, 12, 5), "splits": "2 x (q 2*2 | k 2)"},  # the heads of q lie in two parts
        {"params": weights(2, 16, 8, 3), "convolution": True},
    ]


def trained_alike(kernels: str, dtype: torch.dtype, **settings: Any) -> tuple[Dion2, list[Any]]:
    """Take steps; return what was selected in the last one and what an observer has seen, too."""
    optimizer = Dion2(
        alike(dtype), lr=0.1, weight_decay=0.1, kernels=kernels, orthonormalize_dtype="float32", **settings
    )
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    fill(optimizer, weights=0)
    for step in range(STEPS):
        for parameter in matrices_of(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        fill(optimizer, gradients=1 + step)
        first, second, third, *_ = matrices_of(optimizer)
        first.grad = first.grad.mT.contiguous().mT
        second.grad = None
        _, offset_by_2, offset_by_1 = optimizer.param_groups[-2]["params"]  # so that their parts are aligned otherwise
        for parameter, offset in ((third, 1), (offset_by_2, 2), (offset_by_1, 1)):
            memory = torch.cat([parameter.new_zeros(offset), parameter.grad.flatten()])
            parameter.grad = memory[offset:].view_as(parameter)
        optimizer.step()
    observed = [(each.parameter, each.observed.matrices.name) for each in optimizer.observed_parameters()]
    selected = [getattr(optimizer.selection_of(*each), "indices", None) for each in observed]
    assert [number for number, each in enumerate(selected) if each is None] == [1]
    return optimizer, [[each.tolist() for each in selected if each is not None], repr(tracker.pop_metrics())]


@pytest.mark.parametrize(
    ("settings", "dtype", "working_memory"),
    [
        ({}, torch.float32, 10_000),
        ({}, torch.bfloat16, 60_000),
        ({"normalize_neurons": True, "check_finite": "skip"}, torch.float32, 60_000),
        ({"nesterov": True, "cautious_weight_decay": True}, torch.bfloat16, 40_000),
        ({"fraction": 1.0, "capturable": True}, torch.float32, None),
    ],
    ids=["plain", "half", "neurons and gates", "cautious", "capturable"],
)
def test_alike_parameters_are_one_stack(
    settings: dict[str, Any], dtype: torch.dtype, working_memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits, and what is selected is known by parameter; little memory makes stacks smaller."""
    found_pieces, apply = list[int](), fused.apply

    def spy(*arguments: Any, pieces: list[int], **named: Any) -> None:
        found_pieces.extend(pieces)
        apply(*arguments, pieces=pieces, **named)

    monkeypatch.setattr(fused, "apply", spy)
    (expected, seen), (found, seen_too) = (
        trained_alike(kernels, dtype, working_memory=working_memory, **settings) for kernels in ("torch", "triton")
    )
    assert max(found_pieces) > 1
    for weight, other in zip(matrices_of(found), matrices_of(expected), strict=True):
        assert torch.equal(weight, other)
        for name, value in found.state[weight].items():
            assert torch.equal(value, expected.state[other][name]), name
    assert seen == seen_too


def test_observers_see_the_variances(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(SelectionTracker, "normalized", lambda _, source, variance: seen.append(variance.clone()))
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((16, 24), (24, 16))]
    optimizer = Dion2([{"params": weights, "normalize_neurons": True}], lr=0.1, kernels="triton")
    SelectionTracker(every=1).attach(optimizer)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    variances = [optimizer.state[weight]["variance"] for weight in weights]
    assert [(each > 0).sum() for each in variances] == [4, 24]
    assert all(torch.equal(one, other.mT) for one, other in zip(seen, variances, strict=True))


def test_a_step_that_a_gate_skips_changes_nothing() -> None:
    weight = nn.Parameter(torch.randn(16, 24))
    optimizer = Dion2([weight], lr=0.1, kernels="triton", check_finite="skip")
    weight.grad = torch.randn(16, 24)
    optimizer.step()
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum"].clone()
    weight.grad[3, 5] = math.nan
    optimizer.step()
    assert torch.equal(weight, before) and torch.equal(optimizer.state[weight]["momentum"], momentum)
    assert optimizer.skipped_steps == 1


def check_shards(rank_count: int) -> None:
    """Sharded by rows and by columns, unevenly, and replicated; one in half precision; in one turn and in many.

    And two stacks of one expert, of which one rank has none.
    """
    mesh = init_device_mesh("cpu", (rank_count,))
    experts = [nn.Parameter(distribute_tensor(torch.ones(1, 8, 12), mesh, [Shard(0)])) for _ in range(2)]
    for parameter in experts:
        parameter.grad = distribute_tensor(torch.ones(1, 8, 12), mesh, [Shard(0)])
    Dion2([{"params": experts, "batched": True}], lr=0.1, kernels="triton").step()
    moved = [parameter.full_tensor().ne(1).any() for parameter in experts]
    assert all(moved)
    placements = (Shard(0), Shard(1), Replicate())
    cases = [(shape, placement, torch.float32) for shape in ((17, 24), (24, 17)) for placement in placements]
    cases += [*cases[:2], ((17, 24), Shard(0), torch.bfloat16)]  # some are alike
    for working_memory in (None, 20_000):
        results = []
        for kernels in ("torch", "triton"):
            torch.manual_seed(0)
            weights = [
                nn.Parameter(distribute_tensor(torch.randn(shape).to(dtype), mesh, [placement]))
                for shape, placement, dtype in cases
            ]
            optimizer = Dion2(
                weights,
                lr=0.1,
                kernels=kernels,
                normalize_neurons=True,
                orthonormalize_dtype="float32",
                share_replicas=True,
                working_memory=working_memory,
            )
            for step in range(STEPS):
                for number, weight in enumerate(weights):
                    generator = torch.Generator().manual_seed(10 * step + number)
                    full = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                    weight.grad = distribute_tensor(full, mesh, weight.placements)
                optimizer.step()
            state = [value for weight in weights for value in optimizer.state[weight].values()]
            results.append([each.full_tensor() if isinstance(each, DTensor) else each for each in (*weights, *state)])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    dist.barrier()


def test_matrices_that_ranks_share() -> None:
    run_on_ranks(2, check_shards, 2)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.ones(4, 6)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "kernels='triton' cannot run on cpu: Triton has no kernels for CPUs; with 'auto'"
    with pytest.raises(ValueError, match=message):
        Dion2([weight], lr=0.1, kernels="triton").step()
    assert torch.equal(weight, torch.ones(4, 6))
    Dion2([weight], lr=0.1, kernels="auto").step()
    with pytest.raises(ValueError, match="kernels must be one of 'auto', 'torch', 'triton', got 'cuda'"):
        Dion2([weight], lr=0.1, kernels="cuda")
