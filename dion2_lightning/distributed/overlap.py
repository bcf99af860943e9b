"""Steps that wait for other ranks, side by side, with other work done in the meantime."""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.lists import group_by

WaitingStep = Generator[Sequence[Tensor] | None, Sequence[Tensor], None]
"""A step that pauses: ``yield IN_FLIGHT`` while messages are in flight; ``on_host = yield tensors`` to read integer
tensors on the host.

Every rank has to pause at the same places. The list of tensors may be empty, as on a rank that need not read.
"""

IN_FLIGHT: Final = None
"""What a step yields while it waits for messages of other ranks."""


def run_side_by_side(steps: Sequence[WaitingStep], local: Sequence[Callable[[], None]]) -> None:
    """Run steps that pause, each to its next pause in turn, and local work while all messages are in flight.

    What the steps want to read comes to the host in one synchronisation. Local work is not done at such a pause: the
    host would wait for it too. The steps are in the same order on every rank. At each other pause one piece of
    ``local`` is done, and whatever is left at the end.
    """
    work = iter(local)
    paused = _advance([(step, None) for step in steps])
    while paused:
        if all(wanted is None for _, wanted in paused):
            next(work, lambda: None)()
        tensors = [tensor for _, wanted in paused for tensor in wanted or ()]
        on_host = iter(read_together(tensors) if tensors else ())
        paused = _advance([(step, [next(on_host) for _ in wanted or ()]) for step, wanted in paused])
    for piece in work:
        piece()


def staggered(steps: Iterable[Generator[None, object, None]]) -> Generator[None, object, None]:
    """Run steps that wait for messages, each begun when the one before it has come to its first pause.

    Between two pauses of its own every step that has begun goes on to its next one, the newest first: what a new one
    sends is in flight while an older one computes, and what that sends while the oldest uses what it has received.
    """
    waiting, running = iter(steps), list[Generator[None, object, None]]()
    while True:
        running = [*itertools.islice(waiting, 1), *running]
        if not running:
            return
        running = [step for step in running if next(step, "ended") is IN_FLIGHT]
        if running:
            yield IN_FLIGHT


def _advance(
    steps: Sequence[tuple[WaitingStep, Sequence[Tensor] | None]],
) -> list[tuple[WaitingStep, Sequence[Tensor] | None]]:
    """Send each step what it has read, None to begin; return those that pause again, with what they want to read."""
    paused = []
    for step, answer in steps:
        try:
            paused.append((step, next(step) if answer is None else step.send(answer)))
        except StopIteration:
            continue
    return paused


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return integer or boolean tensors on the host, all in one synchronisation with their device."""
    on_host: dict[int, Tensor] = {}
    for positions in group_by(range(len(tensors)), lambda index: tensors[index].device).values():
        flat = torch.cat([tensors[position].flatten() for position in positions]).cpu()
        parts = torch.split(flat, [tensors[position].numel() for position in positions])
        on_host.update(zip(positions, parts, strict=True))
    return [on_host[position].view(tensor.shape).to(tensor.dtype) for position, tensor in enumerate(tensors)]
