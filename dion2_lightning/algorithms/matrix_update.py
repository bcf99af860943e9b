"""What some matrices bring to a step, and how they are cut into runs.

What a step needs of the settings is read by ``updates_of`` in dion2.py and ``MatrixUpdate.of``; the rest is numbers.
"""

import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import Member, StepContext
from dion2_lightning.algorithms.slicing import Slicing, slicings_of
from dion2_lightning.algorithms.working_memory import memory_at_once, pass_bytes
from dion2_lightning.kernels.device_numbers import Number, as_factor
from dion2_lightning.kernels.estimated_norms import can_estimate_sums
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, random_bits
from dion2_lightning.kernels.selection import Selection
from dion2_lightning.kernels.triton_launch import DTYPES
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import Layout, Spans, local, local_gradient, placed_like_stack
from dion2_lightning.matrices.parts import Part
from dion2_lightning.matrices.splits import OUTPUT_AXIS
from dion2_lightning.matrices.views import Matrices, Source

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

_ROUNDED: Final = {"accumulate": "momentum", "decay": "momentum", "apply": "weight"}
"""The lines of the box that change what may be in half precision. Each is rounded by random bits of its own: a second
rounding by the same bits would not be exact on average."""


@dataclass(eq=False)
class MatrixUpdate:
    """Matrices of a parameter in a step, as (count, n, m) views, n slices of m entries each, and numbers.

    Attributes:
        parameter: The parameter they belong to.
        device: Where it is.
        label: Its name for error messages.
        name: Its name, the same whatever the layout.
        slicing: Which matrices they are, which part of them this rank holds, and what their slices are.
        state: The parameter's state, M in it.
        momentum_factor: mu.
        step_size: lr times the scale rule.
        shrink: 1 - lr * weight_decay.
        nesterov: Whether the gradient is added to what is orthonormalized.
        is_cautious: Whether only entries decay that their update does not push away from zero.
        gate: What decides on the device whether the step is taken; None where every step is.
        leaves_idle: Whether those whose gradient is zero stay as they are.
        neuron_beta: Decay rate of the neurons' variances; None where neurons are not normalized.
        rounding_seed: Decides how what is in half precision is rounded stochastically; None rounds to nearest.
        may_fuse: Whether the kernels of kernels/fused.py may go over its memory, see :attr:`is_fused`.
        bits: The random bits, by the line of the box that they round: see :func:`draw_bits`.
        active: Which of the matrices are updated, once it is known which are idle: see :meth:`leave_idle`.
    """

    parameter: Tensor
    device: torch.device
    label: str
    name: str
    slicing: Slicing
    state: dict[str, Tensor]
    momentum_factor: Number
    step_size: Number
    shrink: Number
    nesterov: bool
    is_cautious: bool
    gate: Gate | None
    leaves_idle: bool
    neuron_beta: float | None
    rounding_seed: int | None
    may_fuse: bool
    bits: dict[str, RandomBits] = field(default_factory=dict)
    active: Gate | None = None

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
        device = local(parameter).device
        slicings = slicings_of(parameter, matrices, label, axis=axis, selected=selected, dtype=dtype, context=context)
        return [
            cls(
                parameter=parameter,
                device=device,
                label=label,
                name=name,
                slicing=slicing,
                state=state,
                momentum_factor=momentum_factor,
                step_size=step_size,
                shrink=shrink,
                nesterov=nesterov,
                is_cautious=group["cautious_weight_decay"] and shrink != 1.0,
                gate=context.gates.get(device),
                leaves_idle=group["skip_idle_experts"] and (matrices.is_stack or matrices.count > 1),
                neuron_beta=neuron_beta,
                rounding_seed=group["rounding_seed"] if group["rounding"] == "stochastic" else None,
                may_fuse=context.fuses_on(device),
            )
            for slicing in slicings
        ]

    @property
    def members(self) -> "Sequence[MatrixUpdate]":
        """The updates of single parameters that this one is made of: itself, but see :class:`StackedUpdate`."""
        return [self]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut what is of all its matrices, (count, ...), into what is of each member's."""
        members = self.members
        parts: Sequence[Tensor] = [tensor] if len(members) == 1 else tensor.split(members[0].count)
        return parts

    @property
    def part(self) -> Part:
        """Which part of which matrices."""
        return self.slicing.part

    @property
    def matrices(self) -> Matrices:
        """The matrices of the block, or of the whole parameter, that these are some of."""
        return self.slicing.matrices

    @property
    def layout(self) -> Layout:
        """Which ranks hold which part of them."""
        return self.slicing.layout

    @property
    def axis(self) -> int:
        """What a slice is: 0 output, 1 input."""
        return self.slicing.axis

    @property
    def selected(self) -> int:
        """Slices to select in each matrix."""
        return self.slicing.selected

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the orthonormalization."""
        return self.slicing.dtype

    @property
    def source(self) -> Source:
        """Which matrices they are, for observers."""
        return Source(self.parameter, self.matrices.name, self.part.first)

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

    @property
    def is_scattered(self) -> bool:
        """Whether slices lie apart, with those of other blocks in between: then the views have all of them.

        :meth:`at` and :meth:`own` say which are its own, so that no block needs a copy.
        """
        return self.slicing.is_scattered

    @property
    def is_in_pieces(self) -> bool:
        """Whether the entries of slices lie in pieces of one size, apart: then the views have pieces.

        They are (count, pieces, n, m of each), see kernels/moving_slices.py, and need no copy either.
        """
        return self.slicing.is_in_pieces

    @property
    def is_interleaved(self) -> bool:
        """Whether single entries of other blocks lie between those of slices."""
        return self.slicing.is_interleaved

    @cached_property
    def is_fused(self) -> bool:
        """Whether a kernel makes each pass over its memory, of all matrices at once; else operations of torch do."""
        if not self.may_fuse or self.is_scattered or self.is_in_pieces:
            return False
        gradient = self.parameter.grad
        dtypes = {self.dtype, self.parameter.dtype, self.state["momentum"].dtype}
        return dtypes.issubset(DTYPES) and (gradient is None or gradient.dtype in DTYPES)

    @cached_property
    def can_estimate_sums(self) -> bool:
        """Whether estimates of its norms can decide about most slices: they are faster, but the host reads them."""
        return not self.is_fused and self.taps == 1 and can_estimate_sums(self.momentum)

    @property
    def sums_key(self) -> Hashable:
        """What is the same for blocks of a weight whose |M| is summed up together, where that reads the memory once."""
        have_rows_in_common = (self.is_interleaved or self.is_in_pieces) and not self.matrices.blocks_are_rows
        are_together = self.taps == 1 and (self.is_scattered or have_rows_in_common)
        return (self.parameter, self.axis) if are_together else self

    @property
    def view_key(self) -> Hashable:
        """What is the same for blocks of a weight that lie in between each other: one view has them all.

        Going over it once for all of them saves up to a tenth of a step, as its rows have few entries of each.
        """
        return (self.parameter, self.axis) if self.is_scattered and self.taps == 1 else self

    @property
    def stack_key(self) -> Hashable:
        """What is the same for updates that can be one :class:`StackedUpdate`."""
        if not self.is_fused or self.leaves_idle or not self.count:
            return self
        if self.part.count not in (None, self.matrices.count) or not self.is_view(local(self.parameter)):
            return self  # what is selected of several parts is put together in their order; copies of X are made late
        variance = None if self.neuron_beta is None else local(self.state["variance"])
        views = [_memory_key(each) for each in (self.weight, self.momentum, self.gradient, variance)]
        numbers = self.momentum_factor, self.step_size, self.shrink, self.neuron_beta, self.nesterov, self.is_cautious
        bits = [(line, *(each.stride() for each in bits)) for line, bits in self.bits.items()]
        return self.slicing, self.gate, self.taps_first, *numbers, *views, *bits

    def _read(self, tensor: Tensor) -> Tensor:
        if self.is_scattered:
            return self.matrices.slices(self.part.stack(tensor), self.axis)
        if self.is_in_pieces:
            dim = 1 if self.matrices.blocks_are_rows else 2
            (pieces,) = self.part.pieces(self.part.stack(tensor), dim)
            return pieces.mT if dim == 1 else pieces.transpose(1, 2)
        taps_first = self.matrices.is_kernel and self.taps_first
        return self.matrices.slices(self.part.read(tensor, taps_first=taps_first), self.axis)

    def is_view(self, whole: Tensor) -> bool:
        """Return whether what is read out of a tensor, such as the parameter, is a view of it."""
        return self.is_scattered or self.is_in_pieces or self.part.is_view(whole, taps_first=self.taps_first)

    def at(self, indices: Tensor) -> Tensor:
        """Return where in the views the slices are that this rank holds under these numbers."""
        return self.part.places(indices) if self.is_scattered else indices

    @property
    def own_places(self) -> Tensor:
        """Where in the views all its slices on this rank are, in order."""
        start, stop = self.held[self.layout.own_rank]
        return self.at(torch.arange(stop - start, device=self.device))

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
        read = vars(self)
        if self.matrices.is_kernel or self.part.is_apart:  # all others are views
            for name, whole in (("weight", local(self.parameter)), ("momentum", local(self.state["momentum"]))):
                if name in read and not self.is_view(whole):
                    copy = self.matrices.slices(read[name], self.axis)  # its own inverse
                    self.part.write(whole, copy, taps_first=self.taps_first)
        for name in ("weight", "gradient", "momentum"):
            read.pop(name, None)

    def nonzero_gradients(self) -> Tensor:
        """Return how many entries of G are not zero, in this rank's part of each matrix, (count,)."""
        if self.gradient is None:
            return torch.zeros(self.count, dtype=torch.int64, device=self.momentum.device)
        own = self.own(self.gradient)
        return torch.stack([torch.count_nonzero(each, tuple(range(1, each.ndim))) for each in own]).sum(0)

    def leave_idle(self, nonzero: Tensor) -> None:
        """From now on leave matrices as they are of which all ranks together have no entry of G that is not zero."""
        is_active = (nonzero > 0).view(-1, 1, 1)
        self.active = Gate(is_active if self.gate is None else is_active & self.gate.is_open)

    @property
    def own_gate(self) -> Gate | None:
        """What decides which of the matrices are updated; :attr:`gate` where it is all or none."""
        return self.gate if self.active is None else self.active

    def number(self, value: Number, neutral: float, of: Tensor, first: int = 0) -> float | Tensor:
        """Return a number that the update multiplies a tensor by; the neutral one in a step that is skipped.

        A tensor is of the other's precision, in float32 at least. It is (count, 1, 1, ...) where some matrices may be
        idle: then the other is of matrices from ``first`` on.
        """
        gate, precise = self.own_gate, torch.promote_types(of.dtype, torch.float32)
        if gate is None:
            return as_factor(value, precise)
        number = gate.number(value, neutral, precise)
        return number if self.active is None else number.narrow(0, first, len(of)).view(-1, *[1] * (of.ndim - 1))

    def sharing(self, share_replicas: bool | None) -> "tuple[ProcessGroup | None, ...]":
        """Return the groups of ranks with which this one takes the step: those of parts, those of replicas."""
        replicas = self.layout.replicas if share_replicas is not False else None
        return self.layout.group, None if replicas is None else replicas.group

    @property
    def slices(self) -> int:
        """Slices of each whole matrix, n; of a kernel each counts as many times as it has taps."""
        return self.slicing.slices

    @property
    def taps(self) -> int:
        """How many of the n are selected together: all taps of a channel, or 1."""
        return self.slicing.taps

    @property
    def k(self) -> int:
        """How many of the n a step selects."""
        return self.slicing.k

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
        return self.slicing.entries

    @property
    def working_bytes(self) -> int:
        """Working memory that one matrix takes beside the others of its batch: for its selected slices."""
        return self.slicing.working_bytes

    @property
    def shared_bytes(self) -> int:
        """Working memory of one matrix that ranks share."""
        return self.slicing.shared_bytes

    @property
    def taken_bytes(self) -> int:
        """Working memory that one matrix takes in addition while its slices are taken, or added to."""
        if self.is_fused:  # kernels need none
            return 0
        copies = 3 if self.view_key is self else 5  # as it lies in the view, and by blocks
        return copies * self.k * self.entries * self.state["momentum"].element_size()

    @property
    def pass_bytes(self) -> int:
        """Working memory of a pass over the weights of one matrix, in half precision or with cautious decay; else 0."""
        if self.is_fused or (self.parameter.dtype not in HALF_PRECISION and not self.is_cautious):
            return 0
        return self.slices * self.entries * pass_bytes(self.parameter.dtype)

    @property
    def slices_are_neurons(self) -> bool:
        """Whether a slice is an output of the matrix; if not, every entry of a slice belongs to another one."""
        return self.slicing.slices_are_neurons

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
        return self.slicing.held

    @property
    def columns(self) -> Spans:
        """By rank of the layout's group: which entries of the slices it holds."""
        return self.slicing.columns

    @property
    def held_of_slices(self) -> int:
        """Entries of each slice that this rank holds."""
        return self.slicing.held_of_slices

    @property
    def held_of_matrix(self) -> int:
        """Entries of each matrix that this rank holds."""
        return self.slicing.held_of_matrix

    @property
    def held_entries(self) -> int:
        """Entries of the matrices that this rank holds."""
        return self.count * self.held_of_matrix

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


