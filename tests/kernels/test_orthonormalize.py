"""The polar factor: its bound, its paths, its memory order."""

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import dion2_lightning.kernels.orthonormalize as orthonormalize_module
from dion2_lightning.kernels.orthonormalize import MIN_BF16_DIM, default_dtype, orthonormalize
from tests.reference import polar

SHAPES = [(48, 192), (192, 768), (512, 1024)]
CONDITIONS = [1.0, 3.0, 10.0, 30.0, 100.0]


def with_spectrum(shape: tuple[int, int], condition: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random matrix with log-spaced singular values from 1 down to 1 / condition, and its factors, in float64."""
    rows, columns = shape
    k = min(shape)
    generator = torch.Generator().manual_seed(rows + columns)
    left, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), k, dtype=torch.float64)
    return (left * values) @ right.T, left, values, right.T


@pytest.fixture
def products_are_exact():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + [shape[::-1] for shape in SHAPES], ids=str)
def test_singular_values_land_near_one(shape, dtype):
    """Every singular value of at least 1e-3 of the Frobenius norm lands in [0.85, 1.15], none above."""
    for condition in CONDITIONS:
        matrix, _, values, _ = with_spectrum(shape, condition)
        assert values.min() >= 1e-3 * values.norm()
        result = torch.linalg.svdvals(orthonormalize(matrix.float()[None], dtype)[0].double())
        assert result.min() >= 0.85
        assert result.max() <= 1.15


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_float32_products_keep_the_bound(precision, products_are_exact, monkeypatch):
    """set_float32_matmul_precision("medium") rounds float32 products to bfloat16: Gram matrices would go astray.

    Not on every processor, so that they are not even made.
    """
    torch.set_float32_matmul_precision(precision)
    gram_newton_schulz = Mock(wraps=orthonormalize_module._gram_newton_schulz)
    monkeypatch.setattr(orthonormalize_module, "_gram_newton_schulz", gram_newton_schulz)
    matrix, *_ = with_spectrum((192, 768), 100.0)
    result = torch.linalg.svdvals(orthonormalize(matrix.float()[None], torch.float32)[0].double())
    assert result.min() >= 0.85
    assert result.max() <= 1.15
    assert gram_newton_schulz.called == (precision == "highest")


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_the_newer_setting_of_reduced_products_is_understood(precision):
    """What the Trainer's tf32 sets; torch raises where the older getter is asked after it. In a process of its own."""
    code = f"""
import torch
from dion2_lightning.kernels.orthonormalize import _rounds_float32, orthonormalize
torch.backends.fp32_precision = {precision!r}
assert _rounds_float32(torch.device("cpu")) == {precision != "ieee"}
assert orthonormalize(torch.randn(1, 8, 64), torch.float32).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (64, 64), (40, 50)], ids=str)
def test_same_polynomials_as_on_the_singular_values(shape, dtype, tolerance):
    """Both paths, Gram and standard, against the polynomials applied to the singular values in float64."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = orthonormalize(matrices.float() if dtype != torch.float64 else matrices, dtype)
    for matrix, its_result in zip(matrices, result, strict=True):
        expected = polar(matrix)
        assert torch.linalg.norm(its_result.double() - expected) / torch.linalg.norm(expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-5)])
def test_few_slices_are_multiplied_in_float32(dtype, tolerance):
    """In bfloat16 only input and output are rounded; its products would be off by up to 5%."""
    for k in (1, 6, MIN_BF16_DIM - 1):
        matrix = torch.randn(1, k, 96, generator=torch.Generator().manual_seed(k)).to(dtype)
        result, expected = orthonormalize(matrix.float(), dtype), polar(matrix[0])
        assert result.dtype == dtype
        assert torch.linalg.norm(result[0].double() - expected) / torch.linalg.norm(expected) < tolerance


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-6, 1e30, 1e36])
def test_the_scale_of_the_input_does_not_matter(scale):
    """Up to float32's ends, where squares vanish or overflow."""
    matrix = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        orthonormalize(matrix * scale, torch.float32), orthonormalize(matrix, torch.float32), rtol=0, atol=1e-5
    )


def test_a_denormal_matrix_fades_to_zero_without_nan():
    matrix = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    result = orthonormalize(matrix * 1e-43, torch.float32)
    assert result.isfinite().all()
    assert torch.linalg.svdvals(result[0]).max() < 1.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 8, 32), (2, 48, 192), (2, 192, 48)], ids=str)
def test_zero_gives_zero(shape, dtype):
    assert orthonormalize(torch.zeros(shape), dtype).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(3, 48, 192), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_order_is_kept(shape, dtype):
    """Submatrices gathered as columns come back as columns, without a copy in between."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    columns = matrices.mT.contiguous().mT
    assert not columns.is_contiguous()
    result = orthonormalize(columns, dtype)
    assert result.mT.is_contiguous()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(result.float(), orthonormalize(matrices, dtype).float(), rtol=0, atol=tolerance)


def test_each_matrix_of_a_batch_is_on_its_own():
    matrices = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))
    together = orthonormalize(matrices * torch.tensor([1e-3, 1.0, 1e3, 0.0]).view(4, 1, 1), torch.float32)
    for index in range(3):
        torch.testing.assert_close(together[index], orthonormalize(matrices[index : index + 1], torch.float32)[0])
    assert together[3].count_nonzero() == 0


def test_precision_follows_the_hardware(monkeypatch):
    """By what the processor says of itself: AMX tiles, or AVX512-BF16 on AMD."""
    cpu = torch.device("cpu")
    cases = [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        ({"architecture": "arm64"}, torch.float32),
    ]
    for capabilities, expected in cases:
        orthonormalize_module._cpu_multiplies_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert default_dtype(cpu) == expected
    orthonormalize_module._cpu_multiplies_bfloat16.cache_clear()
    assert default_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((7, 5), None, torch.float32),
        ((8, 0), None, torch.bfloat16),
        ((9, 0), None, torch.bfloat16),
        ((7, 5), "6.4", torch.bfloat16),
    ],
)
def test_precision_follows_the_gpu(monkeypatch, capability, hip, expected):
    """NVIDIA's emulate bfloat16 before compute capability 8.0; AMD's count otherwise."""
    multiplies = orthonormalize_module._gpu_multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(orthonormalize_module, "_gpu_multiplies_bfloat16", multiplies)  # without its cache
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_dtype(torch.device("cuda", 1)) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a fake GPU is a recent one
    assert default_dtype(torch.device("cuda", 1)) == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 128), (2, 2048), (3, 2047), (2, 65536), (4, 50257), (8, 128256), (40, 50257)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_nearly_rank_one_with_entries_of_one_size(shape, dtype):
    """As a mean makes them of LoRA factors and heads: float32 sums over long rows are off by up to 1e-4."""
    k, m = shape
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randn(1, m, generator=generator).sign()
        for rows in (torch.ones(k, 1), torch.randn(k, 1, generator=generator)):
            for noise in (0.0, 1e-3, 3e-3):
                matrix = (rows * signs + noise * torch.randn(k, m, generator=generator)).unsqueeze(0)
                for each in (matrix, matrix.mT.contiguous(), matrix.mT.contiguous().mT):
                    assert torch.linalg.svdvals(orthonormalize(each, dtype)[0].double()).max() < 1.15
