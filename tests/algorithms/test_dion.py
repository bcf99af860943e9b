"""The update of Dion against an independent float64 reference."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from dion2_lightning import Dion2, build_optimizer
from dion2_lightning.algorithms import low_rank
from tests.algorithms.test_dion2 import SHAPES, gradients, matrices
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import place
from tests.reference import DionReference

NAMES = {"adjust_lr_fn": "rule", "scale_lr_by_fraction": "scale_by_fraction", "momentum": "mu"}
LR = 0.02


def started(parameter: nn.Parameter, **group: Any) -> tuple[Dion2, Tensor]:
    """An optimizer whose state exists, and the Q that it starts with, (count, short, rank)."""
    optimizer = Dion2([{"params": [parameter], "algorithm": "dion", "lr": LR, **group}])
    optimizer.step()  # without a gradient
    q = optimizer.state[parameter]["Q"]
    return optimizer, q.clone().view(-1, *q.shape[-2:])


def steady_gradients(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Gradients with a common part of which no direction is weak.

    Without it the weakest one of a square momentum has so little of it that float32 knows its part of Q to 1e-4 only.
    """
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(3, 5, left.shape[-1]) * math.sqrt(max(shape[-2:]))
    return [each + (left * values) @ right for each in gradients(shape, seed)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected)).item()


def up_to_signs(found: Tensor, expected: Tensor) -> Tensor:
    """Columns with the signs that make them nearest: a QR may choose either."""
    return found * (found * expected).sum(0).sign()


def check(
    shape: tuple[int, ...],
    *,
    batched: bool = False,
    transposed: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Dion2:
    """Compare momentum and Q at every step, and the total update at the end."""
    is_double = dtype == torch.float64
    tolerance = 1e-10 if is_double else 1e-5
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(shape)).to(dtype)
    parameter = nn.Parameter(weight.to(device, copy=True))
    optimizer, q = started(parameter, batched=batched, transposed=transposed, **settings)
    own = {NAMES[name]: value for name, value in settings.items() if name in NAMES}
    own |= {name: value for name, value in settings.items() if name in ("weight_decay", "cautious_weight_decay")}
    start = matrices(weight.double(), transposed)
    references = [
        DionReference(whole, its_q.double().cpu(), lr=LR, **own) for whole, its_q in zip(start, q, strict=True)
    ]
    for gradient in (gradients if is_double else steady_gradients)(shape, seed=1):
        parameter.grad = gradient.to(device, dtype, copy=True)
        optimizer.step()
        state = {name: each.cpu() for name, each in optimizer.state[parameter].items()}
        found = matrices(state["momentum"], transposed), state["Q"].view(len(references), *q.shape[1:])
        for reference, g, m, q_found in zip(references, matrices(gradient, transposed), *found, strict=True):
            reference.step(g.double())
            assert relative_error(m, reference.momentum) < tolerance
            assert relative_error(up_to_signs(q_found, reference.q), reference.q) < tolerance
    end = matrices(parameter.detach().cpu(), transposed)
    for before, after, reference in zip(start, end, references, strict=True):
        assert relative_error(after.double() - before, reference.weight - before) < tolerance
    return optimizer


@pytest.mark.parametrize("rank_fraction", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_and_ranks(kind: str, rank_fraction: float) -> None:
    check(**SHAPES[kind], rank_fraction=rank_fraction)


@pytest.mark.parametrize("kind", ["tall", "square", "batched transposed"])
def test_float64(kind: str) -> None:
    check(**SHAPES[kind], rank_fraction=1.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["tall", "transposed tall", "batched"])
def test_randomized_cholesky_qr(kind: str) -> None:
    """At an eighth, a sketch of P is smaller than P."""
    optimizer = check(**SHAPES[kind], rank_fraction=0.125, qr="rcqr")
    assert not optimizer.fallbacks


@pytest.mark.parametrize("scale_lr_by_fraction", [True, False])
@pytest.mark.parametrize("rule", ["match_rms_adamw", "original", None, "spectral", "none"])
def test_scale_rules(rule: str | None, scale_lr_by_fraction: bool) -> None:
    check(**SHAPES["transposed wide"], adjust_lr_fn=rule, scale_lr_by_fraction=scale_lr_by_fraction)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.5, 1.0), (0.99, 0.1)])
def test_momentum_and_weight_decay(momentum: float, weight_decay: float) -> None:
    check(**SHAPES["odd"], momentum=momentum, weight_decay=weight_decay)


