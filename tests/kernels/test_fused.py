"""The fused kernels against the torch path, bit for bit, in Triton's interpreter; with --device cuda, on a GPU.

The interpreter takes milliseconds for a program, so matrices and tiles are small here. What only a GPU shows is whether
the kernels compile: one test compiles them for one, which takes none.
"""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import kernel_traffic
from benchmarks.fake_tensors import fake_tensors
from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.kernels import fused, orthonormalize
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.moving_slices import add_, decay_, gather, put_
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, multiply_add_, random_bits, store_
from dion2_lightning.kernels.selection import largest, slice_sums
from dion2_lightning.kernels.stacks import adjacent
from dion2_lightning.kernels.triton_launch import PASSES, cut

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 17, 33), (3, 9, 6), (2, 16, 32)]


@pytest.fixture
def device(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen: str = pytestconfig.getoption("device")
    reason = fused.unavailable(torch.device(chosen))
    if reason is not None:
        pytest.skip(reason)
    if chosen == "cpu":
        quicken_interpreter(monkeypatch)
    return chosen


def quicken_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It prepares Triton's language for each call of a function, as the kernel that calls has done: half its time."""
    from triton.runtime.interpreter import InterpretedFunction

    from dion2_lightning.kernels import triton_kernels

    prepare_and_call = InterpretedFunction.__call__

    def call(function: Any, *arguments: Any, **keywords: Any) -> Any:
        if function.fn.__module__ != triton_kernels.__name__:
            return prepare_and_call(function, *arguments, **keywords)
        return function.rewrite()(*arguments, **keywords)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles so small that matrices have several, in both directions."""
    monkeypatch.setattr(fused, "TILES", {True: fused.Tile(8, 16, 32), False: fused.Tile(16, 8, 16)})


# Stacks in all memory orders


def rows(count: int, n: int, m: int) -> Tensor:
    return torch.empty(count, n, m)


def columns(count: int, n: int, m: int) -> Tensor:
    return torch.empty(count, m, n).mT


def rows_with_gaps(count: int, n: int, m: int) -> Tensor:
    return torch.empty(count, n + 2, m + 3)[:, 1:-1, 3:]


def columns_side_by_side(count: int, n: int, m: int) -> Tensor:
    return torch.empty(m, count, n).permute(1, 2, 0)


def every_second_column(count: int, n: int, m: int) -> Tensor:
    return torch.empty(count, m, 2 * n).mT[:, 1::2]


def every_second_entry(count: int, n: int, m: int) -> Tensor:
    return torch.empty(count, n, 2 * m)[..., ::2]


Order = Callable[[int, int, int], Tensor]
ORDERS: list[Order] = [rows, columns, rows_with_gaps, columns_side_by_side, every_second_column, every_second_entry]
each_order = pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(order: Order, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, also in the gaps; some are zero, so that there are ties and numbers without a sign."""
    like = order(*shape)
    size = like.untyped_storage().nbytes() // like.itemsize
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) > 0.1)
    return numbers.to(dtype).as_strided(like.shape, like.stride(), like.storage_offset())


def whole(stack: Tensor) -> Tensor:
    """All of its memory, gaps included."""
    return torch.empty(0, dtype=stack.dtype, device=stack.device).set_(stack.untyped_storage())


def on(device: str, stack: Tensor) -> Tensor:
    """A copy with the same strides and gaps."""
    copy = whole(stack).to(device, copy=True)
    return copy.as_strided(stack.shape, stack.stride(), stack.storage_offset())


def bits_of(shape: tuple[int, int, int], is_transposed: bool, seed: int) -> RandomBits:
    count, n, m = shape
    if is_transposed:
        return bits_of((count, m, n), False, seed).mT
    coordinates = torch.arange(count * n).view(count, n, 1), torch.arange(m).view(1, 1, m)
    [bits] = random_bits([coordinates], [seed], [torch.tensor(3.0)])
    return bits


def some_bits(stacks: Sequence[Tensor], order: Order) -> list[RandomBits | None]:
    """Random bits for every second stack in half precision, of an order the first, of the next one the second."""
    is_transposed = stacks[1].stride(-1) > stacks[1].stride(-2)
    return [
        bits_of(tuple(stack.shape), is_transposed, 7) if stack.dtype in HALF_PRECISION and number % 2 else None
        for number, stack in enumerate(stacks, ORDERS.index(order))
    ]


def on_number(device: str, number: float | Tensor) -> float | Tensor:
    return number.to(device) if isinstance(number, Tensor) else number


