"""What statistics of the selection keep on the device: when each slice was last selected, and how often.

A ledger holds that for all matrices with equally many slices, so that a step costs a few operations however many
matrices there are. Where figures are due it makes a table of them, a row for each parameter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.kernels.precision import move_sums, sum_dtype
from dion2_lightning.matrices.layout import local, placed_like_stack, spread_dims
from dion2_lightning.matrices.views import SlicedParameter
from dion2_lightning.monitoring.history import BINS, bin_of
from dion2_lightning.monitoring.metrics import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Columns of the table that a step leaves, a row for each parameter. All but the longest staleness are sums.
(
    _MATRICES, _UPDATED, _SELECTED, _COVERED, _STALENESS, _FRESH, _CAPTURED, _IMBALANCE, _DEAD, _NEVER, _SQUARES,
    _ERROR, _MEASURED, _IDLE, LONGEST, COLUMNS,
) = range(16)  # fmt: skip
HITS: Final = COLUMNS
COUNTS: Final = COLUMNS + BINS


@dataclass(eq=False)
class Entry:
    """A parameter: where its counts are, and which ranks hold what of it.

    Attributes:
        position: Its row in the table.
        kind: Its names, and what is known of its matrices.
        count: How many of them this rank holds a part of.
        entries: Of all its matrices together.
        device: Where it is.
        mesh: The ranks that hold it; None for a plain parameter.
        held_by: How many ranks hold different parts of it.
        spread_over: Over how many ranks its matrices are spread, each whole on one or with parts on others.
        spread_index: Which of them this rank is.
    """

    position: int
    kind: Kind
    count: int
    entries: int
    device: torch.device
    mesh: Any
    held_by: int
    spread_over: int
    spread_index: int
    ledger: "Ledger" = field(init=False)
    first_row: int = field(init=False)

    @classmethod
    def of(cls, position: int, sliced: SlicedParameter) -> "Entry":
        """Read a parameter, as it is now."""
        parameter: Any = sliced.parameter
        matrices, axis = sliced.matrices, sliced.axis
        is_stack = parameter.ndim == 3
        mesh = getattr(parameter, "device_mesh", None)
        held_by = spread_over = 1
        spread_index = 0
        if mesh is not None:
            sizes = [1 if each.is_replicate() else mesh.size(dim) for dim, each in enumerate(parameter.placements)]
            held_by = math.prod(sizes)
            for dim in spread_dims(parameter) if is_stack else ():
                spread_over *= sizes[dim]
                spread_index = spread_index * sizes[dim] + mesh.get_local_rank(dim)
        return cls(
            position=position,
            kind=Kind(sliced.group, sliced.name, matrices.count, matrices.shape[axis], axis),
            count=local(parameter).shape[0] if is_stack else 1,
            entries=parameter.numel(),
            device=parameter.device,
            mesh=mesh,
            held_by=held_by,
            spread_over=spread_over,
            spread_index=spread_index,
        )

    @property
    def key(self) -> tuple[str, str]:
        """The names of its group and its own."""
        return self.kind.group, self.kind.name

    def is_owned(self, process_group: "ProcessGroup | None") -> bool:
        """Whether its matrices may be orthonormalized, and measured, by other ranks."""
        return self.mesh is not None or process_group is not None

    def is_partial(self, orthogonality: bool, process_group: "ProcessGroup | None") -> bool:
        """Whether other ranks have something of its figures that this one lacks."""
        return self.held_by > 1 or (orthogonality and self.is_owned(process_group))

    def copies(self, ranks: int, process_group: "ProcessGroup | None") -> list[float]:
        """How many of the ranks add the same numbers, by column of the table; all of them where each has all."""
        copies = [ranks / self.spread_over] * (COUNTS + BINS)
        copies[_SQUARES] = ranks / self.held_by
        if self.is_owned(process_group):
            copies[_ERROR] = copies[_MEASURED] = 1.0  # measured by the owner; their ratio is what counts
        return copies


class Ledger:
    """When each slice was last selected, and how often, for all matrices of n slices on a device.

    Attributes:
        last: Step of the last selection; the step before the first one for a slice that never was; int32 (rows, n).
        hits: How often it was selected; int32 (rows, n).
        seen: What a step selected.
    """

    def __init__(self, entries: Sequence[Entry], slices: int, device: torch.device, step: int) -> None:
        self._entries, self._slices = entries, slices
        rows = 0
        for entry in entries:
            entry.ledger, entry.first_row = self, rows
            rows += entry.count
        self.last = torch.full((rows, slices), step, dtype=torch.int32, device=device)
        self.hits = torch.zeros((rows, slices), dtype=torch.int32, device=device)
        self.seen: list[tuple[Entry, Tensor, Tensor]] = []

    def rows_of(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """View what belongs to a parameter, (count, n) each."""
        first, count = entry.first_row, entry.count
        return self.last.narrow(0, first, count), self.hits.narrow(0, first, count)

    def write(self, entry: Entry, last: Tensor, hits: Tensor) -> None:
        """Take over what belongs to a parameter."""
        for own, given in zip(self.rows_of(entry), (last, hits), strict=True):
            own.copy_(given)

    def count(self, step: int, due: "Due | None") -> None:
        """Count what was seen; leave a part of the table where figures are due."""
        before = None if due is None else (self.last == step - 1) & (self.hits > 0)
        if self.seen:
            flat = torch.cat(
                [
                    each.flatten()
                    for each in torch._foreach_add(
                        [_from_first_row(indices, self._slices) for _, indices, _ in self.seen],
                        [entry.first_row * self._slices for entry, _, _ in self.seen],
                    )
                ]
            )
            self.last.view(-1).index_fill_(0, flat, step)
            self.hits.view(-1).index_add_(0, flat, self.hits.new_ones(1).expand(len(flat)))
        if due is not None:
            assert before is not None
            norms = {entry: its_norms for entry, _, its_norms in self.seen}
            due.parts.append((self._entries, self._rows(step, due.window, before, norms)))
        self.seen = []

    def _rows(self, step: int, window: int, before: Tensor, norms: Mapping[Entry, Tensor]) -> Tensor:
        """The table's columns of every matrix, the hits of its slices in bins, and its sorted counts."""
        now = (self.last == step) & (self.hits > 0)
        device = self.last.device
        dtype = sum_dtype(device)
        zeros = self.last.new_zeros((1, self._slices), dtype=torch.float32)
        mass = torch.cat([norms.get(entry, zeros.expand(entry.count, -1)) for entry in self._entries]).to(dtype)
        total, captured = mass.sum(1), (mass * now).sum(1)
        staleness = step - self.last
        never = self.hits == 0
        updated = now.any(1)
        dead = updated & (total == 0)
        counts = self.hits.sort(dim=1).values
        places = torch.arange(1 - self._slices, self._slices, 2, device=device)
        gini = (places * counts).sum(1).to(dtype) / (self._slices * counts.sum(1).clamp(min=1)).to(dtype)
        rows = torch.zeros((len(mass), COUNTS + BINS), dtype=dtype, device=device)
        for column, values in {
            _MATRICES: torch.ones_like(total),
            _UPDATED: updated,
            _SELECTED: now.sum(1),
            _COVERED: ((staleness < window) & ~never).sum(1),
            _STALENESS: staleness.sum(1),
            _FRESH: (now & ~before).sum(1),
            _CAPTURED: torch.where(total == 0, 0.0, captured / total),
            _IMBALANCE: torch.where(dead, 0.0, gini),
            _DEAD: dead,
            _NEVER: never.sum(1) * updated,
            _IDLE: dead & (self.hits.sum(1) > now.sum(1)),
            LONGEST: staleness.amax(1),
        }.items():
            rows.select(1, column).copy_(values)
        rows.narrow(1, HITS, BINS).copy_(self.hits.to(dtype) @ _bins(self._slices, device))
        quantiles = torch.linspace(0, self._slices - 1, BINS, device=device).round().long()
        rows.narrow(1, COUNTS, BINS).copy_(counts.index_select(1, quantiles))
        return rows


