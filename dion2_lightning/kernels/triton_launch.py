"""What the operators of fused.py tell the kernels: arguments are checked, put into a table, and sent with a launch.

A stack (count, n, m) may lie in several pieces that are alike, one after another. So what is to be found out about it
is found out once, as where it has the matrices of many parameters; only addresses are taken piece by piece.
"""

import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits
from dion2_lightning.kernels.stacks import runs_along
from dion2_lightning.lists import group_by

DTYPES: Final = (torch.float32, *HALF_PRECISION)
"""What the tensors may be in."""

TableRows = tuple[dict[str, Any], int, int, list[list[int]]]
"""Constants that a kernel is compiled for; matrices of a piece; tiles in each; a row of the table for each piece."""

Passes = Sequence[tuple[str, Sequence[TableRows]]]
"""Kernels in turn, each with the stacks that it goes over."""

F = TypeVar("F", bound=Callable[..., Passes])
T = TypeVar("T")


# Arguments


def checked_stacks(
    name: str,
    stacks: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]] | None = None,
    device: torch.device | None = None,
) -> torch.device | None:
    """Check stacks, for shapes and a device if given, and return their device; None where there are no stacks."""
    check_count(name, stacks, stacks if shapes is None else shapes)
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


def checked_pieces(pieces: Sequence[int] | None, **tensors: Sequence[Tensor | None]) -> Sequence[int]:
    """Check that the pieces of every stack are alike, and return how many each has (default: None, one)."""
    if pieces is None:
        return [1] * len(next(iter(tensors.values())))
    for name, its_tensors in tensors.items():
        if min(pieces, default=1) < 1 or sum(pieces) != len(its_tensors):
            raise ValueError(f"pieces must be at least 1 and add up to {len(its_tensors)} {name}, got {list(pieces)}")
        for number, (first, *others) in enumerate(cut(its_tensors, pieces)):
            if not all(_are_alike(first, other) for other in others):
                raise ValueError(f"{name}: the pieces of stack {number} differ in shape, strides, dtype or device")
    return pieces


def _are_alike(first: Tensor | None, other: Tensor | None) -> bool:
    if first is None or other is None:
        return first is other
    is_alike = first.stride() == other.stride() and first.shape == other.shape and first.dtype == other.dtype
    return is_alike and first.device == other.device


def cut(values: Sequence[T], pieces: Sequence[int]) -> Iterator[Sequence[T]]:
    """Return values of pieces stack by stack."""
    stop = 0
    for count in pieces:
        start, stop = stop, stop + count
        yield values[start:stop]


class Whole(NamedTuple):
    """A stack, all its pieces together."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    runs_along: bool


def wholes(tensors: Sequence[Tensor], pieces: Sequence[int]) -> list[Whole]:
    """Return what each stack is, given all pieces."""
    return [
        Whole((len(its_tensors) * first.shape[0], *first.shape[1:]), first.dtype, first.device, runs_along(first))
        for its_tensors in cut(tensors, pieces)
        for first in its_tensors[:1]
    ]


def check_numbers(
    name: str, tensors: Sequence[Tensor | Whole | None], dtype: torch.dtype, stacks: Sequence[Tensor | Whole]
) -> None:
    """Check numbers of matrices. Kernels get addresses alone: they would read what is not there."""
    check_count(name, tensors, stacks)
    for number, (tensor, stack) in enumerate(zip(tensors, stacks, strict=True)):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.device != stack.device:
            wanted = f"in {dtype} on {stack.device}"
            raise TypeError(f"{name}[{number}] must be {wanted}, but it is in {tensor.dtype} on {tensor.device}")
        if tensor.shape and tensor.shape[0] not in (1, stack.shape[0]):
            raise ValueError(f"{name}[{number}] has numbers for {tensor.shape[0]} matrices; there are {stack.shape[0]}")


def checked_sums(sums: Sequence[Tensor]) -> torch.device | None:
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


def check_count(name: str, values: Sequence[Any], stacks: Sequence[Any]) -> None:
    """Check that there is a value for each stack."""
    if len(values) != len(stacks):
        raise ValueError(f"{name}: {len(values)} for {len(stacks)} stacks; there must be one for each")


def check_dims(name: str, dims: Sequence[int], stacks: Sequence[Tensor | Whole]) -> None:
    """Check along which dimensions of stacks the entries of neurons lie."""
    check_count(name, dims, stacks)
    for number, dim in enumerate(dims):
        if dim not in (-1, -2):
            raise ValueError(f"{name}[{number}] must be -1 or -2, the entries or the slices of a stack, got {dim}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Check what results are rounded to."""
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {DTYPES}, got {dtype}")