def on_device(device: str, bits: Sequence[RandomBits | None]) -> list[RandomBits | None]:
    return [None if each is None else RandomBits(*(part.to(device) for part in each)) for each in bits]


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether all bits are the same; NaN is NaN, whatever its bits."""
    found, expected = found.cpu(), expected.cpu()
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[expected.itemsize]
    raw = [torch.where(each.isnan(), torch.nan, each).contiguous().view(kind) for each in (found, expected)]
    return found.dtype == expected.dtype and torch.equal(*raw)


def all_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(same(whole(one), whole(other)) for one, other in zip(found, expected, strict=True))


# M <- M + G


@each_order
@each_dtype
def test_accumulate(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    momenta = [make(order, shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    gradients: list[Tensor | None] = [make(order, shape, dtype, 10) for shape in SHAPES]
    bits = some_bits(momenta, order)
    found = [on(device, each) for each in momenta]
    sums = fused.accumulate(found, [on(device, each) for each in gradients], bits=on_device(device, bits))
    for momentum, gradient, its_bits in zip(momenta, gradients, bits, strict=True):
        if its_bits is None:
            momentum.add_(gradient)
        else:
            multiply_add_(momentum, 1.0, gradient, its_bits)
    assert all_same(found, momenta)
    for its_sums, momentum in zip(sums, momenta, strict=True):
        torch.testing.assert_close(its_sums.cpu(), slice_sums(momentum), rtol=1e-15, atol=0)
        assert torch.equal(its_sums.cpu().float(), slice_sums(momentum).float())
    buffer = whole(sums[0])
    assert same(buffer, torch.cat([each.flatten() for each in sums]))


@each_dtype
def test_gradients_of_other_dtypes_and_strides(device: str, tiles: None, dtype: torch.dtype) -> None:
    shape = (1, 9, 17)
    for order in (rows, columns):
        momenta = [make(order, shape, dtype, seed) for seed in range(len(DTYPES) * len(ORDERS))]
        gradients = [make(other, shape, its_dtype, 20) for its_dtype in DTYPES for other in ORDERS]
        found = [on(device, each) for each in momenta]
        fused.accumulate(found, [on(device, each) for each in gradients])
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.add_(gradient)
        assert all_same(found, momenta)


@each_dtype
def test_gates_and_no_gradient(device: str, dtype: torch.dtype) -> None:
    """Where a gate is closed, a gradient may hold anything; where there is none, only the sums are taken."""
    shape = (3, 9, 17)
    opens = [None, torch.tensor(True), torch.tensor(False), torch.tensor([True, False, True]).view(3, 1, 1), None]
    momenta = [make(rows, shape, dtype, seed) for seed in range(5)]
    gradients: list[Tensor | None] = [make(rows, shape, dtype, 10 + seed) for seed in range(4)] + [None]
    gradients[2].fill_(torch.nan)
    gradients[3][1].fill_(torch.nan)
    momenta[4][0, 0, 0] = -0.0
    found = [on(device, each) for each in momenta]
    sums = fused.accumulate(
        found,
        [None if each is None else on(device, each) for each in gradients],
        opens=[None if each is None else each.to(device) for each in opens],
    )
    for momentum, gradient, is_open in zip(momenta[:4], gradients, opens, strict=False):
        momentum.add_(gradient if is_open is None else torch.where(is_open, gradient, 0))
    assert all_same(found, momenta)
    assert all(
        torch.equal(one.cpu().float(), slice_sums(other).float()) for one, other in zip(sums, momenta, strict=True)
    )


# S <- M[K], M[K] <- mu M[K]


def indices_of(stack: Tensor, k: int) -> Tensor:
    return largest(stack.abs().sum(-1, dtype=torch.float64).float(), k)


def taken(
    momentum: Tensor,
    indices: Tensor,
    factor: float | Tensor,
    dtype: torch.dtype,
    bits: RandomBits | None,
    nesterov: tuple[float, Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """The torch path."""
    submatrices = gather(momentum, indices)
    if bits is None:
        decay_(momentum, indices, submatrices, factor)
    else:
        shrunk = submatrices.clone()
        multiply_add_(shrunk, factor, None, bits.of_slices(indices))
        put_(momentum, indices, shrunk)
    if nesterov is not None:
        mu, gradient, is_open = nesterov
        submatrices = submatrices.float() * mu
        if gradient is not None:
            selected = gather(gradient, indices)
            submatrices += selected if is_open is None else torch.where(is_open, selected, 0)
    return submatrices.to(dtype)


@each_order
@each_dtype
def test_take(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    shapes = SHAPES + SHAPES[1:]
    ks = [1, 5, 9, 4, 17, 0, 1]
    momenta = [make(order, shape, dtype, seed) for seed, shape in enumerate(shapes)]
    indices = [indices_of(each, k) for each, k in zip(momenta, ks, strict=True)]
    factors: list[float | Tensor] = [0.95, torch.tensor(0.95), torch.tensor([0.9, 1.0, 0.8]).view(3, 1, 1), 0.9]
    factors += [0.7, torch.tensor(1.0), 0.0]
    bits = some_bits(momenta, order)
    found = [on(device, each) for each in momenta]
    its_dtype = DTYPES[DTYPES.index(dtype) - 1]
    stacks = fused.take(
        found,
        [each.to(device) for each in indices],
        [on_number(device, each) for each in factors],
        its_dtype,
        bits=on_device(device, bits),
    )
    for stack, momentum, its_indices, factor, its_bits in zip(stacks, momenta, indices, factors, bits, strict=True):
        expected = taken(momentum, its_indices, factor, its_dtype, its_bits)
        assert same(stack, expected)
        assert min(stack.shape[1:]) < 2 or (stack.stride(-1) == 1) == (expected.stride(-1) == 1)
    assert all_same(found, momenta)


@pytest.mark.parametrize("order", [rows, columns])
def test_what_is_taken_in_one_shape_is_adjacent(device: str, order: Order) -> None:
    momenta = [on(device, make(order, (count, 9, 6), torch.float32, 0)) for count in (1, 3, 2)]
    stacks = fused.take(momenta, [indices_of(each, 4) for each in momenta], [1.0] * 3, torch.float32)
    together = adjacent(stacks)
    assert together is not None
    assert same(together, torch.cat(stacks))


@pytest.mark.parametrize("order", [rows, every_second_column])
@each_dtype
def test_nesterov(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    shape = (3, 9, 17)
    momenta = [make(order, shape, dtype, seed) for seed in range(5)]
    gradients: list[Tensor | None] = [make(rows, shape, each, 10) for each in (*DTYPES, dtype)] + [None]
    gradients[1].fill_(torch.nan)
    opens = [None, torch.tensor(False), torch.tensor(True), None, None]
    indices = [indices_of(each, 4) for each in momenta]
    factors = [0.9, torch.tensor(1.0), torch.tensor(0.9), 0.8, 0.7]
    found = [on(device, each) for each in momenta]
    stacks = fused.take(
        found,
        [each.to(device) for each in indices],
        [on_number(device, each) for each in factors],
        torch.bfloat16,
        gradients=[None if each is None else on(device, each) for each in gradients],
        nesterov_factors=[0.9] * 5,
        opens=[None if each is None else each.to(device) for each in opens],
    )
    for stack, momentum, its_indices, factor, gradient, is_open in zip(
        stacks, momenta, indices, factors, gradients, opens, strict=True
    ):
        nesterov = 0.9, gradient, is_open
        assert same(stack, taken(momentum, its_indices, factor, torch.bfloat16, None, nesterov))
    assert all_same(found, momenta)


# Before the products


@each_order
@each_dtype
def test_normalize(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    stacks = [make(order, shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    stacks[1] *= 1e-4
    stacks[2][1] = 0.0
    if dtype != torch.float16:
        stacks[3][0] *= 1e-30  # whose squares float32 does not have
        stacks[3][1] *= 1e30
    dtypes = [torch.float32, dtype, torch.bfloat16, dtype]
    results = fused.normalize([on(device, each) for each in stacks], orthonormalize.SAFETY, dtypes)
    for result, stack, its_dtype in zip(results, stacks, dtypes, strict=True):
        assert same(result, orthonormalize._normalize(stack, its_dtype))
        assert (result.stride(-1) == 1) == (stack.is_contiguous() or stack.stride(-1) < stack.stride(-2))


def test_the_parts_of_a_norm_are_many(device: str, tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PARTS", 4)
    stacks = [make(order, (2, 9, 40), torch.bfloat16, 0) for order in (rows, columns)]
    results = fused.normalize([on(device, each) for each in stacks], 1.02, [torch.bfloat16] * 2)
    for result, stack in zip(results, stacks, strict=True):
        assert same(result, orthonormalize._normalize(stack, torch.bfloat16))


# The neurons of O


def square_sums_by_torch(stack: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(stack, dim=dim, dtype=torch.float64)
    return norms.square()


@each_order
@each_dtype
def test_square_sums(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    shapes = [*SHAPES, (2, 5, 0), (2, 0, 5)]
    stacks = [make(order, shape, dtype, seed) for seed, shape in enumerate(shapes) for _ in range(2)]
    dims = [-1, -2] * len(shapes)
    sums = fused.square_sums([on(device, each) for each in stacks], dims)
    for its_sums, stack, dim in zip(sums, stacks, dims, strict=True):
        expected = square_sums_by_torch(stack, dim)
        torch.testing.assert_close(its_sums.cpu(), expected, rtol=1e-15, atol=0)
        assert torch.equal(its_sums.cpu().float(), expected.float())
    assert same(whole(sums[0]), torch.cat([each.flatten() for each in sums]))


def test_sums_halfway_between_two_numbers_round_as_those_of_torch(device: str) -> None:
    """Such as 1 + 2^-24: sums of the squares of numbers with 8 bits often are there. The root decides."""
    stack = torch.ones(1, 400, 2, dtype=torch.bfloat16)
    stack[0, :, 0] = (1 + torch.arange(400) // 100 / 8).bfloat16()
    stack[0, :, 1] = (1 + torch.arange(400) % 100 / 128).bfloat16() * 2.0**-12
    expected = square_sums_by_torch(stack, -1)
    assert (expected.float() != stack.double().square().sum(-1).float()).any()
    [sums] = fused.square_sums([stack.to(device)], [-1])
    assert same(sums, expected)


def factors_by_torch(
    sums: Tensor, variances: Tensor, indices: Tensor | None, size: int, weight: float | Tensor, eps: float
) -> Tensor:
    """The torch path."""
    squares = sums.float()
    known = variances if indices is None else variances.gather(1, indices)
    known = known + ((squares * (1.0 / size) - known).unsqueeze(-1) * weight).squeeze(-1)
    inverse = 1.0 / (known.double().sqrt() + eps)
    before, after = squares.double().sum(1, True), (squares.double() * inverse.square()).sum(1, True)
    inverse *= (before / after.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    if indices is None:
        variances.copy_(known)
    else:
        variances.scatter_(1, indices, known)
    return inverse.float()


@pytest.mark.parametrize("block", [8, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_neuron_factors(device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    """Of all neurons, and of selected ones; of variances with gaps and transposed; where gates are closed."""
    monkeypatch.setattr(fused, "NEURONS", block)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 1), (3, 21), (2, 40), (3, 21), (2, 9), (2, 0)]
    outs = [1, 21, 40, 37, 11, 3]
    sums = [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    sums[1] = sums[1].mT.contiguous().mT
    sums[2][1] = 0.0
    variances = [
        torch.rand(shape[0], out + 3, generator=generator)[:, 3:] for shape, out in zip(shapes, outs, strict=True)
    ]
    variances[1] = torch.rand(21, 3, generator=generator).mT
    variances[2][1] = 0.0
    variances[3] = torch.zeros(3, 37)
    indices: list[Tensor | None] = [None] * 3
    indices += [largest(torch.rand(shape[0], out), shape[1]) for shape, out in zip(shapes[3:], outs[3:], strict=True)]
    by_matrix = torch.tensor([0.05, 0.0, 0.05]).view(3, 1, 1)
    weights: list[float | Tensor] = [0.05, by_matrix, torch.tensor(0.05), 0.1, torch.tensor(0.0), 0.05]
    sizes = [1, 7, 33, 12, 1000, 5]
    found = [on(device, each) for each in variances]
    factors = fused.neuron_factors(
        [on(device, each) for each in sums],
        found,
        [None if each is None else each.to(device) for each in indices],
        sizes,
        [on_number(device, each) for each in weights],
        1e-8,
    )
    for its_factors, *arguments in zip(factors, sums, variances, indices, sizes, weights, [1e-8] * 6, strict=True):
        assert same(its_factors, factors_by_torch(*arguments))
    assert all_same(found, variances)
    assert same(whole(factors[0]), torch.cat([each.flatten() for each in factors]))


def test_factors_keep_the_length_of_a_matrix(device: str) -> None:
    """And make the mean squares of neurons alike, where v is what they have now."""
    result = make(rows, (2, 12, 30), torch.float32, 0).to(device)
    variances = torch.zeros(2, 12, device=device)
    [factors] = fused.neuron_factors(fused.square_sums([result], [-1]), [variances], [None], [30], [1.0], 1e-8)
    made = result.double() * factors.unsqueeze(-1).double()
    torch.testing.assert_close(made.norm(dim=(1, 2)), result.double().norm(dim=(1, 2)), rtol=1e-6, atol=0)
    squares = made.square().mean(-1)
    torch.testing.assert_close(squares, squares.mean(1, True).expand(2, 12), rtol=1e-5, atol=0)
    torch.testing.assert_close(variances.double(), result.double().square().mean(-1), rtol=1e-6, atol=0)


# X <- (1 - lr weight_decay) X, X[K] <- X[K] - lr scale O


def apply_by_torch(
    weight: Tensor,
    indices: Tensor,
    result: Tensor,
    step: float | Tensor,
    shrink: float | Tensor,
    factors: Tensor | None,
    momentum: Tensor | None,
    bits: RandomBits | None,
) -> None:
    """The torch path: what it multiplies O by is -step_size, or 0 where a gate is closed."""
    change = result.float() * (torch.where(step == 0, 0.0, -step) if isinstance(step, Tensor) else -step)
    if factors is not None:
        change *= factors.unsqueeze(-1 if factors.shape == indices.shape else -2)
    decays = isinstance(shrink, Tensor) or shrink != 1.0
    if momentum is not None and decays:
        new = decayed(weight, momentum, shrink)
        put_(new, indices, decayed(gather(weight, indices), result, shrink) + change)
        if weight.dtype in HALF_PRECISION:
            store_(weight, new, bits)
        else:
            weight.copy_(new)
    elif weight.dtype in HALF_PRECISION:
        moved = gather(weight, indices)
        multiply_add_(moved, shrink, change, None if bits is None else bits.of_slices(indices))
        if decays:
            multiply_add_(weight, shrink, None, bits)
        put_(weight, indices, moved)
    else:
        weight.mul_(shrink)
        add_(weight, indices, change)


@each_order
@each_dtype
def test_apply(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    shapes = [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[3], SHAPES[1], SHAPES[2]]
    ks = [1, 5, 9, 4, 0, 3]
    by_matrix = torch.tensor([0.1, 0.0, 0.1]).view(3, 1, 1)
    steps: list[float | Tensor] = [0.1, 0.02, by_matrix, torch.tensor(0.0), 0.1, 0.1]
    shrinks: list[float | Tensor] = [0.99, 0.9, torch.where(by_matrix > 0, 0.9, 1.0), torch.tensor(1.0), 0.95, 1.0]
    weights = [make(order, shape, dtype, seed) for seed, shape in enumerate(shapes)]
    momenta = [make(order, shape, torch.float32, 10) for shape in shapes]
    indices = [indices_of(each, k) for each, k in zip(momenta, ks, strict=True)]
    results = [gather(each, its) for each, its in zip(momenta, indices, strict=True)]
    results = [each.bfloat16() if number % 2 else each for number, each in enumerate(results)]
    generator = torch.Generator().manual_seed(0)
    factors: list[Tensor | None] = [None] * len(shapes)
    factors[1] = torch.rand(1, 5, generator=generator)
    factors[2] = torch.rand(3, 6, generator=generator)
    factors[5] = torch.rand(3, 3, generator=generator)
    dims = [-1, -1, -2, -1, -1, -1]
    bits = some_bits(weights, order)
    # With bits and without them, from order to order.
    judges = [each if number % 4 < 2 else None for number, each in enumerate(momenta, ORDERS.index(order))]
    found = [on(device, each) for each in weights]
    fused.apply(
        found,
        [each.to(device) for each in indices],
        [on(device, each) for each in results],
        [on_number(device, each) for each in steps],
        [on_number(device, each) for each in shrinks],
        factors=[None if each is None else each.to(device) for each in factors],
        factor_dims=dims,
        cautious=[None if each is None else on(device, each) for each in judges],
        bits=on_device(device, bits),
    )
    for arguments in zip(weights, indices, results, steps, shrinks, factors, judges, bits, strict=True):
        apply_by_torch(*arguments)
    assert all_same(found, weights)


# Stacks in pieces

PIECES = [3, 1, 2]
PIECE_SHAPES = [(2, 9, 17)] * 3 + [(1, 16, 32)] + [(1, 6, 16)] * 2
"""The first two stacks have numbers by matrix, the last one has one of all."""


def in_stacks(values: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    """Put what is of pieces together."""
    return [torch.cat(list(each), dim) for each in cut(values, PIECES)]


def by_piece(numbers: Sequence[Any]) -> list[Any]:
    """What each piece has of the numbers of its stack: 0-d, or one for each matrix."""
    found: list[Any] = []
    for number, count, (shape, *_) in zip(numbers, PIECES, cut(PIECE_SHAPES, PIECES), strict=True):
        is_by_matrix = isinstance(number, Tensor) and number.ndim > 0
        found += number.split(shape[0]) if is_by_matrix else [number] * count
    return found


@each_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_a_stack(device: str, tiles: None, order: Order, dtype: torch.dtype) -> None:
    """They have the bits of stacks of their own."""
    momenta = [on(device, make(order, shape, dtype, seed)) for seed, shape in enumerate(PIECE_SHAPES)]
    weights = [on(device, make(rows, shape, dtype, seed)) for seed, shape in enumerate(PIECE_SHAPES, 20)]
    gradients: list[Tensor | None] = [on(device, make(columns, shape, dtype, 10)) for shape in PIECE_SHAPES]
    gradients[4:] = None, None
    apart, weights_apart = [on(device, each) for each in momenta], [on(device, each) for each in weights]
    bits = on_device(device, [bits_of(shape, False, seed) for seed, shape in enumerate(PIECE_SHAPES)])

    def by_matrix(*numbers: float) -> list[Any]:
        own = [torch.tensor(numbers[:6]).view(6, 1, 1), torch.tensor(numbers[6]).view(1, 1, 1)]
        return [each.to(device) for each in own] + [torch.tensor(numbers[7], device=device)]

    opens = [each.bool() for each in by_matrix(1, 0, 1, 1, 1, 0, 1, 0)]
    sums = fused.accumulate(momenta, gradients, pieces=PIECES, opens=opens, bits=bits)
    expected = fused.accumulate(apart, gradients, opens=by_piece(opens), bits=bits)
    assert all(map(same, sums, in_stacks(expected)))

    factors = by_matrix(0.9, 1.0, 0.8, 0.7, 0.6, 0.5, 0.95, 0.9)
    indices = [indices_of(each, 4) for each in apart]
    stacks = fused.take(
        momenta,
        in_stacks(indices),
        factors,
        torch.float32,
        pieces=PIECES,
        gradients=gradients,
        nesterov_factors=factors,
        opens=opens,
        bits=bits,
    )
    expected = fused.take(
        apart,
        indices,
        by_piece(factors),
        torch.float32,
        gradients=gradients,
        nesterov_factors=by_piece(factors),
        opens=by_piece(opens),
        bits=bits,
    )
    assert all(map(same, stacks, in_stacks(expected)))
    assert all_same(momenta, apart)

    of_neurons = fused.square_sums(expected, [-1] * 6)
    variances = [torch.rand(shape[:2], generator=torch.Generator().manual_seed(0)).to(device) for shape in PIECE_SHAPES]
    variances_apart = [each.clone() for each in variances]
    of_stacks = in_stacks(of_neurons), variances, in_stacks(indices), [17, 32, 16], factors
    of_pieces = of_neurons, variances_apart, indices, by_piece([17, 32, 16]), by_piece(factors)
    neurons = fused.neuron_factors(*of_stacks, 1e-8, pieces=PIECES)
    neurons_apart = fused.neuron_factors(*of_pieces, 1e-8)
    assert all(map(same, neurons, in_stacks(neurons_apart))) and all_same(variances, variances_apart)

    fused.apply(
        weights,
        in_stacks(indices),
        stacks,
        factors,
        factors,
        pieces=PIECES,
        factors=neurons,
        cautious=[*momenta[:4], None, None],
        bits=bits,
    )
    fused.apply(
        weights_apart,
        indices,
        expected,
        by_piece(factors),
        by_piece(factors),
        factors=neurons_apart,
        cautious=[*apart[:4], None, None],
        bits=bits,
    )
    assert all_same(weights, weights_apart)


def test_pieces_are_aligned_only_together(device: str) -> None:
    """A piece at another address than a multiple of 16 bytes is read right, and so are those beside it."""
    memory = [torch.zeros(16 * 32 + 1, device=device) for _ in range(2)]
    momenta = [memory[0][:-1].view(1, 16, 32), memory[1][1:].view(1, 16, 32)]
    gradients = [torch.ones(1, 16, 32, device=device) for _ in range(2)]
    [(_, [(constants, *_)])] = PASSES["accumulate"](
        momenta, gradients, [2], [None], [None] * 2, [None] * 2, torch.zeros(32, dtype=torch.float64, device=device)
    )
    sums = fused.accumulate(momenta, gradients, pieces=[2])
    assert [each.tolist() for each in sums] == [[[32.0] * 16] * 2] and not constants["ALIGNED"]


@pytest.mark.parametrize(
    ("pieces", "others", "message"),
    [
        ([1], {}, r"pieces must be at least 1 and add up to 2 momenta, got \[1\]"),
        ([2, 0], {}, "pieces must be at least 1 and add up to 2 momenta"),
        ([2], {"momenta": rows(2, 3, 4)}, "momenta: the pieces of stack 0 differ in shape, strides, dtype or"),
        ([2], {"momenta": columns(1, 3, 4)}, "momenta: the pieces of stack 0 differ"),
        ([2], {"momenta": rows(1, 3, 4).half()}, "momenta: the pieces of stack 0 differ"),
        ([2], {"gradients": None}, "gradients: the pieces of stack 0 differ"),
        ([2], {"bits": None}, "bits: the pieces of stack 0 differ"),
    ],
)
def test_pieces_that_are_not_alike(pieces: list[int], others: dict[str, Any], message: str) -> None:
    first = {"momenta": rows(1, 3, 4).bfloat16(), "gradients": rows(1, 3, 4), "bits": bits_of((1, 3, 4), False, 0)}
    if "gradients" not in others and "momenta" in others:
        others |= {"gradients": torch.zeros_like(others["momenta"])}
    given = {name: [value, (first | others)[name]] for name, value in first.items()}
    with pytest.raises(ValueError, match=message):
        fused.accumulate(**given, pieces=pieces)


# Bytes


class Counted:
    """Counts the bytes of floating-point numbers that the interpreter loads and stores, lane by lane."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.read = self.written = 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            self.read += self.bytes_of(pointers, mask)
            return load(builder, pointers, mask, *others)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            self.written += self.bytes_of(pointers, mask)
            return store(builder, pointers, value, mask, *others)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    @staticmethod
    def bytes_of(pointers: Any, mask: Any) -> int:
        """Tables, indices and hashes are integers; numbers by matrix are single ones."""
        element = pointers.get_element_ty()
        is_small = element.is_int() or pointers.data.size == 1
        return 0 if is_small else int(mask.data.sum()) * element.primitive_bitwidth // 8


