"""What some matrices bring to a step, and the lines of the boxes of Dion2 and Dion3: one function each.

What a step needs of the settings is read by ``updates_of`` in dion2.py and ``MatrixUpdate.of``; the rest is numbers.
"""

import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import Member, StepContext
from dion2_lightning.kernels import fused
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.device_numbers import DeviceNumber, Number, as_factor
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.orthonormalize import (
    MIN_BF16_DIM,
    SAFETY,
    dtype_of_products,
    orthonormalize,
    polar_factor,
)
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, blocks, multiply_add_, random_bits, store_
from dion2_lightning.kernels.selection import Selection, add_, decay_, gather, largest, put_, slice_sums
from dion2_lightning.matrices.layout import Layout, Spans, group_by, local, local_gradient, placed_like_stack
from dion2_lightning.matrices.parts import Part, parts_of
from dion2_lightning.matrices.splits import OUTPUT_AXIS
from dion2_lightning.matrices.views import Matrices, Source

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

WORKING_COPIES: Final = 8
"""How many copies of the submatrices of a batch there are at once, at most: as taken, side by side and normalized, and
of square ones three Gram matrices beside the next iterate; and what became of the last batch."""

SLICE_BYTES: Final = 40
"""Working memory for a slice: the sums of |M|, norms, and their order."""

PASS_COPIES: Final = 7
"""The same for a pass over weights that are in half precision, or decay cautiously, in float32 at least: the wide
weights, the update or its sign, random bits, and what is rounded."""

