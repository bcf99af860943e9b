"""Where in a tensor the matrices of a parameter are, of which this rank holds a part.

Along its axis a block is a growing list of places, and a rank holds an interval of them. So what a rank holds of a
block is, again, a rectangle of each of its matrices, wherever the border between ranks falls.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion2_lightning.matrices.layout import Layout, Layouts, Rectangle, Span, held_coordinates, layout_of, local
from dion2_lightning.matrices.splits import Block
from dion2_lightning.matrices.views import Matrices


class Run(NamedTuple):
    """Pieces of one size, equally far apart.

    Attributes:
        first: Number of the first slice, among those that this rank holds of the matrix.
        pieces: How many.
        size: Slices of each.
        place: Where on this rank's part of the axis they begin.
    """

    first: int
    pieces: int
    size: int
    place: int


@dataclass(frozen=True)
class Part:
    """Consecutive matrices of a block, or of a whole parameter, of which each rank holds an equal rectangle.

    Attributes:
        matrices: All matrices of the block.
        first: Which of them is the first one here.
        count: How many there are, on this rank where the parameter's leading axis counts them; None for all.
        layout: Which rank holds which rectangle of each.
        start: Where this rank's part begins on the axis of the blocks.
    """

    matrices: Matrices
    first: int
    count: int | None
    layout: Layout
    start: int = 0

    def read(self, tensor: Tensor, *, taps_first: bool = False) -> Tensor:
        """Return the matrices, as stored (count, rows, columns), out of this rank's part of a parameter-like tensor.

        It is a view wherever memory has one. Matrices in several pieces have none, nor have kernels in another memory
        order than ``taps_first`` says: then it is a copy, which :meth:`write` brings back.

        Args:
            tensor: This rank's part.
            taps_first: Whether the columns of a convolution run through the channels of one tap, then of the next, as
                in channels_last; else through the taps of one channel (default: False).
        """
        if self.matrices.is_kernel:
            filters = self._filters(tensor)
            return (filters.movedim(2, -1) if taps_first else filters).flatten(2)
        return self.of_stack(self.stack(tensor))

    @cached_property
    def is_apart(self) -> bool:
        """Whether slices of other blocks lie between those of a matrix."""
        block = self.matrices.block
        if block is None or block.size == block.period or self._width == 0:
            return False
        return self._index // block.size != (self._index + self._width - 1) // block.size

    @property
    def is_in_pieces(self) -> bool:
        """Whether several slices lie side by side, then others: there is no view of such a matrix."""
        return self.is_apart and self._block.size > 1

    @property
    def is_in_equal_pieces(self) -> bool:
        """Whether, moreover, all pieces have one size."""
        return self.is_in_pieces and len(self.runs) == 1

    def pieces(self, stack: Tensor, dim: int) -> list[Tensor]:
        """View its pieces in this rank's part: a dimension becomes two, pieces and slices of each.

        There is one view of all pieces of one size, and one more for each that a border between ranks has cut.

        Args:
            stack: This rank's part, (count, rows, columns).
            dim: Which of its dimensions is the axis of the blocks.
        """
        return [
            stack.narrow(dim, run.place, (run.pieces - 1) * self._block.period + run.size)
            .unfold(dim, run.size, self._block.period)
            .movedim(-1, dim + 1)
            for run in self.runs
        ]

    def in_pieces(self, matrices: Tensor, dim: int) -> list[Tensor]:
        """View matrices (count, rows, columns) that were read out of a stack in the pieces in which they lie there."""
        return [
            matrices.narrow(dim, run.first, run.pieces * run.size).unflatten(dim, (run.pieces, run.size))
            for run in self.runs
        ]

    def places(self, slices: Tensor) -> Tensor:
        """Return where on this rank's part of the axis some of the slices that it holds are, given their numbers."""
        block, numbers = self._block, slices + self._index
        periods = numbers.div(block.size, rounding_mode="floor")
        return numbers + periods * (block.period - block.size) + (block.offset - self.start)

    def period_of(self, length: int) -> int | None:
        """Return how long a period is if this rank's part of the axis, of this length, has whole ones alone."""
        period = self._block.period
        return period if self.start % period == length % period == 0 else None

    def sum_of_period(self, numbers: Tensor) -> Tensor:
        """Add up what is of its own slices among numbers of the slices of a period, (..., period)."""
        own = numbers.narrow(-1, self._block.offset, self._block.size)
        return own.squeeze(-1) if self._block.size == 1 else own.sum(-1)

    def is_view(self, tensor: Tensor, *, taps_first: bool = False) -> bool:
        """Return whether :meth:`read` returns a view of the tensor."""
        if self.matrices.is_kernel:
            return self.matrices.taps == 1 or (tensor.movedim(1, -1) if taps_first else tensor).is_contiguous()
        return not self.is_in_pieces

    def write(self, tensor: Tensor, copy: Tensor, *, taps_first: bool = False) -> None:
        """Write the copy that :meth:`read` has returned, changed since, back to the tensor; a view is there already."""
        if copy.untyped_storage() is tensor.untyped_storage():
            return
        if self.matrices.is_kernel:
            filters = self._filters(tensor)
            in_order = filters.movedim(2, -1) if taps_first else filters
            in_order.copy_(copy.view(in_order.shape))
        else:
            for piece, its_copy in self._pairs(self.stack(tensor), copy):
                piece.copy_(its_copy)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy, like :meth:`read`, also where that is a view with gaps: of matrices that are apart."""
        return self._copy(self.stack(tensor))

    def add_product(self, tensor: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left right^T, (count, rows, r) and (count, columns, r), to matrices that are apart, as stored.

        To rows apart it is added where they are. Columns apart have gaps, for which a product would be made elsewhere.
        """
        stack = self.stack(tensor)
        if self._dim == 2:
            product = left.new_empty(len(left), left.shape[1], right.shape[1])
            torch.bmm(left, right.mT, out=product)
            for piece, change in self._pairs(stack, product):
                piece.add_(change)
            return
        if self._block.size == 1:
            self.of_stack(stack).baddbmm_(left, right.mT)
            return
        for pieces, their_left in self._pairs(stack, left):
            for matrix, its_left, its_right in zip(pieces, their_left, right, strict=True):
                matrix.baddbmm_(its_left, its_right.mT.expand(len(matrix), -1, -1))

    def of_stack(self, stack: Tensor) -> Tensor:
        """Return its matrices, given a stack (1, rows, columns), or (count, rows, columns) if its axis counts them.

        The axis along which there are no blocks may have any size.
        """
        if self.matrices.block is None:
            return stack
        if self.is_in_pieces:
            return self._copy(stack)
        shape, strides = list(stack.shape), list(stack.stride())
        dim, count, width, between, step, first = self._view
        stride = strides[dim]
        if not self.matrices.is_stack:
            shape[0], strides[0] = count, between * stride
        shape[dim], strides[dim] = width, step * stride
        if width == 0:
            return stack.new_empty(shape)
        return stack.as_strided(shape, strides, stack.storage_offset() + first * stride)

    def coordinates(self, parameter: Any, *, taps_first: bool = False) -> tuple[Tensor, Tensor]:
        """Return the numbers, in the whole parameter, of the rows (count, r, 1) and columns (count, 1, c) held here."""
        rows, columns = held_coordinates(parameter, is_kernel=self.matrices.is_kernel)
        if taps_first:
            columns = columns.view(-1, self.matrices.taps).mT.flatten()
        stack = local(parameter).shape[:2] if self.matrices.is_stack else (1, len(rows))
        of_rows, of_columns = rows.view(*stack, 1), columns.view(1, 1, len(columns))
        if self.matrices.block is None:
            return of_rows, of_columns
        if self.matrices.blocks_are_rows:
            return self.of_stack(of_rows), of_columns
        return of_rows, self.of_stack(of_columns)

    def stack(self, tensor: Tensor) -> Tensor:
        """View this rank's part as (count, rows, columns), whatever the blocks."""
        return tensor if self.matrices.is_stack else tensor.unsqueeze(0)

    def _filters(self, tensor: Tensor) -> Tensor:
        """View kernels (rows, channels, *kernel) as (count, rows of each, channels, *kernel)."""
        if self.matrices.block is None:
            return tensor.unsqueeze(0)
        rows = tensor.narrow(0, self._first_place if self._width else 0, self._own_count * self._width)
        return rows.view(self._own_count, self._width, *tensor.shape[1:])

    def _copy(self, stack: Tensor) -> Tensor:
        shape = list(stack.shape)
        shape[self._dim] = self._width
        copy = stack.new_empty(shape)
        for piece, its_copy in self._pairs(stack, copy):
            its_copy.copy_(piece)
        return copy

    def _pairs(self, stack: Tensor, matrices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.pieces(stack, self._dim), self.in_pieces(matrices, self._dim), strict=True)

    # Along the axis of the blocks

    @cached_property
    def _view(self) -> tuple[int, int, int, int, int, int]:
        """For a view: their dimension, how many matrices, their slices, how far apart both are, the first place."""
        block, index = self._block, self._index
        between = block.place(index + self._size) - block.place(index)
        step = block.period if block.size == 1 else 1
        return self._dim, self._own_count, self._width, between, step, self._first_place

    @property
    def _dim(self) -> int:
        """Which dimension of (count, rows, columns) it is."""
        return 1 if self.matrices.blocks_are_rows else 2

    @property
    def _block(self) -> Block:
        assert self.matrices.block is not None
        return self.matrices.block

    @property
    def _own_count(self) -> int:
        return self.matrices.count if self.count is None else self.count

    @property
    def _size(self) -> int:
        """Slices of one matrix, on all ranks."""
        return self._block.total // self._block.matrices

    @cached_property
    def _held(self) -> Span:
        """Which of these slices this rank holds."""
        if self.layout.group is None:
            return 0, self._size
        spans = self.layout.rows if self.matrices.blocks_are_rows else self.layout.columns
        return spans[self.layout.own_rank]

    @property
    def _width(self) -> int:
        return self._held[1] - self._held[0]

    @property
    def held_slices(self) -> int:
        """How many slices of the parameter's axis this rank holds of them."""
        return self._width * (1 if self.matrices.is_stack else self._own_count)

    @property
    def _index(self) -> int:
        """The number in the block of the first slice here."""
        return self.first * self._size + self._held[0]

    @property
    def _first_place(self) -> int:
        return self._block.place(self._index) - self.start

    @cached_property
    def runs(self) -> list[Run]:
        """Its pieces: whole ones, and before and behind them what a border between ranks has left of others."""
        size, start, stop = self._block.size, self._index, self._index + self._width
        edges = start, -(-start // size) * size, stop // size * size, stop
        return [
            Run(low - start, max(1, (high - low) // size), min(size, high - low), self._block.place(low) - self.start)
            for low, high in itertools.pairwise(edges)
            if low < high
        ]


def parts_of(parameter: Tensor, matrices: Matrices, label: str, *, process_group: Any, known: Layouts) -> list[Part]:
    """Return the parts of a block of a parameter, as its mesh and placements are now: the same ones on every rank.

    There are several where ranks hold unequal parts of its matrices, or where these are not equally far apart.
    """
    layout = layout_of(
        parameter,
        label,
        batched=matrices.is_stack,
        is_kernel=matrices.is_kernel,
        process_group=process_group,
        known=known,
    )
    key = matrices, id(layout)  # which is kept alive beside it
    if key not in known:
        known[key] = _parts(matrices, layout)
    parts: list[Part] = known[key]
    return parts


def _parts(matrices: Matrices, layout: Layout) -> list[Part]:
    if matrices.block is None:
        return [Part(matrices, 0, None, layout)]
    start = 0
    if layout.group is not None:
        start = (layout.rows if matrices.blocks_are_rows else layout.columns)[layout.own_rank][0]
    return [
        Part(matrices, first, count, Layout(layout.group, rectangles, layout.replicas), start)
        for first, count, rectangles in _runs(matrices, layout.rectangles)
    ]


@lru_cache(maxsize=1024)  # a step asks for as many as there are heads and ranks
def _runs(matrices: Matrices, rectangles: tuple[Rectangle, ...]) -> list[tuple[int, int | None, tuple[Rectangle, ...]]]:
    """The first of consecutive matrices of a block, how many there are, and what each rank holds of each.

    ``rectangles`` are what ranks hold of the whole parameter.
    """
    block = matrices.block
    assert block is not None
    size = block.total // block.matrices
    spans = [each.rows if matrices.blocks_are_rows else each.columns for each in rectangles]
    edges = [(block.before(low), block.before(high)) for low, high in spans]
    # Each run: what every rank holds of each of its matrices, and where these begin.
    runs: list[tuple[tuple[Span, ...], list[int]]] = []
    for number in range(block.matrices):
        held, place = held_of_matrix(edges, number, size), block.place(number * size)
        if runs and runs[-1][0] == held and _is_next(place, runs[-1][1]):
            runs[-1][1].append(place)
        else:
            runs.append((held, [place]))
    found: list[tuple[int, int | None, tuple[Rectangle, ...]]] = []
    first = 0
    for held, places in runs:
        pairs = zip(held, rectangles, strict=True)
        if matrices.blocks_are_rows:
            its_rectangles = tuple(Rectangle(its_held, each.columns) for its_held, each in pairs)
        else:
            its_rectangles = tuple(Rectangle(each.rows, its_held) for its_held, each in pairs)
        found.append((first, None if matrices.is_stack else len(places), its_rectangles))
        first += len(places)
    return found


def held_entries(parameter: Tensor, matrices: Matrices, label: str) -> int:
    """Return how many entries of a block's matrices, or of a whole parameter, this rank holds."""
    own = local(parameter)
    if matrices.block is None:
        return own.numel()
    dim = (0 if matrices.blocks_are_rows else 1) + matrices.is_stack
    parts = parts_of(parameter, matrices, label, process_group=None, known={})
    return sum(part.held_slices for part in parts) * own.numel() // max(own.shape[dim], 1)


def _is_next(place: int, places: list[int]) -> bool:
    """Whether a place is as far from the last one as this is from the one before."""
    return len(places) == 1 or place - places[-1] == places[-1] - places[-2]


def held_of_matrix(edges: list[Span], number: int, size: int) -> tuple[Span, ...]:
    """Return which slices of one matrix of a block each rank holds, given what it holds of the block."""
    first = number * size
    return tuple((min(max(low - first, 0), size), min(max(high - first, 0), size)) for low, high in edges)
