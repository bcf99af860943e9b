"""The machine's memory bandwidth and matrix rates, to which a step is compared."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.section import Options, Row

REPEATS = 10


def measure(options: Options) -> Iterator[Row]:
    """Yield the copy bandwidth, and the rates of matrix products by precision."""
    device = torch.device(options.device)
    yield {"what": "copy, bytes read and written", "rate": copy_bandwidth(device, options.tiny) / 1e12, "unit": "TB/s"}
    size = product_size(options.tiny)
    for dtype in (torch.bfloat16, torch.float32):
        rate = product_rate(device, dtype, options.tiny)
        name = str(dtype).removeprefix("torch.")
        yield {"what": f"{size} x {size} x {size} product, {name}", "rate": rate / 1e12, "unit": "TFLOP/s"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield {"what": "memory", "rate": properties.total_memory / 1e9, "unit": "GB"}
        yield {"what": "multiprocessors", "rate": properties.multi_processor_count, "unit": ""}


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Return the bytes that a large copy reads and writes in a second."""
    source = torch.empty(2**24 if tiny else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device)


def product_size(tiny: bool) -> int:
    """Return the rows and columns of the matrices whose product is measured."""
    return 256 if tiny else 8192


def product_rate(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """Return the floating-point operations that a product of large random matrices does in a second."""
    size = product_size(tiny)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median time of a call on a device, after three warm-up calls."""
    times = [Timer(device) for _ in range(repeats + 3)]
    for timer in times:
        with timer:
            call()
    return statistics.median(timer.seconds() for timer in times[3:])


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Times the work of a device in a ``with`` block, without synchronizing."""

    def __init__(self, device: torch.device) -> None:
        """Prepare the events of a GPU."""
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times: list[float] = []

    def __enter__(self) -> "Timer":
        self._record(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._record(1)

    def _record(self, index: int) -> None:
        if self._events is None:
            self._times.append(time.perf_counter())
        else:
            self._events[index].record()

    def seconds(self) -> float:
        """Return the time of the block; on a GPU, wait for its end."""
        if self._events is None:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3
