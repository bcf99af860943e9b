"""Time of an optimizer step: AdamW, Muon, NorMuon, and Dion2, Dion3 and Dion at several fractions, in turn.

    python -m benchmarks.step --shapes smollm2-135m --layers 6

Every round steps each optimizer once on its own copy of the weights, in an order that rotates, so that a machine whose
speed drifts slows all of them alike. The floor of Dion2 is one of them: it reads G, reads and writes M and X, and makes
the products of the orthonormalization, and nothing else. Quote the ratios; the milliseconds are of this machine on this
day.
"""

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.peak_memory import PeakMemory
from benchmarks.phases import PHASES, shares_of_phases
from dion2_lightning import Dion2
from dion2_lightning.algorithms.hyperparameters import DType
from dion2_lightning.kernels.orthonormalize import default_dtype, dtype_of_products, polar_factor
from dion2_lightning.kernels.selection import selected_count

LAYERS = {
    # (out, in) of one decoder layer: query, key, value, output; gate, up, down.
    "smollm2-135m": [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
    # GPT-2 stores (in, out): fused query|key|value, output; up, down.
    "gpt2": [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
    "llama-1b": [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)],
    "llama-8b": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
    # So small that a step takes the time of its Python, and of starting operations.
    "tiny": [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)],
}
TRANSPOSED = {shapes: shapes == "gpt2" for shapes in LAYERS}
CPU_SHAPES = ("smollm2-135m", "gpt2")
"""Those that a CPU steps in seconds."""

Sizes = Sequence[tuple[int, int]]

ADAMW = "torch.optim.AdamW, fused"
"""What times are divided by."""

MIN_ROUNDS = 3
"""Rounds of a comparison, however long they take."""


class Steps(Protocol):
    """What can be timed: an optimizer, or its floor."""

    def step(self) -> object:
        """Take a step."""


Build = Callable[[list[Tensor]], torch.optim.Optimizer]


class Floor:
    """The least that a step of Dion2 does: 20 bytes a float32 parameter, and the products.

    Args:
        parameters: With gradients.
        fraction: Of the slices that are selected.
        dtype: Of the orthonormalization; None goes by the hardware.
    """

    def __init__(self, parameters: Sequence[Tensor], fraction: float, dtype: DType | None) -> None:
        self.weights = [each.detach() for each in parameters]
        self.gradients = [each.grad for each in parameters if each.grad is not None]
        self.momenta = [torch.zeros_like(each) for each in self.weights]
        device = self.weights[0].device
        self.dtype = default_dtype(device) if dtype is None else getattr(torch, dtype)
        sizes = Counter(tuple(sorted(each.shape)) for each in parameters)
        stacks = [
            torch.randn(count, selected_count(short, fraction), long, device=device, dtype=self.dtype)
            for (short, long), count in sizes.items()
        ]
        norms = [torch.linalg.matrix_norm(each.float(), keepdim=True) for each in stacks]
        self.normalized = [(each / norm).to(dtype_of_products(each)) for each, norm in zip(stacks, norms, strict=True)]

    @torch.no_grad()
    def step(self) -> None:
        """Do it."""
        torch._foreach_add_(self.momenta, self.gradients)
        torch._foreach_mul_(self.weights, 0.999)
        for each in self.normalized:
            polar_factor(each, self.dtype)


def optimizers(shapes: str, dtype: DType | None, device: torch.device) -> Iterator[tuple[str, Build]]:
    """Yield what is compared on a device, by name; the first is what the others are measured against."""

    def group(kernels: Any = "auto", **settings: Any) -> Build:
        return lambda params: Dion2([{"params": params, "transposed": TRANSPOSED[shapes], **settings}], kernels=kernels)

    def dion2(fraction: float, **settings: Any) -> Build:
        return group(fraction=fraction, orthonormalize_dtype=dtype, **settings)

    yield "torch.optim.Muon", lambda params: torch.optim.Muon(params, nesterov=False)
    yield ADAMW, lambda params: torch.optim.AdamW(params, fused=True)
    yield "torch.optim.AdamW, foreach", lambda params: torch.optim.AdamW(params, foreach=True)
    for name, fraction in (("1", 1.0), ("1/2", 0.5), ("1/4", 0.25), ("1/8", 0.125)):
        yield f"Dion2 at {name}", dion2(fraction)
    for name, fraction in (("1/4", 0.25), ("1/8", 0.125)):
        yield f"Dion3 at {name}", dion2(fraction, algorithm="dion3")
    for name, fraction in (("1/4", 0.25), ("1/8", 0.125)):
        yield f"Dion at {name}", group(algorithm="dion", rank_fraction=fraction)
    yield "NorMuon", dion2(1.0, normalize_neurons=True)
    if device.type == "cuda":
        for algorithm in ("dion2", "dion3"):
            yield f"{algorithm.capitalize()} at 1/4, kernels=torch", dion2(0.25, algorithm=algorithm, kernels="torch")
    for check_finite in (True, "skip"):
        yield f"Dion2 at 1/4, check_finite={check_finite}", dion2(0.25, check_finite=check_finite)


