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
Where a stack of M, G, X or v lies in several pieces that are alike, the list has the pieces, and ``pieces`` says how
many belong to each stack.
Each is a custom operator ``dion2::...``, so that torch can trace it without data. What the operators know of every
matrix is sent to the device in one small copy; the host waits for nothing.

There is one launch for all that is alike but for shapes and numbers, and one compilation for each kind of launch. What
is aligned to 16 bytes, and has sizes that are multiples of 16, is of a kind of its own.
"""

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dion2_lightning.kernels.rounding import RandomBits
from dion2_lightning.kernels.stacks import empty_stacks, runs_along
from dion2_lightning.kernels.triton_launch import (
    Passes,
    TableRows,
    bits_of,
    blocks_in,
    check_count,
    check_dims,
    check_dtype,
    check_numbers,
    checked_pieces,
    checked_stacks,
    checked_sums,
    cut,
    each_of,
    gates_of,
    hashes_of,
    in_pieces,
    numbers_and_tensors,
    operator,
    places_of,
    scalars_of,
    selected_shapes,
    shapes_of,
    table_rows,
    vectors_of,
    view_in_pieces,
    view_of,
    wholes,
)

MIN_CAPABILITY: Final = (8, 0)
"""The oldest GPUs of NVIDIA that convert to bfloat16."""

PARTS: Final = 128
"""In how many parts, at most, the squares of a matrix are summed."""

NEURONS: Final = 1024
"""Of how many neurons a program works out the factors at a time. A power of 2."""

_TRUE_WORDS: Final = ("1", "on", "true", "y", "yes")
"""Values of environment variables that Triton takes for true, in any case."""


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


@cache
def _import_error() -> str | None:
    """Return why Triton cannot be imported; None if it can."""
    try:
        from dion2_lightning.kernels import triton_kernels  # noqa: F401
    except Exception as error:  # of many kinds, by what is missing
        return f"{type(error).__name__}: {error}"
    return None


@cache
def _launch_error(device: torch.device) -> str | None:
    """Return why Triton cannot launch kernels on a GPU; None if it can. It needs a C compiler, and Python's headers.

    A kernel is launched to see: in a step it would be too late for torch to take its place.
    """
    try:
        import triton

        from dion2_lightning.kernels import triton_kernels

        triton.runtime.driver.active.get_current_target()
        with torch.cuda.device(device), _disable_current_modes():  # a fake tensor has no memory
            triton_kernels.set_one[(1,)](torch.empty(1, device=device))
    except torch.OutOfMemoryError:  # says nothing about kernels
        raise
    except Exception as error:  # of many kinds, by what is missing
        return f"{type(error).__name__}: {error}"
    return None


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device; None if they can.

    Triton's interpreter, which ``TRITON_INTERPRET=1`` asks for before Triton is imported, runs them on CPUs, slowly.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE_WORDS
    is_gpu = device.type == "cuda" and torch.cuda.is_available()  # and no fake one
    if device.type == "cpu" and not is_interpreted:
        return "Triton has no kernels for CPUs"
    if device.type not in ("cuda", "cpu"):
        return f"Triton has no kernels for devices of type {device.type}"
    if is_gpu and is_interpreted:
        return "TRITON_INTERPRET is set, and Triton's interpreter cannot read the memory of a GPU: unset it"
    if is_gpu and is_capturing():
        return "a CUDA graph is being captured, which would read tables of this step again, and they are gone by then"
    if is_gpu and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {MIN_CAPABILITY}"
    if (error := _import_error()) is not None:
        return f"Triton cannot be imported ({error}): pip install triton"
    if is_gpu and (error := _launch_error(device)) is not None:
        return f"Triton cannot launch kernels ({error})"
    return None


def are_default(device: torch.device) -> bool:
    """Return whether the kernels take the place of torch's operations by default: on CUDA devices that can run them.

    One that cannot is warned of once, unless it is because a step is captured, or because there is no GPU.
    """
    if device.type != "cuda":
        return False
    reason = unavailable(device)
    if reason is not None and torch.cuda.is_available() and not is_capturing():
        _warn(device, reason)
    return reason is None


@cache
def _warn(device: torch.device, reason: str) -> None:
    warnings.warn(f"operations of torch take the place of fused kernels on {device}: {reason}", stacklevel=2)


def is_capturing() -> bool:
    """Return whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# M <- M + G


