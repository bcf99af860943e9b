"""Work on many matrices that the same ranks share, side by side: what all of it sums up travels together."""

import contextlib
import itertools
from collections.abc import Generator, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dion2_lightning.distributed.overlap import IN_FLIGHT, WaitingStep
from dion2_lightning.distributed.torch_versions import all_gather_single, reduce_scatter_single
from dion2_lightning.lists import group_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Over(Enum):
    """The ranks over which something is added up."""

    PARTS = auto()
    """Those that hold other parts of the matrices; the result is a sum."""
    REPLICAS = auto()
    """Those that hold replicas; the result is a mean."""
    ALL = auto()
    """Both: a sum over parts, a mean over replicas."""
    SHARES = auto()
    """Those that hold replicas, of what all ranks of one replica have in full: each of these sends its share."""


class Summand(NamedTuple):
    """What a piece of work has for a sum over ranks: a floating-point tensor."""

    tensor: Tensor
    over: Over = Over.PARTS


SummingWork = Generator[Summand | Tensor, Tensor, None]
"""Work that pauses: ``sum = yield Summand(tensor)`` for a sum over ranks, ``on_host = yield flags`` to read booleans on
the host.

Every rank has to pause at the same places, with tensors of the same shapes; flags have to be the same on all.
"""


def run_together(
    pieces: Sequence[SummingWork], parts: "ProcessGroup | None", replicas: "ProcessGroup | None" = None
) -> WaitingStep:
    """Run pieces of work, each to its next pause in turn: one exchange at a time, however many pieces there are.

    There is one for each dtype, and for each kind of sum. Without a group this rank is the only one of its kind, and
    what it has is the sum.
    """
    paused = [(piece, next(piece)) for piece in pieces]
    while paused:
        answers: dict[int, Tensor] = {}
        flags = {index: asked for index, (_, asked) in enumerate(paused) if isinstance(asked, Tensor)}
        if flags:
            answers.update(zip(flags, (yield list(flags.values())), strict=True))
        summands = {index: asked for index, (_, asked) in enumerate(paused) if isinstance(asked, Summand)}
        if summands:
            answers |= yield from _sums(summands, parts, replicas)
        advanced = []
        for index, (piece, _) in enumerate(paused):
            with contextlib.suppress(StopIteration):
                advanced.append((piece, piece.send(answers[index])))
        paused = advanced


def _sums(
    summands: dict[int, Summand], parts: "ProcessGroup | None", replicas: "ProcessGroup | None"
) -> Generator[None, object, dict[int, Tensor]]:
    """The sums of tensors over ranks; those of one kind in one buffer, and all buffers at the same time."""
    sums = {index: tensor for index, (tensor, _) in summands.items()}
    buffers, exchanges = [], []
    for (over, _), indices in group_by(sums, lambda index: (summands[index].over, sums[index].dtype)).items():
        by_parts = parts if over != Over.REPLICAS else None
        by_replicas = replicas if over != Over.PARTS else None
        if by_replicas is None and (by_parts is None or over == Over.SHARES):
            continue
        buffer = torch.cat([sums[index].flatten() for index in indices])
        buffers.append((indices, buffer))
        exchanges.append(add_up(buffer, by_parts, by_replicas, is_sum=over == Over.SHARES))
    for _ in itertools.zip_longest(*exchanges):
        yield IN_FLIGHT
    for indices, buffer in buffers:
        pieces = buffer.split([sums[index].numel() for index in indices])
        sums.update({index: piece.view_as(sums[index]) for index, piece in zip(indices, pieces, strict=True)})
    return sums


def add_up(
    buffer: Tensor, parts: "ProcessGroup | None", replicas: "ProcessGroup | None", is_sum: bool = False
) -> Generator[None, object, None]:
    """Put the sum over parts, unless it is there already, and the mean over replicas, in a buffer's place.

    With both each rank of a replica sends its share of the sum to the other replicas, so that nothing goes there twice.
    """
    if parts is None or replicas is None:
        work = dist.all_reduce(buffer, group=parts or replicas, async_op=True)
        yield IN_FLIGHT
        work.wait()
        if replicas is not None:
            buffer /= replicas.size()
        return
    padded = pad(buffer, (0, -len(buffer) % parts.size()))
    size = len(padded) // parts.size()
    if is_sum:
        share = padded.narrow(0, size * dist.get_rank(parts), size).clone()
    else:
        share = padded.new_empty(size)
        work = reduce_scatter_single(share, padded, group=parts, async_op=True)
        yield IN_FLIGHT
        work.wait()
    work = dist.all_reduce(share, group=replicas, async_op=True)
    yield IN_FLIGHT
    work.wait()
    share /= replicas.size()
    work = all_gather_single(padded, share, group=parts, async_op=True)
    yield IN_FLIGHT
    work.wait()
    buffer.copy_(padded[: len(buffer)])
