"""The polar factor on the device, at the sizes of real models: its bound, whatever is rounded on the way."""

import functools

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels.orthonormalize import orthonormalize
from tests.kernels.test_orthonormalize import products_are_exact, with_spectrum  # noqa: F401  the first is a fixture

SIZES = {
    "cpu": ((48, 576), (144, 576), (576, 144)),
    "cuda": ((48, 576), (144, 1536), (576, 144), (512, 512), (1024, 4096)),
}
"""Submatrices (k, m): a quarter of the layers of SmolLM2-135M and of a Llama of 8B parameters."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", SIZES[metafunc.config.getoption("device")], ids=str)


@functools.cache
def matrices_of(size: tuple[int, int]) -> Tensor:
    """Two, in float32, whose singular values all have to land near 1."""
    matrices = []
    for condition in (3.0, 30.0):
        matrix, _, values, _ = with_spectrum(size, condition)
        assert values.min() >= 1e-3 * values.norm()
        matrices.append(matrix.float())
    return torch.stack(matrices)


def singular_values(matrix: Tensor) -> Tensor:
    """By the Gram matrix in float64, which is exact enough for those near 1."""
    short = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(short @ short.T).clamp_min(0).sqrt()


def check_bound(size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """As in tests/kernels/test_orthonormalize.py; also of matrices stored by columns, and several at once."""
    stack = matrices_of(size).to(device)
    for stored in (stack, stack.mT.contiguous().mT):
        for result in orthonormalize(stored, dtype):
            found = singular_values(result)
            assert (found.min() >= 0.85) & (found.max() <= 1.15), f"from {found.min():.3f} to {found.max():.3f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_singular_values_land_near_one(size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_bound(size, dtype, device)


@pytest.mark.parametrize("setting", ["allow_tf32", "set_float32_matmul_precision", "fp32_precision"])
@pytest.mark.usefixtures("products_are_exact")
def test_float32_products_that_are_rounded_to_tf32(setting: str, size: tuple[int, int], gpu: str) -> None:
    """By torch's older settings and by its newer one."""
    if setting == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif setting == "fp32_precision":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    check_bound(size, torch.float32, gpu)
