"""The passes of a step over memory, each a single one over all matrices together, by the kernels of triton_kernels.py.

They do what these lines of the step do, to the same bits; sums in float64 differ by the order of their terms alone:

    accumulate        M <- M + G, and the norms of the slices
    take              S <- M[K], then M[K] <- mu M[K]
    normalize         what precedes the products of orthonormalization
    square_sums       the sums of squares of the neurons of O
    neuron_factors    v[K] <- v[K] + (1 - neuron_beta) (mean squares - v[K]), and what normalizes the neurons
    apply             X <- (1 - lr weight_decay) X, and X[K] <- X[K] - lr scale O

All see stacks of matrices as (count, n, m) views, n slices of m entries each, and numbers of neurons as views (count,
neurons), of any strides; a list of stacks may mix shapes, memory orders and dtypes, of :data:`DTYPES`, on one device.
Each is a custom operator ``dion2::...``, so that torch can trace it without data. What the operators know of every
matrix is sent to the device in one small copy; the host waits for nothing.

There is one launch for all that is alike but for shapes and numbers, and one compilation for each kind of launch.
"""

import os
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits

DTYPES: Final = (torch.float32, *HALF_PRECISION)
"""What the tensors may be in."""

MIN_CAPABILITY: Final = (8, 0)
"""The oldest GPUs of NVIDIA that convert to bfloat16."""

PARTS: Final = 128
"""In how many parts, at most, the squares of a matrix are summed."""

NEURONS: Final = 1024
"""Of how many neurons a program works out the factors at a time. A power of 2."""


class Tile(NamedTuple):
    """How much a program works on.

    Attributes:
        slices: Of a matrix.
        entries: Of each slice, at a time.
        span: Of each slice, one after another, where other programs may have the rest.
    """

    slices: int
    entries: int
    span: int


TILES: Final = {True: Tile(8, 256, 2048), False: Tile(32, 64, 512)}
"""By whether memory runs along slices, or across them. Powers of 2.

A tile has 16 numbers for each thread of 4 warps. Its rows in memory, of at least 128 bytes, are what a GPU reads
together; a span is long enough to pay for finding its slices, short enough that one matrix occupies the GPU.
"""

Launch = tuple[dict[str, Any], int, int, list[int]]
"""Constants that a kernel is compiled for; matrices; tiles in each; their row of the table."""


@cache
def _error(*, launches: bool) -> str | None:
    """Return why Triton cannot be imported, or cannot launch: for a GPU it needs a C compiler, and Python's headers."""
    try:
        from dion2_lightning.kernels import triton_kernels  # noqa: F401

        if launches:
            import triton

            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of many kinds, by what is missing
        return f"{type(error).__name__}: {error}"
    return None


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device; None if they can.

    Triton's interpreter, which ``TRITON_INTERPRET=1`` asks for before Triton is imported, runs them on CPUs, slowly.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    is_gpu = device.type == "cuda" and torch.cuda.is_available()  # and no fake one
    if device.type == "cpu" and not is_interpreted:
        return "Triton has no kernels for CPUs"
    if device.type not in ("cuda", "cpu"):
        return f"Triton has no kernels for devices of type {device.type}"
    if is_gpu and is_interpreted:
        return "TRITON_INTERPRET is set, and Triton's interpreter cannot read the memory of a GPU: unset it"
    if is_gpu and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, which would read tables of this step again, and they are gone by then"
    if is_gpu and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {MIN_CAPABILITY}"
    if (error := _error(launches=False)) is not None:
        return f"Triton cannot be imported ({error}): pip install triton"
    if is_gpu and (error := _error(launches=True)) is not None:
        return f"Triton cannot launch kernels ({error})"
    return None


# M <- M + G


def accumulate(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    opens: Sequence[Tensor | None] | None = None,
    bits: Sequence[RandomBits | None] | None = None,
) -> list[Tensor]:
    """M <- M + G in place, and return the sums of |M| over every slice, as M is then stored.

    Args:
        momenta: (count, n, m) each.
        gradients: Of the same shapes. Where it is None M stays as it is, and only its sums are taken.
        opens: Boolean, 0-d or (count, 1, 1): where false G counts as zero, whatever it holds (default: None, always
            true).
        bits: How to round M in half precision stochastically (default: None, to the nearest numbers).

    Returns:
        (count, n) each, in float64: views of one buffer, in the order given.
    """
    device = _checked("momenta", momenta)
    _checked("gradients", gradients, _shapes(momenta), device)
    _check_numbers("opens", opens := _each(opens, len(momenta)), torch.bool, momenta)
    slice_hashes, entry_hashes = _hashes(bits, momenta)
    sizes = [each.shape[0] * each.shape[1] for each in momenta]
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    torch.ops.dion2.accumulate(momenta, gradients, opens, slice_hashes, entry_hashes, sums)
    return [each.view(of.shape[:2]) for each, of in zip(sums.split(sizes), momenta, strict=True)]


