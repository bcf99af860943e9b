"""Work on many matrices that the same ranks share, side by side: what all of it sums up travels together."""

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.distributed.overlap import IN_FLIGHT, WaitingStep
from dion2_lightning.matrices.layout import group_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SummingWork = Generator[Tensor, Tensor, None]
"""Work that pauses: ``sum = yield tensor`` for the sum of a floating-point tensor over the ranks, and ``on_host = yield
flags`` to read booleans on the host.

Every rank has to pause at the same places, with tensors of the same shapes; flags have to be the same on all.
"""


def run_together(pieces: Sequence[SummingWork], group: "ProcessGroup | None") -> WaitingStep:
    """Run pieces of work, each to its next pause in turn: one all-reduce at a time, however many pieces there are.

    There is one for each dtype. Without a group this rank is the only one, and what it has is the sum.
    """
    paused = [(piece, next(piece)) for piece in pieces]
    while paused:
        flags = [index for index, (_, asked) in enumerate(paused) if asked.dtype == torch.bool]
        answers = dict(zip(flags, (yield [paused[index][1] for index in flags]), strict=True)) if flags else {}
        summands = {index: asked for index, (_, asked) in enumerate(paused) if index not in answers}
        if summands:
            answers |= summands if group is None else (yield from _sums(summands, group))
        advanced = []
        for index, (piece, _) in enumerate(paused):
            with contextlib.suppress(StopIteration):
                advanced.append((piece, piece.send(answers[index])))
        paused = advanced


def _sums(summands: dict[int, Tensor], group: "ProcessGroup") -> Generator[None, object, dict[int, Tensor]]:
    """The sums of tensors over the ranks of a group."""
    buffers = []
    for indices in group_by(summands, lambda index: summands[index].dtype).values():
        buffer = torch.cat([summands[index].flatten() for index in indices])
        buffers.append((indices, buffer, dist.all_reduce(buffer, group=group, async_op=True)))
    yield IN_FLIGHT
    sums = {}
    for indices, buffer, work in buffers:
        assert work is not None
        work.wait()
        parts = buffer.split([summands[index].numel() for index in indices])
        sums.update({index: part.view_as(summands[index]) for index, part in zip(indices, parts, strict=True)})
    return sums