def accumulate(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    pieces: Sequence[int] | None = None,
    opens: Sequence[Tensor | None] | None = None,
    bits: Sequence[RandomBits | None] | None = None,
) -> list[Tensor]:
    """M <- M + G in place, and return the sums of |M| over every slice, as M is then stored.

    Args:
        momenta: (count, n, m) each.
        gradients: Of the same shapes. Where it is None M stays as it is, and only its sums are taken.
        pieces: How many momenta form each stack (default: None, one).
        opens: Boolean, 0-d or (count, 1, 1) for each stack: where false G counts as zero, whatever it holds (default:
            None, always true).
        bits: For each momentum how to round it in half precision stochastically (default: None, to the nearest
            numbers).

    Returns:
        (count, n) for each stack, in float64: views of one buffer, in the order given.
    """
    device = checked_stacks("momenta", momenta)
    checked_stacks("gradients", gradients, shapes_of(momenta), device)
    pieces = checked_pieces(pieces, momenta=momenta, gradients=gradients)
    stacks = wholes(momenta, pieces)
    check_numbers("opens", opens := each_of(opens, len(stacks)), torch.bool, stacks)
    hashes = hashes_of(bits, momenta, pieces)
    sizes = [each.shape[0] * each.shape[1] for each in stacks]
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    torch.ops.dion2.accumulate(momenta, gradients, pieces, opens, *hashes, sums)
    return [each.view(of.shape[:2]) for each, of in zip(sums.split(sizes), stacks, strict=True)]


@operator("momenta", "sums")
def _accumulate(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    pieces: Sequence[int],
    opens: Sequence[Tensor | None],
    slice_hashes: Sequence[Tensor | None],
    entry_hashes: Sequence[Tensor | None],
    sums: Tensor,
) -> Passes:
    rows: list[TableRows] = []
    address = sums.data_ptr()
    of_pieces = [cut(each, pieces) for each in (momenta, gradients, slice_hashes, entry_hashes)]
    for its_momenta, its_gradients, of_slices, of_entries, is_open in zip(*of_pieces, opens, strict=True):
        momentum, gradient, number = its_momenta[0], its_gradients[0], len(its_momenta)
        count, n, m = momentum.shape
        along = runs_along(momentum)
        tile = TILES[along]
        of_momentum, of_gradient = view_of(its_momenta, along), view_of(its_gradients, along)
        constants = {
            "M_TYPE": momentum.dtype,
            "G_TYPE": None if gradient is None else gradient.dtype,
            "ALONG": along,
            "M_UNIT": of_momentum.is_unit,
            "G_UNIT": of_gradient.is_unit,
            "ALIGNED": of_momentum.is_aligned and of_gradient.is_aligned,
            "STOCHASTIC": of_slices[0] is not None,
            "SLICES": tile.slices,
            "ENTRIES": tile.entries,
        }
        its_rows = table_rows(
            (n, m, 0),
            *(of_momentum.columns, of_gradient.columns, gates_of(is_open, number)),
            *(vectors_of(of_slices, -2), vectors_of(of_entries, -1)),
            places_of(address, count * n * sums.itemsize, number),
        )
        rows.append((constants, count, blocks_in(n, tile.slices), its_rows))
        address += number * count * n * sums.itemsize
    return [("accumulate", rows)]


# S <- M[K], M[K] <- mu M[K]


