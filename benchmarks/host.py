"""What a step costs the host where Triton's kernels go over the memory of a GPU, measured without a GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.host --layers 30

The matrices are small and on the CPU. Everything is as on a GPU, up to the tables that go with the launches; kernels
are not launched, and products not made. What is left is Python, and what torch takes to begin operations. The host of a
GPU launches kernels as well, some tens of microseconds each, as many as `traffic.py` counts. torch.optim.Muon is timed
as it is, the products of its small matrices included. Steps are taken in turn, and times are the processor's; quote the
ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.step import LAYERS, weights
from dion2_lightning import Dion2
from dion2_lightning.algorithms import passes
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from dion2_lightning.kernels import fused, triton_launch

CPU = torch.device("cpu")

FUSED_ADAMW = "torch.optim.AdamW, fused"
"""What times are divided by."""

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    FUSED_ADAMW: lambda params: torch.optim.AdamW(params, fused=True),
    "torch.optim.Muon": lambda params: torch.optim.Muon(params),
    "AdamW in a group of Dion2": lambda params: Dion2([{"params": params, "algorithm": "adamw"}]),
    "Dion2 at 1/4": lambda params: Dion2([{"params": params}]),
    "Dion2 at 1/4, stochastic, bfloat16": lambda params: Dion2(_in_bfloat16(params)),
    "Dion3 at 1/4": lambda params: Dion2([{"params": params, "algorithm": "dion3"}]),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="decoder layers, of 7 matrices each (default: 30)")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each optimizer that count (default: 30)")
    chosen = parser.parse_args(arguments)
    sizes = LAYERS["tiny"] * chosen.layers
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, {len(sizes)} matrices")
    print(f"{'':36}{'ms a step':>11}{'us a matrix':>13}{'it / AdamW fused':>18}")
    with without_launches():
        optimizers = {name: build(weights(sizes, CPU)) for name, build in OPTIMIZERS.items()}
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for number in range(-3, chosen.rounds):
            for name, optimizer in optimizers.items():
                begin = time.process_time()
                optimizer.step()
                if number >= 0:
                    times[name].append((time.process_time() - begin) * 1e3)
    medians = {name: statistics.median(its_times) for name, its_times in times.items()}
    for name, median in medians.items():
        print(f"{name:36}{median:11.2f}{median * 1e3 / len(sizes):13.1f}{median / medians[FUSED_ADAMW]:17.1f}x")


@contextmanager
def without_launches() -> Iterator[None]:
    """Have matrices on the CPU taken by kernels that are not launched, and leave products out."""
    with (
        patch.object(fused, "are_default", return_value=True),
        patch.object(triton_launch, "start", lambda *_: None),
        patch.object(passes, "polar_factor", lambda normalized, dtype: normalized.to(dtype)),
        patch.object(MatrixUpdate, "goes_alone", False),  # as it may on a CPU
    ):
        yield


def _in_bfloat16(params: Sequence[Tensor]) -> list[Tensor]:
    half = [torch.nn.Parameter(each.detach().bfloat16()) for each in params]
    for each, like in zip(half, params, strict=True):
        each.grad = None if like.grad is None else like.grad.bfloat16()
    return list(half)


if __name__ == "__main__":
    main()
