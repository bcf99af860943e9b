"""The time of an optimizer step of matrices alone, by phase, and compared with the least the machine allows."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.machine import Timer, copy_bandwidth, product_rate, synchronize
from benchmarks.gpu.section import Options, Row
from benchmarks.half_precision import times_of_rounding
from benchmarks.phases import shares_of_phases
from benchmarks.step import LAYERS, Sizes, optimizers, weights
from dion2_lightning import Dion2
from dion2_lightning.kernels.orthonormalize import default_dtype, flops
from dion2_lightning.kernels.selection import selected_count

ROUNDS = 12
TINY = 128
"""Rows or columns of the largest matrix with --tiny, which has two layers."""

BYTES = {"AdamW": 28, "Dion2": 20}
"""Bytes moved per float32 parameter: weight, gradient and state read, weight and state written. Muon is like Dion2."""

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "hipLaunchKernel")


def time_steps(options: Options, *, shapes: str, layers: int) -> Iterator[Row]:
    """Yield a row for each optimizer: the median time of a step, against AdamW's and the floor, and by phase.

    All step the same float32 parameters, in turn, on the same gradients. Each step begins on an idle device, so that
    its time does not depend on how far ahead of the device the host was.

    Args:
        options: Of the section.
        shapes: A model of ``benchmarks.step.LAYERS``.
        layers: How many of its layers.
    """
    device = torch.device(options.device)
    sizes: Sizes = LAYERS[shapes] * layers
    if options.tiny:
        largest = max(max(size) for size in sizes)
        sizes = [(rows * TINY // largest, columns * TINY // largest) for rows, columns in LAYERS[shapes] * 2]
    parameters = weights(sizes, device)
    count = sum(each.numel() for each in parameters)
    yield {"matrices": len(sizes), "parameters": count, "shapes": shapes, "layers": len(sizes) // len(LAYERS[shapes])}
    compared = {name: build(parameters) for name, build in optimizers(shapes, None, device) if "foreach" not in name}
    times = median_times(compared, device, rounds=3 if options.tiny else ROUNDS)
    bandwidth, rate = copy_bandwidth(device, options.tiny), product_rate(device, default_dtype(device), options.tiny)
    adamw = times["torch.optim.AdamW, fused"]
    for name, optimizer in compared.items():
        floor = _floor_bytes(name) * count / bandwidth + _product_flops(optimizer, sizes) / rate
        row = {"optimizer": name, "ms": 1e3 * times[name], "of AdamW": times[name] / adamw, "floor, ms": 1e3 * floor}
        yield {**row, **_launches(optimizer, device), "extra memory, MB": _extra_memory(optimizer, device)}
    for name, optimizer in compared.items():
        if isinstance(optimizer, Dion2):
            yield {"share of the phases": name, **shares_of_phases(optimizer, device)}


def time_rounding(options: Options, *, shapes: str, layers: int) -> Iterator[Row]:
    """Yield a row for each kind of weight in bfloat16: a step that rounds to nearest, and one that does at random."""
    sizes, rounds, embedding = LAYERS[shapes] * layers, ROUNDS, (49152, 576)
    if options.tiny:
        sizes, rounds, embedding = [(TINY, TINY)] * 2, 3, (TINY, TINY)
    yield from times_of_rounding(sizes, rounds, torch.device(options.device), embedding)


def median_times(compared: Mapping[str, torch.optim.Optimizer], device: torch.device, rounds: int) -> dict[str, float]:
    """The median seconds of each optimizer's step, in turn, after two that create state and fill caches.

    Until the device is idle again: with offloading, state still leaves on another stream after the last update.
    """
    timers: dict[str, list[Timer]] = defaultdict(list)
    turns = list(compared.items())
    for number in range(rounds + 2):
        turn = number % len(turns)
        for name, optimizer in turns[turn:] + turns[:turn]:
            timers[name].append(Timer(device))
            synchronize(device)
            with timers[name][-1]:
                optimizer.step()
                synchronize(device)
    return {name: statistics.median(timer.seconds() for timer in each[2:]) for name, each in timers.items()}


def _floor_bytes(name: str) -> int:
    return BYTES["AdamW"] if "AdamW" in name else BYTES["Dion2"]


def _product_flops(optimizer: torch.optim.Optimizer, sizes: Sizes) -> int:
    """FLOPs of the orthonormalization in a step."""
    if isinstance(optimizer, torch.optim.AdamW):
        return 0
    fraction = optimizer.param_groups[0].get("fraction", 1.0)
    shapes = [sorted(size) for size in sizes]
    return sum(flops(selected_count(short, fraction), long) for short, long in shapes)


def _launches(optimizer: torch.optim.Optimizer, device: torch.device) -> Row:
    """How many kernels a step launches, and how long the GPU is busy with them."""
    if device.type == "cpu":
        return {"launches": None, "GPU busy, ms": None}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        synchronize(device)
    return _count_launches(profiler.events())


def _count_launches(events: Sequence[Any]) -> Row:
    """Launches and GPU time among a profiler's events; None where there are none: it may lack access to the driver."""
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    return {
        "launches": sum(event.name.startswith(LAUNCHES) for event in events) or None,
        "GPU busy, ms": sum(event.time_range.elapsed_us() for event in kernels) / 1e3 or None,
    }


def _extra_memory(optimizer: torch.optim.Optimizer, device: torch.device) -> float | None:
    """Peak memory of a step besides weights, gradients and state, in MB."""
    if device.type == "cpu":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
