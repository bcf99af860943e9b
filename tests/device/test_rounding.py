"""Rounding on the device: the bits of the CPU, which tests/kernels/test_rounding.py has worked out by hand."""

import math

import pytest
import torch

from dion2_lightning.kernels.rounding import RandomBits, cut_like, multiply_add_, random_bits, store_each_

SHAPE = (300, 200)


def bits_on(device: str) -> RandomBits:
    rows, columns = (torch.arange(size, device=device) for size in SHAPE)
    [bits] = random_bits([(rows, columns)], [0xDEADBEEF], [torch.tensor(1234.0, device=device)])
    return bits.shaped(SHAPE)


@pytest.mark.parametrize("is_stochastic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding(dtype: torch.dtype, is_stochastic: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, change = torch.randn(SHAPE, generator=generator).to(dtype), 1e-3 * torch.randn(SHAPE, generator=generator)
    results = []
    for each in ("cpu", device):
        tensor = start.clone().to(each)
        # The factor is exact, so that fused and separate multiplication and addition are the same.
        multiply_add_(tensor, 1.0, change.to(each), bits_on(each) if is_stochastic else None)
        results.append(tensor.cpu())
    assert torch.equal(*results)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize("is_stochastic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_tensors_are_rounded_together(dtype: torch.dtype, is_stochastic: bool, device: str) -> None:
    """Those that are alike have random bits that are drawn together."""
    shapes = [(7, 30), (7, 30), (5,), (7, 30), (64, 1)]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(map(math.prod, shapes)), generator=generator)
    results = []
    for each in ("cpu", device):
        coordinates = {
            (*rows, columns): (torch.arange(math.prod(rows), device=each), torch.arange(columns, device=each))
            for *rows, columns in shapes
        }
        steps = [torch.tensor(float(step), device=each) for step in range(len(shapes))]
        drawn = random_bits([coordinates[shape] for shape in shapes], [2**32 - 1 - at for at in range(5)], steps)
        bits = [of_tensor.shaped(shape) for of_tensor, shape in zip(drawn, shapes, strict=True)]
        tensors = [torch.zeros(shape, dtype=dtype, device=each) for shape in shapes]
        store_each_(tensors, values.to(each), bits if is_stochastic else [None] * len(shapes))
        results.append([tensor.cpu() for tensor in tensors])
    for on_cpu, on_device, its_values in zip(*results, cut_like(values, results[0]), strict=True):
        assert torch.equal(on_cpu, on_device)
        assert ((on_cpu.float() - its_values).abs() <= its_values.abs() * torch.finfo(dtype).eps).all()
    together = torch.cat([tensor.flatten() for tensor in results[0]])
    assert torch.equal(together, values.to(dtype)) != is_stochastic