@dataclass
class Due:
    """What a step leaves on the device where figures are due.

    Attributes:
        step: Which step it is.
        window: Steps that coverage looks back.
        parts: Every ledger's parameters and rows.
        squares: Of what a part of a parameter was changed by, the sum.
        errors: Of matrices that this rank has orthonormalized, as :func:`orthogonality_errors` returns them.
    """

    step: int
    window: int
    parts: list[tuple[Sequence[Entry], Tensor]] = field(default_factory=list)
    squares: list[tuple[Entry, Tensor]] = field(default_factory=list)
    errors: list[tuple[Entry, Tensor]] = field(default_factory=list)

    def table(self, entries: Sequence[Entry]) -> Tensor:
        """Return the table, in ``sum_dtype``, a row for each parameter, of what this rank holds."""
        device = self.parts[0][1].device
        table = torch.zeros((len(entries), COUNTS + BINS), dtype=sum_dtype(device), device=device)
        for its_entries, rows in self.parts:
            position_of_row = [entry.position for entry in its_entries for _ in range(entry.count)]
            # A rank may hold no expert of any stack: even then these are whole numbers.
            positions = torch.tensor(position_of_row, dtype=torch.int64).to(device, non_blocking=True)
            rows = move_sums(rows, device)
            longest = rows.select(1, LONGEST).clone()
            rows.select(1, LONGEST).zero_()
            table.index_add_(0, positions, rows)
            table.select(1, LONGEST).scatter_reduce_(0, positions, longest, "amax")
        if self.squares:
            positions = to_device([entry.position for entry, _ in self.squares], device)
            values = torch.stack([move_sums(each.sum(), device) for _, each in self.squares])
            table.select(1, _SQUARES).index_add_(0, positions, values)
        if self.errors:
            positions = to_device([entry.position for entry, _ in self.errors], device)
            sums = torch.stack([move_sums(each.sum(1), device) for _, each in self.errors])
            for column, values in zip((_ERROR, _MEASURED), sums.unbind(1), strict=True):
                table.select(1, column).index_add_(0, positions, values)
        return table


