"""How matrices are cut into slices, which is found once in a step for all parameters that are alike."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.working_memory import shared_bytes, working_bytes
from dion2_lightning.matrices.layout import Layout, Spans
from dion2_lightning.matrices.parts import Part, parts_of
from dion2_lightning.matrices.splits import OUTPUT_AXIS
from dion2_lightning.matrices.views import Matrices


@dataclass(frozen=True, eq=False)
class Slicing:
    """Matrices, each cut into n slices of m entries.

    A slice of a kernel is a channel with all its taps: then it is ``taps`` of the n.

    Attributes:
        part: Which matrices they are, and which part of them this rank holds.
        axis: What a slice is: 0 output, 1 input.
        selected: Slices to select in each matrix.
        dtype: Precision of the orthonormalization.
    """

    part: Part
    axis: int
    selected: int
    dtype: torch.dtype

    @cached_property
    def matrices(self) -> Matrices:
        """The matrices of the block, or of the whole parameter, that these are some of."""
        return self.part.matrices

    @cached_property
    def layout(self) -> Layout:
        """Which ranks hold which part of them."""
        return self.part.layout

    @cached_property
    def slices(self) -> int:
        """Slices of each whole matrix, n; of a kernel each counts as many times as it has taps."""
        return self.matrices.shape[self.axis]

    @cached_property
    def entries(self) -> int:
        """Entries of each whole slice, m."""
        return self.matrices.shape[1 - self.axis]

    @cached_property
    def taps(self) -> int:
        """How many of the n are selected together: all taps of a channel, or 1."""
        return self.matrices.taps_along(self.axis)

    @cached_property
    def k(self) -> int:
        """How many of the n a step selects."""
        return self.selected * self.taps

    @cached_property
    def is_scattered(self) -> bool:
        """Whether slices lie apart, with those of other blocks in between."""
        return self.part.is_apart and self.axis == self.matrices.block_axis

    @cached_property
    def is_in_pieces(self) -> bool:
        """Whether the entries of slices lie in pieces of one size, apart."""
        return self.part.is_in_equal_pieces and self.axis != self.matrices.block_axis

    @cached_property
    def is_interleaved(self) -> bool:
        """Whether single entries of other blocks lie between those of slices, so that views have gaps."""
        return self.part.is_apart and not self.part.is_in_pieces and self.axis != self.matrices.block_axis

    @cached_property
    def slices_are_rows(self) -> bool:
        """Whether slices are rows as stored."""
        return self.matrices.slices_are_rows(self.axis)

    @cached_property
    def slices_are_neurons(self) -> bool:
        """Whether a slice is an output of the matrix; if not, every entry of a slice belongs to another one."""
        return self.axis == OUTPUT_AXIS

    @cached_property
    def held(self) -> Spans:
        """By rank of the layout's group: which slices it touches. Without a group this rank is the only one."""
        if self.layout.group is None:
            return Spans([(0, self.slices)])
        return self.layout.rows if self.slices_are_rows else self.layout.columns

    @cached_property
    def columns(self) -> Spans:
        """By rank of the layout's group: which entries of the slices it holds."""
        if self.layout.group is None:
            return Spans([(0, self.entries)])
        return self.layout.columns if self.slices_are_rows else self.layout.rows

    @cached_property
    def held_of_slices(self) -> int:
        """Entries of each slice that this rank holds."""
        start, stop = self.columns[self.layout.own_rank]
        return stop - start

    @cached_property
    def held_of_matrix(self) -> int:
        """Entries of each matrix that this rank holds."""
        rank = self.layout.own_rank
        return math.prod(stop - start for start, stop in (self.held[rank], self.columns[rank]))

    @cached_property
    def working_bytes(self) -> int:
        """Working memory that one matrix takes beside the others of its batch: for its selected slices."""
        return working_bytes(self.k, self.entries, self.slices, self.dtype.itemsize)

    @cached_property
    def shared_bytes(self) -> int:
        """Working memory of one matrix that ranks share."""
        return shared_bytes(self.k, self.entries, self.slices, self.dtype.itemsize)


def slicings_of(
    parameter: Tensor,
    matrices: Matrices,
    label: str,
    *,
    axis: int,
    selected: int,
    dtype: torch.dtype,
    context: StepContext,
) -> list[Slicing]:
    """Cut matrices of a parameter, as its layout is now; several where ranks hold unequal parts of the matrices.

    See the attributes. What is alike is the same object.
    """
    parts = parts_of(parameter, matrices, label, process_group=context.process_group, known=context.layouts)
    key = id(parts), axis, selected, dtype  # context.layouts keeps the parts, so that no other object gets their id
    if key not in context.layouts:
        context.layouts[key] = [Slicing(part, axis, selected, dtype) for part in parts]
    slicings: list[Slicing] = context.layouts[key]
    return slicings