def take(
    momenta: Sequence[Tensor],
    indices: Sequence[Tensor],
    factors: Sequence[float | Tensor],
    dtype: torch.dtype,
    *,
    pieces: Sequence[int] | None = None,
    gradients: Sequence[Tensor | None] | None = None,
    nesterov_factors: Sequence[float | Tensor] | None = None,
    opens: Sequence[Tensor | None] | None = None,
    bits: Sequence[RandomBits | None] | None = None,
) -> list[Tensor]:
    """Return S = M[K], or G[K] + mu M[K] with Nesterov; then M[K] <- mu M[K], in place.

    Args:
        momenta: (count, n, m) each.
        indices: K, int64 (count, k) for each stack, k of each matrix's slices.
        factors: What M[K] is multiplied by: mu, or a float32 tensor of it, 0-d or (count, 1, 1), for each stack.
        dtype: Of S.
        pieces: How many momenta form each stack (default: None, one).
        gradients: With Nesterov: of the shapes of the momenta; None where there is none (default: None, no Nesterov).
        nesterov_factors: With Nesterov: the mu in S, also in a step that is skipped; in the same ways.
        opens: With Nesterov: as in :func:`accumulate`.
        bits: Of the whole of M: how to round it in half precision stochastically (default: None, to the nearest).

    Returns:
        (count, k, m) for each stack, in the memory order of the momenta. Those of one (k, m) and memory order lie one
        after another in the order given: see :func:`~dion2_lightning.kernels.stacks.adjacent`.
    """
    check_dtype("dtype", dtype)
    device = checked_stacks("momenta", momenta)
    if (gradients is None) != (nesterov_factors is None):
        raise ValueError("gradients and nesterov_factors belong together: give both, or neither")
    checked_stacks("gradients", gradients := each_of(gradients, len(momenta)), shapes_of(momenta), device)
    pieces = checked_pieces(pieces, momenta=momenta, gradients=gradients)
    stacks = wholes(momenta, pieces)
    check_count("nesterov_factors", nesterov_factors or stacks, stacks)
    check_numbers("opens", opens := each_of(opens, len(stacks)), torch.bool, stacks)
    constants, tensors = numbers_and_tensors("factors", factors, stacks)
    submatrices = empty_stacks(
        selected_shapes(indices, stacks), [each.runs_along for each in stacks], [dtype] * len(stacks), device
    )
    torch.ops.dion2.take(
        momenta,
        gradients,
        pieces,
        indices,
        constants,
        tensors,
        *numbers_and_tensors("nesterov_factors", nesterov_factors or [1.0] * len(stacks), stacks),
        nesterov_factors is not None,
        opens,
        *hashes_of(bits, momenta, pieces),
        submatrices,
    )
    return submatrices


@operator("momenta", "stacks")
def _take(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    pieces: Sequence[int],
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
) -> Passes:
    rows: list[TableRows] = []
    of_pieces = [cut(each, pieces) for each in (momenta, gradients, slice_hashes, entry_hashes)]
    for place, (its_momenta, its_gradients, of_slices, of_entries, its_indices, stack) in enumerate(
        zip(*of_pieces, indices, stacks, strict=True)
    ):
        momentum, gradient, number = its_momenta[0], its_gradients[0], len(its_momenta)
        count, n, m = momentum.shape
        k = its_indices.shape[1]
        along = runs_along(momentum)
        tile = TILES[along]
        of_momentum, of_gradient = view_of(its_momenta, along), view_of(its_gradients, along)
        of_stack = view_in_pieces(stack, along, number)
        constants = {
            "M_TYPE": momentum.dtype,
            "G_TYPE": None if gradient is None else gradient.dtype,
            "S_TYPE": stack.dtype,
            "NESTEROV": nesterov,
            "ALONG": along,
            "M_UNIT": of_momentum.is_unit,
            "G_UNIT": of_gradient.is_unit,
            # single columns never are
            "ALIGNED": along and of_momentum.is_aligned and of_gradient.is_aligned and of_stack.is_aligned,
            "STOCHASTIC": of_slices[0] is not None,
            **tile._asdict(),
        }
        its_rows = table_rows(
            (n, m, k),
            *(of_momentum.columns, of_gradient.columns, of_stack.columns, gates_of(opens[place], number)),
            scalars_of(factors[place], factor_tensors[place], number),
            scalars_of(nesterov_factors[place], nesterov_tensors[place], number),
            *(in_pieces(its_indices, number), vectors_of(of_slices, -2), vectors_of(of_entries, -1)),
        )
        rows.append((constants, count, blocks_in(k, tile.slices) * blocks_in(m, tile.span), its_rows))
    return [("take", rows)]


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
    device = checked_stacks("stacks", stacks)
    check_count("dtypes", dtypes, stacks)
    for number, dtype in enumerate(dtypes):
        check_dtype(f"dtypes[{number}]", dtype)
    shapes = [tuple(each.shape) for each in stacks]
    results = empty_stacks(shapes, [runs_along(each) for each in stacks], dtypes, device)
    partial = torch.empty(sum(map(len, stacks)) * PARTS, dtype=torch.float64, device=device)
    torch.ops.dion2.normalize(stacks, safety, partial, results)
    return results


