"""What the operators of fused.py tell the kernels: arguments are checked, put into a table, and sent with a launch."""

import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits
from dion2_lightning.lists import group_by

DTYPES: Final = (torch.float32, *HALF_PRECISION)
"""What the tensors may be in."""

TableRow = tuple[dict[str, Any], int, int, list[int]]
"""Constants that a kernel is compiled for; matrices; tiles in each; their row of the table."""

Passes = Sequence[tuple[str, Sequence[TableRow]]]
"""Kernels in turn, each with the stacks that it goes over."""

F = TypeVar("F", bound=Callable[..., Passes])


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


def check_numbers(name: str, tensors: Sequence[Tensor | None], dtype: torch.dtype, stacks: Sequence[Tensor]) -> None:
    """Check numbers of matrices. Kernels get addresses alone: they would read what is not there."""
    check_count(name, tensors, stacks)
    for number, (tensor, stack) in enumerate(zip(tensors, stacks, strict=True)):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.device != stack.device:
            wanted = f"in {dtype} on {stack.device}"
            raise TypeError(f"{name}[{number}] must be {wanted}, but it is in {tensor.dtype} on {tensor.device}")
        if tensor.ndim > 0 and tensor.shape[0] not in (1, stack.shape[0]):
            raise ValueError(f"{name}[{number}] has numbers for {len(tensor)} matrices; there are {len(stack)}")


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


def check_dims(name: str, dims: Sequence[int], stacks: Sequence[Tensor]) -> None:
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


def selected_shapes(indices: Sequence[Tensor], stacks: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Check the indices, and return the shapes (count, k, m) of what they select."""
    check_numbers("indices", indices, torch.int64, stacks)
    for number, (each, stack) in enumerate(zip(indices, stacks, strict=True)):
        if each.ndim != 2 or each.shape[0] != stack.shape[0]:
            raise ValueError(f"indices[{number}] must have the shape ({len(stack)}, k), but it has {tuple(each.shape)}")
    return [(*each.shape, stack.shape[2]) for each, stack in zip(indices, stacks, strict=True)]


def each_of(values: Sequence[Tensor | None] | None, count: int) -> Sequence[Tensor | None]:
    """Return a value for each of so many stacks: None where none are given."""
    return [None] * count if values is None else values


def numbers_and_tensors(
    name: str, numbers: Sequence[float | Tensor], stacks: Sequence[Tensor]
) -> tuple[list[float], list[Tensor | None]]:
    """Take numbers and tensors of numbers apart."""
    tensors = [each if isinstance(each, Tensor) else None for each in numbers]
    check_numbers(name, tensors, torch.float32, stacks)
    return [0.0 if isinstance(each, Tensor) else float(each) for each in numbers], tensors


def hashes_of(
    bits: Sequence[RandomBits | None] | None, stacks: Sequence[Tensor]
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


class View(NamedTuple):
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


NO_VIEW: Final = View((0, 0, 0, 0), True, True)


def view_of(stack: Tensor | None, along: bool) -> View:
    """Return where a stack is in memory."""
    if stack is None:
        return NO_VIEW
    address, (of_matrices, of_slices, of_entries) = stack.data_ptr(), stack.stride()
    dense, other = (of_entries, of_slices) if along else (of_slices, of_entries)
    multiples = address | of_matrices | other | stack.shape[-1 if along else -2]
    return View((address, of_matrices, of_slices, of_entries), dense == 1, dense == 1 and multiples % 16 == 0)


def vector_of(numbers: Tensor | None, dim: int) -> tuple[int, int, int]:
    """One of three axes, of which one has a number for each slice or entry; an axis of size 1 is the same for all."""
    if numbers is None:
        return 0, 0, 0
    of_matrices, of_numbers = (numbers.stride(each) if numbers.shape[each] > 1 else 0 for each in (0, dim))
    return numbers.data_ptr(), of_matrices, of_numbers


def gate_of(tensor: Tensor | None) -> tuple[int, int]:
    """0-d, or one for each matrix."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), tensor.stride(0) if tensor.ndim > 0 and tensor.shape[0] > 1 else 0


def scalar_of(constant: float, tensor: Tensor | None) -> tuple[int, int, int]:
    """Return where a number is on the device, or, in float32, the number itself."""
    return *gate_of(tensor), bits_of("f", constant)


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


def launches_of(passes: Passes) -> list[tuple[str, dict[str, Any], list[TableRow]]]:
    """Return of each launch its kernel, its constants, and the rows of its table: one for all that have these."""
    rows = [(kernel, row) for kernel, its_rows in passes for row in its_rows if row[1] * row[2] > 0]
    launches = group_by(rows, lambda each: (each[0], tuple(each[1][0].items())))
    return [(kernel, dict(constants), [row for _, row in alike]) for (kernel, constants), alike in launches.items()]


def launch(passes: Passes, device: torch.device) -> None:
    """Launch kernels one after another, after one copy of all tables to the device."""
    launches = launches_of(passes)
    if not launches:
        return
    tables = [_table([(count, numbers) for _, count, _, numbers in rows]) for *_, rows in launches]
    on_gpu = device.type == "cuda"
    in_one = array("q", chain.from_iterable(tables))
    on_host = torch.frombuffer(in_one, dtype=torch.int64)  # of a list torch takes twice as long
    on_device = on_host.pin_memory().to(device, non_blocking=True) if on_gpu else on_host
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for table, (kernel, constants, rows) in zip(on_device.split([*map(len, tables)]), launches, strict=True):
            tiles = max(tiles for _, _, tiles, _ in rows)
            start(kernel, table, sum(count for _, count, _, _ in rows), tiles, constants)


def start(kernel: str, table: Tensor, matrices: int, tiles: int, constants: Mapping[str, Any]) -> None:
    """Launch one kernel, with so many programs for each matrix."""
    from dion2_lightning.kernels import triton_kernels

    named = {name.upper(): triton_kernels.TYPES.get(value, value) for name, value in constants.items()}
    getattr(triton_kernels, kernel)[(matrices * tiles,)](table, tiles, **named, num_warps=4, enable_fp_fusion=False)


def _table(stacks: Sequence[tuple[int, list[int]]]) -> list[int]:
    """Return for each matrix where the row of its stack begins, then the rows, which name their first matrices."""
    matrices = sum(count for count, _ in stacks)
    begins: list[int] = []
    rows: list[int] = []
    for count, numbers in stacks:
        first = len(begins)
        begins += [matrices + len(rows)] * count
        rows += first, *numbers
    return begins + rows