@torch.library.custom_op("dion2::accumulate", mutates_args=("momenta", "sums"))
def _accumulate(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    opens: Sequence[Tensor | None],
    slice_hashes: Sequence[Tensor | None],
    entry_hashes: Sequence[Tensor | None],
    sums: Tensor,
) -> None:
    rows: list[Launch] = []
    address = sums.data_ptr()
    for momentum, gradient, is_open, slice_hash, entry_hash in zip(
        momenta, gradients, opens, slice_hashes, entry_hashes, strict=True
    ):
        count, n, m = momentum.shape
        along = _runs_along(momentum)
        tile = TILES[along]
        of_momentum, of_gradient = _view(momentum, along), _view(gradient, along)
        constants = {
            "M_TYPE": momentum.dtype,
            "G_TYPE": None if gradient is None else gradient.dtype,
            "ALONG": along,
            "M_UNIT": of_momentum.is_unit,
            "G_UNIT": of_gradient.is_unit,
            "ALIGNED": of_momentum.is_aligned and of_gradient.is_aligned,
            "STOCHASTIC": slice_hash is not None,
            "SLICES": tile.slices,
            "ENTRIES": tile.entries,
        }
        numbers = [
            *(n, m, 0),
            *(*of_momentum.numbers, *of_gradient.numbers, *_gate(is_open)),
            *(*_vector(slice_hash, -2), *_vector(entry_hash, -1), address),
        ]
        rows.append((constants, count, _blocks(n, tile.slices), numbers))
        address += count * n * sums.itemsize
    _launch("accumulate", rows, sums.device)


# S <- M[K], M[K] <- mu M[K]


def take(
    momenta: Sequence[Tensor],
    indices: Sequence[Tensor],
    factors: Sequence[float | Tensor],
    dtype: torch.dtype,
    *,
    gradients: Sequence[Tensor | None] | None = None,
    nesterov_factors: Sequence[float | Tensor] | None = None,
    opens: Sequence[Tensor | None] | None = None,
    bits: Sequence[RandomBits | None] | None = None,
) -> list[Tensor]:
    """Return S = M[K], or G[K] + mu M[K] with Nesterov; then M[K] <- mu M[K], in place.

    Args:
        momenta: (count, n, m) each.
        indices: K, int64 (count, k), k of each matrix's slices.
        factors: What M[K] is multiplied by: mu, or a float32 tensor of it, 0-d or (count, 1, 1).
        dtype: Of S.
        gradients: With Nesterov: of the shapes of the momenta; None where there is none (default: None, no Nesterov).
        nesterov_factors: With Nesterov: the mu in S, also in a step that is skipped; in the same ways.
        opens: With Nesterov: as in :func:`accumulate`.
        bits: Of the whole of M: how to round it in half precision stochastically (default: None, to the nearest).

    Returns:
        (count, k, m) each, in the memory order of the momenta. Those of one (k, m) and memory order lie one after
        another in the order given: see :func:`adjacent`.
    """
    count = len(momenta)
    device = _checked("momenta", momenta)
    if (gradients is None) != (nesterov_factors is None):
        raise ValueError("gradients and nesterov_factors belong together: give both, or neither")
    _checked("gradients", gradients := _each(gradients, count), _shapes(momenta), device)
    _check_count("nesterov_factors", nesterov_factors or momenta, momenta)
    _check_numbers("opens", opens := _each(opens, count), torch.bool, momenta)
    constants, tensors = _split("factors", factors, momenta)
    shapes = _selected_shapes(indices, momenta)
    stacks = _empty(shapes, [_runs_along(each) for each in momenta], [dtype] * count, device)
    torch.ops.dion2.take(
        momenta,
        gradients,
        indices,
        constants,
        tensors,
        *_split("nesterov_factors", nesterov_factors or [1.0] * len(momenta), momenta),
        nesterov_factors is not None,
        opens,
        *_hashes(bits, momenta),
        stacks,
    )
    return stacks


