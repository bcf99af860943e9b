"""A step that the device itself takes or skips, so that the host need not wait to know; and what decides it."""

import math
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from dion2_lightning.kernels.device_numbers import DeviceNumber, Number


class Gate:
    """Open in a step that is taken. Closed, an update that asks it for gradients and numbers changes nothing.

    Attributes:
        is_open: Boolean, on the device of what is updated: 0-d, or (count, 1, 1), one for each of several matrices.
    """

    def __init__(self, is_open: Tensor) -> None:
        self.is_open = is_open
        self._numbers: dict[tuple[Number, float, torch.dtype], Tensor] = {}

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return a gradient; zeros where closed."""
        return torch.where(self.is_open, gradient, 0)

    def number(self, value: Number, neutral: float, dtype: torch.dtype) -> Tensor:
        """Return a number of the update, in the shape of :attr:`is_open`; the neutral one where closed."""
        key = value, neutral, dtype
        if key not in self._numbers:
            on_device = partial(torch.full, (), dtype=dtype, device=self.is_open.device)
            where_open = value.to(dtype) if isinstance(value, DeviceNumber) else on_device(value)
            self._numbers[key] = torch.where(self.is_open, where_open, on_device(neutral))
        return self._numbers[key]

    @cached_property
    def found_inf(self) -> Tensor:
        """What torch's fused optimizers ask for: 0 where open, 1 where closed, in float32."""
        return self.is_open.logical_not().float()


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return which tensors hold neither NaN nor Inf: boolean, (count,).

    Args:
        tensors: Not empty, of one device and dtype. Each is read once.
    """
    # The largest of |x|, and NaN where there is one. A CPU takes 7 times as long for norms as for both extremes.
    if tensors[0].device.type == "cpu":
        largest = torch.stack([torch.stack(torch.aminmax(tensor)).abs().amax() for tensor in tensors])
    else:
        largest = torch.stack(torch._foreach_norm(list(tensors), math.inf))
    return largest < math.inf