def orthogonality_errors(orthonormal: Tensor) -> Tensor:
    """The error of each of a stack (count, k, m), in float32 at least, and whether it has one, 1 or 0; (2, count).

    What is made of momentum that is zero throughout is zero itself, and has none: both numbers are 0.
    """
    precise = orthonormal.to(torch.promote_types(orthonormal.dtype, torch.float32))
    if precise.shape[1] > precise.shape[2]:
        precise = precise.mT
    gram = precise @ precise.mT
    short = gram.shape[1]
    distance = torch.linalg.matrix_norm(gram - torch.eye(short, dtype=gram.dtype, device=gram.device))
    has_one = (precise != 0).flatten(1).any(1)
    dtype = sum_dtype(orthonormal.device)
    errors = torch.where(has_one, torch.div(distance.to(dtype), short**0.5), 0.0)
    return torch.stack([errors, has_one.to(dtype)])


def group_around(entries: Sequence[Entry], process_group: "ProcessGroup | None") -> "ProcessGroup | None":
    """The ranks that hold something of the parameters; all there are, where these are on several meshes."""
    meshes = {entry.mesh for entry in entries}
    if len(meshes) != 1:
        return dist.group.WORLD if meshes else None
    mesh = meshes.pop()
    if mesh is None:
        return process_group
    if mesh.ndim == 1:
        group: ProcessGroup = mesh.get_group()
        return group
    return mesh._flatten().get_group() if mesh.mesh_dim_names is not None else dist.group.WORLD


def _from_first_row(indices: Tensor, slices: int) -> Tensor:
    """Positions among all slices of a stack, given those in each of its matrices (count, k)."""
    count = len(indices)
    if count == 1:
        return indices
    return indices + torch.arange(0, count * slices, slices, device=indices.device).unsqueeze(1)


def _bins(slices: int, device: torch.device) -> Tensor:
    """Which bin each slice falls into, (slices, BINS), one-hot."""
    bins = bin_of(slices, device)
    return torch.zeros((slices, BINS), dtype=sum_dtype(device), device=device).scatter_(1, bins.unsqueeze(1), 1.0)


def to_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Send numbers to a device, without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def whole_rows(rows: Tensor, parameter: Any, entry: Entry) -> Tensor:
    """The rows of all matrices of a stack, on the host; gathered where ranks hold different ones."""
    if entry.spread_over > 1:
        spread: Any = placed_like_stack(rows, parameter, entry.kind.matrices)
        rows = spread.full_tensor()
    return rows.cpu().clone()


def own_part(whole: Tensor, parameter: Any, entry: Entry) -> Tensor:
    """This rank's rows of a tensor with one for each matrix of a stack."""
    if entry.spread_over == 1:
        return whole
    from torch.distributed.tensor import Replicate, distribute_tensor

    dims = spread_dims(parameter)
    placements = [each if dim in dims else Replicate() for dim, each in enumerate(parameter.placements)]
    return distribute_tensor(whole.to(entry.device), entry.mesh, placements, src_data_rank=None).to_local()