@torch.library.custom_op("dion2::take", mutates_args=("momenta", "stacks"))
def _take(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    factors: Sequence[float],
    factor_tensors: Sequence[Tensor | None],
    nesterov_factors: Sequence[float],
    nesterov_tensors: Sequence[Tensor | None],
    nesterov: bool,
    opens: Sequence[Tensor | None],
    slice_hashes: Sequence[Tensor | None],
    entry_hashes: Sequence[Tensor | None],
    stacks: Sequence[Tensor],
) -> None:
    rows: list[Launch] = []
    for number, (momentum, gradient, its_indices, stack, slice_hash, entry_hash) in enumerate(
        zip(momenta, gradients, indices, stacks, slice_hashes, entry_hashes, strict=True)
    ):
        count, n, m = momentum.shape
        k = its_indices.shape[1]
        along = _runs_along(momentum)
        tile = TILES[along]
        views = of_momentum, of_gradient, of_stack = [_view(each, along) for each in (momentum, gradient, stack)]
        constants = {
            "M_TYPE": momentum.dtype,
            "G_TYPE": None if gradient is None else gradient.dtype,
            "S_TYPE": stack.dtype,
            "NESTEROV": nesterov,
            "ALONG": along,
            "M_UNIT": of_momentum.is_unit,
            "G_UNIT": of_gradient.is_unit,
            "ALIGNED": along and all(each.is_aligned for each in views),  # single columns never are
            "STOCHASTIC": slice_hash is not None,
            **tile._asdict(),
        }
        numbers = [
            *(n, m, k),
            *(*of_momentum.numbers, *of_gradient.numbers, *of_stack.numbers, *_gate(opens[number])),
            *_scalar(factors[number], factor_tensors[number]),
            *_scalar(nesterov_factors[number], nesterov_tensors[number]),
            *(its_indices.data_ptr(), *its_indices.stride()),
            *(*_vector(slice_hash, -2), *_vector(entry_hash, -1)),
        ]
        rows.append((constants, count, _blocks(k, tile.slices) * _blocks(m, tile.span), numbers))
    if rows:
        _launch("take", rows, momenta[0].device)


def adjacent(stacks: Sequence[Tensor]) -> Tensor | None:
    """Return stacks of one shape (k, m) that lie one after another in memory as one stack, a view; else None.

    Args:
        stacks: (count, k, m) each, at least one.
    """
    first = stacks[0]
    storage, offset, (step, *_) = first.untyped_storage(), first.storage_offset(), first.stride()
    for each in stacks:
        is_like = each.shape[1:] == first.shape[1:] and each.stride() == first.stride() and each.dtype == first.dtype
        if not is_like or each.untyped_storage() is not storage or each.storage_offset() != offset:
            return None
        offset += len(each) * step
    return first.as_strided((sum(map(len, stacks)), *first.shape[1:]), first.stride())


# Before the products


