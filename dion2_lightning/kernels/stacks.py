"""Stacks of matrices (count, k, m) that share a buffer, so that those of one shape are a batch without a copy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dion2_lightning.lists import group_by


def runs_along(stack: Tensor) -> bool:
    """Whether its memory is dense along slices, and not across them."""
    return stack.is_contiguous() or stack.stride(-1) < stack.stride(-2)


def empty_stacks(
    shapes: Sequence[tuple[int, ...]], along: Sequence[bool], dtypes: Sequence[torch.dtype], device: torch.device | None
) -> list[Tensor]:
    """Make stacks (count, k, m), those of one (k, m), memory order and dtype one after another in one buffer."""

    def key(number: int) -> tuple[int, int, bool, torch.dtype]:
        return shapes[number][1], shapes[number][2], along[number], dtypes[number]

    stacks: dict[int, Tensor] = {}
    for (k, m, its_along, dtype), numbers in group_by(range(len(shapes)), key).items():
        counts = [shapes[number][0] for number in numbers]
        buffer = torch.empty((sum(counts), *((k, m) if its_along else (m, k))), dtype=dtype, device=device)
        stacks.update(zip(numbers, (buffer if its_along else buffer.mT).split(counts), strict=True))
    return [stacks[number] for number in range(len(shapes))]


def adjacent(stacks: Sequence[Tensor]) -> Tensor | None:
    """Return stacks of one shape (k, m) that lie one after another in memory as one stack, a view; else None.

    Args:
        stacks: (count, k, m) each, at least one.
    """
    first = stacks[0]
    storage, offset, (step, *_) = first.untyped_storage(), first.storage_offset(), first.stride()
    for each in stacks:
        is_like = each.shape[1:] == first.shape[1:] and each.stride() == first.stride() and each.dtype == first.dtype
        if not is_like or each.untyped_storage() is not storage or each.storage_offset() != offset:
            return None
        offset += len(each) * step
    return first.as_strided((sum(map(len, stacks)), *first.shape[1:]), first.stride())


def concatenate(stacks: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, in the memory order that the stacks have; a view where they are adjacent."""
    if len(stacks) == 1:
        return stacks[0]
    together = adjacent(stacks)
    if together is not None:
        return together
    if stacks[0].stride(-1) != 1:
        return torch.cat([stack.mT for stack in stacks]).mT
    return torch.cat(list(stacks))


def concatenate_slices(stacks: Sequence[Tensor]) -> Tensor:
    """Concatenate along the slices, (count, k, m) each of one count and m, in the memory order that the stacks have."""
    if len(stacks) == 1:
        return stacks[0]
    if stacks[0].stride(-1) != 1:
        return torch.cat([stack.mT for stack in stacks], -1).mT
    return torch.cat(list(stacks), 1)
