"""What it costs to track the selection: steps with metrics every 10 steps, against steps without, in one process.

    python -m benchmarks.statistics --shapes smollm2-135m --layers 6

One optimizer takes blocks of steps in turn, with a tracker attached and without, so that both use the same memory:
where weights happen to lie makes more of a difference than the tracker does. A block with a tracker ends with its
metrics, popped as a callback does it. The gradients change from step to step, so that the selection does. "calls" is
the time of all calls of the tracker, as a share of the steps in the same blocks: on a CPU it is what they cost, and
unlike the ratios of blocks it hardly depends on what else a shared machine does.

Freed memory stays with the process (--malloc keeps the C library's own way). Without that, glibc gives large blocks
back to the system and fetches them again, page by page, in some processes and not in others: in those, a step takes a
third longer, with a tracker or without, and which of the two it slows down more is a matter of chance.
"""

import argparse
import ctypes
import gc
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import CPU_SHAPES, LAYERS, TRANSPOSED, timed, weights
from dion2_lightning import Dion2, SelectionTracker, SelectionWarning

GRADIENTS = 4
"""Sets of gradients that follow each other."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(): up to how many bytes free memory stays, and blocks come from the heap."""


def main() -> None:
    """Run the comparison that the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=LAYERS, nargs="+", default=CPU_SHAPES, help="default: those of step.py")
    parser.add_argument("--algorithm", choices=("dion2", "dion3", "dion"), default="dion2", help="default: dion2")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers (default: 6)")
    parser.add_argument(
        "--every", type=int, default=10, help="steps of a block, the last one with metrics (default: 10)"
    )
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each that count (default: 20)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--malloc", action="store_true", help="leave freed memory to the C library")
    arguments = parser.parse_args()
    if not arguments.malloc:
        keep_memory()
    warnings.simplefilter("ignore", SelectionWarning)  # with random gradients some slices wait long
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.device}, {torch.get_num_threads()} threads")
    heads = f"{'calls':>8}{'of fastest':>12}{'of medians':>12}{'median ratio':>14}"
    print(f"{'':14}{'ms without':>12}{'with':>9}{heads}{'integers a slice':>18}")
    for shapes in arguments.shapes:
        compare(shapes, arguments)


def keep_memory() -> None:
    """Keep freed memory in the process if the C library is glibc; print a warning if it is not."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    most = 2**31 - 1
    # glibc takes a threshold for blocks up to half a heap's size, 32 MiB, and answers 0 to more.
    if mallopt is None or not (mallopt(M_TRIM_THRESHOLD, most) and mallopt(M_MMAP_THRESHOLD, 2**25)):
        print("this C library cannot be told to keep freed memory; the ratios of blocks may differ by a third")


def compare(shapes: str, arguments: argparse.Namespace) -> None:
    """Time both on one model's shapes and print a row."""
    parameters = weights(LAYERS[shapes] * arguments.layers, arguments.device)
    group = {"params": parameters, "transposed": TRANSPOSED[shapes], "algorithm": arguments.algorithm}
    optimizer = Dion2([group])
    sets = [[gradient_like(each, seed) for each in parameters] for seed in range(GRADIENTS)]
    tracker = TimedTracker(every=arguments.every)

    def block() -> None:
        for step in range(arguments.every):
            for parameter, gradient in zip(parameters, sets[step % GRADIENTS], strict=True):
                parameter.grad = gradient
            optimizer.step()
            tracker.pop_metrics()

    times: dict[bool, list[float]] = {False: [], True: []}
    calls: list[float] = []
    for number in range(arguments.blocks + 1):
        for is_tracked in (True, False) if number % 2 else (False, True):
            if is_tracked:
                tracker.attach(optimizer)
                tracker.seconds = 0.0
            elapsed = timed(block, arguments.device) / arguments.every
            tracker.detach()
            if number > 0:  # the first creates state
                times[is_tracked].append(elapsed)
                if is_tracked:
                    calls.append(1e3 * tracker.seconds / arguments.every / elapsed)
    without, with_ = (statistics.median(times[each]) for each in (False, True))
    paired = statistics.median(b / a for a, b in zip(times[False], times[True], strict=True))
    slices = sum(min(shape) for shape in LAYERS[shapes]) * arguments.layers
    kept = size_of(tensors_of(tracker, apart_from=[optimizer, tracker.history, *parameters])) / torch.int32.itemsize
    fastest = min(times[True]) / min(times[False])
    ratios = f"{statistics.median(calls):8.2%}{fastest:12.4f}{with_ / without:12.4f}{paired:14.4f}"
    print(f"{shapes:14}{without:12.2f}{with_:9.2f}{ratios}{kept / slices:18.1f}")


def _timed_call(name: str) -> Callable[..., Any]:
    call = getattr(SelectionTracker, name)

    def timed_call(self: "TimedTracker", *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(self, *arguments, **options)
        finally:
            self.seconds += time.perf_counter() - start

    return timed_call


class TimedTracker(SelectionTracker):
    """A tracker that adds up the time of its calls, those that an optimizer's step makes and :meth:`pop_metrics`.

    Attributes:
        seconds: Time on the host since it was set to zero.
    """

    seconds = 0.0

    begin_step = _timed_call("begin_step")
    selected = _timed_call("selected")
    orthonormalized = _timed_call("orthonormalized")
    moved = _timed_call("moved")
    projected = _timed_call("projected")
    end_step = _timed_call("end_step")
    pop_metrics = _timed_call("pop_metrics")


def tensors_of(root: object, *, apart_from: Iterable[object]) -> list[Tensor]:
    """Return every tensor that can be reached from an object, but for those on the way through some others."""
    seen = {id(each) for each in apart_from}
    found, reached = [], [root]
    while reached:
        each = reached.pop()
        if id(each) in seen or isinstance(each, type | ModuleType):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found.append(each)
        else:  # a function's globals are a whole module
            reached += gc.get_referents(each.__closure__ if isinstance(each, FunctionType) else each)
    return found


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of what tensors have their entries in; views keep all of it."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def gradient_like(parameter: Tensor, seed: int) -> Tensor:
    """Return a random gradient."""
    generator = torch.Generator(parameter.device).manual_seed(seed)
    return torch.randn(parameter.shape, generator=generator, device=parameter.device)


if __name__ == "__main__":
    main()