def normalize(stacks: Sequence[Tensor], safety: float, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return matrices divided by ``safety`` times their Frobenius norms; a zero matrix stays zero.

    Args:
        stacks: (count, k, m) each.
        safety: A little more than 1.
        dtypes: What each result is rounded to.

    Returns:
        Of the same shapes and memory orders, without gaps.
    """
    device = _checked("stacks", stacks)
    shapes = [tuple(each.shape) for each in stacks]
    results = _empty(shapes, [_runs_along(each) for each in stacks], dtypes, device)
    partial = torch.empty(sum(map(len, stacks)) * PARTS, dtype=torch.float64, device=device)
    torch.ops.dion2.normalize(stacks, safety, partial, results)
    return results


@torch.library.custom_op("dion2::normalize", mutates_args=("partial", "results"))
def _normalize(stacks: Sequence[Tensor], safety: float, partial: Tensor, results: Sequence[Tensor]) -> None:
    sums: list[Launch] = []
    quotients: list[Launch] = []
    address = partial.data_ptr()
    for stack, result in zip(stacks, results, strict=True):
        count, k, m = stack.shape
        along = _runs_along(stack)
        tile = TILES[along]
        of_stack, of_result = _view(stack, along), _view(result, along)
        constants = {
            "S_TYPE": stack.dtype,
            "O_TYPE": result.dtype,
            "ALONG": along,
            "S_UNIT": of_stack.is_unit,
            "ALIGNED": of_stack.is_aligned and of_result.is_aligned,
            **tile._asdict(),
            "PARTS": PARTS,
        }
        numbers = [k, m, 0, *of_stack.numbers, *of_result.numbers, address, _bits("d", safety)]
        blocks = _blocks(k, tile.slices) * _blocks(m, tile.entries)
        sums.append((constants, count, min(blocks, PARTS), numbers))
        quotients.append((constants, count, _blocks(k, tile.slices) * _blocks(m, tile.span), numbers))
        address += count * PARTS * partial.itemsize
    _launch("square_sums", sums, partial.device)
    _launch("divide", quotients, partial.device)


# The neurons of O


def square_sums(results: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Return the sums of squares of the entries of every neuron.

    Args:
        results: O, (count, k, m) each.
        dims: For each stack the dimension along which the entries of a neuron lie: -1 or -2.

    Returns:
        (count, k) each, or (count, m) for dimension -2, in float64: views of one buffer, in the order given.
    """
    device = _checked("results", results)
    _check_count("dims", dims, results)
    for number, dim in enumerate(dims):
        if dim not in (-1, -2):
            raise ValueError(f"dims[{number}] must be -1 or -2, the entries or the slices of a stack, got {dim}")
    stacks = [each if dim == -1 else each.mT for each, dim in zip(results, dims, strict=True)]
    sizes = [each.shape[0] * each.shape[1] for each in stacks]
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    torch.ops.dion2.square_sums(stacks, sums)
    return [each.view(of.shape[:2]) for each, of in zip(sums.split(sizes), stacks, strict=True)]


@torch.library.custom_op("dion2::square_sums", mutates_args=("sums",))
def _square_sums(stacks: Sequence[Tensor], sums: Tensor) -> None:
    rows: list[Launch] = []
    address = sums.data_ptr()
    for stack in stacks:
        count, n, m = stack.shape
        along = _runs_along(stack)
        tile = TILES[along]
        of_stack = _view(stack, along)
        constants = {
            "O_TYPE": stack.dtype,
            "ALONG": along,
            "O_UNIT": of_stack.is_unit,
            "ALIGNED": of_stack.is_aligned,
            "SLICES": tile.slices,
            "ENTRIES": tile.entries,
        }
        rows.append((constants, count, _blocks(n, tile.slices), [n, m, 0, *of_stack.numbers, address]))
        address += count * n * sums.itemsize
    _launch("neuron_sums", rows, sums.device)


def neuron_factors(
    sums: Sequence[Tensor],
    variances: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    sizes: Sequence[int],
    weights: Sequence[float | Tensor],
    eps: float,
) -> list[Tensor]:
    """Update v <- v + weight (sum / size - v), in place, and return what each neuron of O is multiplied by.

    It is 1 / (sqrt(v) + eps), times what makes the matrix as long as it was.

    Args:
        sums: Of the squares of the entries of every neuron, (count, neurons) each, in float64 or float32.
        variances: v, float32 (count, out) each.
        indices: Which of the ``out`` the neurons are, int64 (count, neurons); None where they are all.
        sizes: How many entries a neuron has.
        weights: Of the new mean squares, or float32 tensors of them, 0-d or with one for each matrix.
        eps: A small number.

    Returns:
        (count, neurons) each, in float32: views of one buffer, in the order given.
    """
    device = _checked_sums(sums)
    for name, values in (("variances", variances), ("indices", indices), ("sizes", sizes)):
        _check_count(name, values, sums)
    _check_numbers("variances", variances, torch.float32, sums)
    _check_numbers("indices", indices, torch.int64, sums)
    for number, (each, variance, its_indices) in enumerate(zip(sums, variances, indices, strict=True)):
        wanted = tuple(each.shape)
        if its_indices is not None and its_indices.shape != each.shape:
            raise ValueError(f"indices[{number}] must have the shape {wanted}, but it has {tuple(its_indices.shape)}")
        is_whole = its_indices is None
        if variance.ndim != 2 or len(variance) != len(each) or (is_whole and variance.shape != each.shape):
            raise ValueError(
                f"variances[{number}] must have one number for each neuron of {wanted}, but it has the shape "
                f"{tuple(variance.shape)}"
            )
    constants, weight_tensors = _split("weights", weights, sums)
    numbers = [each.numel() for each in sums]
    factors = torch.empty(sum(numbers), dtype=torch.float32, device=device)
    torch.ops.dion2.neuron_factors(sums, variances, indices, sizes, constants, weight_tensors, eps, factors)
    return [each.view(of.shape) for each, of in zip(factors.split(numbers), sums, strict=True)]


@torch.library.custom_op("dion2::neuron_factors", mutates_args=("variances", "factors"))
def _neuron_factors(
    sums: Sequence[Tensor],
    variances: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    sizes: Sequence[int],
    weights: Sequence[float],
    weight_tensors: Sequence[Tensor | None],
    eps: float,
    factors: Tensor,
) -> None:
    rows: list[Launch] = []
    address = factors.data_ptr()
    for number, (each, variance, its_indices, size) in enumerate(zip(sums, variances, indices, sizes, strict=True)):
        count, neurons = each.shape
        constants = {"S_TYPE": each.dtype, "INDEXED": its_indices is not None, "NEURONS": NEURONS}
        numbers = [
            *(neurons, 0, 0),
            *(each.data_ptr(), *each.stride()),
            *(variance.data_ptr(), *variance.stride()),
            *((0, 0, 0) if its_indices is None else (its_indices.data_ptr(), *its_indices.stride())),
            *_scalar(weights[number], weight_tensors[number]),
            *(_bits("f", 1.0 / size), _bits("d", eps), address),
        ]
        rows.append((constants, count, min(neurons, 1), numbers))
        address += count * neurons * factors.itemsize
    _launch("neuron_factors", rows, factors.device)


# X <- (1 - lr weight_decay) X, X[K] <- X[K] - lr scale O


def apply(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    results: Sequence[Tensor],
    step_sizes: Sequence[float | Tensor],
    shrinks: Sequence[float | Tensor],
    *,
    factors: Sequence[Tensor | None] | None = None,
    factor_dims: Sequence[int] | None = None,
    cautious: Sequence[Tensor | None] | None = None,
    bits: Sequence[RandomBits | None] | None = None,
) -> None:
    """X <- shrink X, and X[K] <- X[K] - step_size O, in place; in half precision rounded once.

    Where ``shrink`` is the float 1.0, only the selected slices are read and written.

    Args:
        weights: (count, n, m) each.
        indices: K, int64 (count, k), sorted.
        results: O, (count, k, m) each.
        step_sizes: Numbers, or float32 tensors of them, 0-d or (count, 1, 1).
        shrinks: In the same way.
        factors: What each neuron of O is multiplied by as well, in float32: (count, k), or (count, m) where every entry
            of a slice belongs to another neuron (default: None, by nothing).
        factor_dims: For each stack the dimension of O along which the entries of a neuron lie: -1 for (count, k), -2
            for (count, m) (default: None, -1).
        cautious: M, (count, n, m), where the decay is cautious: an entry shrinks unless O, or M where it is not
            selected, has the opposite sign (default: None, all shrink).
        bits: Of the whole of X: how to round it in half precision stochastically (default: None, to the nearest).
    """
    count = len(weights)
    device = _checked("weights", weights)
    _checked("results", results, _selected_shapes(indices, weights), device)
    _checked("cautious", cautious := _each(cautious, count), _shapes(weights), device)
    steps, step_tensors = _split("step_sizes", step_sizes, weights)
    constants, shrink_tensors = _split("shrinks", shrinks, weights)
    factor_dims = [-1] * count if factor_dims is None else factor_dims
    _check_numbers("factors", factors := _each(factors, count), torch.float32, weights)
    for number, (factor, dim, result) in enumerate(zip(factors, factor_dims, results, strict=True)):
        if factor is not None and factor.shape != (len(result), result.shape[-2 if dim == -1 else -1]):
            raise ValueError(
                f"factors[{number}] must have one number for each neuron of {tuple(result.shape)}, whose entries lie "
                f"along dimension {dim}, but it has the shape {tuple(factor.shape)}"
            )
    torch.ops.dion2.apply(
        weights,
        indices,
        results,
        steps,
        step_tensors,
        constants,
        shrink_tensors,
        factors,
        factor_dims,
        cautious,
        *_hashes(bits, weights),
    )


@torch.library.custom_op("dion2::apply", mutates_args=("weights",))
def _apply(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    results: Sequence[Tensor],
    step_sizes: Sequence[float],
    step_tensors: Sequence[Tensor | None],
    shrinks: Sequence[float],
    shrink_tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    factor_dims: Sequence[int],
    momenta: Sequence[Tensor | None],
    slice_hashes: Sequence[Tensor | None],
    entry_hashes: Sequence[Tensor | None],
) -> None:
    rows: list[Launch] = []
    for number, (weight, its_indices, result, slice_hash, entry_hash) in enumerate(
        zip(weights, indices, results, slice_hashes, entry_hashes, strict=True)
    ):
        count, n, m = weight.shape
        k = its_indices.shape[1]
        along = _runs_along(weight)
        tile = TILES[along]
        decays = _decays(shrinks[number], shrink_tensors[number])
        momentum = momenta[number] if decays else None
        factor = factors[number]
        of_weight, of_result, of_momentum = [_view(each, along) for each in (weight, result, momentum)]
        are_aligned = of_weight.is_aligned and of_momentum.is_aligned
        constants = {
            "X_TYPE": weight.dtype,
            "O_TYPE": result.dtype,
            "M_TYPE": None if momentum is None else momentum.dtype,
            "DECAYS": decays,
            "HAS_FACTORS": factor is not None,
            "FACTORS_OF_SLICES": factor_dims[number] == -1,
            "ALONG": along,
            "X_UNIT": of_weight.is_unit,
            "O_UNIT": of_result.is_unit,
            "M_UNIT": of_momentum.is_unit,
            "ALIGNED": are_aligned and (of_result.is_aligned if along else decays),  # single columns never are
            "STOCHASTIC": slice_hash is not None,
            **tile._asdict(),
        }
        numbers = [
            *(n, m, k),
            *(*of_weight.numbers, *of_result.numbers, *of_momentum.numbers),
            *_scalar(step_sizes[number], step_tensors[number]),
            *_scalar(shrinks[number], shrink_tensors[number]),
            *(its_indices.data_ptr(), *its_indices.stride()),
            *(*_vector(slice_hash, -2), *_vector(entry_hash, -1)),
            *((0, 0, 0) if factor is None else (factor.data_ptr(), *factor.stride())),
        ]
        slices = n if decays else k
        rows.append((constants, count, _blocks(slices, tile.slices) * _blocks(m, tile.span), numbers))
    if rows:
        _launch("apply", rows, weights[0].device)


def _decays(shrink: float, tensor: Tensor | None) -> bool:
    return tensor is not None or shrink != 1.0


# torch traces the operators without data: they return nothing.
for _operator in (_accumulate, _take, _normalize, _square_sums, _neuron_factors, _apply):
    _operator.register_fake(lambda *_: None)


# Traffic


def traffic(name: str, arguments: tuple[Any, ...], result: object = None) -> tuple[int, int]:
    """Return how many bytes a call of the operator ``dion2::name`` reads and writes.

    Left out is what it reads of small tables: numbers by matrix, slice or entry, indices, and hashes. Of single columns
    a GPU moves more than they have: what lies between them in the same 32 bytes.

    Args:
        name: Such as "accumulate".
        arguments: All of the call, positional.
        result: What it returned: nothing.

    Raises:
        KeyError: If there is no such operator.
    """
    return _TRAFFIC[name](*arguments)


def launches(name: str, arguments: tuple[Any, ...]) -> int:
    """Return how many launches a call of the operator ``dion2::name`` takes, the copy of its table among them.

    It is one for each memory order and dtype of the matrices, twice in ``normalize``; addresses and sizes that are not
    multiples of 16 may add to that. In ``neuron_factors`` it is one where slices are neurons, one where they are not.
    """
    if name == "neuron_factors":
        sums, _, indices, *_ = arguments
        return 1 + len({(each.dtype, which is None) for each, which in zip(sums, indices, strict=True)})
    kinds = {(each.dtype, _runs_along(each), 1 in each.stride()[1:]) for each in arguments[0]}
    return 1 + len(kinds) * (2 if name == "normalize" else 1)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _accumulate_traffic(momenta: Sequence[Tensor], gradients: Sequence[Tensor | None], *others: Any) -> tuple[int, int]:
    pairs = [(momentum, each) for momentum, each in zip(momenta, gradients, strict=True) if each is not None]
    read = sum(map(_size, momenta)) + sum(_size(gradient) for _, gradient in pairs)
    return read, sum(_size(momentum) for momentum, _ in pairs) + _size(others[-1])


def _take_traffic(momenta: Sequence[Tensor], gradients: Sequence[Tensor | None], *others: Any) -> tuple[int, int]:
    stacks: Sequence[Tensor] = others[-1]
    of_momenta = sum(stack.numel() * each.itemsize for stack, each in zip(stacks, momenta, strict=True))
    of_gradients = sum(
        stack.numel() * each.itemsize for stack, each in zip(stacks, gradients, strict=True) if each is not None
    )
    return of_momenta + of_gradients, of_momenta + sum(map(_size, stacks))


def _normalize_traffic(
    stacks: Sequence[Tensor], safety: float, partial: Tensor, results: Sequence[Tensor]
) -> tuple[int, int]:
    return 2 * sum(map(_size, stacks)), sum(map(_size, results))


def _square_sums_traffic(stacks: Sequence[Tensor], sums: Tensor) -> tuple[int, int]:
    return sum(map(_size, stacks)), _size(sums)


def _neuron_factors_traffic(sums: Sequence[Tensor], variances: Sequence[Tensor], *others: Any) -> tuple[int, int]:
    factors: Tensor = others[-1]
    return 2 * (sum(map(_size, sums)) + _size(factors)), 2 * _size(factors)  # v of a neuron is as large as its factor


def _apply_traffic(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    results: Sequence[Tensor],
    step_sizes: Sequence[float],
    step_tensors: Sequence[Tensor | None],
    shrinks: Sequence[float],
    shrink_tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    factor_dims: Sequence[int],
    momenta: Sequence[Tensor | None],
    *hashes: Any,
) -> tuple[int, int]:
    read = written = 0
    for weight, result, shrink, tensor, momentum in zip(
        weights, results, shrinks, shrink_tensors, momenta, strict=True
    ):
        touched = weight.numel() if _decays(shrink, tensor) else result.numel()
        read += touched * weight.itemsize + _size(result)
        written += touched * weight.itemsize
        if momentum is not None and _decays(shrink, tensor):
            read += (momentum.numel() - result.numel()) * momentum.itemsize
    return read, written


_TRAFFIC: Final[dict[str, Callable[..., tuple[int, int]]]] = {
    "accumulate": _accumulate_traffic,
    "take": _take_traffic,
    "normalize": _normalize_traffic,
    "square_sums": _square_sums_traffic,
    "neuron_factors": _neuron_factors_traffic,
    "apply": _apply_traffic,
}


# Arguments


def _checked(
    name: str,
    stacks: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]] | None = None,
    device: torch.device | None = None,
) -> torch.device | None:
    """Check stacks, for shapes and a device if given, and return their device; None where there are no stacks."""
    _check_count(name, stacks, stacks if shapes is None else shapes)
    for number, stack in enumerate(stacks):
        if stack is None:
            continue
        if stack.ndim != 3 or (shapes is not None and stack.shape != shapes[number]):
            wanted = "(count, n, m)" if shapes is None else tuple(shapes[number])
            raise ValueError(f"{name}[{number}] must have the shape {wanted}, but it has {tuple(stack.shape)}")
        if stack.dtype not in DTYPES:
            raise TypeError(f"{name}[{number}] is in {stack.dtype}: use one of {DTYPES}, or the kernels of torch")
        device = stack.device if device is None else device
        if stack.device != device:
            raise ValueError(
                f"{name}[{number}] is on {stack.device}, others are on {device}: call once for each device"
            )
    return device


