"""Weights and momenta in half precision: they go where float32 goes, with either rounding as exactly as it allows."""

import copy
import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dion2_lightning import Dion2, build_optimizer
from dion2_lightning.algorithms import adamw, matrix_update, working_memory
from tests.reference import Reference

ALGORITHMS = ["dion2", "dion", "adamw"]
HALF = [torch.bfloat16, torch.float16]


def weight_of(dtype: torch.dtype, shape: tuple[int, ...] = (128, 128)) -> nn.Parameter:
    """The weight of a linear layer as torch makes it; in any dtype one that bfloat16 has."""
    torch.manual_seed(0)
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound).to(torch.bfloat16).to(dtype))


def optimizer_of(weight: nn.Parameter, algorithm: str = "dion2", name: str = "weight", **settings: Any) -> Dion2:
    settings = {"orthonormalize_dtype": "float32", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what rounding to nearest loses
        return Dion2([{"params": [(name, weight)], "algorithm": algorithm}], **settings)


def steps_of(weight: nn.Parameter, optimizer: Dion2, steps: range, size: float = 1.0) -> None:
    """Steps with gradients that have a direction, in the dtype of the weight, the same values in every dtype."""
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for step in steps:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 + step))
        weight.grad = (size * (direction + noise)).to(torch.bfloat16).to(weight.dtype)
        optimizer.step()


# Where it goes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", HALF)
def test_the_distance_walked_is_that_of_float32(dtype: torch.dtype, algorithm: str) -> None:
    """To 5% over 200 steps at 1e-4; and along the same way, not by noise that adds up to it."""
    moved = {}
    for each in (torch.float32, dtype):
        weight = weight_of(each)
        start = weight.detach().double()
        steps_of(weight, optimizer_of(weight, algorithm, lr=1e-4, weight_decay=0.0), range(200))
        moved[each] = (weight.detach().double() - start).flatten()
    expected, found = moved[torch.float32], moved[dtype]
    assert found.norm() / expected.norm() == pytest.approx(1.0, rel=0.05)
    assert found @ expected / expected.square().sum() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", HALF)
def test_weight_decay_takes_away_what_it_does_in_float32(dtype: torch.dtype, algorithm: str) -> None:
    """Of zero gradients, with lr x weight_decay = 1e-4: to 2% over 200 steps, in the mean of all entries."""
    weight = weight_of(dtype)
    start = weight.detach().double()
    steps_of(weight, optimizer_of(weight, algorithm, lr=1e-3, weight_decay=0.1), range(200), size=0.0)
    lost = (start.abs() - weight.detach().double().abs()).mean()
    assert lost / start.abs().mean() == pytest.approx(1 - (1 - 1e-4) ** 200, rel=0.02)