def weights(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Return random parameters (rows, columns) with random gradients, the same on every call."""
    generator = torch.Generator(device).manual_seed(0)
    parameters: list[Tensor] = []
    for rows, columns in sizes:
        parameter = torch.nn.Parameter(torch.randn(rows, columns, generator=generator, device=device))
        parameter.grad = torch.randn(rows, columns, generator=generator, device=device)
        parameters.append(parameter)
    return parameters


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", choices=LAYERS, nargs="+", default=CPU_SHAPES, help=f"default: {' '.join(CPU_SHAPES)}"
    )
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each optimizer that count (default: 9)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=100.0,
        help=f"for each of the shapes: then no round begins, but {MIN_ROUNDS} are done (default: 100)",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--dtype", help="precision of Dion2's orthonormalization (default: by hardware)")
    parser.add_argument("--only", default="", help="only optimizers whose name contains this, and the floor")
    parser.add_argument("--phases", action="store_true", help="also the share of each phase of Dion2 and Dion3")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="draw the ratios to AdamW into this file")
    chosen = parser.parse_args(arguments)
    if chosen.picture is not None and chosen.only not in ADAMW:
        parser.error(
            f"--picture draws ratios to {ADAMW!r}, which --only {chosen.only!r} leaves out: leave out one of them"
        )

    print(f"torch {torch.__version__}, {platform.machine()}, {chosen.device}, {torch.get_num_threads()} threads")
    tables = [compare(shapes, chosen) for shapes in chosen.shapes]
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(tables, indent=1) + "\n")
    if chosen.picture is not None:
        draw(tables, chosen.picture)


def compare(shapes: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Time every optimizer on one model's shapes, print a table, and return its figures."""
    sizes = LAYERS[shapes] * chosen.layers
    candidates: dict[str, Steps] = {
        name: build(weights(sizes, chosen.device))
        for name, build in optimizers(shapes, chosen.dtype, chosen.device)
        if chosen.only in name
    }
    for name, fraction in (("1/4", 0.25), ("1/8", 0.125)):
        candidates[f"floor of Dion2 at {name}"] = Floor(weights(sizes, chosen.device), fraction, chosen.dtype)
    times = take_turns(candidates, chosen)
    medians = {name: statistics.median(values) for name, values in times.items()}
    means = {name: statistics.mean(values) for name, values in times.items()}
    memory = {
        name: working_memory(optimizer)
        for name, optimizer in candidates.items()
        if isinstance(optimizer, torch.optim.Optimizer)
    }
    rounds, count = len(next(iter(times.values()))), sum(rows * columns for rows, columns in sizes)
    print(f"\n{shapes}, {chosen.layers} layers, {count / 1e6:.1f}M parameters, milliseconds of {rounds} steps")
    adamw, muon = medians.get(ADAMW), medians.get("torch.optim.Muon")
    print(
        f"{'':36}{'median':>9}{'mean':>9}{'it / AdamW fused':>18}"
        f"{'Muon / it':>11}{'it / its floor':>16}{'memory, MB':>12}"
    )
    for name, median in medians.items():
        floor = medians.get(f"floor of {name}")
        ratios = [
            f"{median / adamw:17.2f}x" if adamw else " " * 18,
            f"{muon / median:10.1f}x" if muon else " " * 11,
            f"{median / floor:15.2f}x" if floor else " " * 16,
            f"{memory[name] / 1e6:12.1f}" if name in memory else "",
        ]
        print(f"{name:36}{median:9.1f}{means[name]:9.1f}{''.join(ratios)}".rstrip())
    figures: dict[str, Any] = {"shapes": shapes, "layers": chosen.layers, "parameters": count, "ms": medians}
    figures |= {"mean_ms": means, "memory": memory}
    if chosen.phases:
        figures["phases"] = {
            name: shares_of_phases(optimizer, chosen.device)
            for name, optimizer in candidates.items()
            if isinstance(optimizer, Dion2) and name.startswith(("Dion2", "Dion3"))
        }
        titles = [*PHASES, "rest"]
        print(f"{'percent of a step':36}{''.join(f'{title:>18}' for title in titles)}")
        for name, shares in figures["phases"].items():
            print(f"{name:36}{''.join(f'{shares[title]:18.0f}' for title in titles)}")
    return figures


def working_memory(optimizer: torch.optim.Optimizer) -> int:
    """Return the most bytes at once of what a step's operations return, beside weights, gradients and state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    state = [value for each in optimizer.state.values() for value in each.values()]
    with PeakMemory([each for each in (*parameters, *gradients, *state) if isinstance(each, Tensor)]) as memory:
        optimizer.step()
    return memory.peak


def take_turns(candidates: dict[str, Steps], chosen: argparse.Namespace) -> dict[str, list[float]]:
    """Step all candidates once a round, in an order that rotates; return the milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, begin = list(candidates), time.perf_counter()
    for number in range(chosen.rounds + 1):
        if number > MIN_ROUNDS and time.perf_counter() - begin > chosen.seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = timed(candidates[name].step, chosen.device)
            if number > 0:  # the first creates state
                times[name].append(elapsed)
    return times


def draw(tables: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars: the time of each optimizer's step over that of AdamW."""
    import matplotlib.pyplot as plt

    names = list(tables[0]["ms"])
    figure, axes = plt.subplots(1, len(tables), figsize=(6 * len(tables), 0.32 * len(names) + 1), sharey=True)
    for table, axis in zip(tables, [axes] if len(tables) == 1 else axes, strict=True):
        reference = table["ms"][ADAMW]
        bars = axis.barh(names, [table["ms"][name] / reference for name in names])
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set(
            xscale="log", xlabel="time of a step / fused AdamW's", title=f"{table['shapes']}, {table['layers']} layers"
        )
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
