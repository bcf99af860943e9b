"""Which matrices a parameter yields, and how they are viewed as slices.

A parameter is not always one matrix: a stack of experts holds one for each expert, a ``Conv1D`` weight is stored (in,
out). The parameter's group says so by plain data (``batched``, ``transposed``); from here on everything knows matrices
only, and an (out, in) shape means what it says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from torch import Tensor

OUTPUT_AXIS: Final = 0
INPUT_AXIS: Final = 1


@dataclass(frozen=True)
class Matrices:
    """The matrices of one parameter: ``count`` of them, of the same shape and storage.

    Attributes:
        count: How many: 1 for a plain weight, the number of experts for a stack.
        out_size: Output size of each.
        in_size: Input size of each.
        transposed: Whether each is stored (in, out).
    """

    count: int
    out_size: int
    in_size: int
    transposed: bool

    @classmethod
    def of(cls, shape: Sequence[int], *, batched: bool = False, transposed: bool = False) -> "Matrices":
        """Read a parameter's shape: (rows, columns), or (count, rows, columns) where it is ``batched``."""
        count, rows, columns = shape if batched else (1, *shape)
        out_size, in_size = (columns, rows) if transposed else (rows, columns)
        return cls(count, out_size, in_size, transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        return self.out_size, self.in_size

    def selection_axis(self, select: str) -> int:
        """Return the axis to select from, 0 output or 1 input; ``"shorter"`` takes the output axis at a tie."""
        if select == "output" or self.out_size <= self.in_size:
            return OUTPUT_AXIS
        return INPUT_AXIS

    def slices(self, tensor: Tensor, axis: int) -> Tensor:
        """View a tensor of the parameter's shape, or of a part of it, as (count, n, m): n slices along ``axis``."""
        stack = tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
        return stack if self.slices_are_rows(axis) else stack.mT

    def slices_are_rows(self, axis: int) -> bool:
        """Return whether slices along ``axis`` are rows as stored."""
        return axis == (INPUT_AXIS if self.transposed else OUTPUT_AXIS)


class Observed(NamedTuple):
    """What statistics observe of a parameter: how a step updates its matrices.

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
    """A parameter that statistics observe.

    Attributes:
        parameter: The parameter itself.
        group: Name of its parameter group.
        name: Its name in the model, or ``parameter 0``, ``parameter 1``, ... by its place in a group without names.
        is_named: Whether it has a name.
        observed: What is observed of it.
    """

    parameter: Tensor
    group: str
    name: str
    is_named: bool
    observed: Observed