@pytest.mark.parametrize("kind", ["tall", "wide", "batched transposed"])
def test_cautious_weight_decay(kind: str) -> None:
    check(**SHAPES[kind], cautious_weight_decay=True, weight_decay=2.0)


def test_cautious_weight_decay_in_half_precision() -> None:
    """Decay and update are rounded once."""
    start, gradient = (each.bfloat16() for each in gradients((24, 12), seed=0)[:2])
    weights = []
    for dtype in (torch.bfloat16, torch.float32):
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer, _ = started(parameter, cautious_weight_decay=True, weight_decay=2.0, rounding="nearest")
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        weights.append(parameter.detach().bfloat16())
    assert torch.equal(*weights)


def check_cautious_weight_decay_of_shards() -> None:
    mesh, shape = init_device_mesh("cpu", (2,)), (40, 24)
    for placements in ((Shard(0),), (Shard(1),)):
        start = 0.02 * gradients(shape, seed=0)[0]
        parameter = nn.Parameter(place(start, mesh, placements))
        settings = {"cautious_weight_decay": True, "weight_decay": 2.0}
        optimizer = Dion2([{"params": [parameter], "algorithm": "dion", "lr": LR, **settings}])
        optimizer.step()  # without a gradient
        q = optimizer.state[parameter]["Q"].full_tensor()
        reference = DionReference(start.double(), q.double(), lr=LR, cautious_weight_decay=True, weight_decay=2.0)
        for gradient in steady_gradients(shape, seed=1):
            parameter.grad = place(gradient, mesh, placements)
            optimizer.step()
            reference.step(gradient.double())
        moved = parameter.detach().full_tensor() - start
        assert relative_error(moved, reference.weight - start) < 1e-5


def test_cautious_weight_decay_of_shards() -> None:
    run_on_ranks(2, check_cautious_weight_decay_of_shards)


@pytest.mark.parametrize(
    ("fraction", "multiple", "rank"), [(0.1, 1, 3), (0.11, 1, 4), (0.01, 1, 1), (0.25, 8, 8), (0.9, 16, 30), (1, 1, 30)]
)
def test_rank(fraction: float, multiple: int, rank: int) -> None:
    parameter = nn.Parameter(torch.zeros(40, 30))
    _, q = started(parameter, rank_fraction=fraction, rank_multiple_of=multiple)
    assert q.shape == (1, 30, rank)


@pytest.mark.parametrize("rank_fraction", [0.125, 0.5, 1.0])
def test_size_of_an_update(rank_fraction: float) -> None:
    """As long as an AdamW update whatever the rank: entries of root mean square 0.2 lr."""
    parameter = nn.Parameter(torch.zeros(96, 24))
    optimizer, _ = started(parameter, rank_fraction=rank_fraction, weight_decay=0.0)
    parameter.grad = gradients((96, 24), seed=1)[0]
    optimizer.step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2 * LR, rel=1e-5)


