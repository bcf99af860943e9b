"""Which precision sums are taken in on a device: float64, or float32 where there is none."""

from typing import Final

import torch
from torch import Tensor

WITHOUT_FLOAT64: Final = ("mps",)
"""Types of devices of which none has float64: Apple's GPUs."""


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64; Intel's GPUs differ."""
    if device.type == "xpu" and torch.xpu.is_available():  # and no fake one
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in WITHOUT_FLOAT64


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return what norms and other sums are taken in on a device: float64, or float32 where there is none."""
    return torch.float64 if has_float64(device) else torch.float32


def move_sums(sums: Tensor, device: torch.device) -> Tensor:
    """Bring sums to a device, in what it takes sums in."""
    dtype = sum_dtype(device)
    if sums.dtype != dtype:
        sums = sums.float()  # what both devices have
    return sums.to(device).to(dtype)
