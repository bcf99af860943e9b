"""Lists cut into groups of what is alike, and into runs of a bounded size; names as messages show them."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group items by a key, groups and their items in the order in which they come."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def bounded(items: Sequence[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Cut a list into runs of at most ``limit`` together, or of one item."""
    run: list[T] = []
    total = 0
    for item in items:
        size = size_of(item)
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run


def first_few(names: Sequence[str]) -> str:
    """Return the first three of some names, and how many more there are, or "none"."""
    return ", ".join(names[:3] or ["none"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
