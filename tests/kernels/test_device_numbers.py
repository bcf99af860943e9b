"""Numbers on the device against Python's floats, bit for bit."""

import random

import pytest
import torch

from dion2_lightning.kernels.device_numbers import DeviceNumber, Number, as_factor
from dion2_lightning.kernels.gate import Gate


def value_of(number: Number) -> float:
    return number.to(torch.float64).item() if isinstance(number, DeviceNumber) else number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_arithmetic_is_that_of_floats(dtype: torch.dtype) -> None:
    generator = random.Random(0)
    for _ in range(100):
        lr, decay = (torch.tensor(generator.random(), dtype=dtype) for _ in range(2))
        rate, other, scale = DeviceNumber(lr), DeviceNumber(decay), generator.uniform(0.1, 20)
        expected = {
            lr.item() * scale: rate * scale,
            scale * lr.item(): scale * rate,
            -lr.item(): -rate,
            lr.item() - 1.0: rate - 1.0,
            1.0 - lr.item() * decay.item(): 1.0 - rate * other,
        }
        for value, number in expected.items():
            assert value_of(number) == value
            assert as_factor(number, torch.float32) == torch.tensor(value, dtype=torch.float32)


def test_what_is_made_of_a_number_is_made_once() -> None:
    rate = DeviceNumber(torch.tensor(0.1))
    assert rate * 3.0 is rate * 3.0 is 3.0 * rate
    assert -rate is -rate
    assert 1.0 - rate is 1.0 - rate
    assert rate.to(torch.float32) is rate.to(torch.float32)
    assert rate - 1.0 is not 1.0 - rate


def test_only_a_product_with_zero_is_known() -> None:
    rate = DeviceNumber(torch.tensor(1.0))
    assert rate * 0.0 == 0.0 * rate == 0.0
    assert rate != 1.0
    assert rate == rate
    assert repr(rate) == repr(DeviceNumber(torch.tensor(2.0)))


@pytest.mark.parametrize("is_open", [True, False])
def test_gates_take_them(is_open: bool) -> None:
    gate, rate = Gate(torch.tensor(is_open)), DeviceNumber(torch.tensor(0.1))
    assert gate.number(rate, 1.0, torch.float64).item() == (torch.tensor(0.1).item() if is_open else 1.0)
    assert gate.number(rate, 1.0, torch.float64) is gate.number(rate, 1.0, torch.float64)
