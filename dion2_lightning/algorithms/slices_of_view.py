"""Blocks whose slices lie in between each other are gone over together, as one view has them all.

Where each goes alone, a pass reads the memory of all of them for the few entries of one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dion2_lightning.algorithms.matrix_update import SelectedSlices
from dion2_lightning.kernels.moving_slices import gather
from dion2_lightning.kernels.rounding import RandomBits
from dion2_lightning.kernels.stacks import concatenate_slices, runs_along
from dion2_lightning.lists import group_by


class SlicesOfView:
    """Selected slices of blocks that one view has, where they are slices of the same matrices; or of one update alone.

    Attributes:
        slices: Block by block.
        first: Those of the first block; the numbers of its update hold for all.
        places: Where in the view all of them are.
    """

    def __init__(self, slices: Sequence[SelectedSlices]) -> None:
        self.slices, self.first = slices, slices[0]
        places = [each.update.at(each.indices) for each in slices]
        self.places = places[0] if len(places) == 1 else torch.cat(places, 1)
        self._counts = [each.shape[1] for each in places]
        self._order: Tensor | None = None
        if len(places) > 1 and self.first.update.part.is_in_pieces and not runs_along(self.momentum):
            # Rows with pieces of other blocks in between are read five times as fast in the order of the memory.
            self.places, self._order = torch.sort(self.places, 1)

    @property
    def weight(self) -> Tensor:
        """The view of X."""
        return self.first.weight

    @property
    def momentum(self) -> Tensor:
        """The view of M."""
        return self.first.momentum

    @property
    def gradient(self) -> Tensor | None:
        """The view of G, which may be a copy; None where only other ranks have it."""
        return self.first.gradient

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

    def everything(self, line: str) -> Iterator[tuple[Tensor, Tensor, RandomBits | None]]:
        """Yield views of all slices of X that belong to the blocks, of M, and their random bits.

        Each has about as many entries as a block.
        """
        own = sum(each.update.held_of_matrix * each.count for each in self.slices)
        if len(self.slices) == 1 or own < self.weight.numel():
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

    def _bits(self, line: str) -> RandomBits | None:
        """The random bits of the view; of a single block those of its own slices alone."""
        of_blocks = [bits for each in self.slices if (bits := each.bits(line)) is not None]
        if not of_blocks or len(self.slices) == 1:
            return of_blocks[0] if of_blocks else None
        factors = list(of_blocks[0])  # of the entries all blocks have the same
        number = 0 if self.first.update.matrices.slices_are_rows(self.first.update.axis) else 1  # the factor of slices
        of_slices = factors[number].new_zeros((len(factors[number]), self.weight.shape[1], 1))
        for each, bits in zip(self.slices, of_blocks, strict=True):
            of_slices.index_copy_(1, each.update.own_places, bits[number])
        factors[number] = of_slices
        return RandomBits(*factors)


def views_of(slices: Sequence[SelectedSlices]) -> list[SlicesOfView]:
    """Return slices by the view that has them."""
    return [SlicesOfView(alike) for alike in group_by(slices, lambda each: each.view_key).values()]