def shapes_of(stacks: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return their shapes."""
    return [stack.shape for stack in stacks]


def selected_shapes(indices: Sequence[Tensor], stacks: Sequence[Whole]) -> list[tuple[int, ...]]:
    """Check the indices, and return the shapes (count, k, m) of what they select."""
    check_numbers("indices", indices, torch.int64, stacks)
    for number, (each, stack) in enumerate(zip(indices, stacks, strict=True)):
        if each.ndim != 2 or each.shape[0] != stack.shape[0]:
            wanted = f"({stack.shape[0]}, k)"
            raise ValueError(f"indices[{number}] must have the shape {wanted}, but it has {tuple(each.shape)}")
    return [(*each.shape, stack.shape[2]) for each, stack in zip(indices, stacks, strict=True)]


def each_of(values: Sequence[Tensor | None] | None, count: int) -> Sequence[Tensor | None]:
    """Return a value for each of so many stacks: None where none are given."""
    return [None] * count if values is None else values


def numbers_and_tensors(
    name: str, numbers: Sequence[float | Tensor], stacks: Sequence[Tensor | Whole]
) -> tuple[list[float], list[Tensor | None]]:
    """Take numbers and tensors of numbers apart."""
    tensors = [each if isinstance(each, Tensor) else None for each in numbers]
    check_numbers(name, tensors, torch.float32, stacks)
    return [0.0 if isinstance(each, Tensor) else float(each) for each in numbers], tensors


def hashes_of(
    bits: Sequence[RandomBits | None] | None, stacks: Sequence[Tensor], pieces: Sequence[int]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Take random bits apart: the hashes of slices, (count or 1, n, 1), and those of entries, (count or 1, 1, m)."""
    of_slices: list[Tensor | None] = [None] * len(stacks)
    of_entries: list[Tensor | None] = [None] * len(stacks)
    if bits is None:
        return of_slices, of_entries
    check_count("bits", bits, stacks)
    for number, each in enumerate(bits):
        if each is not None and stacks[number].dtype in HALF_PRECISION:
            is_transposed = each.rows.shape[-1] != 1 or each.columns.shape[-2] != 1
            hashes = each[::-1] if is_transposed else each[:]
            _check_hashes(f"bits[{number}]", *hashes, stacks[number].shape)
            of_slices[number], of_entries[number] = hashes
    check_numbers("bits", of_slices, torch.int32, stacks)
    check_numbers("bits", of_entries, torch.int32, stacks)
    checked_pieces(pieces, bits=of_slices)
    checked_pieces(pieces, bits=of_entries)
    return of_slices, of_entries


def _check_hashes(name: str, of_slices: Tensor, of_entries: Tensor, shape: tuple[int, ...]) -> None:
    count, n, m = shape
    for hashes, wanted in ((of_slices, (count, n, 1)), (of_entries, (count, 1, m))):
        if hashes.ndim != 3 or any(size not in (1, whole) for size, whole in zip(hashes.shape, wanted, strict=True)):
            shapes = f"{tuple(of_slices.shape)} and {tuple(of_entries.shape)}"
            raise ValueError(f"{name} must have hashes that broadcast to {tuple(shape)}, but they have {shapes}")


# The table, column by column


def blocks_in(size: int, block: int) -> int:
    """Return how many blocks cover a size."""
    return -(-size // block)


Columns = list[tuple[int, ...]]
"""Some columns of the table: for each piece an address, and the numbers after it."""


class View(NamedTuple):
    """What a kernel knows of a stack.

    Attributes:
        columns: Addresses, strides of (count, n, m).
        is_unit: Whether the stride along which memory is dense is 1.
        is_aligned: Whether, beyond that, addresses are multiples of 16 bytes, and the other strides and the size of
            this dimension are multiples of 16.
    """

    columns: Columns
    is_unit: bool
    is_aligned: bool


def view_of(pieces: Sequence[Tensor | None], along: bool) -> View:
    """Return where a stack is in memory, given its pieces; Nones where there is none."""
    first = pieces[0]
    if first is None:
        return View([(0, 0, 0, 0)] * len(pieces), True, True)
    addresses = [piece.data_ptr() for piece in pieces if piece is not None]
    return _view(addresses, first, along)


def view_in_pieces(stack: Tensor, along: bool, pieces: int) -> View:
    """Return where a stack is in memory that is cut into so many pieces."""
    return _view([address for address, *_ in in_pieces(stack, pieces)], stack, along)


def _view(addresses: list[int], first: Tensor, along: bool) -> View:
    strides = of_matrices, of_slices, of_entries = first.stride()
    dense, other = (of_entries, of_slices) if along else (of_slices, of_entries)
    multiples = of_matrices | other | first.shape[-1 if along else -2]
    is_aligned = dense == 1 and multiples % 16 == 0 and all(address % 16 == 0 for address in addresses)
    return View([(address, *strides) for address in addresses], dense == 1, is_aligned)


def in_pieces(tensor: Tensor | None, pieces: int) -> Columns:
    """Return addresses and strides of a tensor with a row of numbers for each matrix, which is cut into pieces."""
    if tensor is None:
        return [(0, 0, 0)] * pieces
    address, strides = tensor.data_ptr(), tensor.stride()
    step = len(tensor) // pieces * strides[0] * tensor.itemsize
    return [(address + number * step, *strides) for number in range(pieces)]


def places_of(address: int, step: int, pieces: int) -> Columns:
    """Return where so many pieces have their results, one after another."""
    return [(address + number * step,) for number in range(pieces)]


def vectors_of(numbers: Sequence[Tensor | None], dim: int) -> Columns:
    """Three axes each, of which one has a number for each slice or entry; an axis of size 1 is the same for all."""
    first = numbers[0]
    if first is None:
        return [(0, 0, 0)] * len(numbers)
    of_matrices, of_numbers = (first.stride(each) if first.shape[each] > 1 else 0 for each in (0, dim))
    return [(each.data_ptr(), of_matrices, of_numbers) for each in numbers if each is not None]


def gates_of(tensor: Tensor | None, pieces: int) -> Columns:
    """0-d, or one for each matrix."""
    if tensor is None:
        return [(0, 0)] * pieces
    if tensor.ndim == 0 or tensor.shape[0] == 1:
        return [(tensor.data_ptr(), 0)] * pieces
    return [columns[:2] for columns in in_pieces(tensor, pieces)]


def scalars_of(constant: float, tensor: Tensor | None, pieces: int) -> Columns:
    """Return where numbers are on the device, or, in float32, the number itself."""
    bits = bits_of("f", constant)
    return [(*columns, bits) for columns in gates_of(tensor, pieces)]


def table_rows(sizes: tuple[int, int, int], *columns: Columns) -> list[list[int]]:
    """Return the rows of a stack's pieces: three sizes, then the columns side by side."""
    return [[*sizes, *chain.from_iterable(row)] for row in zip(*columns, strict=True)]


def bits_of(kind: str, number: float) -> int:
    """The bits of a number in float32, "f", or float64, "d"."""
    bits: int = struct.unpack({"f": "=i", "d": "=q"}[kind], struct.pack(f"={kind}", number))[0]
    return bits


# Launches

PASSES: Final[dict[str, Callable[..., Passes]]] = {}
"""By operator ``dion2::name`` what makes of its arguments the passes of a call."""


def operator(*mutated: str) -> Callable[[F], F]:
    """Make a function ``_name`` an operator ``dion2::name``, which launches the passes that the function returns.

    Its first argument is a list of tensors on the device. As it returns nothing, torch traces it without data.

    Args:
        mutated: The arguments that kernels write.
    """

    def register(passes: F) -> F:
        def body(*arguments: Any) -> None:
            if arguments[0]:
                launch(passes(*arguments), arguments[0][0].device)

        vars(body)["__signature__"] = signature(passes).replace(return_annotation=None)
        name = passes.__name__.removeprefix("_")
        torch.library.custom_op(f"dion2::{name}", body, mutates_args=mutated).register_fake(lambda *_: None)
        PASSES[name] = passes
        return passes

    return register


def launches_of(passes: Passes) -> list[tuple[str, dict[str, Any], list[TableRows]]]:
    """Return of each launch its kernel, its constants, and the rows of its table: one for all that have these."""
    rows = [(kernel, row) for kernel, its_rows in passes for row in its_rows if row[1] * row[2] > 0]
    launches = group_by(rows, lambda each: (each[0], tuple(each[1][0].items())))
    return [(kernel, dict(constants), [row for _, row in alike]) for (kernel, constants), alike in launches.items()]


def launch(passes: Passes, device: torch.device) -> None:
    """Launch kernels one after another, after one copy of all tables to the device."""
    launches = launches_of(passes)
    if not launches:
        return
    tables = [_table([(count, numbers) for _, count, _, pieces in rows for numbers in pieces]) for *_, rows in launches]
    on_gpu = device.type == "cuda"
    in_one = array("q", chain.from_iterable(tables))
    on_host = torch.frombuffer(in_one, dtype=torch.int64)  # of a list torch takes twice as long
    on_device = on_host.pin_memory().to(device, non_blocking=True) if on_gpu else on_host
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for table, (kernel, constants, rows) in zip(on_device.split([*map(len, tables)]), launches, strict=True):
            tiles = max(tiles for _, _, tiles, _ in rows)
            start(kernel, table, sum(count * len(pieces) for _, count, _, pieces in rows), tiles, constants)


def start(kernel: str, table: Tensor, matrices: int, tiles: int, constants: Mapping[str, Any]) -> None:
    """Launch one kernel, with so many programs for each matrix."""
    from dion2_lightning.kernels import triton_kernels

    named = {name.upper(): triton_kernels.TYPES.get(value, value) for name, value in constants.items()}
    getattr(triton_kernels, kernel)[(matrices * tiles,)](table, tiles, **named, num_warps=4, enable_fp_fusion=False)


def _table(stacks: Sequence[tuple[int, list[int]]]) -> list[int]:
    """Return for each matrix where the row of its piece begins, then the rows, which name their first matrices."""
    matrices = sum(count for count, _ in stacks)
    begins: list[int] = []
    rows: list[int] = []
    for count, numbers in stacks:
        first = len(begins)
        begins += [matrices + len(rows)] * count
        rows += first, *numbers
    return begins + rows
