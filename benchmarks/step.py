"""Time of an optimizer step: AdamW, Muon, NorMuon, and Dion2, Dion3 and Dion at several fractions, in turn.

    python -m benchmarks.step --shapes smollm2-135m --layers 6

Every round steps each optimizer once on its own copy of the weights, in an order that rotates, so that a machine whose
speed drifts slows all of them alike. Quote the ratios; the milliseconds are of this machine on this day.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dion2_lightning import Dion2
from dion2_lightning.algorithms.hyperparameters import DType

LAYERS = {
    # (out, in) of one decoder layer: query, key, value, output; gate, up, down.
    "smollm2-135m": [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
    # GPT-2 stores (in, out): fused query|key|value, output; up, down.
    "gpt2": [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
    "llama-1b": [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)],
    "llama-8b": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
}
TRANSPOSED = {shapes: shapes == "gpt2" for shapes in LAYERS}
CPU_SHAPES = ("smollm2-135m", "gpt2")
"""Those that a CPU steps in seconds."""

Sizes = Sequence[tuple[int, int]]

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


def optimizers(shapes: str, dtype: DType | None) -> Iterator[tuple[str, Build]]:
    """Yield what is compared, by name; the first is what the others are measured against."""

    def group(**settings: Any) -> Build:
        return lambda params: Dion2([{"params": params, "transposed": TRANSPOSED[shapes], **settings}])

    def dion2(fraction: float, **settings: Any) -> Build:
        return group(fraction=fraction, orthonormalize_dtype=dtype, **settings)

    yield "torch.optim.Muon", lambda params: torch.optim.Muon(params, nesterov=False)
    yield "torch.optim.AdamW, fused", lambda params: torch.optim.AdamW(params, fused=True)
    yield "torch.optim.AdamW, foreach", lambda params: torch.optim.AdamW(params, foreach=True)
    for name, fraction in (("1", 1.0), ("1/2", 0.5), ("1/4", 0.25), ("1/8", 0.125)):
        yield f"Dion2 at {name}", dion2(fraction)
    for name, fraction in (("1/4", 0.25), ("1/8", 0.125)):
        yield f"Dion3 at {name}", dion2(fraction, algorithm="dion3")
    for name, fraction in (("1/4", 0.25), ("1/8", 0.125)):
        yield f"Dion at {name}", group(algorithm="dion", rank_fraction=fraction)
    yield "NorMuon", dion2(1.0, normalize_neurons=True)
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


def main() -> None:
    """Run the comparison that the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", choices=LAYERS, nargs="+", default=CPU_SHAPES, help=f"default: {' '.join(CPU_SHAPES)}"
    )
    parser.add_argument("--layers", type=int, default=6, help="decoder layers (default: 6)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each optimizer that count (default: 9)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--dtype", help="precision of Dion2's orthonormalization (default: by hardware)")
    parser.add_argument("--only", help="only optimizers whose name contains this, and Muon")
    arguments = parser.parse_args()

    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.device}, {torch.get_num_threads()} threads")
    for shapes in arguments.shapes:
        compare(shapes, arguments)


def compare(shapes: str, arguments: argparse.Namespace) -> None:
    """Time every optimizer on one model's shapes and print a table."""
    candidates = [
        (name, build(weights(LAYERS[shapes] * arguments.layers, arguments.device)))
        for name, build in optimizers(shapes, arguments.dtype)
        if arguments.only is None or arguments.only in name or "Muon" in name
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in candidates}
    for round_number in range(arguments.rounds + 1):
        turn = round_number % len(candidates)
        for name, optimizer in candidates[turn:] + candidates[:turn]:
            elapsed = timed(optimizer.step, arguments.device)
            if round_number > 0:  # the first creates state
                times[name].append(elapsed)

    medians = {name: statistics.median(values) for name, values in times.items()}
    count = sum(rows * columns for rows, columns in LAYERS[shapes]) * arguments.layers
    print(f"\n{shapes}, {arguments.layers} layers, {count / 1e6:.1f}M parameters, median of {arguments.rounds} steps")
    print(f"{'':32}{'ms':>9}{'Muon / it':>12}{'it / AdamW fused':>18}")
    muon, adamw = medians["torch.optim.Muon"], medians.get("torch.optim.AdamW, fused")
    for name, median in medians.items():
        against_adamw = f"{median / adamw:17.1f}x" if adamw else ""
        print(f"{name:32}{median:9.1f}{muon / median:11.1f}x{against_adamw}")


if __name__ == "__main__":
    main()
