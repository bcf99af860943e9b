"""A step takes no more memory than ``working_memory`` says, beside weights, gradients and state.

On fake CUDA tensors, so it is what a GPU is asked for: of each operation the results, not what it takes inside.
"""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peak_memory import PeakMemory
from dion2_lightning import Dion2
from dion2_lightning.algorithms.working_memory import pass_bytes
from dion2_lightning.kernels import fused
from tests.every_kind import parameters_of
from tests.test_host_synchronisation import devices_seen, fake_cuda

__all__ = ["devices_seen", "fake_cuda"]  # the latter is used by every test

IS_MISSING = fused.unavailable(torch.device("cuda"))
SHAPE = 2048, 4096
UNBOUNDED = 2**40
PER_LINE = 40
"""Bytes for each row and column, of all matrices together: what is selected, sums, and random bits."""

HALF: dict[str, Any] = {"dtype": torch.bfloat16}
CAUTIOUS: dict[str, Any] = {"cautious_weight_decay": True}
FULL: dict[str, Any] = {"fraction": 1.0}
APART: dict[str, Any] = {"shape": (3072, 1024), "splits": "16 x (q 64 | k 64 | v 64)", "rank_fraction": 1 / 16}
IN_ONE_VIEW: dict[str, dict[str, Any]] = {
    "rows": {"shape": (3072, 1024), "splits": "16 x (q 64 | k 64 | v 64)", "select": "output"},
    "columns": {"shape": (1024, 3072), "splits": "16 x (q 64 | k 64 | v 64)", "transposed": True, "select": "output"},
    "six blocks": {
        "shape": (1024, 3072),
        "splits": "16 x (a 32 | b 32 | c 32 | d 32 | e 32 | f 32)",
        "transposed": True,
        "select": "output",
        "fraction": 1 / 8,
    },
    "every second row": {"shape": (4096, 1024), "splits": "2048 x (gate 1 | up 1)"},
    "every second column": {"shape": (1024, 4096), "splits": "2048 x (gate 1 | up 1)", "transposed": True},
    "pieces of rows": {"shape": (1024, 6144), "splits": "16 x (q 128 | k 128 | v 128)", "transposed": True},
    "pieces of columns": {"shape": (6144, 1024), "splits": "16 x (q 128 | k 128 | v 128)"},
}
UNEQUAL: dict[str, Any] = {"shape": (3072, 1024), "splits": "256 x (q 8 | k 2 | v 2)", "rank_fraction": 1 / 16}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{algorithm} in {dtype}, {fraction}": {
            "algorithm": algorithm,
            "orthonormalize_dtype": dtype,
            "fraction": fraction,
        }
        for algorithm in ("dion2", "dion3")
        for dtype in ("bfloat16", "float32")
        for fraction in (1.0, 0.25, 0.05)
    },
    "square": {"shape": (3072, 3072), "orthonormalize_dtype": "float32", **FULL},
    "square in float64": {"shape": (2048, 2048), "dtype": torch.float64, "orthonormalize_dtype": "float64", **FULL},
    "tall": {"shape": (4096, 2048), "orthonormalize_dtype": "float32"},
    "few slices in bfloat16": {"shape": (24, 2**16), **FULL},
    "nesterov": {"algorithm": "dion3", "nesterov": True, **FULL},
    "wide state": {"state_dtype": "float64", "nesterov": True, **FULL},
    "skipped": {"check_finite": "skip"},
    "half": HALF,
    "half with its momentum": {**HALF, "state_dtype": "bfloat16"},
    "float16": {"dtype": torch.float16},
    "cautious": CAUTIOUS,
    "cautious half": {**HALF, **CAUTIOUS, **FULL},
    "dion": {"algorithm": "dion"},
    "dion, all ranks": {"algorithm": "dion", "rank_fraction": 1.0, "shape": (3072, 3072)},
    "dion half": {"algorithm": "dion", **HALF},
    "dion cautious": {"algorithm": "dion", **CAUTIOUS},
    "dion in float64": {"algorithm": "dion", "dtype": torch.float64, **CAUTIOUS},
    **{
        f"{name}, {settings}": {**case, **settings}
        for name, case in IN_ONE_VIEW.items()
        for settings in ({}, HALF, CAUTIOUS, {**HALF, **CAUTIOUS})
    },
    "dion apart": {"algorithm": "dion", **APART},
    "dion apart, cautious": {"algorithm": "dion", **APART, **CAUTIOUS},
    "dion apart, half": {"algorithm": "dion", **APART, **HALF},
    "dion apart, skipped": {"algorithm": "dion", **APART, "check_finite": "skip"},
    "dion apart, unequal": {"algorithm": "dion", **UNEQUAL},
    "dion apart, unequal, skipped": {"algorithm": "dion", **UNEQUAL, "check_finite": "skip"},
    "adamw": {"algorithm": "adamw"},
    "adamw half": {"algorithm": "adamw", **HALF},
    "adamw, another order": {"algorithm": "adamw", "is_gradient_transposed": True},
    "adamw half, another order": {"algorithm": "adamw", "is_gradient_transposed": True, **HALF},
    "adamw float16": {"algorithm": "adamw", "dtype": torch.float16},
    "adamw cautious": {"algorithm": "adamw", **CAUTIOUS},
    "adamw cautious half": {"algorithm": "adamw", **HALF, **CAUTIOUS},
    "adamw in float64": {"algorithm": "adamw", "dtype": torch.float64, **CAUTIOUS},
}