_ROUNDED: Final = {"accumulate": "momentum", "decay": "momentum", "apply": "weight"}
"""The lines of the box that change what may be in half precision. Each is rounded by random bits of its own: a second
rounding by the same bits would not be exact on average."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class MatrixUpdate:
    """Matrices of a parameter in a step, as (count, n, m) views, n slices of m entries each, and numbers.

    A slice of a kernel is a channel with all its taps: then it is ``taps`` of the n.

    Attributes:
        parameter: The parameter they belong to.
        label: Its name for error messages.
        name: Its name, the same whatever the layout.
        part: Which matrices they are, and which part of them this rank holds.
        state: The parameter's state, M in it.
        axis: What a slice is: 0 output, 1 input.
        selected: Slices to select in each matrix.
        momentum_factor: mu.
        step_size: lr times the scale rule.
        shrink: 1 - lr * weight_decay.
        dtype: Precision of the orthonormalization.
        nesterov: Whether the gradient is added to what is orthonormalized.
        is_cautious: Whether only entries decay that their update does not push away from zero.
        gate: What decides on the device whether the step is taken; None where every step is.
        leaves_idle: Whether those whose gradient is zero stay as they are.
        neuron_beta: Decay rate of the neurons' variances; None where neurons are not normalized.
        rounding_seed: Decides how what is in half precision is rounded stochastically; None rounds to nearest.
        may_fuse: Whether the kernels of kernels/fused.py may go over its memory, see :attr:`is_fused`.
        bits: The random bits, by the line of the box that they round: see :func:`draw_bits`.
        own_gates: One, for each of the matrices, once it is known which are idle: see :meth:`leave_idle`.
    """

    parameter: Tensor
    label: str
    name: str
    part: Part
    state: dict[str, Tensor]
    axis: int
    selected: int
    momentum_factor: Number
    step_size: Number
    shrink: Number
    dtype: torch.dtype
    nesterov: bool
    is_cautious: bool
    gate: Gate | None
    leaves_idle: bool
    neuron_beta: float | None
    rounding_seed: int | None
    may_fuse: bool
    bits: dict[str, RandomBits] = field(default_factory=dict)
    own_gates: list[Gate] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        member: Member,
        context: StepContext,
        *,
        matrices: Matrices,
        axis: int,
        selected: int,
        momentum_factor: Number,
        step_size: Number,
        shrink: Number,
        dtype: torch.dtype,
        nesterov: bool = False,
        neuron_beta: float | None = None,
    ) -> "list[MatrixUpdate]":
        """Read the layout of some matrices of a parameter as it is now, and its state, with ``"momentum"`` in it.

        There is one update, or several where ranks hold unequal parts of the matrices. See the attributes.
        """
        parameter, state, group, label, name = member
        parts = parts_of(parameter, matrices, label, process_group=context.process_group, known=context.layouts)
        return [
            cls(
                parameter=parameter,
                label=label,
                name=name,
                part=part,
                state=state,
                axis=axis,
                selected=selected,
                momentum_factor=momentum_factor,
                step_size=step_size,
                shrink=shrink,
                dtype=dtype,
                nesterov=nesterov,
                is_cautious=group["cautious_weight_decay"] and shrink != 1.0,
                gate=context.gates.get(local(parameter).device),
                leaves_idle=group["skip_idle_experts"] and (matrices.is_stack or matrices.count > 1),
                neuron_beta=neuron_beta,
                rounding_seed=group["rounding_seed"] if group["rounding"] == "stochastic" else None,
                may_fuse=context.fuses_on(local(parameter).device),
            )
            for part in parts
        ]

    @property
    def matrices(self) -> Matrices:
        """The matrices of the block, or of the whole parameter, that these are some of."""
        return self.part.matrices

    @property
    def layout(self) -> Layout:
        """Which ranks hold which part of them."""
        return self.part.layout

    @property
    def source(self) -> Source:
        """Which matrices they are, for observers."""
        return Source(self.parameter, self.matrices.name, self.part.first)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return local(self.parameter).device

    @property
    def count(self) -> int:
        """How many matrices they are, on this rank."""
        if self.part.count is not None:
            return self.part.count
        return len(local(self.parameter)) if self.matrices.is_stack else self.matrices.count

    @cached_property
    def weight(self) -> Tensor:
        """X, this rank's part, updated in place."""
        return self._read(local(self.parameter))

    @cached_property
    def gradient(self) -> Tensor | None:
        """G, this rank's part; None where only other ranks have it."""
        gradient = local_gradient(self.parameter)
        return None if gradient is None else self._read(gradient)

    @cached_property
    def momentum(self) -> Tensor:
        """M, this rank's part, updated in place."""
        return self._read(local(self.state["momentum"]))

    @property
    def has_gradient(self) -> bool:
        """Whether this rank has a part of G."""
        return self.parameter.grad is not None

    @cached_property
    def taps_first(self) -> bool:
        """Whether the columns of a kernel are in the order of channels_last memory, so that they need no copy.

        Not where the state has a number for each of them: its order is the same whatever the memory's.
        """
        whole = local(self.parameter)
        if not self.matrices.is_kernel or self.layout.group is not None or whole.is_contiguous():
            return False
        return not self.state_knows_taps and whole.movedim(1, -1).is_contiguous()

    @property
    def state_knows_taps(self) -> bool:
        """Whether the state has numbers for each tap, as the variances of a transposed kernel are."""
        return self.neuron_beta is not None and self.matrices.taps_along(OUTPUT_AXIS) > 1

    @cached_property
    def is_scattered(self) -> bool:
        """Whether slices lie apart, with those of other blocks in between: then the views have all of them.

        :meth:`at` and :meth:`own` say which are its own, so that no block needs a copy.
        """
        return self.part.is_apart and self.axis == self.matrices.block_axis

    @cached_property
    def is_in_pieces(self) -> bool:
        """Whether the entries of slices lie in rows apart, in pieces of one size: then the views have pieces.

        They are (count, pieces, n, m of each), see kernels/selection.py, and need no copy either.
        """
        return self.part.is_in_equal_pieces and self.axis != self.matrices.block_axis and self.matrices.blocks_are_rows

    @cached_property
    def is_fused(self) -> bool:
        """Whether a kernel makes each pass over its memory, of all matrices at once; else operations of torch do."""
        tensors = (self.parameter, self.state["momentum"], self.parameter.grad)
        dtypes = {self.dtype, *(each.dtype for each in tensors if each is not None)}
        return self.may_fuse and not (self.is_scattered or self.is_in_pieces) and dtypes <= set(fused.DTYPES)

    def _read(self, tensor: Tensor) -> Tensor:
        if self.is_scattered:
            return self.matrices.slices(self.part.stack(tensor), self.axis)
        if self.is_in_pieces:
            (pieces,) = self.part.pieces(self.part.stack(tensor), 1)
            return pieces.mT
        return self.matrices.slices(self.part.read(tensor, taps_first=self.taps_first), self.axis)

    def is_view(self, whole: Tensor) -> bool:
        """Return whether what is read out of a tensor, such as the parameter, is a view of it."""
        return self.is_scattered or self.is_in_pieces or self.part.is_view(whole, taps_first=self.taps_first)

    def at(self, indices: Tensor) -> Tensor:
        """Return where in the views the slices are that this rank holds under these numbers."""
        return self.part.places(indices) if self.is_scattered else indices

    def own(self, view: Tensor) -> list[Tensor]:
        """Return what of a view is its own: all of it, or views (count, pieces, n of each, m), one a size of pieces."""
        return self.part.pieces(view, 1) if self.is_scattered else [view]

    def own_bits(self, bits: RandomBits | None) -> Sequence[RandomBits | None]:
        """Return the random bits of what :meth:`own` returns, given those of its matrices; None for none."""
        if bits is None or not (self.is_scattered or self.is_in_pieces):
            return [bits] * (len(self.part.runs) if self.is_scattered else 1)
        dim = 1 if self.is_scattered else 2
        cut = [
            self.part.in_pieces(each, dim) if each.shape[dim] > 1 else [each.unsqueeze(dim)] * len(self.part.runs)
            for each in bits
        ]
        own = [RandomBits(*each) for each in zip(*cut, strict=True)]
        return own if self.is_scattered else [RandomBits(*(factor.transpose(1, 2) for factor in own[0]))]

    def write_back(self) -> None:
        """Write what had to be copied, as it has no view, to where it came from, and let go of it."""
        for name, whole in (("weight", local(self.parameter)), ("momentum", local(self.state["momentum"]))):
            if name in vars(self) and not self.is_view(whole):
                copy = self.matrices.slices(vars(self)[name], self.axis)  # its own inverse
                self.part.write(whole, copy, taps_first=self.taps_first)
        for name in ("weight", "gradient", "momentum"):
            vars(self).pop(name, None)

    def nonzero_gradients(self) -> Tensor:
        """Return how many entries of G are not zero, in this rank's part of each matrix, (count,)."""
        if self.gradient is None:
            return torch.zeros(self.count, dtype=torch.int64, device=self.momentum.device)
        own = self.own(self.gradient)
        return torch.stack([torch.count_nonzero(each, tuple(range(1, each.ndim))) for each in own]).sum(0)

    def leave_idle(self, nonzero: Tensor) -> None:
        """From now on leave matrices as they are of which all ranks together have no entry of G that is not zero."""
        is_active = (nonzero > 0).view(-1, 1, 1)
        self.own_gates.append(Gate(is_active if self.gate is None else is_active & self.gate.is_open))

    @property
    def own_gate(self) -> Gate | None:
        """What decides which of the matrices are updated; :attr:`gate` where it is all or none."""
        return self.own_gates[0] if self.own_gates else self.gate

    def number(self, value: Number, neutral: float, of: Tensor, first: int = 0) -> float | Tensor:
        """Return a number that the update multiplies a tensor by; the neutral one in a step that is skipped.

        A tensor is of the other's precision, in float32 at least. It is (count, 1, 1, ...) where some matrices may be
        idle: then the other is of matrices from ``first`` on.
        """
        gate, precise = self.own_gate, torch.promote_types(of.dtype, torch.float32)
        if gate is None:
            return as_factor(value, precise)
        number = gate.number(value, neutral, precise)
        return number.narrow(0, first, len(of)).view(-1, *[1] * (of.ndim - 1)) if self.own_gates else number

    def sharing(self, share_replicas: bool | None) -> "tuple[ProcessGroup | None, ...]":
        """Return the groups of ranks with which this one takes the step: those of parts, those of replicas."""
        replicas = self.layout.replicas if share_replicas is not False else None
        return self.layout.group, None if replicas is None else replicas.group

    @property
    def slices(self) -> int:
        """Slices of each whole matrix, n; of a kernel each counts as many times as it has taps."""
        return self.matrices.shape[self.axis]

    @property
    def taps(self) -> int:
        """How many of the n are selected together: all taps of a channel, or 1."""
        return self.matrices.taps_along(self.axis)

    @property
    def k(self) -> int:
        """How many of the n a step selects."""
        return self.selected * self.taps

    def places(self, selected: Tensor) -> Tensor:
        """Return which of the n are selected, sorted (count, k), given the slices (count, selected)."""
        if self.taps == 1:
            return selected
        taps = torch.arange(self.taps, device=selected.device)
        if self.taps_first:
            return (selected.unsqueeze(1) + taps.unsqueeze(1) * (self.slices // self.taps)).flatten(1)
        return (selected.unsqueeze(2) * self.taps + taps).flatten(1)

    @property
    def entries(self) -> int:
        """Entries of each whole slice, m."""
        return self.matrices.shape[1 - self.axis]

    @property
    def working_bytes(self) -> int:
        """Working memory that one matrix takes beside the others of its batch: for its selected slices."""
        return working_bytes(self.k, self.entries, self.slices, self.dtype.itemsize)

    @property
    def pass_bytes(self) -> int:
        """Working memory that one matrix takes in addition, when it is its turn: for what is taken, and its weights."""
        taken = 3 * self.k * self.entries * self.state["momentum"].element_size()
        if self.parameter.dtype not in HALF_PRECISION and not self.is_cautious:
            return taken
        return max(taken, self.slices * self.entries * pass_bytes(self.parameter.dtype))

    @property
    def slices_are_neurons(self) -> bool:
        """Whether a slice is an output of the matrix; if not, every entry of a slice belongs to another one."""
        return self.axis == OUTPUT_AXIS

    @property
    def neuron_dim(self) -> int:
        """The dimension of (count, k, m) along which the entries of one neuron lie."""
        return -1 if self.slices_are_neurons else -2

    @property
    def goes_alone(self) -> bool:
        """Whether its matrices are orthonormalized one by one, so that all bits are alike on every layout.

        On a CPU the last bits of small odd products depend on what else is in their batch, and on the memory order.
        Stochastic rounding makes more of them, and who asks torch for deterministic algorithms wants them alike.
        """
        is_rounded = self.rounding_seed is not None and self.parameter.dtype in HALF_PRECISION
        return (is_rounded or torch.are_deterministic_algorithms_enabled()) and self.device.type == "cpu"

    @property
    def held(self) -> Spans:
        """By rank of the layout's group: which slices it touches. Without a group this rank is the only one."""
        if self.layout.group is None:
            return Spans([(0, self.slices)])
        return self.layout.rows if self.matrices.slices_are_rows(self.axis) else self.layout.columns

    @property
    def columns(self) -> Spans:
        """By rank of the layout's group: which entries of the slices it holds."""
        if self.layout.group is None:
            return Spans([(0, self.entries)])
        return self.layout.columns if self.matrices.slices_are_rows(self.axis) else self.layout.rows

    @property
    def held_entries(self) -> int:
        """Entries of the matrices that this rank holds."""
        rank = self.layout.own_rank
        return self.count * math.prod(stop - start for start, stop in (self.held[rank], self.columns[rank]))

    @property
    def is_split(self) -> bool:
        """Whether ranks hold different slices, so that message sizes depend on the selection."""
        return not self.held.are_equal

    def selection(self, indices: Tensor) -> Selection:
        """Return the indices (count, selected) in the shape and placement that users see."""
        if self.matrices.is_stack:
            return Selection(self.axis, placed_like_stack(indices, self.parameter, self.matrices.count))
        return Selection(self.axis, indices.squeeze(0) if self.matrices.count == 1 else indices)

    def checksum(self) -> int:
        """Return a number made of all that ranks must agree about."""
        numbers = (self.k, self.momentum_factor, self.step_size, self.shrink, self.dtype, self.layout.fingerprint)
        return zlib.crc32(repr((self.matrices, self.part.first, self.axis, self.taps_first, numbers)).encode())


@dataclass(frozen=True, eq=False)
class SelectedSlices:
    """The slices that a step selects of some matrices of an update, as far as this rank holds them.

    Attributes:
        update: The update that the matrices belong to.
        indices: Shape (count, r), counted from this rank's first slice.
        first: Which of the update's matrices on this rank is the first one.
    """

    update: MatrixUpdate
    indices: Tensor
    first: int = 0

    @property
    def is_fused(self) -> bool:
        """Whether a kernel makes each pass over their memory."""
        return self.update.is_fused

    @property
    def weight(self) -> Tensor:
        """X of these matrices, this rank's part."""
        return self.of_matrices(self.update.weight)

    @property
    def momentum(self) -> Tensor:
        """M of these matrices, this rank's part."""
        return self.of_matrices(self.update.momentum)

    @property
    def gradient(self) -> Tensor | None:
        """G of these matrices, this rank's part; None where only other ranks have it."""
        return None if self.update.gradient is None else self.of_matrices(self.update.gradient)

    def of_matrices(self, tensor: Tensor) -> Tensor:
        """View the part of these matrices of a tensor that has all of the update's."""
        return tensor.narrow(0, self.first, len(self.indices))

    def bits(self, line: str) -> RandomBits | None:
        """Return the random bits of these matrices for a line of the box; None where it does not round by any."""
        bits = self.update.bits.get(line)
        return None if bits is None else bits.of_matrices(self.first, len(self.indices))

    def number(self, value: Number, neutral: float, of: Tensor) -> float | Tensor:
        """Return :meth:`MatrixUpdate.number` for a tensor of these matrices."""
        return self.update.number(value, neutral, of, self.first)


S = TypeVar("S", MatrixUpdate, SelectedSlices)


def runs(updates: Sequence[MatrixUpdate], context: StepContext) -> Iterator[list[MatrixUpdate]]:
    """Cut updates into runs that are updated together, those of equal shapes next to each other.

    A run is on one device and takes at most the working memory, or is one update that takes more.
    """

    def key(update: MatrixUpdate) -> Hashable:
        return update.slices, update.entries, update.k

    for there in group_by(updates, lambda update: update.device).values():
        in_order = [update for equal in group_by(there, key).values() for update in equal]
        yield from bounded(in_order, lambda update: update.working_bytes * update.count, context.working_memory)


def within_memory(slices: Sequence[SelectedSlices], context: StepContext) -> Iterator[list[SelectedSlices]]:
    """Cut the slices of a run so that their submatrices take at most the working memory, or are those of one matrix.

    There are several lists where one stack of matrices takes more.
    """
    single: list[SelectedSlices] = []
    for each in slices:
        size = max(1, context.working_memory // (each.update.working_bytes + each.update.pass_bytes))
        pieces = enumerate(each.indices.split(size))
        single += [SelectedSlices(each.update, indices, each.first + number * size) for number, indices in pieces]
    in_turn = max((len(each.indices) * each.update.pass_bytes for each in single), default=0)
    return bounded(single, lambda each: len(each.indices) * each.update.working_bytes, context.working_memory - in_turn)


def working_bytes(k: int, entries: int, slices: int, itemsize: int) -> int:
    """Return the working memory of k slices of ``entries`` each, of so many, orthonormalized in a precision's bytes."""
    itemsize = max(itemsize, torch.float32.itemsize) if min(k, entries) < MIN_BF16_DIM else itemsize
    return k * entries * itemsize * WORKING_COPIES + slices * SLICE_BYTES


def pass_bytes(dtype: torch.dtype) -> int:
    """Return the working memory of a pass over weights of a dtype, for an entry."""
    return PASS_COPIES * torch.promote_types(dtype, torch.float32).itemsize


def bounded(items: Sequence[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Cut a list into runs of at most ``limit`` together, or of one item."""
    run: list[T] = []
    total = 0
    for item in items:
        if run and total + size_of(item) > limit:
            yield run
            run, total = [], 0
        run.append(item)
        total += size_of(item)
    if run:
        yield run


def draw_bits(updates: Sequence[MatrixUpdate]) -> None:
    """Draw the random bits of a step, for all that is rounded on one device together."""
    rounded = [
        (line, update)
        for update in updates
        if update.rounding_seed is not None
        for line, name in _ROUNDED.items()
        if (update.parameter if name == "weight" else update.state[name]).dtype in HALF_PRECISION
    ]
    for equal in group_by(rounded, lambda pair: pair[1].device).values():
        coordinates = {
            each: each.part.coordinates(each.parameter, taps_first=each.taps_first)
            for each in dict.fromkeys(each for _, each in equal)
        }
        drawn = random_bits(
            [coordinates[each] for _, each in equal],
            [zlib.crc32(f"{each.rounding_seed} {line} {each.name}".encode()) for line, each in equal],
            [each.state["step"] for _, each in equal],
        )
        for (line, each), bits in zip(equal, drawn, strict=True):
            each.bits[line] = bits if each.matrices.slices_are_rows(each.axis) else bits.mT


def count_step(updates: Sequence[MatrixUpdate]) -> None:
    """Count the step, once for each parameter."""
    of_parameters = {update.parameter: update for update in updates}.values()
    for gate, equal in group_by(of_parameters, lambda update: update.gate).items():
        steps = [update.state["step"] for update in equal]
        if gate is None:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [gate.number(1.0, 0.0, torch.float32)] * len(steps))


def split_off_wholes(updates: Sequence[MatrixUpdate]) -> tuple[list[MatrixUpdate], list[MatrixUpdate]]:
    """Return updates for what is the same for every entry of a parameter: one for all its blocks, and blocks alone.

    A pass over every second column takes as long as one over all of them, and blocks in pieces may have to be copied.
    """
    at_once: list[MatrixUpdate] = []
    alone: list[MatrixUpdate] = []
    for parameter, of_parameter in group_by(updates, lambda update: update.parameter).items():
        is_alike = not any(each.own_gates or "accumulate" in each.bits for each in of_parameter)
        if is_alike and sum(each.held_entries for each in of_parameter) == local(parameter).numel():
            at_once.append(of_parameter[0])
        else:
            alone += of_parameter
    return at_once, alone


def accumulate_and_sum(updates: Sequence[MatrixUpdate], working_memory: int) -> list[Tensor]:
    """M <- M + G, where there is a G; return the sums of |M| over the slices, (count, held slices), in float64."""
    accumulate([update for update in updates if not update.is_fused], working_memory)
    sums = at_once_or_one_by_one(updates, _accumulate_at_once, lambda update: _slice_sums(update, working_memory))
    return [_sums_of_channels(*pair) for pair in zip(updates, sums, strict=True)]


def _accumulate_at_once(updates: Sequence[MatrixUpdate]) -> list[Tensor]:
    return fused.accumulate(
        [update.momentum for update in updates],
        [update.gradient for update in updates],
        opens=[None if update.gate is None else update.gate.is_open for update in updates],
        bits=[update.bits.get("accumulate") for update in updates],
    )


def accumulate(updates: Sequence[MatrixUpdate], working_memory: int) -> None:
    """M <- M + G, where there is a G. What takes memory, a closed gate and rounding, goes over M block by block."""
    together: list[tuple[Tensor, Tensor]] = []
    at_once, alone = split_off_wholes(updates)
    terms: list[tuple[MatrixUpdate, Tensor, Tensor | None, RandomBits | None]] = [
        (each, local(each.state["momentum"]), local_gradient(each.parameter), None) for each in at_once
    ]
    for each in alone:
        if each.gradient is not None:
            own_bits = each.own_bits(each.bits.get("accumulate"))
            terms += zip(repeat(each), each.own(each.momentum), each.own(each.gradient), own_bits)
    for update, momentum, gradient, bits in terms:
        if gradient is None:
            continue
        if update.gate is None and bits is None:
            together.append((momentum, gradient))
            continue
        entries = max(update.slices * update.entries, working_memory // pass_bytes(momentum.dtype))
        for (part, its_gradient), its_bits in blocks([momentum, gradient], bits, entries):
            addend = its_gradient if update.gate is None else update.gate.gradient(its_gradient)
            if its_bits is None:
                part.add_(addend)
            else:
                multiply_add_(part, 1.0, addend, its_bits)
    if together:
        momenta, gradients = zip(*together, strict=True)
        torch._foreach_add_(momenta, gradients)


def leave_idle(updates: Sequence[MatrixUpdate]) -> None:
    """Leave idle matrices as they are, where the settings say so and no other rank shares them."""
    for update in updates:
        if update.leaves_idle:
            update.leave_idle(update.nonzero_gradients())


def _slice_sums(update: MatrixUpdate, working_memory: int) -> Tensor:
    """Sum up |M|, as many matrices at a time as memory allows."""
    momentum = update.momentum
    size = max(1, working_memory * len(momentum) // max(1, momentum.nbytes))
    if len(momentum) > size:
        sums = [torch.cat([slice_sums(some) for some in own.split(size)]) for own in update.own(momentum)]
    else:
        sums = [slice_sums(own) for own in update.own(momentum)]
    if update.is_in_pieces:
        return sums[0].sum(1)
    return sums[0].flatten(1) if len(sums) == 1 else torch.cat([each.flatten(1) for each in sums], 1)


def _sums_of_channels(update: MatrixUpdate, sums: Tensor) -> Tensor:
    """Add up the sums of the taps of a channel, where that is what a slice is."""
    if update.taps == 1:
        return sums
    channels = sums.shape[1] // update.taps
    shape = (update.taps, channels) if update.taps_first else (channels, update.taps)
    return sums.view(len(sums), *shape).sum(1 if update.taps_first else 2)


def select(updates: Sequence[MatrixUpdate], sums: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """K: the sorted indices of the largest slices, from the sums over all slices, (count, slices).

    Returns:
        For each update the indices, (count, selected), and the norms: the sums in float32.
    """
    selected: dict[int, tuple[Tensor, Tensor]] = {}
    for equal in group_by(range(len(updates)), lambda at: (sums[at].shape[1], updates[at].selected)).values():
        counts = [len(sums[at]) for at in equal]
        norms = torch.cat([sums[at] for at in equal]).float()
        indices = largest(norms, updates[equal[0]].selected)
        selected.update(zip(equal, zip(indices.split(counts), norms.split(counts), strict=True), strict=True))
    return [selected[at] for at in range(len(updates))]


def take(slices: Sequence[SelectedSlices]) -> list[Tensor]:
    """S <- M[K], or G[K] + mu M[K] with Nesterov, then M[K] <- mu M[K]; S in the orthonormalization's precision."""
    return at_once_or_one_by_one(slices, _take_at_once, _take)


def _take_at_once(slices: Sequence[SelectedSlices]) -> list[Tensor]:
    taken: dict[SelectedSlices, Tensor] = {}
    for (dtype, nesterov), alike in group_by(slices, lambda each: (each.update.dtype, each.update.nesterov)).items():
        gates = [each.update.gate for each in alike]
        stacks = fused.take(
            [each.momentum for each in alike],
            [each.indices for each in alike],
            [each.number(each.update.momentum_factor, 1.0, each.momentum) for each in alike],
            dtype,
            gradients=[each.gradient for each in alike] if nesterov else None,
            nesterov_factors=[as_factor(each.update.momentum_factor, torch.float32) for each in alike]
            if nesterov
            else None,
            opens=[None if gate is None else gate.is_open for gate in gates],
            bits=[each.bits("decay") for each in alike],
        )
        taken.update(zip(alike, stacks, strict=True))
    return [taken[each] for each in slices]


def _take(slices: SelectedSlices) -> Tensor:
    update, momentum, indices = slices.update, slices.momentum, slices.indices
    places = update.at(indices)
    submatrices = gather(momentum, places)
    factor = slices.number(update.momentum_factor, 1.0, submatrices)
    bits = slices.bits("decay")
    if bits is None:
        decay_(momentum, places, submatrices, factor)
    else:
        shrunk = submatrices.clone()
        multiply_add_(shrunk, factor, None, bits.of_slices(indices))
        put_(momentum, places, shrunk)
    if update.nesterov:
        submatrices = submatrices.to(torch.promote_types(momentum.dtype, torch.float32))
        submatrices = submatrices * as_factor(update.momentum_factor, submatrices.dtype)
        if slices.gradient is not None:
            selected = gather(slices.gradient, places)
            submatrices += selected if update.gate is None else update.gate.gradient(selected)
    return submatrices.to(update.dtype)


def polar_factors(stacks: Sequence[Tensor], updates: Sequence[MatrixUpdate], context: StepContext) -> list[Tensor]:
    """O: the polar factors of stacks of submatrices, (count, k, m) each; those of one (k, m) together."""

    def key(at: int) -> Hashable:
        stack, update = stacks[at], updates[at]
        return stack.shape[1:], stack.stride(-1) != 1, stack.dtype, stack.device, update.goes_alone, update.is_fused

    results: dict[int, Tensor] = {}
    in_order = [at for alike in group_by(range(len(stacks)), key).values() for at in alike]
    for turn in bounded(in_order, lambda at: len(stacks[at]) * updates[at].working_bytes, context.working_memory):
        equal = list(group_by(turn, key).values())
        batches = [concatenate([stacks[at] for at in alike]) for alike in equal]
        factors = _polar_factors(batches, [updates[alike[0]] for alike in equal], context)
        for alike, its_factors in zip(equal, factors, strict=True):
            results.update(zip(alike, its_factors.split([len(stacks[at]) for at in alike]), strict=True))
    return [results[at] for at in range(len(stacks))]


def _polar_factors(
    batches: Sequence[Tensor], updates: Sequence[MatrixUpdate], context: StepContext
) -> Iterator[Tensor]:
    """The polar factors of batches, given an update that each is of."""
    if context.orthonormalize is not None:
        yield from (_checked_result(context.orthonormalize(batch.contiguous()), batch) for batch in batches)
        return
    at_once = [at for at, update in enumerate(updates) if update.is_fused and not update.goes_alone]
    normalized: dict[int, Tensor] = {}
    if at_once:
        dtypes = [dtype_of_products(batches[at]) for at in at_once]
        normalized.update(zip(at_once, fused.normalize([batches[at] for at in at_once], SAFETY, dtypes), strict=True))
    for at, (batch, update) in enumerate(zip(batches, updates, strict=True)):
        if at in normalized:
            yield polar_factor(normalized.pop(at), batch.dtype)
        elif update.goes_alone:
            yield concatenate([orthonormalize(matrix.contiguous(), batch.dtype) for matrix in batch.split(1)])
        else:
            yield orthonormalize(batch, batch.dtype)


def _checked_result(result: Tensor, batch: Tensor) -> Tensor:
    """What a callable instead of the package's own has returned, in the precision of the batch."""
    if result.shape != batch.shape:
        raise ValueError(
            f"orthonormalize must return the shape it is given: got {tuple(result.shape)} for {tuple(batch.shape)}"
        )
    return result.to(batch.dtype)


def shrink(updates: Sequence[MatrixUpdate]) -> None:
    """X <- (1 - lr weight_decay) X.

    What is in half precision, or decays cautiously, is left to :func:`apply`: it rounds once, and knows the update. So
    is what a kernel goes over, once.
    """
    at_once, alone = split_off_wholes(
        [
            each
            for each in updates
            if each.shrink != 1.0 and not (each.is_cautious or each.is_fused or each.parameter.dtype in HALF_PRECISION)
        ]
    )
    pairs = [(each, local(each.parameter)) for each in at_once]
    pairs += [(each, own) for each in alone for own in each.own(each.weight)]

    def key(pair: tuple[MatrixUpdate, Tensor]) -> tuple[Gate | None, DeviceNumber | None, torch.dtype]:
        update, weight = pair
        return update.own_gate, update.shrink if isinstance(update.shrink, DeviceNumber) else None, weight.dtype

    for (gate, factor, dtype), equal in group_by(pairs, key).items():
        if gate is not None:
            for update, weight in equal:
                weight.mul_(update.number(update.shrink, 1.0, weight))
        elif factor is not None:
            torch._foreach_mul_([weight for _, weight in equal], factor.to(dtype))
        else:
            factors = [update.shrink for update, _ in equal if not isinstance(update.shrink, DeviceNumber)]
            torch._foreach_mul_([weight for _, weight in equal], factors)


def apply(
    slices: Sequence[SelectedSlices],
    results: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    context: StepContext,
) -> None:
    """X[K] <- X[K] - lr scale O, each neuron times its factor where there are any.

    In half precision X <- (1 - lr weight_decay) X comes first, so that what is selected is rounded once; so it does
    where it is cautious. Slices that are not selected have no update, and are judged by M, of which it will be made.
    """
    of_results = dict(zip(slices, zip(results, factors, strict=True), strict=True))
    at_once_or_one_by_one(
        slices,
        lambda at_once: _apply_at_once(at_once, [of_results[each] for each in at_once]),
        lambda each: _apply(each, *of_results[each]),
    )
    if context.observer is not None and context.observer.wants_results:
        for each, (result, its_factors) in of_results.items():
            context.observer.moved(each.update.source, _change(each, result, its_factors))


def _apply_at_once(slices: Sequence[SelectedSlices], results: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[None]:
    fused.apply(
        [each.weight for each in slices],
        [each.indices for each in slices],
        [result for result, _ in results],
        [each.number(each.update.step_size, 0.0, each.weight) for each in slices],
        [1.0 if each.update.shrink == 1.0 else each.number(each.update.shrink, 1.0, each.weight) for each in slices],
        factors=[factors for _, factors in results],
        factor_dims=[each.update.neuron_dim for each in slices],
        cautious=[each.momentum if each.update.is_cautious else None for each in slices],
        bits=[each.bits("apply") for each in slices],
    )
    return [None] * len(slices)


def _change(slices: SelectedSlices, result: Tensor, factors: Tensor | None) -> Tensor:
    """What is added to X[K], in float32 at least."""
    update = slices.update
    change = result.to(torch.promote_types(update.parameter.dtype, torch.float32))
    change = change * slices.number(-update.step_size, 0.0, change)
    if factors is not None:
        change *= factors.unsqueeze(update.neuron_dim)
    return change


def _apply(slices: SelectedSlices, result: Tensor, factors: Tensor | None) -> None:
    update, weight, bits = slices.update, slices.weight, slices.bits("apply")
    change = _change(slices, result, factors)
    places, its_bits = update.at(slices.indices), None if bits is None else bits.of_slices(slices.indices)
    if update.is_cautious or weight.dtype in HALF_PRECISION:
        moved = gather(weight, places)
        shrink = slices.number(update.shrink, 1.0, moved)
        if update.is_cautious:
            store_(moved, decayed(moved, result, shrink) + change, its_bits)
        else:
            multiply_add_(moved, shrink, change, its_bits)
        everything = zip(update.own(weight), update.own(slices.momentum), update.own_bits(bits), strict=True)
        for own, direction, own_bits in everything:
            shrink = slices.number(update.shrink, 1.0, own)
            if update.is_cautious:
                store_(own, decayed(own, direction, shrink), own_bits)
            elif update.shrink != 1.0:
                multiply_add_(own, shrink, None, own_bits)
        put_(weight, places, moved)
    else:
        add_(weight, places, change)


def at_once_or_one_by_one(
    items: Sequence[S], at_once: Callable[[list[S]], Sequence[R]], one: Callable[[S], R]
) -> list[R]:
    """Return what a function makes of all items together that kernels go over, and another one of each of the rest."""
    together = [each for each in items if each.is_fused]
    made = dict(zip(together, at_once(together), strict=True)) if together else {}
    return [made[each] if each in made else one(each) for each in items]


def show_result(update: MatrixUpdate, result: Tensor, context: StepContext) -> None:
    """Show the observer whole orthonormal submatrices (count, k, m), if it wants them."""
    if context.observer is not None and context.observer.wants_results:
        context.observer.orthonormalized(update.source, result)


def record_selection(update: MatrixUpdate, indices: Tensor, norms: Tensor, context: StepContext) -> None:
    """Keep what was selected, (count, selected), and show the observer that and the norms of all slices."""
    if context.observer is not None:
        context.observer.selected(update.source, indices, norms)
    key = update.parameter, update.matrices.name
    if update.part.first:  # more matrices of a block
        indices = torch.cat([context.selections[key].indices.view(-1, update.selected), indices])
    context.selections[key] = update.selection(indices)


def concatenate(stacks: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, in the memory order that the stacks have; a view where they lie side by side."""
    if len(stacks) == 1:
        return stacks[0]
    side_by_side = fused.adjacent(stacks)
    if side_by_side is not None:
        return side_by_side
    if stacks[0].stride(-1) != 1:
        return torch.cat([stack.mT for stack in stacks]).mT
    return torch.cat(list(stacks))
