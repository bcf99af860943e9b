"""How much memory a step takes."""

from typing import Final

import torch

from dion2_lightning.kernels.orthonormalize import MIN_BF16_DIM

WORKING_COPIES: Final = 6
"""How many copies of the submatrices of a batch there are at once, at most: as taken, normalized, an iterate and the
next one; of square ones as large are their Gram matrix and its polynomial."""

SLICE_BYTES: Final = 40
"""Working memory for a slice: the sums of |M|, norms, and their order."""

PASS_COPIES: Final = 7
"""Copies in a pass over weights that are in half precision, or decay cautiously, in float32 at least: the wide
weights, the update or its sign, random bits, and what is rounded."""

CPU_BYTES: Final = 2**26
"""What a CPU takes at once. When a process frees more at the end of its heap, glibc gives it back to the system, and
every page of 4 KB is cleared again in the next step: a tenth of a step at 1/4."""


def memory_at_once(device: torch.device, working_memory: int) -> int:
    """Return how much of the working memory matrices that are updated together take."""
    return min(working_memory, CPU_BYTES) if device.type == "cpu" else working_memory


def working_bytes(k: int, entries: int, slices: int, itemsize: int) -> int:
    """Return the working memory of k slices of ``entries`` each, of so many, orthonormalized in a precision's bytes."""
    itemsize = max(itemsize, torch.float32.itemsize) if min(k, entries) < MIN_BF16_DIM else itemsize
    return k * entries * itemsize * WORKING_COPIES + slices * SLICE_BYTES


def shared_bytes(k: int, entries: int, slices: int, itemsize: int) -> int:
    """Return the working memory of a matrix that ranks share: as above, and what is sent and received of it."""
    return working_bytes(k, entries, slices, itemsize) + 2 * k * entries * itemsize


def pass_bytes(dtype: torch.dtype) -> int:
    """Return the working memory of a pass over weights of a dtype, for an entry."""
    return PASS_COPIES * torch.promote_types(dtype, torch.float32).itemsize