@pytest.fixture
def counted(device: str, monkeypatch: pytest.MonkeyPatch) -> Counted:
    if device != "cpu":
        pytest.skip("a GPU does not say what it loads")
    return Counted(monkeypatch)


def declared(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[], object]) -> tuple[int, int]:
    """What a call of an operator says that it reads and writes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    totals = []

    class Declared(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = function(*arguments, **(keywords or {}))
            if function.namespace == "dion2":
                assert function._opname == name
                totals.append(kernel_traffic.traffic(name, arguments))
            return result

    with Declared():
        call()
    [total] = totals
    return total


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("case", ["plain", "nesterov", "cautious", "selected", "half"])
def test_traffic(counted: Counted, monkeypatch: pytest.MonkeyPatch, order: Order, case: str) -> None:
    """Lane by lane exactly what is declared; for float32 at 1/4 in bytes an entry: 12, 0.25 (4 + 4 + 2), 8 + 0.5."""
    dtype = torch.bfloat16 if case == "half" else torch.float32
    shape, k = (2, 16, 32), 4
    entries = 2 * 16 * 32
    momenta = [make(order, shape, dtype, 0)]
    gradients: list[Tensor | None] = [make(rows, shape, dtype, 1)]
    weights = [make(order, shape, dtype, 2)]
    stacks: list[Tensor] = []
    indices = [indices_of(each, k) for each in momenta]
    is_nesterov = case == "nesterov"

    def take() -> None:
        stacks[:] = fused.take(
            momenta,
            indices,
            [0.9],
            torch.bfloat16,
            gradients=gradients if is_nesterov else None,
            nesterov_factors=[0.9] if is_nesterov else None,
        )

    def apply() -> None:
        shrink = 1.0 if case == "selected" else 0.9
        fused.apply(weights, indices, stacks, [0.1], [shrink], cautious=momenta if case == "cautious" else None)

    size = dtype.itemsize
    expected = {
        "accumulate": (2 * size * entries, size * entries + 8 * 2 * 16),
        "take": (entries // 4 * (2 * size if is_nesterov else size), entries // 4 * (size + 2)),
        "normalize": (entries // 4 * 4, entries // 4 * 2),
        "apply": (size * entries + entries // 4 * 2, size * entries),
    }
    if case == "cautious":
        expected["apply"] = (expected["apply"][0] + entries * 3 // 4 * 4, expected["apply"][1])
    if case == "selected":
        expected["apply"] = (entries // 4 * (4 + 2), entries // 4 * 4)
    calls: dict[str, Callable[[], object]] = {
        "accumulate": lambda: fused.accumulate(momenta, gradients),
        "take": take,
        "normalize": lambda: fused.normalize(stacks, 1.02, [torch.bfloat16]),
        "apply": apply,
    }
    for name, call in calls.items():
        counted.read = counted.written = 0
        assert declared(monkeypatch, name, call) == expected[name]
        partial = 0 if name != "normalize" else counted.read - expected[name][0]
        assert (counted.read - partial, counted.written) == expected[name]
        assert partial <= 2 * 8 * 32 * 16  # what the programs read of the partial sums, a number for each tile


def test_without_gradients_momenta_are_only_read(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    momenta = [make(rows, (2, 9, 6), torch.float32, 0)]
    total = declared(monkeypatch, "accumulate", lambda: fused.accumulate(momenta, [None]))
    assert total == (counted.read, counted.written) == (4 * 2 * 9 * 6, 8 * 2 * 9)


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("dim", [-1, -2])
def test_traffic_of_neurons(counted: Counted, monkeypatch: pytest.MonkeyPatch, order: Order, dim: int) -> None:
    """O is read once; sums and v, which are read twice, are as small as one slice."""
    results, sums = [make(order, (2, 8, 32), torch.bfloat16, 0)], list[Tensor]()
    neurons = 2 * (8 if dim == -1 else 32)
    indices = [torch.arange(8).expand(2, 8) if dim == -1 else None]
    total = declared(monkeypatch, "square_sums", lambda: sums.extend(fused.square_sums(results, [dim])))
    assert total == (counted.read, counted.written) == (2 * 2 * 8 * 32, 8 * neurons)
    variances = [torch.zeros(2, 32)]
    counted.read = counted.written = 0
    total = declared(
        monkeypatch,
        "neuron_factors",
        lambda: fused.neuron_factors(sums, variances, indices, [8], [0.1], 1e-8),
    )
    assert total == (counted.read, counted.written) == (2 * (8 + 4) * neurons, 2 * 4 * neurons)


def test_traffic_of_no_operator() -> None:
    with pytest.raises(KeyError, match="nothing"):
        kernel_traffic.traffic("nothing", ())


# Launches


@pytest.fixture
def launched(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Launches of kernels, as they are recorded: their names, and how many programs each has."""
    from dion2_lightning.kernels import triton_kernels

    recorded: list[tuple[str, int]] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: tuple[int]) -> Any:
            recorded.append((self.name, grid[0]))
            return self.kernel[grid]

    for name in ("accumulate", "take", "norm_parts", "divide", "neuron_sums", "neuron_factors", "apply"):
        monkeypatch.setattr(triton_kernels, name, Recorded(name))
    return recorded