@operator("partial", "results")
def _normalize(stacks: Sequence[Tensor], safety: float, partial: Tensor, results: Sequence[Tensor]) -> Passes:
    parts: list[TableRows] = []
    quotients: list[TableRows] = []
    address = partial.data_ptr()
    for stack, result in zip(stacks, results, strict=True):
        count, k, m = stack.shape
        along = runs_along(stack)
        tile = TILES[along]
        of_stack, of_result = view_of([stack], along), view_of([result], along)
        of_norm = {
            "S_TYPE": stack.dtype,
            "ALONG": along,
            "S_UNIT": of_stack.is_unit,
            "ALIGNED": of_stack.is_aligned,
            "SLICES": tile.slices,
            "ENTRIES": tile.entries,
            "PARTS": PARTS,
        }
        of_quotient = {
            **of_norm,
            "O_TYPE": result.dtype,
            "ALIGNED": of_stack.is_aligned and of_result.is_aligned,
            "SPAN": tile.span,
        }
        row = table_rows((k, m, 0), of_stack.columns, of_result.columns, [(address, bits_of("d", safety))])
        blocks = blocks_in(k, tile.slices) * blocks_in(m, tile.entries)
        parts.append((of_norm, count, min(blocks, PARTS), row))
        quotients.append((of_quotient, count, blocks_in(k, tile.slices) * blocks_in(m, tile.span), row))
        address += count * PARTS * partial.itemsize
    return [("norm_parts", parts), ("divide", quotients)]


# The neurons of O