@dataclass(eq=False, kw_only=True)
class StackedUpdate(MatrixUpdate):
    """The matrices of several parameters that are alike, as one stack: those of one after those of another.

    Kernels of Triton take them so. What a step finds out about a stack, and makes for it, it does once: with 210
    matrices of four shapes the host takes 0.7 of the time. What holds for all is the first member's; parameters, names,
    states and random bits are the members' own, and so are X, G and M, of which there is no view of all. What a step
    selects of a stack is never cut, as a run has memory for all of it.

    Attributes:
        stacked: The members.
    """

    stacked: Sequence[MatrixUpdate]

    @property
    def members(self) -> Sequence[MatrixUpdate]:
        """The updates of single parameters."""
        return self.stacked

    @property
    def count(self) -> int:
        """How many matrices they are, on this rank."""
        return sum(each.count for each in self.stacked)

    def _read(self, tensor: Tensor) -> Tensor:
        raise TypeError("a stack of several parameters has no view; take those of its members")

    def write_back(self) -> None:
        """Let each member write back what it has copied."""
        for each in self.stacked:
            each.write_back()


def _memory_key(view: Tensor | None) -> Hashable:
    """What is the same for views that a kernel reads alike."""
    if view is None:
        return None
    return view.dtype, view.shape, view.stride(), view.storage_offset() * view.itemsize % 16 == 0