def test_what_is_alike_but_for_shapes_and_numbers_is_one_launch(device: str, launched: list[tuple[str, int]]) -> None:
    alike = [on(device, make(rows, shape, torch.float32, 0)) for shape in ((1, 9, 6), (3, 17, 7), (2, 5, 35))]
    fused.accumulate(alike, alike)
    assert launched == [("accumulate", 6 * 3)]
    other = on(device, make(columns, (1, 9, 6), torch.float32, 0))
    fused.accumulate([*alike, other, alike[0]], [*alike, other, None])
    assert launched[1:] == [("accumulate", programs) for programs in (6 * 3, 1, 2)]


def test_neurons_are_one_launch_where_they_are_slices_and_one_where_they_are_not(
    device: str, launched: list[tuple[str, int]]
) -> None:
    results = [on(device, make(rows, shape, torch.float32, 0)) for shape in ((1, 9, 6), (3, 17, 7), (2, 5, 35))] * 2
    sums = fused.square_sums(results, [-1] * 3 + [-2] * 3)
    assert launched == [("neuron_sums", 6 * 3), ("neuron_sums", 6 * 2)]
    indices = [torch.arange(each.shape[1], device=device).expand(len(each), -1) for each in results[:3]]
    variances = [torch.zeros(len(each), 40, device=device) for each in results]
    variances[3:] = [each[:, : its.shape[1]] for each, its in zip(variances[3:], sums[3:], strict=True)]
    fused.neuron_factors(sums, variances, [*indices, None, None, None], [7] * 6, [0.1] * 6, 1e-8)
    assert launched[2:] == [("neuron_factors", 6)] * 2