def square_sums(results: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Return the sums of squares of the entries of every neuron.

    Args:
        results: O, (count, k, m) each.
        dims: For each stack the dimension along which the entries of a neuron lie: -1 or -2.

    Returns:
        (count, k) each, or (count, m) for dimension -2, in float64: views of one buffer, in the order given.
    """
    device = checked_stacks("results", results)
    check_dims("dims", dims, results)
    stacks = [each if dim == -1 else each.mT for each, dim in zip(results, dims, strict=True)]
    sizes = [each.shape[0] * each.shape[1] for each in stacks]
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    torch.ops.dion2.square_sums(stacks, sums)
    return [each.view(of.shape[:2]) for each, of in zip(sums.split(sizes), stacks, strict=True)]


@operator("sums")
def _square_sums(stacks: Sequence[Tensor], sums: Tensor) -> Passes:
    rows: list[TableRows] = []
    address = sums.data_ptr()
    for stack in stacks:
        count, n, m = stack.shape
        along = runs_along(stack)
        tile = TILES[along]
        of_stack = view_of([stack], along)
        constants = {
            "O_TYPE": stack.dtype,
            "ALONG": along,
            "O_UNIT": of_stack.is_unit,
            "ALIGNED": of_stack.is_aligned,
            "SLICES": tile.slices,
            "ENTRIES": tile.entries,
        }
        row = table_rows((n, m, 0), of_stack.columns, [(address,)])
        rows.append((constants, count, blocks_in(n, tile.slices), row))
        address += count * n * sums.itemsize
    return [("neuron_sums", rows)]


def neuron_factors(
    sums: Sequence[Tensor],
    variances: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    sizes: Sequence[int],
    weights: Sequence[float | Tensor],
    eps: float,
    *,
    pieces: Sequence[int] | None = None,
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
        pieces: In how many variances v of each stack lies (default: None, one).

    Returns:
        (count, neurons) each, in float32: views of one buffer, in the order given.
    """
    device = checked_sums(sums)
    pieces = checked_pieces(pieces, variances=variances)
    of_variances = wholes(variances, pieces)
    for name, values in (("variances", of_variances), ("indices", indices), ("sizes", sizes)):
        check_count(name, values, sums)
    check_numbers("variances", of_variances, torch.float32, sums)
    check_numbers("indices", indices, torch.int64, sums)
    for number, (each, variance, its_indices, size) in enumerate(zip(sums, of_variances, indices, sizes, strict=True)):
        if size < 1:
            raise ValueError(f"sizes[{number}] must be at least 1, the entries of a neuron, got {size}")
        wanted = tuple(each.shape)
        if its_indices is not None and its_indices.shape != each.shape:
            raise ValueError(f"indices[{number}] must have the shape {wanted}, but it has {tuple(its_indices.shape)}")
        is_whole = its_indices is None
        if len(variance.shape) != 2 or variance.shape[0] != len(each) or (is_whole and variance.shape != each.shape):
            raise ValueError(
                f"variances[{number}] must have one number for each neuron of {wanted}, but it has the shape "
                f"{tuple(variance.shape)}"
            )
    constants, weight_tensors = numbers_and_tensors("weights", weights, sums)
    numbers = [each.numel() for each in sums]
    factors = torch.empty(sum(numbers), dtype=torch.float32, device=device)
    torch.ops.dion2.neuron_factors(sums, variances, pieces, indices, sizes, constants, weight_tensors, eps, factors)
    return [each.view(of.shape) for each, of in zip(factors.split(numbers), sums, strict=True)]


@operator("variances", "factors")
def _neuron_factors(
    sums: Sequence[Tensor],
    variances: Sequence[Tensor],
    pieces: Sequence[int],
    indices: Sequence[Tensor | None],
    sizes: Sequence[int],
    weights: Sequence[float],
    weight_tensors: Sequence[Tensor | None],
    eps: float,
    factors: Tensor,
) -> Passes:
    rows: list[TableRows] = []
    address = factors.data_ptr()
    for place, (each, its_variances, its_indices, size) in enumerate(
        zip(sums, cut(variances, pieces), indices, sizes, strict=True)
    ):
        number, neurons = len(its_variances), each.shape[1]
        count = len(each) // number
        constants = {"S_TYPE": each.dtype, "INDEXED": its_indices is not None, "NEURONS": NEURONS}
        its_rows = table_rows(
            (neurons, 0, 0),
            in_pieces(each, number),
            [(variance.data_ptr(), *variance.stride()) for variance in its_variances],
            in_pieces(its_indices, number),
            scalars_of(weights[place], weight_tensors[place], number),
            [(bits_of("f", 1.0 / size), bits_of("d", eps))] * number,
            places_of(address, count * neurons * factors.itemsize, number),
        )
        rows.append((constants, count, min(neurons, 1), its_rows))
        address += len(each) * neurons * factors.itemsize
    return [("neuron_factors", rows)]


# X <- (1 - lr weight_decay) X, X[K] <- X[K] - lr scale O


def apply(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    results: Sequence[Tensor],
    step_sizes: Sequence[float | Tensor],
    shrinks: Sequence[float | Tensor],
    *,
    pieces: Sequence[int] | None = None,
    factors: Sequence[Tensor | None] | None = None,
    factor_dims: Sequence[int] | None = None,
    cautious: Sequence[Tensor | None] | None = None,
    bits: Sequence[RandomBits | None] | None = None,
) -> None:
    """X <- shrink X, and X[K] <- X[K] - step_size O, in place; in half precision rounded once.

    Where ``shrink`` is the float 1.0, only the selected slices are read and written.

    Args:
        weights: (count, n, m) each.
        indices: K, int64 (count, k) for each stack, sorted.
        results: O, (count, k, m) for each stack.
        step_sizes: Numbers, or float32 tensors of them, 0-d or (count, 1, 1), for each stack.
        shrinks: In the same way.
        pieces: How many weights form each stack (default: None, one).
        factors: What each neuron of O is multiplied by as well, in float32: (count, k), or (count, m) where every entry
            of a slice belongs to another neuron (default: None, by nothing).
        factor_dims: For each stack the dimension of O along which the entries of a neuron lie: -1 for (count, k), -2
            for (count, m) (default: None, -1).
        cautious: M, of the shapes of the weights, where the decay is cautious: an entry shrinks unless O, or M where it
            is not selected, has the opposite sign (default: None, all shrink).
        bits: Of the whole of X: how to round it in half precision stochastically (default: None, to the nearest).
    """
    device = checked_stacks("weights", weights)
    checked_stacks("cautious", cautious := each_of(cautious, len(weights)), shapes_of(weights), device)
    pieces = checked_pieces(pieces, weights=weights, cautious=cautious)
    stacks = wholes(weights, pieces)
    checked_stacks("results", results, selected_shapes(indices, stacks), device)
    steps, step_tensors = numbers_and_tensors("step_sizes", step_sizes, stacks)
    constants, shrink_tensors = numbers_and_tensors("shrinks", shrinks, stacks)
    check_dims("factor_dims", factor_dims := [-1] * len(stacks) if factor_dims is None else factor_dims, stacks)
    check_numbers("factors", factors := each_of(factors, len(stacks)), torch.float32, stacks)
    for number, (factor, dim, result) in enumerate(zip(factors, factor_dims, results, strict=True)):
        if factor is not None and factor.shape != (len(result), result.shape[-2 if dim == -1 else -1]):
            raise ValueError(
                f"factors[{number}] must have one number for each neuron of {tuple(result.shape)}, whose entries lie "
                f"along dimension {dim}, but it has the shape {tuple(factor.shape)}"
            )
    torch.ops.dion2.apply(
        weights,
        pieces,
        indices,
        results,
        steps,
        step_tensors,
        constants,
        shrink_tensors,
        factors,
        factor_dims,
        cautious,
        *hashes_of(bits, weights, pieces),
    )


@operator("weights")
def _apply(
    weights: Sequence[Tensor],
    pieces: Sequence[int],
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
) -> Passes:
    rows: list[TableRows] = []
    of_pieces = [cut(each, pieces) for each in (weights, momenta, slice_hashes, entry_hashes)]
    for place, (its_weights, its_momenta, of_slices, of_entries, its_indices, result, factor) in enumerate(
        zip(*of_pieces, indices, results, factors, strict=True)
    ):
        weight, number = its_weights[0], len(its_weights)
        count, n, m = weight.shape
        k = its_indices.shape[1]
        along = runs_along(weight)
        tile = TILES[along]
        is_whole = decays(shrinks[place], shrink_tensors[place])
        its_momenta = its_momenta if is_whole else [None] * number
        momentum = its_momenta[0]
        of_weight, of_momentum = view_of(its_weights, along), view_of(its_momenta, along)
        of_result = view_in_pieces(result, along, number)
        are_aligned = of_weight.is_aligned and of_momentum.is_aligned
        constants = {
            "X_TYPE": weight.dtype,
            "O_TYPE": result.dtype,
            "M_TYPE": None if momentum is None else momentum.dtype,
            "DECAYS": is_whole,
            "HAS_FACTORS": factor is not None,
            "FACTORS_OF_SLICES": factor_dims[place] == -1,
            "ALONG": along,
            "X_UNIT": of_weight.is_unit,
            "O_UNIT": of_result.is_unit,
            "M_UNIT": of_momentum.is_unit,
            "ALIGNED": are_aligned and (of_result.is_aligned if along else is_whole),  # single columns never are
            "STOCHASTIC": of_slices[0] is not None,
            **tile._asdict(),
        }
        its_rows = table_rows(
            (n, m, k),
            *(of_weight.columns, of_result.columns, of_momentum.columns),
            scalars_of(step_sizes[place], step_tensors[place], number),
            scalars_of(shrinks[place], shrink_tensors[place], number),
            *(in_pieces(its_indices, number), vectors_of(of_slices, -2), vectors_of(of_entries, -1)),
            in_pieces(factor, number),
        )
        slices = n if is_whole else k
        rows.append((constants, count, blocks_in(slices, tile.slices) * blocks_in(m, tile.span), its_rows))
    return [("apply", rows)]


def decays(shrink: float, tensor: Tensor | None) -> bool:
    """Return whether weights decay, so that :func:`apply` goes over all of them."""
    return tensor is not None or shrink != 1.0