def test_several_batches_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is batched by shape keeps its own settings, and bounding the working memory changes nothing."""
    settings = [{"lr": lr, "momentum": mu, "weight_decay": 1.0 - mu} for lr in (0.1, 0.01) for mu in (0.9, 0.5)]
    shapes = [(24, 12), (12, 24)]

    def trained(apart: bool) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.ones(shape)) for _ in settings for shape in shapes]
        names = [f"weight {index}" for index in range(len(parameters))]
        groups = [
            {"params": [(name, parameter)], "algorithm": "dion", **settings[index // len(shapes)]}
            for index, (name, parameter) in enumerate(zip(names, parameters, strict=True))
        ]
        optimizers = [Dion2([group]) for group in groups] if apart else [Dion2(groups)]
        for step in range(3):
            for parameter in parameters:
                parameter.grad = gradients(tuple(parameter.shape), seed=step)[0]
            for optimizer in optimizers:
                optimizer.step()
        return parameters

    together, apart = trained(False), trained(True)
    monkeypatch.setattr("dion2_lightning.algorithms.algorithm.MIN_WORKING_MEMORY", 3000)
    for one, other, bounded in zip(together, apart, trained(False), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        torch.testing.assert_close(one, bounded, rtol=0, atol=1e-6)
    assert len({tuple(parameter.flatten().tolist()) for parameter in apart}) == len(apart)


@pytest.mark.parametrize("stored", ["transposed view", "strided view"])
def test_parameters_that_are_not_contiguous(stored: str) -> None:
    start = gradients((24, 12), seed=0)[0]
    plain = nn.Parameter(start.clone())
    if stored == "transposed view":
        odd = nn.Parameter(start.T.contiguous().T)
    else:
        odd = nn.Parameter(torch.zeros(24, 24)[:, ::2].copy_(start))
    assert not odd.is_contiguous()
    optimizers = [started(parameter)[0] for parameter in (plain, odd)]
    for gradient in gradients((24, 12), seed=3):
        for parameter, optimizer in zip((plain, odd), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(plain, odd, rtol=0, atol=1e-6)


# Momenta that lack rank


@pytest.mark.parametrize("qr", ["qr", "rcqr"])
def test_a_zero_matrix_beside_others(qr: str) -> None:
    """It only decays, its Q stays, and nothing falls back."""
    parameter = nn.Parameter(torch.ones(3, 40, 12))
    optimizer, q = started(parameter, batched=True, qr=qr, lr=0.5, weight_decay=0.5)
    parameter.grad = gradients((3, 40, 12), seed=0)[0]
    parameter.grad[1] = 0
    optimizer.step()
    assert torch.equal(parameter[1], torch.full((40, 12), 0.75))
    assert torch.equal(optimizer.state[parameter]["Q"][1], q[1])
    assert (parameter[0] != 0.75).all()
    assert not optimizer.fallbacks


@pytest.mark.parametrize("qr", ["qr", "rcqr"])
@pytest.mark.parametrize("kind", ["all equal", "rank 2"])
def test_a_momentum_of_lower_rank_than_the_update(kind: str, qr: str) -> None:
    """Nothing is applied but what it has; when gradients have full rank again, so has the update."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(96, 2, generator=generator), torch.randn(2, 24, generator=generator)
    gradient, rank = (torch.full((96, 24), 0.3), 1) if kind == "all equal" else (factors[0] @ factors[1], 2)
    parameter = nn.Parameter(torch.zeros(96, 24))
    optimizer, q = started(parameter, qr=qr, weight_decay=0.0, scale_lr_by_fraction=False, adjust_lr_fn="none", lr=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            before = parameter.detach().clone()
            parameter.grad = gradient.clone()
            optimizer.step()
    values = torch.linalg.svdvals(parameter.detach() - before)
    assert values[:rank].sub(-1).abs().ge(1.5).all()
    assert values[rank:].max() < 1e-5
    assert optimizer.state[parameter]["Q"].norm(dim=0).min() > 0.9
    # All equal rows leave P without even rounding errors to make a basis of.
    fell_back = 5 if (kind, qr) == ("all equal", "rcqr") else 0
    assert optimizer.fallbacks["rcqr"] == fell_back
    assert len(caught) == fell_back
    assert all("a randomized Cholesky QR has failed" in str(each.message) for each in caught)
    for seed in range(3):
        before = parameter.detach().clone()
        parameter.grad = 100 * gradients((96, 24), seed=seed)[0]
        optimizer.step()
    values = torch.linalg.svdvals(parameter.detach() - before)
    assert values[q.shape[-1] - 1] > 0.1


@pytest.mark.parametrize("rank_fraction", [1 / 8, 1 / 4, 1 / 2])
@pytest.mark.parametrize("number", [1e2, 1e4, 1e6])
def test_randomized_cholesky_qr_goes_where_an_exact_qr_goes(number: float, rank_fraction: float) -> None:
    """Over 12 steps, with gradients whose singular values span a condition number."""
    left, _, right = torch.linalg.svd(gradients((256, 64), seed=0)[0], full_matrices=False)
    values = torch.logspace(0, -math.log10(number), 64)
    moved = {}
    for qr in ("qr", "rcqr"):
        parameter = nn.Parameter(torch.zeros(256, 64))
        optimizer, _ = started(parameter, qr=qr, weight_decay=0.0, rank_fraction=rank_fraction)
        for _ in range(12):
            parameter.grad = (left * values) @ right
            optimizer.step()
        assert not optimizer.fallbacks
        moved[qr] = parameter.detach().double()
    assert relative_error(moved["rcqr"], moved["qr"]) < 1e-4


@pytest.mark.parametrize("qr", ["qr", "rcqr"])
@pytest.mark.parametrize("rank_fraction", [1 / 8, 1 / 4, 1 / 2, 1.0])
@pytest.mark.parametrize("number", [1e2, 1e3, 1e4])
def test_weights_move_as_by_an_exact_qr_in_float64(
    number: float, rank_fraction: float, qr: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of 12 steps from the same weights and state, with gradients of a condition number."""
    left, _, right = torch.linalg.svd(gradients((256, 64), seed=0)[0], full_matrices=False)
    gradient = (left * torch.logspace(0, -math.log10(number), 64)) @ right
    parameter = nn.Parameter(torch.zeros(256, 64))
    optimizer, _ = started(parameter, qr=qr, weight_decay=0.0, rank_fraction=rank_fraction)
    for _ in range(12):
        twin = nn.Parameter(torch.zeros(256, 64))
        exact, _ = started(twin, qr="qr", weight_decay=0.0, rank_fraction=rank_fraction)
        for entry, value in optimizer.state[parameter].items():
            exact.state[twin][entry].copy_(value)
        before = parameter.detach().clone()
        parameter.grad, twin.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(low_rank, "orthonormal_columns", lambda p: torch.linalg.qr(p.double()).Q.float())
            exact.step()
        moved = parameter.detach().double() - before
        assert relative_error(moved, twin.detach().double()) < 1e-4
    assert not optimizer.fallbacks


# Q


def test_q_starts_as_normals_that_depend_on_the_name_alone() -> None:
    def start(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        parameter = nn.Parameter(torch.zeros(80, 60, dtype=dtype))
        optimizer = Dion2([{"params": [(name, parameter)], "algorithm": "dion", "rank_fraction": 0.5}])
        optimizer.step()
        return optimizer.state[parameter]["Q"]

    q = start("layer.weight")
    assert q.shape == (60, 30)
    assert q.mean().abs() < 0.1
    assert q.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(start("_orig_mod.layer.weight"), q)
    assert torch.equal(start("layer.weight", torch.bfloat16), q)
    assert not torch.equal(start("other.weight"), q)


def test_a_rank_that_changes_between_steps_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(12, 8))
    optimizer, _ = started(parameter)
    optimizer.param_groups[0]["rank_fraction"] = 0.5
    before = parameter.detach().clone()
    parameter.grad = torch.ones(12, 8)
    with pytest.raises(
        ValueError,
        match=r"'dion': parameter 0: rank_fraction and rank_multiple_of ask for rank 4, and its state has rank 2; set",
    ):
        optimizer.step()
    assert torch.equal(parameter, before)
    del optimizer.state[parameter]
    optimizer.step()
    assert optimizer.state[parameter]["Q"].shape == (8, 4)


# Checkpoints and settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_equals_uninterrupted(dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).to(dtype)

    def train(model: nn.Module, optimizer: Dion2, steps: range) -> None:
        for step in steps:
            batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    model, other = make(), make()
    optimizer = build_optimizer(model, lr=0.1, algorithm="dion", rank_fraction=0.5)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["dion", "adamw"]
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, lr=0.1, algorithm="dion", rank_fraction=0.25)
    with pytest.warns(UserWarning, match=r"rank_fraction 0\.5 instead of 0\.25"):  # the checkpoint's settings hold
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_another_algorithm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6))
    dion, dion2 = (build_optimizer(model, lr=0.1, algorithm=name) for name in ("dion", "dion2"))
    saved = dion.state_dict()
    with pytest.raises(ValueError, match="the checkpoint's algorithm is 'dion', this optimizer's 'dion2'"):
        dion2.load_state_dict(saved)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank_fraction": 0.0}, ValueError, r"rank_fraction must lie in \(0, 1\], got 0\.0; 1 is the whole matrix"),
        ({"rank_fraction": 1.5}, ValueError, r"rank_fraction must lie in \(0, 1\], got 1\.5"),
        ({"rank_multiple_of": 0}, ValueError, "rank_multiple_of must be at least 1, got 0"),
        ({"rank_multiple_of": 2.0}, TypeError, "rank_multiple_of must be an integer, got 2.0"),
        ({"qr": "cholesky"}, ValueError, "qr must be one of 'auto', 'qr', 'rcqr', got 'cholesky'"),
        (
            {"fraction": 0.5},
            ValueError,
            "unknown entry 'fraction' of algorithm 'dion'; it belongs to 'dion2', 'dion3', remove",
        ),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Dion2([{"params": [nn.Parameter(torch.zeros(3, 4))], "algorithm": "dion", **settings}])
