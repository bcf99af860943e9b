"""Clipping on one process against torch's own; across meshes in tests/distributed/test_clipping.py."""

import copy

import pytest
import torch
from torch import nn

from dion2_lightning import clip_grad_norm_


def with_gradients(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, width), nn.Linear(width, 3))
    for parameter in list(model.parameters())[:4]:
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("width", [3, 128, 256, 300])
def test_equals_torch(max_norm, norm_type, width):
    """Also of as many entries as are summed up at once, twice as many, and more."""
    ours, theirs = with_gradients(width), with_gradients(width)
    norm = clip_grad_norm_(ours.parameters(), max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_one_parameter_several_dtypes_and_none():
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 2.0)
    half = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    half.grad = torch.full((4,), 2.0, dtype=torch.bfloat16)
    assert clip_grad_norm_(parameter, 1.0) == 4.0
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5))
    assert clip_grad_norm_([parameter, half], 100.0) == pytest.approx(17**0.5)
    assert clip_grad_norm_([], 1.0) == 0.0
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_half_precision_gradients_is_not_rounded(dtype):
    """Nor are those of its pieces. In float16 it would overflow, and everything be scaled to zero."""
    parameter = nn.Parameter(torch.zeros(999, 999, dtype=dtype))
    gradient = (3000 * torch.randn(999, 999, generator=torch.Generator().manual_seed(0))).to(dtype)
    parameter.grad = gradient.clone()
    norm = gradient.double().norm().item()
    assert clip_grad_norm_(parameter, norm / 4).item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(parameter.grad, gradient / 4, rtol=1e-2, atol=0)


def test_bad_input():
    model = with_gradients()
    with pytest.raises(ValueError, match=r"max_norm must be at least 0, got -1\.0"):
        clip_grad_norm_(model.parameters(), -1.0)
    with pytest.raises(ValueError, match="norm_type must be over 0, got 0"):
        clip_grad_norm_(model.parameters(), 1.0, 0.0)
    model[0].bias.grad[0] = float("nan")
    before = copy.deepcopy([parameter.grad for parameter in model.parameters()])
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan, so nothing was clipped"):
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "gradient",
    [
        torch.full((1000, 20000), 0.1),
        torch.full((20000, 1000), 0.1).mT,
        torch.full((20_000_001,), 0.1),
        torch.full((20_000_000, 1), 0.1),
        torch.full((10_000_000, 4), 0.1)[:, ::2],
    ],
    ids=["matrix", "turned", "vector", "column", "with gaps"],
)
def test_the_norm_of_a_large_gradient(gradient):
    """One float32 sum over all of it would be off by up to 1e-2."""
    parameter = nn.Parameter(torch.empty_like(gradient))
    parameter.grad = gradient
    expected = gradient.numel() ** 0.5 * gradient.flatten()[0].double().item()
    assert clip_grad_norm_(parameter, 1e9).item() == pytest.approx(expected, rel=1e-5)