def test_a_linear_layer_decays_by_default() -> None:
    """Also what routing makes of a layer, its matrix and what AdamW trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Embedding(100, 128)).to(torch.bfloat16)
    decaying = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    start = [parameter.detach().double() for parameter in decaying]
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    for _ in range(40):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for before, after in zip(start, decaying, strict=True):
        lost = (before.abs() - after.detach().double().abs()).mean() / before.abs().mean()
        assert lost == pytest.approx(1 - (1 - 1e-4) ** 40, rel=0.05)


def test_a_second_moment_decays() -> None:
    """At 0.999 for 1,500 steps: from 0.35 to 0.078. In bfloat16 each step would be less than half of the last bit."""
    weight = weight_of(torch.bfloat16)
    optimizer = optimizer_of(weight, "adamw", lr=0.0)
    weight.grad = torch.full_like(weight, 18.75)
    optimizer.step()
    weight.grad = torch.zeros_like(weight)
    for _ in range(1500):
        optimizer.step()
    expected = 0.001 * 18.75**2 * 0.999**1500
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg_sq"], torch.full(weight.shape, expected), rtol=1e-3, atol=0
    )


def test_a_momentum_in_bfloat16_goes_on_growing() -> None:
    """A slice that is not selected adds up its gradients until it is. To nearest it would stop at 256 of them."""
    for rounding, reached in (("stochastic", 1000), ("nearest", 256)):
        weight = weight_of(torch.float32, (64, 512))
        optimizer = optimizer_of(weight, state_dtype="bfloat16", rounding=rounding, lr=0.0, fraction=1 / 64)
        weight.grad = torch.ones_like(weight)
        weight.grad[0] = 1e6  # is selected every time
        for _ in range(1000):
            optimizer.step()
        momentum = optimizer.state[weight]["momentum"]
        assert momentum.dtype == torch.bfloat16
        assert momentum[1:].float().mean() == pytest.approx(reached, rel=0.01)


# Each step


def reference_step(weight: Tensor, momentum: Tensor, gradient: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """A step from the same weight, float64, not rounded; and the momentum after it."""
    reference = Reference(weight.double(), momentum.clone(), lr=0.01, weight_decay=0.5)
    if transposed:
        reference.weight, reference.momentum, gradient = reference.weight.T, reference.momentum.T, gradient.T
    reference.step(gradient.float())
    return (reference.weight.T, reference.momentum.T) if transposed else (reference.weight, reference.momentum)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_decay_and_update_are_rounded_once(
    rounding: str, dtype: torch.dtype, shape: tuple[int, int], transposed: bool
) -> None:
    """Every entry, selected or not, is the float64 result rounded: to nearest, or to one of its two neighbours."""
    weight = weight_of(dtype, shape)
    optimizer = Dion2(
        [{"params": [weight], "transposed": transposed}],
        lr=0.01,
        weight_decay=0.5,
        orthonormalize_dtype="float32",
        rounding=rounding,
    )
    momentum = torch.zeros(shape)
    for step in range(6):
        before = weight.detach().clone()
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        exact, momentum = reference_step(before, momentum, weight.grad, transposed)
        assert torch.equal(optimizer.state[weight]["momentum"], momentum)
        check_rounding(weight.detach(), exact, rounding)


def check_rounding(found: Tensor, exact: Tensor, rounding: str) -> None:
    """What was computed in float32 may lie on the other side of a number, of one entry in a thousand."""
    nearest = exact.to(found.dtype)
    if rounding == "nearest":
        assert (found == nearest).double().mean() > 0.999
        return
    last_bit = 2.0 ** exact.abs().log2().floor().clamp(min=-14 if found.dtype == torch.float16 else -126)
    last_bit *= torch.finfo(found.dtype).eps
    errors = (found.double() - exact) / last_bit
    assert (errors.abs() < 1 + 1e-3).all()
    assert 0.3 < (found != nearest).double().mean() / (nearest.double() - exact).div(last_bit).abs().mean() < 1.7
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(errors.numel())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_adamw_is_rounded_once(rounding: str, dtype: torch.dtype) -> None:
    """Each step from the same weight: what torch's AdamW does in float64, rounded; the moments are never."""
    weight = weight_of(dtype)
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = optimizer_of(weight, "adamw", rounding=rounding, **settings)
    control = nn.Parameter(weight.detach().double())
    theirs = torch.optim.AdamW([control], **settings)
    for step in range(6):
        control.data.copy_(weight.detach())
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        control.grad = weight.grad.double()
        optimizer.step()
        theirs.step()
        check_rounding(weight.detach(), control.detach(), rounding)
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[weight][name].dtype == torch.float32
        torch.testing.assert_close(
            optimizer.state[weight][name].double(), theirs.state[control][name], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_of_nothing_changes_nothing(algorithm: str) -> None:
    """Neither before the first step, as torch.distributed.checkpoint takes it, which is not counted, nor later."""
    weight = weight_of(torch.bfloat16)
    start = weight.detach().clone()
    optimizer = optimizer_of(weight, algorithm, lr=0.0, weight_decay=0.1, state_dtype="bfloat16")
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 0
    optimizer.param_groups[0]["lr"] = 0.1
    steps_of(weight, optimizer, range(2))
    assert optimizer.state[weight]["step"] == 2
    assert not torch.equal(weight, start)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_parameter_without_gradient_is_not_counted(algorithm: str) -> None:
    weight = weight_of(torch.bfloat16)
    optimizer = optimizer_of(weight, algorithm, lr=0.1)
    steps_of(weight, optimizer, range(1))
    weight.grad, before = None, weight.detach().clone()
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_not_rounded(dtype: torch.dtype, algorithm: str) -> None:
    weights = []
    for rounding in ("nearest", "stochastic"):
        weight = weight_of(dtype)
        optimizer = optimizer_of(weight, algorithm, lr=0.01, rounding=rounding)
        steps_of(weight, optimizer, range(3))
        weights.append(weight)
    assert torch.equal(*weights)


# What the random bits depend on


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bits_depend_on_the_name_without_the_prefixes_of_wrappers(algorithm: str) -> None:
    def trained(name: str) -> Tensor:
        weight = weight_of(torch.bfloat16)
        steps_of(weight, optimizer_of(weight, algorithm, name, lr=1e-3), range(3))
        return weight.detach()

    expected = trained("layer.weight")
    for name in ("module.layer.weight", "_orig_mod.module.layer.weight", "layer._checkpoint_wrapped_module.weight"):
        assert torch.equal(trained(name), expected), name
    assert not torch.equal(trained("other.weight"), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bits_depend_on_the_seed(algorithm: str) -> None:
    trained = []
    for seed in (0, 0, 1):
        weight = weight_of(torch.bfloat16)
        steps_of(weight, optimizer_of(weight, algorithm, lr=1e-3, rounding_seed=seed), range(2))
        trained.append(weight.detach())
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_names_bits_depend_on_the_place_in_the_group(algorithm: str) -> None:
    weights = [weight_of(torch.bfloat16) for _ in range(2)]
    optimizer = Dion2([{"params": weights, "algorithm": algorithm}], lr=1e-3)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(*weights)


def test_the_roundings_of_a_step_are_independent() -> None:
    """Those of the momentum, twice, and of the weight: as many as the bits that a step draws."""
    weight = weight_of(torch.bfloat16)
    optimizer = optimizer_of(weight, state_dtype="bfloat16")
    seen: list[dict[str, Any]] = []
    original = matrix_update.draw_bits

    def spy(updates: Any) -> None:
        original(updates)
        seen.extend(update.bits for update in updates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dion2_lightning.algorithms.dion2.draw_bits", spy)
        steps_of(weight, optimizer, range(2))
    noise = [((bits.rows * bits.columns) >> 16 & 0xFFFF).double().flatten() for step in seen for bits in step.values()]
    assert len(noise) == 6
    correlations = torch.corrcoef(torch.stack(noise)) - torch.eye(6)
    assert correlations.abs().max() < 5 / 128


@pytest.mark.parametrize("shape", [(), (5,), (6, 7), (3, 4, 5), (4, 3, 2, 2)], ids=str)
def test_adamw_rounds_parameters_of_any_shape(shape: tuple[int, ...]) -> None:
    """By 1,000 steps of a sixteenth of the last bit each, down from 1."""
    weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    if len(shape) == 4:
        weight = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    optimizer = optimizer_of(weight, "adamw", lr=2**-12, weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    expected = 1 - 1000 * 2**-12
    assert (weight.detach().float() - expected).abs().max() < 0.1
    assert weight.detach().double().mean() == pytest.approx(expected, abs=0.1 / math.sqrt(weight.numel()))


def test_a_large_parameter_is_updated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, whatever is updated at once: parts of one parameter, or several."""

    def trained() -> list[Tensor]:
        weights = [weight_of(torch.bfloat16, shape) for shape in ((60, 50), (70,), (20, 30))]
        optimizer = Dion2([{"params": weights, "algorithm": "adamw"}], lr=1e-3)
        for step in range(4):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
            optimizer.step()
        assert all(optimizer.state[weight]["step"] == 4 for weight in weights)
        return [weight.detach() for weight in weights]

    expected, sizes = trained(), []
    original = adamw._adamw

    def spy(pieces: Any, *others: Any) -> None:
        sizes.append(sum(weight.numel() for weight in pieces.weights))
        original(pieces, *others)

    monkeypatch.setattr(adamw, "_adamw", spy)
    limit = 700 * working_memory.pass_bytes(torch.bfloat16)
    monkeypatch.setattr("dion2_lightning.algorithms.algorithm.MIN_WORKING_MEMORY", limit)
    assert all(torch.equal(one, other) for one, other in zip(expected, trained(), strict=True))
    assert len(sizes) > 4
    assert max(sizes) <= 700


def test_stacks_of_matrices_are_rounded_each_by_their_own_bits() -> None:
    """Equal matrices with equal gradients, in both storages: rounded differently, and on average the same."""
    for transposed in (False, True):
        weight = nn.Parameter(weight_of(torch.bfloat16, (64, 96)).detach().expand(3, -1, -1).clone())
        start = weight.detach().double()
        optimizer = Dion2(
            [{"params": [("experts", weight)], "batched": True, "transposed": transposed}], lr=1e-3, weight_decay=0.1
        )
        for step in range(5):
            gradient = torch.randn(64, 96, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            weight.grad = gradient.expand(3, -1, -1).clone()
            optimizer.step()
        first, second, third = weight.detach().double() - start
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
        torch.testing.assert_close(first.norm(), second.norm(), rtol=0.05, atol=0)
        assert first.flatten() @ second.flatten() > 0.8 * first.square().sum()


# Checkpoints


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("settings", [{}, {"state_dtype": "bfloat16"}, {"rounding": "nearest"}], ids=str)
def test_resumed_equals_uninterrupted(settings: dict[str, Any], algorithm: str) -> None:
    weight = weight_of(torch.bfloat16)
    optimizer = optimizer_of(weight, algorithm, lr=1e-3, **settings)
    steps_of(weight, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    steps_of(weight, optimizer, range(3, 6))

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = nn.Parameter(saved["weight"])
    other = optimizer_of(resumed, algorithm, lr=1.0)
    other.load_state_dict(saved["optimizer"])
    steps_of(resumed, other, range(3, 6))
    assert torch.equal(weight, resumed)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, other.state[resumed][name]), name
        assert value.dtype == other.state[resumed][name].dtype


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_checkpoint_of_another_dtype_loads(before: torch.dtype, after: torch.dtype, algorithm: str) -> None:
    """One that counts no steps lacks nothing that matters."""
    weight = weight_of(before)
    optimizer = optimizer_of(weight, algorithm, lr=1e-3)
    steps_of(weight, optimizer, range(3))
    other_weight = nn.Parameter(weight.detach().to(after))
    other = optimizer_of(other_weight, algorithm, lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps_of(other_weight, other, range(3, 5))
    assert (other_weight.detach() - weight.detach()).abs().max() > 0
    for name in ("momentum", "exp_avg", "exp_avg_sq"):
        if name in optimizer.state[weight]:
            assert other.state[other_weight][name].dtype == torch.float32


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_so_does_a_sharded_one(before: torch.dtype, after: torch.dtype, tmp_path: Path) -> None:
    """Which ``torch.distributed.checkpoint`` reads by the names of the state that there is."""
    saved, loaded = (nn.Sequential(nn.Linear(128, 128)).to(dtype) for dtype in (before, after))
    optimizer, other = (Dion2([("0.weight", model[0].weight)], lr=1e-3) for model in (saved, loaded))
    steps_of(saved[0].weight, optimizer, range(3))
    dcp.save(get_optimizer_state_dict(saved, optimizer), checkpoint_id=tmp_path)
    state = get_optimizer_state_dict(loaded, other)
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(loaded, other, state)
    steps_of(loaded[0].weight, other, range(3, 4))
    found = other.state[loaded[0].weight]
    assert (found["step"], found["momentum"].dtype) == (4, torch.float32)


def test_moments_that_were_saved_in_half_precision_load_as_float32() -> None:
    weight = weight_of(torch.bfloat16)
    optimizer = optimizer_of(weight, "adamw", lr=1e-3)
    steps_of(weight, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = saved["state"][0][name].to(torch.bfloat16)
    optimizer.load_state_dict(saved)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[weight]["exp_avg"], saved["state"][0]["exp_avg"].float())
    steps_of(weight, optimizer, range(3, 5))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_that_is_cast_after_the_first_steps(algorithm: str) -> None:
    layer = nn.Linear(128, 128, bias=False)
    optimizer = optimizer_of(layer.weight, algorithm, lr=1e-3)
    steps_of(layer.weight, optimizer, range(2))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        layer.to(dtype)
        layer.weight.grad = None
        before = layer.weight.detach().clone()
        steps_of(layer.weight, optimizer, range(2))
        assert layer.weight.dtype == dtype
        assert not torch.equal(layer.weight, before)


# Warnings


def test_a_warning_where_rounding_to_nearest_loses_the_decay() -> None:
    """Once for all groups, with the figures and the remedy, at the line that builds the optimizer."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8)).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="loses the weight decay") as seen:
        Dion2(
            [{"params": [model[0].weight]}, {"params": [model[1].weight], "algorithm": "adamw", "lr": 1e-4}],
            lr=1e-3,
            weight_decay=0.1,
            rounding="nearest",
        )
    assert len(seen) == 1
    assert seen[0].filename == __file__
    message = str(seen[0].message)
    assert "in group 'dion2' lr x weight_decay is 0.0001, and bfloat16 weights stay where" in message
    assert "in group 'adamw' lr x weight_decay is 1e-05" in message
    assert "by less than 0.002 to 0.004 of themselves" in message
    assert 'pass rounding="stochastic", the default, or keep the weights in float32' in message


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"rounding": "nearest", "weight_decay": 0.0}),
        (torch.bfloat16, {"rounding": "nearest", "lr": 0.1}),
        (torch.float32, {"rounding": "nearest"}),
    ],
    ids=str,
)
def test_no_warning_where_nothing_is_lost(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dion2([weight_of(dtype)], **{"lr": 1e-3, "weight_decay": 0.1, **settings})
