"""Fused weights: the text by which a parameter group says which matrices lie side by side in one weight.

    q 2048 | k 512 | v 512             one after the other along the outputs
    32 x (q 64 | k 64 | v 64)          64 rows of q, of k and of v, 32 times: q is a matrix of 2048 rows
    1440 x (gate 1 | up 1)             every second row
    q 32*64 | k 8*64 | v 8*64          q is 32 matrices of 64 rows, as are heads
    head 32*64 along inputs            the same along the other axis
    expert 16*1024                     a stack of 16 matrices in two dimensions
    whole                              one matrix

What a text names is called a block. The axis is one of (out, in), whichever way round the weight is stored.
"""

import re
from functools import lru_cache
from typing import Final, NamedTuple

WHOLE: Final = "whole"
"""Says that a weight is one matrix."""

OUTPUT_AXIS: Final = 0
INPUT_AXIS: Final = 1

_TEXT = re.compile(r"(?:(?P<repeats>\d+) x \((?P<period>[^()]*)\)|(?P<once>[^()]*?))(?P<inputs> along inputs)?")
_PIECE = re.compile(r"(?P<name>[A-Za-z_][\w.-]*) (?:(?P<count>\d+)\*)?(?P<size>\d+)")


class Block(NamedTuple):
    """Which slices of an axis belong together: ``size`` of every period, from ``offset`` on.

    Attributes:
        name: Its name, such as ``"q"``.
        offset: Where it begins in a period.
        size: How many slices of a period it has.
        period: How many slices a period has.
        repeats: How many periods the axis has.
        matrices: How many matrices it holds, one after the other along the axis.
    """

    name: str
    offset: int
    size: int
    period: int
    repeats: int
    matrices: int

    @property
    def total(self) -> int:
        """How many slices it has."""
        return self.size * self.repeats

    @property
    def is_apart(self) -> bool:
        """Whether slices of other blocks lie between those of one of its matrices."""
        return self.size != self.period and self.size % (self.total // self.matrices) != 0

    def before(self, place: int) -> int:
        """Return how many of its slices come before a place on the axis."""
        periods, rest = divmod(place, self.period)
        return periods * self.size + min(max(rest - self.offset, 0), self.size)

    def place(self, index: int) -> int:
        """Return where on the axis its slice of this number is."""
        return index // self.size * self.period + self.offset + index % self.size


class Splits(NamedTuple):
    """The blocks of a weight, in their order along an axis.

    Attributes:
        axis: Along which they lie: 0 outputs, 1 inputs.
        blocks: One for each name.
    """

    axis: int
    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """How many slices the axis has."""
        return self.blocks[0].period * self.blocks[0].repeats


@lru_cache(maxsize=1024)
def read_splits(text: str) -> Splits | None:
    """Read a text; None for ``"whole"``.

    Raises:
        ValueError: The text is not valid; the error begins with it, and says why.
    """
    if text == WHOLE:
        return None
    match = _TEXT.fullmatch(text)
    period = "" if match is None else match["period"] or match["once"]
    pieces = [_PIECE.fullmatch(each) for each in period.split(" | ")]
    if match is None or not all(pieces):
        raise ValueError(
            f"{text!r} is no list of blocks; write it as 'q 2048 | k 512 | v 512', '32 x (q 64 | k 64 | v 64)', "
            f"'q 32*64 | k 8*64 | v 8*64', each also with ' along inputs', or {WHOLE!r}"
        )
    repeats = int(match["repeats"] or 1)
    found = [
        (each["name"], None if each["count"] is None else int(each["count"]), int(each["size"]))
        for each in pieces
        if each is not None
    ]
    names = [name for name, _, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{text!r} has two blocks named {twice[0]!r}; give each a name of its own")
    if repeats == 0 or any(count == 0 or size == 0 for _, count, size in found):
        raise ValueError(f"{text!r} has an empty block; leave it out")
    sizes = [size if count is None else count * size for _, count, size in found]
    blocks = tuple(
        Block(name, sum(sizes[:place]), sizes[place], sum(sizes), repeats, 1 if count is None else count * repeats)
        for place, (name, count, _) in enumerate(found)
    )
    return Splits(INPUT_AXIS if match["inputs"] else OUTPUT_AXIS, blocks)


def blocks_of(text: str) -> tuple[Block, ...]:
    """Return the blocks that a text names; none for ``"whole"``."""
    splits = read_splits(text)
    return () if splits is None else splits.blocks


def check_splits(name: str, value: object) -> None:
    """Raise an error that begins with the name unless the value is a text that :func:`read_splits` can read."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text such as 'q 2048 | k 512 | v 512', got {value!r}")
    try:
        read_splits(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def misfit(text: str, shape: tuple[int, int], *, may_repeat: bool = True) -> str | None:
    """Return why a text does not fit a weight of (out, in), and what would; None if it does.

    ``may_repeat`` says whether blocks may be repeated, or lie along the other axis: not those of a kernel.
    """
    splits = read_splits(text)
    if splits is None:
        return None
    size, axis = shape[splits.axis], ("outputs", "inputs")[splits.axis]
    if splits.size != size:
        first, fits = splits.blocks[0], ""
        if may_repeat and size % first.period == 0 and (first.repeats > 1 or size > first.period):
            fits = f"; {size // first.period} x (...) would fit"
        elif may_repeat and shape[1 - splits.axis] == splits.size:
            fits = f"; it would fit along {('inputs', 'outputs')[splits.axis]}"
        return f"{text!r} is {splits.size} {axis}, and the weight has {size}; its blocks must sum to that{fits}"
    if shape[1 - splits.axis] == 1:
        return f"{text!r} makes vectors of it, as it has a single one of its {('inputs', 'outputs')[splits.axis]}"
    for block in splits.blocks:
        if block.total // block.matrices == 1:
            found = f"block {block.name!r} of {text!r} has a single {axis[:-1]} in each matrix, which is a vector"
            return f"{found}; make it a part of another block"
    return None