def test_as_many_launches_as_declared_and_one_table(
    device: str, launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all operators, of odd and aligned shapes in both memory orders and two dtypes together; without data too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tables, frombuffer = list[Tensor](), torch.frombuffer

    def counted(*given: Any, **named: Any) -> Tensor:
        tables.append(frombuffer(*given, **named))
        return tables[-1]

    monkeypatch.setattr(torch, "frombuffer", counted)
    found: dict[str, tuple[int, int]] = {}
    without_data: dict[str, int] = {}

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            name = function._opname
            if function.namespace != "dion2":
                return function(*arguments, **(keywords or {}))
            if is_fake:
                without_data[name] = kernel_traffic.launches(name, arguments)
                return None
            launched.clear()
            tables.clear()
            function(*arguments)
            assert len(tables) == 1
            found[name] = kernel_traffic.launches(name, arguments), len(launched) + len(tables)
            return None

    def all_operators(device: str) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        momenta = [empty(2, 16, 32), empty(1, 17, 33), empty(1, 32, 16).mT, empty(1, 19, 5).mT, empty(1, 16, 32)]
        momenta += [empty(1, 16, 32, dtype=torch.bfloat16)]
        ks = [4, 5, 16, 3, 7, 4]
        indices = [torch.arange(k, device=device).expand(len(each), k) for k, each in zip(ks, momenta, strict=True)]
        fused.accumulate(momenta, [*momenta[:4], None, momenta[5]])
        stacks = fused.take(momenta, indices, [0.9] * 6, torch.bfloat16)
        results = fused.normalize(stacks, 1.02, [torch.bfloat16] * 6)
        dims = [-1, -2, -1, -2, -1, -1]
        sums = fused.square_sums(results, dims)
        variances = [empty(*each.shape) for each in sums]
        factors = fused.neuron_factors(sums, variances, [indices[0], *[None] * 5], [9] * 6, [0.1] * 6, 1e-8)
        shrinks = [0.9, 0.9, 0.9, 0.9, 0.9, 1.0]
        fused.apply(momenta, indices, results, [0.1] * 6, shrinks, factors=factors, factor_dims=dims)

    is_fake = False
    with Counted():
        all_operators(device)
    assert all(declares == has for declares, has in found.values()), found
    assert len(found) == 6 and min(count for count, _ in found.values()) >= 3
    is_fake = True
    with fake_tensors(), Counted():
        all_operators("cuda")
    assert without_data == {name: count for name, (count, _) in found.items()}


def test_nothing_to_do(device: str) -> None:
    empty = [torch.empty(shape, device=device) for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0))]
    assert fused.accumulate([], []) == []
    assert [each.tolist() for each in fused.accumulate(empty, empty)] == [[], [[], []], [[0.0] * 3] * 2]
    assert fused.take([], [], [], torch.float32) == []
    assert fused.normalize([], 1.02, []) == []
    assert [each.tolist() for each in fused.square_sums(empty, [-1] * 3)] == [[], [[], []], [[0.0] * 3] * 2]
    assert fused.square_sums([], []) == fused.neuron_factors([], [], [], [], [], 1e-8) == []
    fused.apply([], [], [], [], [])
    indices = [torch.empty(2, 0, dtype=torch.int64, device=device)]
    weight = torch.ones(2, 3, 4, device=device)
    [stack] = fused.take([weight], indices, [0.5], torch.float32)
    assert stack.shape == (2, 0, 4)
    fused.apply([weight], indices, [stack], [0.1], [1.0])
    assert (weight == 1).all()