def _check_numbers(name: str, tensors: Sequence[Tensor | None], dtype: torch.dtype, stacks: Sequence[Tensor]) -> None:
    """Check numbers of matrices. Kernels get addresses alone: they would read what is not there."""
    _check_count(name, tensors, stacks)
    for number, (tensor, stack) in enumerate(zip(tensors, stacks, strict=True)):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.device != stack.device:
            wanted = f"in {dtype} on {stack.device}"
            raise TypeError(f"{name}[{number}] must be {wanted}, but it is in {tensor.dtype} on {tensor.device}")
        if tensor.ndim > 0 and len(tensor) not in (1, len(stack)):
            raise ValueError(f"{name}[{number}] has numbers for {len(tensor)} matrices; there are {len(stack)}")


def _checked_sums(sums: Sequence[Tensor]) -> torch.device | None:
    """Check sums by neuron, and return their device; None where there are none."""
    device = sums[0].device if sums else None
    for number, each in enumerate(sums):
        if each.ndim != 2:
            raise ValueError(f"sums[{number}] must have the shape (count, neurons), but it has {tuple(each.shape)}")
        if each.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"sums[{number}] must be in torch.float64 or torch.float32, but it is in {each.dtype}")
        if each.device != device:
            raise ValueError(f"sums[{number}] is on {each.device}, others are on {device}: call once for each device")
    return device


