"""Rounding on the device: the bits of the CPU, which tests/kernels/test_rounding.py has worked out by hand."""

import pytest
import torch

from dion2_lightning.kernels.rounding import RandomBits, multiply_add_, random_bits

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