def stack_alike(updates: Sequence[MatrixUpdate]) -> list[MatrixUpdate]:
    """Make one update of those that are alike and that kernels of Triton take; all others stay as they are."""
    groups = group_by(updates, lambda update: update.stack_key).values()
    return [_stacked(alike) if len(alike) > 1 else alike[0] for alike in groups]


def _stacked(alike: Sequence[MatrixUpdate]) -> MatrixUpdate:
    of_first = {each.name: getattr(alike[0], each.name) for each in fields(MatrixUpdate)}
    return StackedUpdate(**of_first, stacked=alike)


@dataclass(eq=False)
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
    def count(self) -> int:
        """How many matrices they are of."""
        return self.indices.shape[0]

    @property
    def members(self) -> "Sequence[SelectedSlices]":
        """The same, parameter by parameter: itself, unless the update is of several."""
        return [self] if len(self.update.members) == 1 else self._members  # it must not hold itself: garbage

    @cached_property
    def _members(self) -> "Sequence[SelectedSlices]":
        return [
            SelectedSlices(*each) for each in zip(self.update.members, self.update.split(self.indices), strict=True)
        ]

    @property
    def parameter(self) -> Tensor:
        """The parameter that the matrices belong to."""
        return self.update.parameter

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.update.device

    @property
    def is_fused(self) -> bool:
        """Whether a kernel makes each pass over their memory."""
        return self.update.is_fused

    @property
    def view_key(self) -> Hashable:
        """The same for what is gathered, and put back, together: of the same matrices, by the same numbers."""
        return (self.update.view_key, self.first, self.count) if self.update.active is None else self

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
        count = self.indices.shape[0]
        return tensor if count == tensor.shape[0] else tensor.narrow(0, self.first, count)

    def bits(self, line: str) -> RandomBits | None:
        """Return the random bits of these matrices for a line of the box; None where it does not round by any."""
        bits = self.update.bits.get(line)
        return None if bits is None else bits.of_matrices(self.first, self.count)

    def number(self, value: Number, neutral: float, of: Tensor) -> float | Tensor:
        """Return :meth:`MatrixUpdate.number` for a tensor of these matrices."""
        return self.update.number(value, neutral, of, self.first)