def test_torch_traces_an_allocation_and_a_call_of_each_operator() -> None:
    """What the operators do then, tests/test_host_synchronisation.py checks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    with FakeTensorMode():
        momenta = [torch.empty(2, 16, 32, device="cuda"), torch.empty(1, 8, 4, device="cuda").mT]
        indices = [
            torch.empty(2, 4, dtype=torch.int64, device="cuda"),
            torch.empty(1, 1, dtype=torch.int64, device="cuda"),
        ]
        with Seen():
            sums = fused.accumulate(momenta, [momenta[0], None])
            stacks = fused.take(momenta, indices, [0.9, 0.9], torch.bfloat16)
            results = fused.normalize(stacks, 1.02, [torch.bfloat16, torch.float32])
            neurons = fused.square_sums(results, [-1, -2])
            variances = [torch.empty(2, 16, device="cuda"), torch.empty(1, 8, device="cuda")]
            selected = [indices[0], None]
            factors = fused.neuron_factors(neurons, variances, selected, [32, 1], [0.1, 0.1], 1e-8)
            fused.apply(momenta, indices, results, [0.1, 0.1], [0.9, 1.0], factors=factors, factor_dims=[-1, -2])
    assert [each.shape for each in sums] == [(2, 16), (1, 4)]
    assert [(each.shape, each.dtype) for each in results] == [((2, 4, 32), torch.bfloat16), ((1, 1, 8), torch.float32)]
    assert [(each.shape, each.dtype) for each in factors] == [((2, 4), torch.float32), ((1, 8), torch.float32)]
    assert {each.device.type for each in (*sums, *stacks, *results, *neurons, *factors)} == {"cuda"}
    operators = [each for each in seen if each.startswith("dion2")]
    names = "accumulate", "take", "normalize", "square_sums", "neuron_factors", "apply"
    assert operators == [f"dion2.{name}.default" for name in names]
    views = {"aten.split_with_sizes.default", "aten.view.default", "aten.transpose.int", "prim.device.default"}
    assert set(seen) - set(operators) <= {"aten.empty.memory_format", *views}


# Where it runs, and what it takes


def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str) -> str:
        return str(fused.unavailable(torch.device(device)))

    assert "devices of type mps" in reason("mps")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason("cpu") == "Triton has no kernels for CPUs"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cannot read the memory of a GPU" in reason("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert reason("cuda").startswith("Tesla T4 is older than")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fused, "_import_error", lambda: None)
    monkeypatch.setattr(fused, "_launch_error", lambda device: "no C compiler")
    assert reason("cuda") == "Triton cannot launch kernels (no C compiler)"
    monkeypatch.setattr(fused, "_import_error", lambda: "No module named 'triton'")
    assert "pip install triton" in reason("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert reason("cuda").startswith("a CUDA graph is being captured")


def test_a_gpu_that_cannot_run_them_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """For each device and reason; not of a step that is captured, of a device that is not there, nor of a CPU."""
    asked: list[torch.device] = []
    reasons = {"cuda:0": "no C compiler", "cuda:1": "too old"}

    def unavailable(device: torch.device) -> str | None:
        asked.append(device)
        return reasons.get(str(device))

    monkeypatch.setattr(fused, "unavailable", unavailable)
    monkeypatch.setattr(fused, "_warn", cache(fused._warn.__wrapped__))
    devices = [torch.device("cuda", number) for number in range(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not any(map(fused.are_default, devices[:2])) and not recwarn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "is_capturing", lambda: True)
    assert not fused.are_default(devices[0]) and not recwarn
    monkeypatch.setattr(fused, "is_capturing", lambda: False)
    asked.clear()
    for _ in range(2):
        context = StepContext(kernels="auto")
        assert [context.fuses_on(device) for device in devices * 2] == [False, False, True] * 2
        assert not context.fuses_on(torch.device("cpu"))
    assert asked == devices * 2
    assert [str(each.message) for each in recwarn] == [
        "operations of torch take the place of fused kernels on cuda:0: no C compiler",
        "operations of torch take the place of fused kernels on cuda:1: too old",
    ]


@pytest.mark.parametrize("word", ["1", "ON", "Yes", "y", "true", "0", "false", "off", "no", "", "2"])
def test_the_interpreter_is_asked_for_as_triton_reads_it(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert (fused.unavailable(torch.device("cpu")) is None) == knobs.runtime.interpret


def test_the_kernel_by_which_it_sees_whether_it_can_launch(device: str) -> None:
    from dion2_lightning.kernels import triton_kernels

    number = torch.zeros(2, device=device)
    triton_kernels.set_one[(1,)](number)
    assert number.tolist() == [1.0, 0.0]


def test_autograd_knows_that_kernels_change_tensors(device: str) -> None:
    """A step between forward and backward is an error, as with torch's own operations."""
    weights = torch.ones(1, 4, 8, device=device)
    inputs = torch.ones(8, requires_grad=True, device=device)
    loss = (weights * inputs).sum()
    momenta, stacks = torch.ones_like(weights), torch.ones(1, 2, 8, device=device)
    indices = torch.tensor([[0, 2]], device=device)
    fused.accumulate([momenta], [torch.ones_like(weights)])
    assert (momenta._version, weights._version) == (1, 0)
    fused.take([momenta], [indices], [0.5], torch.float32)
    assert momenta._version == 2
    fused.apply([weights], [indices], [stacks], [0.1], [1.0])
    assert (weights._version, stacks._version) == (1, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_can_be_launched() -> None:
    assert fused._import_error() is None
    assert "RuntimeError" in str(fused._launch_error(torch.device("cuda")))


@pytest.mark.parametrize(
    ("momentum", "gradient", "error", "message"),
    [
        (torch.zeros(3, 4), None, ValueError, r"momenta\[0\] must have the shape \(count, n, m\)"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 4, 3), ValueError, r"gradients\[0\] must have the shape \(1, 3, 4\)"),
        (torch.zeros(1, 3, 4).double(), None, TypeError, r"momenta\[0\] is in torch.float64"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4, dtype=torch.int32), TypeError, r"gradients\[0\] is in torch.int32"),
    ],
)
def test_what_is_refused(momentum: Tensor, gradient: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused.accumulate([momentum], [gradient])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"indices": torch.zeros(2, 1)}, TypeError, r"indices\[0\] must be in torch.int64 on cpu"),
        ({"indices": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, r"indices\[0\] must have the shape \(2, k\)"),
        ({"results": torch.zeros(2, 2, 4)}, ValueError, r"results\[0\] must have the shape \(2, 1, 4\)"),
        ({"step_sizes": torch.zeros((), dtype=torch.float64)}, TypeError, r"step_sizes\[0\] must be in torch.float32"),
        ({"step_sizes": torch.zeros((), device="meta")}, TypeError, r"but it is in torch.float32 on meta"),
        ({"shrinks": torch.zeros(3, 1, 1)}, ValueError, r"shrinks\[0\] has numbers for 3 matrices; there are 2"),
        ({"factors": torch.zeros(2, 4)}, ValueError, r"factors\[0\] must have one number for each neuron"),
        ({"factor_dims": 2}, ValueError, r"factor_dims\[0\] must be -1 or -2"),
        ({"cautious": torch.zeros(2, 3, 5)}, ValueError, r"cautious\[0\] must have the shape \(2, 3, 4\)"),
        ({"results": torch.zeros(2, 1, 4, device="meta")}, ValueError, r"results\[0\] is on meta, others are on cpu"),
    ],
)
def test_kernels_get_no_wrong_addresses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "weights": torch.zeros(2, 3, 4),
        "indices": torch.zeros(2, 1, dtype=torch.int64),
        "results": torch.zeros(2, 1, 4),
        "step_sizes": 0.1,
        "shrinks": 0.9,
    } | wrong
    with pytest.raises(error, match=message):
        fused.apply(**{name: [value] for name, value in given.items()})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sums": torch.zeros(3)}, ValueError, r"sums\[0\] must have the shape \(count, neurons\), but it has \(3,\)"),
        ({"sums": torch.zeros(2, 3).half()}, TypeError, r"sums\[0\] must be in torch.float64 or torch.float32"),
        ({"variances": torch.zeros(2, 3).double()}, TypeError, r"variances\[0\] must be in torch.float32 on cpu"),
        ({"variances": torch.zeros(1, 5)}, ValueError, r"variances\[0\] must have one number for each neuron"),
        ({"variances": torch.zeros(2)}, ValueError, r"variances\[0\] must have one number for each neuron"),
        ({"indices": None}, ValueError, r"one number for each neuron of \(2, 3\), but it has the shape \(2, 5\)"),
        ({"indices": torch.zeros(2, 3)}, TypeError, r"indices\[0\] must be in torch.int64"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"indices\[0\] must have the shape \(2, 3\)"),
        ({"sizes": 0}, ValueError, r"sizes\[0\] must be at least 1, the entries of a neuron, got 0"),
        ({"weights": torch.zeros(3, 1, 1)}, ValueError, r"weights\[0\] has numbers for 3 matrices; there are 2"),
    ],
)
def test_factors_of_neurons_that_do_not_fit(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "sums": torch.zeros(2, 3, dtype=torch.float64),
        "variances": torch.zeros(2, 5),
        "indices": torch.zeros(2, 3, dtype=torch.int64),
        "sizes": 4,
        "weights": 0.1,
    } | wrong
    with pytest.raises(error, match=message):
        fused.neuron_factors(**{name: [value] for name, value in given.items()}, eps=1e-8)
    with pytest.raises(ValueError, match=r"dims\[0\] must be -1 or -2, the entries or the slices of a stack, got 1"):
        fused.square_sums([torch.zeros(2, 3, 4)], [1])


