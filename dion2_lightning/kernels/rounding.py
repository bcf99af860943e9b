"""Rounding to half precision: a float32 result is stored once, as the nearest number or as one of the two around it.

bfloat16 has 8 significant bits. Rounded to the nearest number, a weight that should change by less than 1/512 of itself
does not change, at this step and at every other one. Rounded stochastically it becomes the number above or below it,
with probabilities that make its expectation exact (Gupta et al., arXiv 1502.02551).

The random bits are a hash of what is rounded, not the output of a generator. There is no generator's state to save, and
an entry is rounded alike on whatever rank it is.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dion2_lightning.kernels.random_numbers import hashed
from dion2_lightning.lists import bounded, group_by

HALF_PRECISION: Final = (torch.bfloat16, torch.float16)

BLOCK: Final = 2**17
"""Entries that a CPU's thread rounds at once: the working memory, 8 bytes an entry, stays in its cache."""

BATCH: Final = 2**24
"""The same for other devices, where it is to bound the working memory alone."""

_SPARE_BITS: Final = {torch.bfloat16: 16, torch.float16: 13}
"""The lowest bits of a float32 number that a dtype has no room for."""

_SMALLEST_NORMAL: Final = 2.0**-14
"""Of float16. Below it numbers are multiples of 2^-24; those of bfloat16 begin where float32's do."""

_COLUMN: Final = 0x9E3779B9
"""Tells the hashes of columns from those of rows."""


class RandomBits(NamedTuple):
    """Random bits for every entry of a tensor: the upper bits of the product of two hashes, of its row and its column.

    Hashes have 32 bits, and those of rows are odd, so a product is uniform, and those of any two entries independent.
    A sum would be so as well; but as a matrix it is nearly of rank one, and what rounding adds would be, too.

    Attributes:
        rows: int32, broadcasts with ``columns`` to the shape of the tensor.
        columns: int32.
    """

    rows: Tensor
    columns: Tensor

    @property
    def mT(self) -> "RandomBits":
        """Those of the tensor's ``mT``."""
        return RandomBits(self.rows.mT, self.columns.mT)

    def shaped(self, shape: Sequence[int]) -> "RandomBits":
        """Return those of a tensor, of at least one axis, from one number for each of its rows and of its columns.

        Leading axes count as rows.
        """
        *leading, last = shape
        return RandomBits(self.rows.view(*leading, 1), self.columns.view(*[1] * len(leading), last))

    def of_matrices(self, first: int, count: int) -> "RandomBits":
        """Return those of consecutive matrices of a (count, n, m) tensor."""
        return RandomBits(*(each if len(each) == 1 else each.narrow(0, first, count) for each in self))

    def of_slices(self, indices: Tensor) -> "RandomBits":
        """Return those of some slices of a (count, n, m) tensor, which ``indices`` (count, k) name."""
        _, n, _ = torch.broadcast_shapes(self.rows.shape, self.columns.shape)
        at = indices.unsqueeze(-1)
        return RandomBits(*(each if each.shape[-1] != 1 else each.expand(len(at), n, 1).gather(1, at) for each in self))

    def narrow(self, dim: int, start: int, length: int) -> "RandomBits":
        """Return those of the tensor's ``narrow``."""
        return RandomBits(*(each if each.shape[dim] == 1 else each.narrow(dim, start, length) for each in self))


def random_bits(
    coordinates: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int], steps: Sequence[Tensor]
) -> list[RandomBits]:
    """Return the random bits of several tensors on one device, each a function of seed, step, row and column alone.

    Args:
        coordinates: The numbers of the rows of each tensor, and of its columns, in the whole that it may be a part of;
            of any shape. Tensors that share one pair are drawn together, in as many operations as one.
        seeds: One for each tensor, in [0, 2^32).
        steps: One for each tensor, 0-d. The host does not read it.

    Returns:
        For each tensor one number a row and one a column, in the shapes of their coordinates.
    """
    alike = list(group_by(range(len(seeds)), lambda at: id(coordinates[at])).values())
    in_order, counts = [at for each in alike for at in each], [len(each) for each in alike]
    device = coordinates[0][0].device
    at_steps = torch.stack([steps[at].to(device, non_blocking=True) for at in in_order]).to(torch.int32)
    salted, of_steps = list[Tensor](), list[Tensor]()
    for axis, of_axis in enumerate((0, _COLUMN)):
        salts = _numbers_on(device, [(seeds[at] ^ of_axis) - 2**31 for at in in_order])
        for its, its_salts, its_steps in zip(alike, salts.split(counts), at_steps.split(counts), strict=True):
            numbers = coordinates[its[0]][axis].flatten()
            salted.append((numbers ^ its_salts.unsqueeze(1)).flatten())
            of_steps.append(its_steps.repeat_interleave(len(numbers)))
    sizes = [each.numel() for each in salted]
    of_places = hashed(torch.cat(salted).to(torch.int32))
    hashes = hashed(of_places ^ torch.cat(of_steps))
    rows, columns = hashes.split([sum(sizes[: len(alike)]), sum(sizes[len(alike) :])])
    of_rows, of_columns = (rows | 1).split(sizes[: len(alike)]), columns.split(sizes[len(alike) :])
    drawn: dict[int, RandomBits] = {}
    for its, its_rows, its_columns in zip(alike, of_rows, of_columns, strict=True):
        held_rows, held_columns = coordinates[its[0]]
        of_each = its_rows.view(len(its), *held_rows.shape), its_columns.view(len(its), *held_columns.shape)
        drawn.update(zip(its, map(RandomBits, *(each.unbind() for each in of_each)), strict=True))
    return [drawn[at] for at in range(len(seeds))]


