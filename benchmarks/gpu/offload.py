"""State on the host: the bits with ``offload="cpu"`` and without, the memory of a step, and its time as a ratio."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.machine import synchronize
from benchmarks.gpu.section import Options, Row
from benchmarks.gpu.step import TINY, median_times
from benchmarks.step import LAYERS, weights
from dion2_lightning import Dion2
from dion2_lightning.kernels.orthonormalize import default_dtype, orthonormalize

STEPS: Final = 3
"""Before what was computed is compared; the later steps fetch what the earlier ones took back."""

ROUNDS: Final = 8

KINDS: Final[dict[str, tuple[torch.dtype, dict[str, Any]]]] = {
    "Dion2": (torch.float32, {}),
    "Dion2, weights in bfloat16": (torch.bfloat16, {}),
    "Dion3": (torch.float32, {"algorithm": "dion3"}),
    "Dion": (torch.float32, {"algorithm": "dion"}),
    "AdamW": (torch.float32, {"algorithm": "adamw"}),
    "AdamW, weights in bfloat16": (torch.bfloat16, {"algorithm": "adamw"}),
}

TOLERANCE: Final = 1e-3
"""Of Dion's weights, relative to the largest: how many matrices a batched QR takes may change its last bits."""


def compare(options: Options, *, shapes: str, layers: int, visits: int = 8) -> Iterator[Row]:
    """Yield two rows for each algorithm: whether both train alike, and what a step takes.

    Submatrices are orthonormalized one by one for the first, as visits make other batches than a step without them.

    Args:
        options: Of the section. A CPU has no other memory: there the two do the same, and no memory is measured.
        shapes: A model of ``benchmarks.step.LAYERS``.
        layers: How many of its layers.
        visits: About how many there are in a step.
    """
    device = torch.device(options.device)
    sizes = LAYERS[shapes] * layers
    if options.tiny:
        largest = max(max(size) for size in LAYERS[shapes])
        sizes = [(rows * TINY // largest, columns * TINY // largest) for rows, columns in LAYERS[shapes] * 2]
    for name, (dtype, settings) in KINDS.items():
        state = sum(rows * columns for rows, columns in sizes) * 4 * (2 if "AdamW" in name else 1)
        memory = 4 * state // visits
        yield {"trained": name, **_difference(sizes, dtype, device, {**settings, "working_memory": memory})}
        compared, took = {}, dict[str, float | None]()
        for offload in (None, "cpu"):
            parameters = _parameters(sizes, dtype, device)
            before = _allocated(device)
            optimizer = Dion2([{"params": parameters, **settings}], working_memory=memory, offload=offload)
            took[offload or "gpu"] = _peak_of_steps(optimizer, before, device)
            compared[offload or "gpu"] = optimizer
        times = median_times(compared, device, rounds=3 if options.tiny else ROUNDS)
        yield {
            "step": name,
            "of its time without": times["cpu"] / times["gpu"],
            "state, MB": state / 1e6,
            "most memory without, MB": took["gpu"],
            "most memory with, MB": took["cpu"],
            "ok": took["gpu"] is None or took["cpu"] is None or took["cpu"] < took["gpu"],
            "found": "memory needs a GPU" if device.type == "cpu" else None,
        }


def _difference(sizes: Any, dtype: torch.dtype, device: torch.device, settings: dict[str, Any]) -> Row:
    """How far weights and state are apart after some steps with offloading and without."""
    custom: dict[str, Any] = {} if settings.get("algorithm") in ("dion", "adamw") else {"orthonormalize": _one_by_one}
    trained = []
    for offload in (None, "cpu"):
        own = dict(settings)
        memory = own.pop("working_memory")
        parameters = _parameters(sizes, dtype, device)
        optimizer = Dion2([{"params": parameters, **own}], working_memory=memory, offload=offload, **custom)
        for _ in range(STEPS):
            optimizer.step()
            for parameter in parameters:
                parameter.grad = parameter.grad.roll(1, 0)  # type: ignore[union-attr]
        state = optimizer.state_dict()["state"]
        trained.append([*parameters, *(each for entries in state.values() for each in entries.values())])
    pairs = list(zip(*trained, strict=True))
    equal = all(torch.equal(one, other.to(one.device)) for one, other in pairs)
    apart = max(_apart(one, other.to(one.device)) for one, other in pairs[: len(sizes)])
    is_ok = equal or (settings.get("algorithm") == "dion" and apart <= TOLERANCE)
    return {"bits": "equal" if equal else "differ", "relative difference": apart, "ok": is_ok}


def _one_by_one(stack: Tensor) -> Tensor:
    return torch.cat([orthonormalize(matrix, default_dtype(stack.device)) for matrix in stack.split(1)]).to(stack.dtype)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _parameters(sizes: Any, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    parameters = weights(sizes, device)
    for each in parameters:
        gradient, each.grad = each.grad, None
        each.data = each.data.to(dtype)
        each.grad = gradient.to(dtype)  # type: ignore[union-attr]
    return parameters


def _allocated(device: torch.device) -> int:
    synchronize(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak_of_steps(optimizer: Dion2, before: int, device: torch.device) -> float | None:
    """The most memory of two steps, beside weights and gradients, with the state that is on the device, in MB."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        optimizer.step()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
