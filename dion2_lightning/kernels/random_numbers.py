"""Random numbers that are hashes of where they stand, not the output of a generator.

There is no generator's state to save, and an entry of a matrix is the same on whatever rank it is.
"""

import math
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.kernels.precision import sum_dtype

_SECOND: Final = 0x5851F42D
"""Tells the second hash of an entry from the first."""


def hashed(numbers: Tensor) -> Tensor:
    """A bijection of int32 that looks random (Murmur3's final mix)."""
    numbers = (numbers ^ _shifted(numbers, 16)) * -0x7A143595
    numbers = (numbers ^ _shifted(numbers, 13)) * -0x3D4D51CB
    return numbers ^ _shifted(numbers, 16)


def uniforms(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """Return numbers of mean 0 and variance 1, uniformly distributed, each a function of seed, row and column alone.

    Args:
        rows: The numbers of the rows in the whole matrix, integers of shape (n,).
        columns: The numbers of the columns, (m,).
        seed: In [0, 2^32).

    Returns:
        Shape (n, m), in float32, the same bits on every device.
    """
    # 24 bits, exact in float32; odd numbers are symmetric around zero.
    return (_entries(rows, columns, seed).bitwise_right_shift(8) * 2 + 1).float() * (math.sqrt(3.0) / 2**24)


def normals(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """Return standard normal numbers in the same way, computed in float64 where there is one.

    Rounded to float32 they have the same bits wherever they are computed, but for the rarest of exceptions.

    Args:
        rows: The numbers of the rows in the whole matrix, integers of shape (n,).
        columns: The numbers of the columns, (m,).
        seed: In [0, 2^32).

    Returns:
        Shape (n, m), in float64, or in float32 on a device that has no float64.
    """
    first = _entries(rows, columns, seed)
    second = hashed(first ^ _SECOND)
    # The polar form of two normal numbers (Box and Muller, 1958), of which one is used.
    exact = sum_dtype(rows.device)
    radius = ((first.to(exact) + 2**31 + 0.5) / 2**32).log().mul(-2).sqrt()
    return radius * (second.to(exact) * (math.pi / 2**31)).cos()


def _entries(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """A hash of each entry, int32 of shape (n, m)."""
    salted = (rows ^ (seed - 2**31)).to(torch.int32)
    return hashed(hashed(salted).unsqueeze(1) + hashed(columns.to(torch.int32)))


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    """``numbers >> shift``, with zeros from the left also where they are negative."""
    return numbers.bitwise_right_shift(shift).bitwise_and_(2 ** (32 - shift) - 1)