def test_there_is_one_of_everything_for_each_stack() -> None:
    momenta = [torch.zeros(2, 3, 4)] * 2
    with pytest.raises(ValueError, match="sizes: 1 for 2 stacks"):
        fused.neuron_factors([torch.zeros(1, 3)] * 2, [torch.zeros(1, 3)] * 2, [None] * 2, [4], [0.1] * 2, 1e-8)
    with pytest.raises(ValueError, match="gradients: 1 for 2 stacks; there must be one for each"):
        fused.accumulate(momenta, [None])
    with pytest.raises(ValueError, match="opens: 1 for 2 stacks"):
        fused.accumulate(momenta, [None, None], opens=[None])
    with pytest.raises(ValueError, match="gradients and nesterov_factors belong together"):
        fused.take(momenta, [torch.zeros(2, 1, dtype=torch.int64)] * 2, [0.9] * 2, torch.float32, gradients=[None] * 2)

    with pytest.raises(ValueError, match="dtypes: 1 for 2 stacks"):
        fused.normalize(momenta, 1.02, [torch.float32])
    indices = [torch.zeros(2, 1, dtype=torch.int64)] * 2
    results = [torch.zeros(2, 1, 4)] * 2
    with pytest.raises(ValueError, match="factor_dims: 1 for 2 stacks"):
        fused.apply(momenta, indices, results, [0.1] * 2, [0.9] * 2, factor_dims=[-1])