def peak_of_step(
    count: int,
    memory: int,
    *,
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float32,
    kernels: Literal["torch", "triton"] = "torch",
    offload: Literal["cpu"] | None = None,
    is_gradient_transposed: bool = False,
    **settings: Any,
) -> int:
    """Return how many bytes a second step takes at most, of so many equal parameters."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for _ in range(count)]
    optimizer = Dion2(
        [{"params": parameters, **settings}], lr=0.1, working_memory=memory, kernels=kernels, offload=offload
    )
    optimizer.step()  # without gradients: it creates the state
    for parameter in parameters:
        zeros = torch.zeros(shape[::-1] if is_gradient_transposed else shape, dtype=dtype, device="cuda")
        parameter.grad = zeros.mT if is_gradient_transposed else zeros
    with PeakMemory(kept_by(optimizer)) as memory_of_step:
        optimizer.step()
    return memory_of_step.peak


def peak_of_one(**case: Any) -> int:
    """Return what one parameter takes at a time; of matrices the second one, when the last result is still there."""
    if case.get("algorithm") == "adamw":
        return max(1, peak_of_step(1, UNBOUNDED, **case))
    return peak_of_step(2, 1, **case)


def kept_by(optimizer: Dion2) -> list[Tensor]:
    """Weights, gradients and state."""
    parameters = list(parameters_of(optimizer))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [*parameters, *gradients, *(tensor for each in optimizer.state.values() for tensor in each.values())]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_bound_holds(case: dict[str, Any]) -> None:
    """From what a single matrix needs on."""
    count, shape = 4, case.get("shape", SHAPE)
    single = peak_of_one(**case)
    for memory in (single, 2 * single):
        assert peak_of_step(count, memory, **case) <= memory + PER_LINE * sum(shape) * count


@pytest.mark.parametrize("settings", [{}, HALF, CAUTIOUS, {"check_finite": "skip"}], ids=str)
@pytest.mark.parametrize("algorithm", ["dion2", "dion3"])
def test_a_stack_is_taken_apart(algorithm: str, settings: dict[str, Any]) -> None:
    """So it needs no more memory than a few of its matrices; M + G and |M| included."""
    matrix = peak_of_one(algorithm=algorithm, **settings)
    case = {"shape": (16, *SHAPE), "batched": True, "algorithm": algorithm, **settings}
    assert peak_of_step(1, 2 * matrix, **case) <= 2 * matrix + PER_LINE * sum(SHAPE) * 16
    assert peak_of_step(1, UNBOUNDED, **case) > 4 * matrix


@pytest.mark.parametrize(("blocks", "inputs", "settings"), [(16, 16, {**HALF, **CAUTIOUS}), (32, 48, {})], ids=str)
def test_the_bound_holds_for_many_blocks_of_single_entries(blocks: int, inputs: int, settings: dict[str, Any]) -> None:
    """Whose rows have few entries of each."""
    splits = f"64 x ({' | '.join(f'b{number} 1' for number in range(blocks))})"
    case = {"shape": (inputs, 64 * blocks), "splits": splits, "transposed": True, **settings}
    single = peak_of_step(2, 1, **case)
    for memory in (single, 8 * single, 32 * single):
        assert peak_of_step(2, memory, **case) <= memory + PER_LINE * sum(case["shape"]) * 2


@pytest.mark.parametrize("inputs", [256, 64])
def test_blocks_of_a_stack_are_taken_apart_together(inputs: int) -> None:
    """As many matrices at a time as memory allows, where slices or entries lie in between each other."""
    case = {"splits": "128 x (a 1 | b 1 | c 1 | d 1 | e 1 | f 1 | g 1 | h 1)", "batched": True, "transposed": True}
    single = peak_of_step(1, 1, shape=(2, inputs, 1024), **case)
    for memory in (16 * single, 32 * single):
        peak = peak_of_step(1, memory, shape=(16, inputs, 1024), **case)
        assert peak <= memory + PER_LINE * (inputs + 1024) * 16


@pytest.mark.usefixtures("devices_seen")
@pytest.mark.parametrize(
    "case",
    [
        {"orthonormalize_dtype": "float32", **FULL},
        {"algorithm": "dion3", **HALF},
        {"algorithm": "dion"},
        {"algorithm": "adamw"},
        {"algorithm": "adamw", **HALF},
    ],
    ids=str,
)
def test_the_bound_holds_with_state_that_visits(case: dict[str, Any]) -> None:
    """From where one half of it has room for what a matrix needs, and the other for the state of two."""
    state = math.prod(SHAPE) * 4 * (2 if case.get("algorithm") == "adamw" else 1)
    least = 2 * max(peak_of_one(**case), 2 * state)
    for memory in (least, 3 * least):
        peak = peak_of_step(12, memory, offload="cpu", **case)
        assert state <= peak <= memory + PER_LINE * sum(SHAPE) * 12


@pytest.mark.parametrize("settings", [{}, CAUTIOUS], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_small_parameters_are_updated_within_it(
    dtype: torch.dtype, is_transposed: bool, settings: dict[str, Any]
) -> None:
    """By AdamW, several of them at a time; also where neither they nor their state are contiguous."""
    parameters = []
    for _ in range(20):
        zeros = torch.zeros(512, 512, dtype=dtype, device="cuda")
        parameters.append(nn.Parameter(zeros.mT if is_transposed else zeros))
        parameters[-1].grad = torch.zeros(512, 512, dtype=dtype, device="cuda")
    memory = 6 * 512 * 512 * pass_bytes(dtype)
    optimizer = Dion2([{"params": parameters, "algorithm": "adamw", **settings}], working_memory=memory)
    optimizer.step()
    with PeakMemory(kept_by(optimizer)) as memory_of_step:
        optimizer.step()
    assert memory_of_step.peak <= 0.8 * memory


def test_most_of_the_bound_is_used() -> None:
    """A bound that nothing comes near would make small runs for nothing."""
    for dtype in ("float32", "bfloat16"):
        case = {"orthonormalize_dtype": dtype, "shape": (3072, 3072), **FULL}
        memory = 8 * peak_of_one(**case)
        assert peak_of_step(16, memory, **case) > 0.7 * memory


@pytest.mark.skipif(IS_MISSING is not None, reason=str(IS_MISSING))
@pytest.mark.parametrize("case", [{"orthonormalize_dtype": "float32"}, HALF, {"algorithm": "dion3"}], ids=str)
def test_kernels_of_triton_take_no_more(case: dict[str, Any]) -> None:
    memory = 3 * peak_of_one(**case)
    assert peak_of_step(6, memory, kernels="triton", **case) <= memory + PER_LINE * sum(SHAPE) * 6


def test_what_is_measured() -> None:
    """Views and what is written in place take nothing, and what is freed no longer does."""
    kept = torch.zeros(1000, device="cuda")
    with PeakMemory([kept]) as memory:
        first = kept + 1
        view = first.narrow(0, 0, 500)
        del first
        kept.add_(1.0)
        assert memory.peak == 4000
        del view
        second = torch.ones(1500, device="cuda", dtype=torch.bfloat16)
        assert memory.peak == 4000
        third = second + 1
    assert memory.peak == 6000
    assert third.nbytes == 3000
