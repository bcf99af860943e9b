"""Blocks that lie in between each other are gone over together, as one view has them all.

Where each goes alone, a pass reads the memory of all of them for the few entries of one. Where slices lie in between
those of other blocks, all are slices of one matrix; where their entries do, the blocks are a batch of matrices.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from dion2_lightning.algorithms.matrix_update import SelectedSlices
from dion2_lightning.kernels.moving_slices import gather
from dion2_lightning.kernels.rounding import RandomBits
from dion2_lightning.kernels.stacks import concatenate, concatenate_slices, runs_along, side_by_side
from dion2_lightning.lists import group_by


class SlicesOfView(ABC):
    """Selected slices of blocks that one view has, or of one update alone.

    Attributes:
        slices: Block by block.
        first: Those of the first block; the numbers of its update hold for all.
        places: Where in the view all of them are.
    """

    def __init__(self, slices: Sequence[SelectedSlices], places: Tensor) -> None:
        self.slices, self.first, self.places = slices, slices[0], places

    @property
    def weight(self) -> Tensor:
        """The view of X."""
        weight = self._view("weight")
        assert weight is not None
        return weight

    @property
    def momentum(self) -> Tensor:
        """The view of M."""
        momentum = self._view("momentum")
        assert momentum is not None
        return momentum

    @property
    def gradient(self) -> Tensor | None:
        """The view of G, which may be a copy; None where only other ranks have it."""
        return self._view("gradient")

    @abstractmethod
    def split(self, gathered: Tensor) -> Sequence[Tensor]:
        """Return block by block what has been gathered at the places."""

    @abstractmethod
    def join(self, of_blocks: Sequence[Tensor]) -> Tensor:
        """Return the opposite of :meth:`split`."""

    @abstractmethod
    def selected_bits(self, line: str) -> RandomBits | None:
        """Return the random bits of what is at the places."""

    def everything(self, line: str) -> Iterator[tuple[Tensor, Tensor, RandomBits | None]]:
        """Yield views of all slices of X that belong to the blocks, of M, and their random bits.

        Each has about as many entries as a block.
        """
        if len(self.slices) == 1 or not self._has_all_of_view:
            for each in self.slices:
                update, weight, momentum = each.update, each.weight, each.momentum
                yield from zip(update.own(weight), update.own(momentum), update.own_bits(each.bits(line)), strict=True)
            return
        bits, (_, *shape) = self._bits(line), self.weight.shape
        dim = 1 if runs_along(self.weight) else 2  # so that what is cut off is dense
        size = max(1, -(-shape[dim - 1] // len(self.slices)))
        for start in range(0, shape[dim - 1], size):
            length = min(size, shape[dim - 1] - start)
            its_bits = None if bits is None else bits.narrow(dim, start, length)
            yield self.weight.narrow(dim, start, length), self.momentum.narrow(dim, start, length), its_bits

    @abstractmethod
    def _view(self, name: str) -> Tensor | None: ...

    @property
    @abstractmethod
    def _has_all_of_view(self) -> bool:
        """Whether all slices of the view are of these blocks."""

    @abstractmethod
    def _bits(self, line: str) -> RandomBits | None:
        """The random bits of the view."""

    def _bits_of_blocks(self, line: str) -> list[RandomBits]:
        """Block by block; none where the line of the box does not round by any."""
        return [bits for each in self.slices if (bits := each.bits(line)) is not None]

    @property
    def _factor_of_slices(self) -> int:
        """Which factor of random bits has one for each slice."""
        update = self.first.update
        return 0 if update.matrices.slices_are_rows(update.axis) else 1


class ScatteredSlices(SlicesOfView):
    """Slices in between those of other blocks: those of all are slices of the same matrices; or of one update alone."""

    def __init__(self, slices: Sequence[SelectedSlices]) -> None:
        places = [each.update.at(each.indices) for each in slices]
        super().__init__(slices, places[0] if len(places) == 1 else torch.cat(places, 1))
        self._counts = [each.shape[1] for each in places]
        self._order: Tensor | None = None
        if len(places) > 1 and self.first.update.part.is_in_pieces and not runs_along(self.momentum):
            # Rows with pieces of other blocks in between are read five times as fast in the order of the memory.
            self.places, self._order = torch.sort(self.places, 1)

    def split(self, gathered: Tensor) -> Sequence[Tensor]:
        """Return block by block what has been gathered at the places."""
        if len(self._counts) == 1:
            return [gathered]
        if self._order is None:
            of_blocks: Sequence[Tensor] = gathered.split(self._counts, 1)
            return of_blocks
        return [gather(gathered, its_places) for its_places in self._order.argsort(1).split(self._counts, 1)]

    def join(self, of_blocks: Sequence[Tensor]) -> Tensor:
        """Return the opposite of :meth:`split`."""
        together = concatenate_slices(of_blocks)
        return together if self._order is None else gather(together, self._order)

    def selected_bits(self, line: str) -> RandomBits | None:
        """Return the random bits of what is at the places."""
        bits = self._bits(line)
        if bits is None:
            return None
        return bits.of_slices(self.first.indices if len(self.slices) == 1 else self.places)

    def _view(self, name: str) -> Tensor | None:
        view: Tensor | None = getattr(self.first, name)
        return view

    @property
    def _has_all_of_view(self) -> bool:
        return sum(each.update.held_of_matrix * each.count for each in self.slices) == self.weight.numel()

    def _bits(self, line: str) -> RandomBits | None:
        """The random bits of the view; of a single block those of its own slices alone."""
        of_blocks = self._bits_of_blocks(line)
        if not of_blocks or len(self.slices) == 1:
            return of_blocks[0] if of_blocks else None
        factors = list(of_blocks[0])  # of the entries all blocks have the same
        number = self._factor_of_slices
        of_slices = factors[number].new_zeros((len(factors[number]), self.weight.shape[1], 1))
        for each, bits in zip(self.slices, of_blocks, strict=True):
            of_slices.index_copy_(1, each.update.own_places, bits[number])
        factors[number] = of_slices
        return RandomBits(*factors)


class InterleavedSlices(SlicesOfView):
    """Slices whose entries lie in between those of other blocks: one matrix of each block, together a batch."""

    def __init__(self, slices: Sequence[SelectedSlices], changed: str, view: Tensor) -> None:
        super().__init__(slices, torch.cat([each.indices for each in slices]))
        self._views: dict[str, Tensor | None] = {changed: view}

    def split(self, gathered: Tensor) -> Sequence[Tensor]:
        """Return block by block what has been gathered at the places."""
        of_blocks: Sequence[Tensor] = gathered.split(1)
        return of_blocks

    def join(self, of_blocks: Sequence[Tensor]) -> Tensor:
        """Return the opposite of :meth:`split`."""
        return concatenate(of_blocks)

    def selected_bits(self, line: str) -> RandomBits | None:
        """Return the random bits of what is at the places."""
        bits = self._bits(line)
        return None if bits is None else bits.of_slices(self.places)

    def _view(self, name: str) -> Tensor | None:
        if name not in self._views:
            tensors = [tensor for each in self.slices if (tensor := getattr(each, name)) is not None]
            view = side_by_side(tensors) if tensors else None
            if tensors and view is None:  # an expanded gradient
                view = torch.cat(tensors)
            self._views[name] = view
        return self._views[name]

    @property
    def _has_all_of_view(self) -> bool:
        return True

    def _bits(self, line: str) -> RandomBits | None:
        of_blocks = self._bits_of_blocks(line)
        if not of_blocks:
            return None
        factors = list(of_blocks[0])  # of the slices all blocks have the same
        number = 1 - self._factor_of_slices
        factors[number] = torch.stack([bits[number] for bits in of_blocks], -1).movedim(-1, 0).squeeze(1)
        return RandomBits(*factors)


def views_of(slices: Sequence[SelectedSlices], changed: Literal["weight", "momentum"]) -> list[SlicesOfView]:
    """Return slices by the view that has them, to change X or M."""
    views: list[SlicesOfView] = []
    for alike in group_by(slices, lambda each: each.view_key).values():
        if len(alike) == 1 or not alike[0].update.is_interleaved:
            views.append(ScatteredSlices(alike))
            continue
        for equal in group_by(alike, lambda each: each.indices.shape).values():
            is_batch = len(equal) > 1 and equal[0].count == 1
            view = side_by_side([getattr(each, changed) for each in equal]) if is_batch else None
            if view is None:
                views += [ScatteredSlices([each]) for each in equal]
            else:
                views.append(InterleavedSlices(equal, changed, view))
    return views