def test_results_are_in_dtypes_of_kernels() -> None:
    momenta = [torch.zeros(2, 3, 4)]
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch.int32"):
        fused.take(momenta, [torch.zeros(2, 1, dtype=torch.int64)], [0.9], torch.int32)
    with pytest.raises(TypeError, match=r"dtypes\[0\] must be one of .*, got torch.float64"):
        fused.normalize(momenta, 1.02, [torch.float64])


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 3, 5), (3, 3, 4)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_random_bits_of_another_shape(shape: tuple[int, int, int], is_transposed: bool) -> None:
    momenta = [torch.zeros(2, 3, 4, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"bits\[0\] must have hashes that broadcast to \(2, 3, 4\), but they have"):
        fused.accumulate(momenta, momenta, bits=[bits_of(shape, is_transposed, 0)])


# A GPU's compiler

COMPILED = """
    import re, subprocess, sys, torch, triton
    from triton.backends.compiler import GPUTarget
    from dion2_lightning.kernels import fused, triton_kernels
    from dion2_lightning.kernels.rounding import random_bits

    class Driver:  # of an H100 or H200 that is not there
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    triton.runtime.driver.set_active(Driver)
    compiled = set()

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def compile(*arguments, **options):
                made = self.kernel.warmup(*arguments, grid=grid, **options).asm
                code = made["ptx"]
                assert not re.search(r"fma\\.\\w+\\.f32", code), "a product that is not rounded before it is added"
                assert "div.full" not in code, "a division that is not exact"
                if code not in compiled:
                    width = "wide" if "ld.global.v4" in code else "narrow"
                    print(self.kernel.__name__, width, *resources_of(made["cubin"]))
                compiled.add(code)
            return compile

    def resources_of(cubin):
        with open(sys.argv[1], "wb") as file:
            file.write(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", sys.argv[1]]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.findall(r"(?:REG|STACK):[0-9]+", usage)

    for name in ("accumulate", "take", "norm_parts", "divide", "neuron_sums", "neuron_factors", "apply"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name)))

    def step(stack, k, factor):
        indices = torch.zeros(len(stack), k, dtype=torch.int64)
        fused.accumulate([stack], [stack])
        taken = fused.take([stack], [indices], [factor], torch.bfloat16)
        fused.apply([stack], [indices], fused.normalize(taken, 1.02, [torch.bfloat16]), [0.1], [factor])

    step(torch.zeros(1, 32, 64), 16, 0.9)
    step(torch.zeros(3, 16, 2048), 1, 0.8)
    step(torch.zeros(1, 64, 32).mT, 16, 0.9)
    odd = torch.zeros(1, 32, 63)
    fused.accumulate([odd], [odd])

    coordinates = torch.arange(32).view(1, 32, 1), torch.arange(64).view(1, 1, 64)
    bits = random_bits([coordinates], [0], [torch.tensor(0.0)])
    half, indices = torch.zeros(1, 32, 64, dtype=torch.bfloat16), torch.zeros(1, 16, dtype=torch.int64)
    fused.accumulate([half], [half], bits=bits)
    taken = fused.take([half], [indices], [0.9], torch.bfloat16, gradients=[half], nesterov_factors=[0.9], bits=bits)
    fused.apply([half], [indices], taken, [0.1], [0.9], cautious=[half], factors=[torch.ones(1, 16)], bits=bits)

    def neurons(result, of_slices):
        for_each, over = result.shape[1:] if of_slices else (result.shape[2], result.shape[1])
        sums = fused.square_sums([result], [-1 if of_slices else -2])
        indices = torch.zeros(len(result), for_each, dtype=torch.int64) if of_slices else None
        fused.neuron_factors(sums, [torch.zeros(len(result), for_each)], [indices], [over], [0.1], 1e-8)

    for result in (torch.zeros(1, 16, 64), torch.zeros(3, 32, 2048), torch.zeros(1, 64, 16).mT):
        for of_slices in (True, False):
            neurons(result.bfloat16(), of_slices)

    # Gates, numbers on the device, float16 at random, single columns of a wider matrix, factors by entry, no decay.
    print("others")
    half = torch.zeros(1, 64, 64, dtype=torch.float16).mT[:, 1::2]
    is_open, number = torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, 1)
    fused.accumulate([half], [torch.zeros(1, 32, 64)], opens=[is_open], bits=bits)
    numbers = {"gradients": [half], "nesterov_factors": [number], "opens": [is_open]}
    taken = fused.take([half], [indices], [number], torch.float16, bits=bits, **numbers)
    by_entry = {"factors": [torch.ones(1, 64)], "factor_dims": [-2]}
    fused.apply([half], [indices], taken, [number], [number], cautious=[half], bits=bits, **by_entry)
    fused.apply([half], [indices], taken, [number], [1.0], bits=bits, **by_entry)
"""


def test_a_gpu_compiler_takes_them(tmp_path: Path) -> None:
    """No product fuses with a sum, aligned memory is read 16 bytes at a time; shapes and numbers compile nothing.

    Nothing is spilled from registers to memory, but where float16 lies apart and is rounded at random, and of programs
    of four warps four fit on a GPU's core, or three where memory is not aligned.
    """
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILED), str(tmp_path / "cubin")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passes = ["accumulate", "take", "norm_parts", "divide", "apply"]
    rows = dict.fromkeys(passes, "wide")
    columns = rows | {"take": "narrow"}
    printed = [tuple(line.split()[:2]) for line in done.stdout.splitlines()]
    assert printed[:10] == [*rows.items(), *columns.items()]
    assert printed[10:14] == [("accumulate", "narrow"), ("accumulate", "wide"), ("take", "wide"), ("apply", "wide")]
    end = printed.index(("others",))
    of_factors = [(name, width) for name, width in printed[14:end] if name == "neuron_factors"]
    assert printed[14:end] == [
        *[("neuron_sums", "wide"), of_factors[0], ("neuron_sums", "wide"), of_factors[1]],
    ]
    assert [name for name, _ in printed[end + 1 :]] == ["accumulate", "take", "apply", "apply"]
    for line in done.stdout.splitlines()[:end]:
        registers, stack = (int(number) for number in re.findall(r"REG:(\d+) STACK:(\d+)", line)[0])
        assert stack == 0 and registers * 128 * (4 if "wide" in line else 3) <= 2**16, line