def _check_count(name: str, values: Sequence[Any], stacks: Sequence[Any]) -> None:
    if len(values) != len(stacks):
        raise ValueError(f"{name}: {len(values)} for {len(stacks)} stacks; there must be one for each")


def _shapes(stacks: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [stack.shape for stack in stacks]


def _selected_shapes(indices: Sequence[Tensor], stacks: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Check the indices, and return the shapes (count, k, m) of what they select."""
    _check_numbers("indices", indices, torch.int64, stacks)
    for number, (each, stack) in enumerate(zip(indices, stacks, strict=True)):
        if each.ndim != 2 or len(each) != len(stack):
            raise ValueError(f"indices[{number}] must have the shape ({len(stack)}, k), but it has {tuple(each.shape)}")
    return [(*each.shape, stack.shape[2]) for each, stack in zip(indices, stacks, strict=True)]


def _each(values: Sequence[Tensor | None] | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if values is None else values


def _split(
    name: str, numbers: Sequence[float | Tensor], stacks: Sequence[Tensor]
) -> tuple[list[float], list[Tensor | None]]:
    """Take numbers and tensors of numbers apart."""
    tensors = [each if isinstance(each, Tensor) else None for each in numbers]
    _check_numbers(name, tensors, torch.float32, stacks)
    return [0.0 if isinstance(each, Tensor) else float(each) for each in numbers], tensors


def _hashes(
    bits: Sequence[RandomBits | None] | None, stacks: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Take random bits apart: the hashes of slices, (count or 1, n, 1), and those of entries, (count or 1, 1, m)."""
    of_slices: list[Tensor | None] = [None] * len(stacks)
    of_entries: list[Tensor | None] = [None] * len(stacks)
    if bits is None:
        return of_slices, of_entries
    _check_count("bits", bits, stacks)
    for number, each in enumerate(bits):
        if each is not None and stacks[number].dtype in HALF_PRECISION:
            is_transposed = each.rows.shape[-1] != 1 or each.columns.shape[-2] != 1
            of_slices[number], of_entries[number] = reversed(each) if is_transposed else each
    _check_numbers("bits", of_slices, torch.int32, stacks)
    _check_numbers("bits", of_entries, torch.int32, stacks)
    return of_slices, of_entries


def _empty(
    shapes: Sequence[tuple[int, ...]], along: Sequence[bool], dtypes: Sequence[torch.dtype], device: torch.device | None
) -> list[Tensor]:
    """Make stacks (count, k, m), those of one (k, m), memory order and dtype one after another in one buffer."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, (shape, its_along, dtype) in enumerate(zip(shapes, along, dtypes, strict=True)):
        groups.setdefault((*shape[1:], its_along, dtype), []).append(number)
    stacks: dict[int, Tensor] = {}
    for (k, m, its_along, dtype), numbers in groups.items():
        counts = [shapes[number][0] for number in numbers]
        buffer = torch.empty((sum(counts), *((k, m) if its_along else (m, k))), dtype=dtype, device=device)
        stacks.update(zip(numbers, (buffer if its_along else buffer.mT).split(counts), strict=True))
    return [stacks[number] for number in range(len(shapes))]


# The memory order of a stack


def _runs_along(stack: Tensor) -> bool:
    """Whether its memory is dense along slices, and not across them."""
    return stack.is_contiguous() or stack.stride(-1) < stack.stride(-2)


# The table, column by column


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class _View(NamedTuple):
    """What a kernel knows of a stack.

    Attributes:
        numbers: Address, strides of (count, n, m).
        is_unit: Whether the stride along which memory is dense is 1.
        is_aligned: Whether, beyond that, the address is a multiple of 16 bytes, and the other strides and the size of
            this dimension are multiples of 16.
    """

    numbers: tuple[int, ...]
    is_unit: bool
    is_aligned: bool


_NO_VIEW: Final = _View((0, 0, 0, 0), True, True)


def _view(stack: Tensor | None, along: bool) -> _View:
    if stack is None:
        return _NO_VIEW
    address, (of_matrices, of_slices, of_entries) = stack.data_ptr(), stack.stride()
    dense, other = (of_entries, of_slices) if along else (of_slices, of_entries)
    multiples = address | of_matrices | other | stack.shape[-1 if along else -2]
    return _View((address, of_matrices, of_slices, of_entries), dense == 1, dense == 1 and multiples % 16 == 0)


def _vector(numbers: Tensor | None, dim: int) -> tuple[int, int, int]:
    """One of three axes, of which one has a number for each slice or entry; an axis of size 1 is the same for all."""
    if numbers is None:
        return 0, 0, 0
    of_matrices, of_numbers = (numbers.stride(each) if numbers.shape[each] > 1 else 0 for each in (0, dim))
    return numbers.data_ptr(), of_matrices, of_numbers


def _gate(tensor: Tensor | None) -> tuple[int, int]:
    """0-d, or one for each matrix."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), tensor.stride(0) if tensor.ndim > 0 and len(tensor) > 1 else 0


def _scalar(constant: float, tensor: Tensor | None) -> tuple[int, int, int]:
    return *_gate(tensor), _bits("f", constant)


def _bits(kind: str, number: float) -> int:
    """The bits of a number in float32, "f", or float64, "d"."""
    bits: int = struct.unpack({"f": "=i", "d": "=q"}[kind], struct.pack(f"={kind}", number))[0]
    return bits


def _launch(kernel: str, launches: Iterable[Launch], device: torch.device) -> None:
    """Launch a kernel once for each set of constants, after one copy of all tables to the device."""
    from dion2_lightning.kernels import triton_kernels

    groups: dict[tuple[tuple[str, Any], ...], list[tuple[int, int, list[int]]]] = {}
    for constants, count, tiles, numbers in launches:
        if count * tiles > 0:
            groups.setdefault(tuple(constants.items()), []).append((count, tiles, numbers))
    if not groups:
        return
    table: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for group in groups.values():
        begin, matrices = len(table), sum(count for count, *_ in group)
        rows: list[int] = []
        first = 0
        for count, _, numbers in group:
            table += [matrices + len(rows)] * count
            rows += first, *numbers
            first += count
        table += rows
        grids.append((begin, matrices, max(tiles for _, tiles, _ in group)))
    on_gpu = device.type == "cuda"
    on_host = torch.frombuffer(array("q", table), dtype=torch.int64)  # of a list torch takes twice as long
    on_device = on_host.pin_memory().to(device, non_blocking=True) if on_gpu else on_host
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for names, (begin, matrices, tiles) in zip(groups, grids, strict=True):
            named = {name.upper(): triton_kernels.TYPES.get(value, value) for name, value in names}
            getattr(triton_kernels, kernel)[(matrices * tiles,)](
                on_device[begin:], tiles, **named, num_warps=4, enable_fp_fusion=False
            )
