"""Which matrices a parameter yields, and which of their slices a step may select.

A parameter is not always one matrix: a stack of experts holds one for each expert, a ``Conv1D`` weight is stored (in,
out), a fused projection holds q, k and v side by side, and a convolution is a matrix (out, in x kernel). The
parameter's group says so by plain data (``batched``, ``transposed``, ``splits``, ``convolution``); from here on
everything knows matrices only, and an (out, in) shape means what it says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from dion2_lightning.matrices.splits import INPUT_AXIS, OUTPUT_AXIS, WHOLE, Block, read_splits


@dataclass(frozen=True)
class Matrices:
    """Matrices of one shape and storage that a parameter holds: all that it has, or those of one block.

    Attributes:
        count: How many: 1 for a plain weight, the number of experts for a stack, of heads for a block cut into these.
        out_size: Output size of each.
        in_size: Input size of each; of a convolution it counts every tap of the kernel.
        transposed: Whether each is stored (in, out). A transposed convolution is: its taps are outputs.
        is_kernel: Whether the parameter is the kernel of a convolution, (rows, channels, *kernel).
        taps: Entries of the kernel for each pair of channels; 1 where it is none.
        is_stack: Whether the parameter's leading axis counts them.
        block: Which part of the parameter they are; None for all of it.
        block_axis: Along which axis of (out, in) the parameter's blocks lie.
        first_neuron: How many neurons the parameter's blocks before this one have.
    """

    count: int
    out_size: int
    in_size: int
    transposed: bool
    is_kernel: bool = False
    taps: int = 1
    is_stack: bool = False
    block: Block | None = None
    block_axis: int = OUTPUT_AXIS
    first_neuron: int = 0

    @property
    def name(self) -> str:
        """Name of the block; empty where they are all that the parameter holds."""
        return "" if self.block is None else self.block.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        return self.out_size, self.in_size

    @property
    def entries(self) -> int:
        """Entries of all of them."""
        return self.count * self.out_size * self.in_size

    @property
    def neurons(self) -> int:
        """Outputs of all of them, or of one where the parameter's leading axis counts them."""
        return self.out_size * (1 if self.is_stack else self.count)

    def selection_axis(self, select: str) -> int:
        """Return the axis to select from, 0 output or 1 input; ``"shorter"`` takes the output axis at a tie."""
        if select == "output" or self.out_size <= self.in_size:
            return OUTPUT_AXIS
        return INPUT_AXIS

    def taps_along(self, axis: int) -> int:
        """Return how many rows or columns a slice is: all taps of a channel, or 1."""
        return 1 if self.slices_are_rows(axis) else self.taps

    def slices_along(self, axis: int) -> int:
        """Return how many slices each matrix has along an axis."""
        return self.shape[axis] // self.taps_along(axis)

    def slices(self, stack: Tensor, axis: int) -> Tensor:
        """View matrices as stored, (count, rows, columns), as (count, n, m): n rows or columns along ``axis``."""
        return stack if self.slices_are_rows(axis) else stack.mT

    def slices_are_rows(self, axis: int) -> bool:
        """Return whether slices along ``axis`` are rows as stored."""
        return axis == (INPUT_AXIS if self.transposed else OUTPUT_AXIS)

    @property
    def blocks_are_rows(self) -> bool:
        """Whether the parameter's blocks are made of rows as stored."""
        return self.slices_are_rows(self.block_axis)


def matrices_of(parameter: Tensor, group: Mapping[str, Any]) -> tuple[Matrices, ...]:
    """Return the matrices of a parameter, as its group says that they are stored: one entry for each block."""
    return read_matrices(
        tuple(parameter.shape), group["batched"], group["transposed"], group["convolution"], group["splits"]
    )


@lru_cache(maxsize=4096)
def read_matrices(
    shape: Sequence[int],
    batched: bool = False,
    transposed: bool = False,
    convolution: bool = False,
    splits: str = WHOLE,
) -> tuple[Matrices, ...]:
    """Read a shape: (rows, columns), (count, rows, columns) where it is ``batched``, or (rows, channels, *kernel)."""
    taps = math.prod(shape[2:]) if convolution else 1
    count, rows, columns = shape if batched else (1, shape[0], shape[1] * taps)
    size = (columns, rows) if transposed else (rows, columns)
    found = read_splits(splits)
    if found is None:
        return (Matrices(count, *size, transposed, convolution, taps, batched),)
    matrices: list[Matrices] = []
    for block in found.blocks:
        each = block.total // block.matrices
        its_size = (each, size[1]) if found.axis == OUTPUT_AXIS else (size[0], each)
        first = sum(before.neurons for before in matrices)
        matrices.append(
            Matrices(
                count * block.matrices, *its_size, transposed, convolution, taps, batched, block, found.axis, first
            )
        )
    return tuple(matrices)


class Source(NamedTuple):
    """Which matrices something is about: some of those of a parameter's block, from ``first`` on.

    Attributes:
        parameter: The parameter.
        block: Name of the block; empty where the parameter is not split.
        first: Number of the first one, among the matrices of the block on this rank.
    """

    parameter: Tensor
    block: str
    first: int


class Observed(NamedTuple):
    """What statistics observe of matrices: how a step updates them.

    Attributes:
        matrices: The matrices.
        axis: What a slice is: 0 output, 1 input.
        selected: How many slices of each matrix a step selects; 0 where it selects none.
        rank: The rank of its update where that is of low rank, else 0.
    """

    matrices: Matrices
    axis: int
    selected: int
    rank: int = 0


class ObservedParameter(NamedTuple):
    """A parameter, or a block of one, that statistics observe.

    Attributes:
        parameter: The parameter itself.
        group: Name of its parameter group.
        name: Its name in the model, or ``parameter 0``, ``parameter 1``, ... by its place in a group without names; of
            a block with its name behind it, as in ``qkv_proj.weight[q]``.
        is_named: Whether it has a name.
        observed: What is observed of it.
    """

    parameter: Tensor
    group: str
    name: str
    is_named: bool
    observed: Observed