def runs(updates: Sequence[MatrixUpdate], context: StepContext) -> Iterator[list[MatrixUpdate]]:
    """Cut updates into runs that are updated together, those of equal shapes next to each other.

    A run is on one device and takes at most what :func:`memory_at_once` says, or is one view that takes more.
    """

    def shape(view: Sequence[MatrixUpdate]) -> Hashable:
        return view[0].slices, view[0].entries, view[0].k

    def size_of(view: Sequence[MatrixUpdate]) -> int:
        return sum(update.working_bytes * update.count for update in view)

    for device, there in group_by(updates, lambda update: update.device).items():
        views = group_by(there, lambda update: update.view_key).values()
        in_order = [view for equal in group_by(views, shape).values() for view in equal]
        for run in bounded(in_order, size_of, memory_at_once(device, context.working_memory)):
            yield [update for view in run for update in view]


def within_memory(slices: Sequence[SelectedSlices], context: StepContext) -> Iterator[list[SelectedSlices]]:
    """Cut the slices of a run so that their submatrices take at most that much memory, or are those of one matrix.

    There are several lists where one stack of matrices takes more.
    """
    if not slices:
        return
    turns: list[list[SelectedSlices]] = []
    for alike in group_by(slices, lambda each: each.view_key).values():
        if len(alike) == alike[0].count == 1:
            turns.append(alike)
            continue
        size = min(_matrices_at_once(each.update, context) for each in alike)
        if size >= len(alike):
            pieces = [list(_pieces(each, size // len(alike))) for each in alike]
            turns += map(list, zip(*pieces, strict=True))
        else:
            turns += [[piece] for each in alike for piece in _pieces(each, size)]
    in_turn = max(map(_bytes_of_turn, turns))
    limit = memory_at_once(slices[0].update.device, context.working_memory - in_turn)

    def size_of(turn: Sequence[SelectedSlices]) -> int:
        return sum(each.count * each.update.working_bytes for each in turn)

    for some in bounded(turns, size_of, limit):
        yield [each for turn in some for each in turn]


def _matrices_at_once(update: MatrixUpdate, context: StepContext) -> int:
    """How many of its matrices' submatrices fit in memory; at least one."""
    size = context.working_memory // (update.working_bytes + max(update.taken_bytes, update.pass_bytes))
    return max(1, min(size, memory_at_once(update.device, context.working_memory) // update.working_bytes))


def _pieces(slices: SelectedSlices, size: int) -> Iterator[SelectedSlices]:
    """Cut slices into those of at most ``size`` matrices."""
    if slices.count <= size:
        yield slices
        return
    for number, indices in enumerate(slices.indices.split(size)):
        yield SelectedSlices(slices.update, indices, slices.first + number * size)


def _bytes_of_turn(slices: Sequence[SelectedSlices]) -> int:
    """Working memory that the slices of one view take in addition, when it is their turn."""
    taken = sum(each.count * each.update.taken_bytes for each in slices)
    return max(taken, *(each.count * each.update.pass_bytes for each in slices))


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
        coordinates: dict[tuple[Slicing, bool], tuple[Tensor, Tensor]] = {}
        for _, each in equal:
            if (key := (each.slicing, each.taps_first)) not in coordinates:
                coordinates[key] = each.part.coordinates(each.parameter, taps_first=each.taps_first)
        drawn = random_bits(
            [coordinates[each.slicing, each.taps_first] for _, each in equal],
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