def _numbers_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Bring integers to a device as arguments of a launch: a copy from the host may not be in a CUDA graph."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return torch.cat(torch._foreach_add([zero] * len(numbers), list(numbers)))


def multiply_add_(tensor: Tensor, factor: float | Tensor, addend: Tensor | None, bits: RandomBits | None) -> None:
    """``tensor <- factor * tensor + addend`` in half precision, computed in float32 and rounded once, in place.

    Args:
        tensor: In half precision.
        factor: Of float32's precision; a tensor is 0-d, or broadcasts with the tensor.
        addend: Of the tensor's shape; None adds nothing.
        bits: To round stochastically; None rounds to the nearest number.
    """
    factors = [factor.expand_as(tensor)] if isinstance(factor, Tensor) and factor.ndim > 0 else []
    addends = [] if addend is None else [addend]
    for (part, *others), its_bits in blocks([tensor, *factors, *addends], bits):
        wide = part.float().mul_(others.pop(0) if factors else factor)
        for each in others:
            wide.add_(each)
        _store(part, wide, its_bits)


def store_(tensor: Tensor, values: Tensor, bits: RandomBits | None) -> None:
    """``tensor <- values``, float32 numbers rounded to half precision; without ``bits`` to the nearest numbers."""
    for (part, its_values), its_bits in blocks([tensor, values], bits):
        _store(part, its_values, its_bits)


def store_each_(tensors: Sequence[Tensor], values: Tensor, bits: Sequence[RandomBits | None]) -> None:
    """:func:`store_` for tensors of one dtype, all with random bits or none; small ones in a few operations for all.

    Args:
        tensors: In half precision.
        values: Of all entries, one tensor after the other, in one dimension.
        bits: Those of each tensor.
    """
    pairs, start = list(zip(tensors, bits, strict=True)), 0
    for some in bounded(pairs, lambda pair: pair[0].numel(), _entries_at_once(values.device)):
        its_tensors, its_bits = [tensor for tensor, _ in some], [each for _, each in some if each is not None]
        its_values = values.narrow(0, start, sum(each.numel() for each in its_tensors))
        start += len(its_values)
        if len(some) == 1:
            store_(its_tensors[0], its_values.view(its_tensors[0].shape), some[0][1])
            continue
        if its_bits:
            products = torch.empty_like(its_values, dtype=torch.int32)
            for each, its_products in zip(its_bits, cut_like(products, its_tensors), strict=True):
                torch.mul(each.rows, each.columns, out=its_products)
            its_values = _rounded(its_values, products, tensors[0].dtype)
        torch._foreach_copy_(its_tensors, cut_like(its_values, its_tensors))


def cut_like(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """View a buffer as contiguous tensors of their shapes, one after the other."""
    parts = buffer.split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def blocks(
    tensors: Sequence[Tensor], bits: RandomBits | None, entries: int | None = None
) -> Iterator[tuple[Sequence[Tensor], RandomBits | None]]:
    """Cut tensors of one shape, and its random bits, into blocks.

    Args:
        tensors: The memory order of the first one decides how to cut.
        bits: Those of a tensor of this shape; None where it is rounded to nearest.
        entries: How many a block has at most (default: None, what is fast to round on their device).
    """
    first = tensors[0]
    if entries is None:
        entries = _entries_at_once(first.device)
    if first.numel() <= entries:
        yield tensors, bits
        return
    dim = max((dim for dim, size in enumerate(first.shape) if size > 1), key=first.stride)
    size = max(1, entries * first.shape[dim] // first.numel())
    factors = () if bits is None else tuple(each.expand_as(first) for each in bits)
    for pieces in zip(*(each.split(size, dim) for each in (*tensors, *factors)), strict=True):
        its_tensors, its_factors = pieces[: len(tensors)], pieces[len(tensors) :]
        yield from blocks(its_tensors, RandomBits(*its_factors) if its_factors else None, entries)


def _entries_at_once(device: torch.device) -> int:
    return BLOCK * torch.get_num_threads() if device.type == "cpu" else BATCH


def _store(part: Tensor, values: Tensor, bits: RandomBits | None) -> None:
    """Round a block."""
    if bits is None:
        part.copy_(values)
        return
    products = torch.empty_like(values, dtype=torch.int32)
    torch.mul(bits.rows, bits.columns, out=products)
    part.copy_(_rounded(values, products, part.dtype))


def _rounded(values: Tensor, products: Tensor, dtype: torch.dtype) -> Tensor:
    """Round stochastically, by adding a random number to the bits that are then cut off; the result is in float32.

    It is uniform on all that these bits can be, so it carries over into the last one that is kept with the probability
    that is wanted, and a number that the dtype has stays as it is, infinite ones among them.

    Args:
        values: In float32.
        products: Of the hashes of each entry, int32, which are overwritten.
        dtype: To which.
    """
    spare = _SPARE_BITS[dtype]
    noise = products.bitwise_right_shift_(32 - spare).bitwise_and_(2**spare - 1)
    small = None
    if dtype == torch.float16:
        multiples = values.abs().mul_(2.0**24).add_(noise * 2.0**-spare).floor_()
        small = multiples.mul_(2.0**-24).copysign_(values)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**spare)).view(torch.float32)
    if small is not None:
        rounded = torch.where(values.abs() < _SMALLEST_NORMAL, small, rounded)
    # The bits of NaN, with noise added, may be those of a number. This returns what is rounded, and NaN for NaN;
    # torch.where takes 8 times as long.
    return torch.clamp(values, min=rounded, max=rounded)
