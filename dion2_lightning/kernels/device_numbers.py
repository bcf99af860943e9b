"""Numbers of an update that only the device knows, such as the learning rate of a step that a CUDA graph replays."""

from collections.abc import Callable

import torch
from torch import Tensor

from dion2_lightning.kernels.precision import sum_dtype


class DeviceNumber:
    """A number whose value the host does not read; what is made of it is made on the device, once.

    Its arithmetic is that of Python's floats, in float64 where there is one. So a step by tensors has the bits of a
    step by the floats that they hold. It equals nothing but itself: ``number != 1.0`` says that it may differ.

    Args:
        value: 0-d.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.to(sum_dtype(value.device))
        self._casts: dict[torch.dtype, Tensor] = {}
        self._results: dict[tuple[str, Number], DeviceNumber] = {}

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return it as a 0-d tensor, rounded once."""
        if dtype not in self._casts:
            self._casts[dtype] = self._value.to(dtype)
        return self._casts[dtype]

    def __neg__(self) -> "DeviceNumber":
        return self._result("-", 0.0, lambda value: -value)

    def __mul__(self, other: "Number") -> "Number":
        if not other:
            return 0.0
        return self._result("*", other, lambda value: value * _operand(other))

    __rmul__ = __mul__

    def __sub__(self, other: float) -> "DeviceNumber":
        return self._result("- other", other, lambda value: value - other)

    def __rsub__(self, other: float) -> "DeviceNumber":
        return self._result("other -", other, lambda value: other - value)

    def __repr__(self) -> str:
        return "DeviceNumber()"

    def _result(self, operation: str, other: "Number", compute: Callable[[Tensor], Tensor]) -> "DeviceNumber":
        key = operation, other
        if key not in self._results:
            self._results[key] = DeviceNumber(compute(self._value))
        return self._results[key]


Number = float | DeviceNumber


def as_factor(number: Number, dtype: torch.dtype) -> float | Tensor:
    """Return what multiplies tensors of a dtype: a float as it is, else a 0-d tensor of that dtype."""
    return number.to(dtype) if isinstance(number, DeviceNumber) else number


def _operand(number: Number) -> float | Tensor:
    return number._value if isinstance(number, DeviceNumber) else number
