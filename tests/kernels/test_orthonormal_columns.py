"""Randomized Cholesky QR against an exact QR, at every condition number."""

import math

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels.orthonormal_columns import (
    finish,
    orthonormal_columns,
    precondition,
    randomized_cholesky_qr,
    sketch_rows,
    sketches,
)

SHAPES = [(512, 64), (300, 96), (512, 256), (40, 3), (60, 1)]


def of_condition(number: float, rows: int, rank: int, seed: int = 0) -> Tensor:
    """A stack of two random matrices with a condition number, singular values in equal ratios."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(2, rows, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(2, rank, rank, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(number), rank, dtype=torch.float64)
    return ((left * values) @ right.mT).float()


def off_orthonormal(matrices: Tensor) -> float:
    """The largest entry of P^T P - I."""
    matrices = matrices.double()
    return (matrices.mT @ matrices - torch.eye(matrices.shape[-1])).abs().max().item()


def relative_error(found: Tensor, matrices: Tensor) -> float:
    """By how much columns are off those of an exact QR in float64 of the same matrices, whose signs are free."""
    found, exact = found.double(), torch.linalg.qr(matrices.double()).Q
    exact = exact * (found * exact).sum(1, keepdim=True).sign()
    return (torch.linalg.norm(found - exact) / torch.linalg.norm(exact)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [1.0, 1e2, 1e3, 1e4, 1e6, 1e8])
def test_columns_are_orthonormal_and_span_the_same(number: float, shape: tuple[int, int]) -> None:
    matrices = of_condition(number, *shape)
    found, failed = randomized_cholesky_qr(matrices)
    assert not failed.any()
    assert off_orthonormal(found) < (2.5e-7 if number <= 1e6 else 1e-6)
    rest = matrices.double() - found.double() @ (found.double().mT @ matrices.double())
    assert torch.linalg.norm(rest) < 1e-6 * torch.linalg.norm(matrices)
    if number <= 1e6:
        assert relative_error(found, matrices) < 2.5e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [1.0, 1e2, 1e3, 1e4, 1e6, 1e8])
def test_an_exact_qr_on_a_cpu(number: float, shape: tuple[int, int]) -> None:
    """It takes float64 where float32 would turn columns too far, and there alone."""
    matrices = of_condition(number, *shape)
    found = orthonormal_columns(matrices)
    assert off_orthonormal(found) < 1e-6
    if number <= 1e6:
        assert relative_error(found, matrices) < 1e-4
    if number in (1e2, 1e4) and shape[1] > 1:
        assert torch.equal(found, torch.linalg.qr(matrices).Q) == (number == 1e2)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e15, 1e21])
def test_an_exact_qr_at_every_scale(scale: float) -> None:
    matrices = scale * of_condition(1e4, 512, 64)
    assert relative_error(orthonormal_columns(matrices), matrices) < 1e-6


def test_rows_on_several_ranks() -> None:
    """Sums over the parts of a matrix give what the whole one does."""
    matrices = of_condition(1e3, 300, 40)
    numbers = torch.arange(300).split([120, 0, 179, 1])
    parts = [matrices[:, its] for its in numbers]
    sketch = sum(sketches(part, its) for part, its in zip(parts, numbers, strict=True))
    assert sketch.shape == (2, sketch_rows(40), 40)
    parts = [precondition(part, sketch) for part in parts]
    gram = sum(part.mT @ part for part in parts)
    found = torch.cat([finish(part, gram)[0] for part in parts], dim=1)
    expected, _ = randomized_cholesky_qr(matrices)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_the_scale_does_not_matter(scale: float) -> None:
    found, failed = randomized_cholesky_qr(scale * of_condition(10.0, 512, 64))
    assert not failed.any()
    assert off_orthonormal(found) < 1e-6


def test_zero_stays_zero() -> None:
    matrices = of_condition(10.0, 100, 8)
    matrices[1] = 0
    found, failed = randomized_cholesky_qr(matrices)
    assert not failed.any()
    assert torch.equal(found[1], torch.zeros(100, 8))
    assert off_orthonormal(found[:1]) < 1e-6
    assert off_orthonormal(orthonormal_columns(matrices)) < 1e-6


@pytest.mark.parametrize("kind", ["a zero column", "equal columns", "NaN"])
def test_failures_are_told(kind: str) -> None:
    """Of the matrix alone that lacks rank; an exact QR completes it, unless it has no numbers."""
    matrices = of_condition(10.0, 100, 8)
    if kind == "a zero column":
        matrices[1, :, 3] = 0
    elif kind == "equal columns":
        matrices[1, :, 3] = matrices[1, :, 5]
    else:
        matrices[1, 4, 3] = math.nan
    found, failed = randomized_cholesky_qr(matrices)
    assert failed.tolist() == [False, True]
    assert off_orthonormal(found[:1]) < 1e-6
    assert (off_orthonormal(orthonormal_columns(matrices[1:])) < 1e-6) == (kind != "NaN")
