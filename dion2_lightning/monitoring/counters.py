"""Counters on the device: when each slice was last selected, and how often.

Matrices with the same number of slices share counters, so a step costs a few operations however many matrices there
are. A matrix from which no slices are selected is one slice, and counts at steps with metrics. At these, counters yield
a table, one row for each parameter, from which the host computes the metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.kernels.precision import move_sums, sum_dtype
from dion2_lightning.matrices.layout import local, placed_like_stack, spread_dims
from dion2_lightning.matrices.mesh_groups import group_around
from dion2_lightning.matrices.parts import held_entries
from dion2_lightning.matrices.views import ObservedParameter
from dion2_lightning.monitoring.history import BINS, bin_of
from dion2_lightning.monitoring.metrics import COLUMNS, ParameterInfo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# After COLUMNS, the table has the number of selections in each bin, and the sorted counts.
HITS: Final = len(COLUMNS)
COUNTS: Final = HITS + BINS
_WIDTH: Final = COUNTS + BINS


class TrackedParameter:
    """A parameter, or a block of one, its counters, and how ranks share it.

    Attributes:
        parameter: The parameter itself.
        source: It, and the name of the block.
        row: Its row of the table.
        info: Its names and its matrices.
        count: How many of its matrices this rank knows the selection of.
        counted: How many slices of each matrix have counters.
        elements: Entries of all its matrices.
        held: How many of them this rank holds.
        share: Which share of the entries of the matrices that it knows of this rank holds.
        mesh: The ranks that hold it; None for a plain parameter.
        is_sharded: Whether ranks hold different parts of it.
        spread_over: Number of ranks over which the matrices of a stack are spread.
        spread_index: Number of this rank among them.
        counters: The counters that it shares with other parameters.
        first_row: The row of its first matrix in them.
        key: What identifies it when the optimizer's parameters change: its names, or itself if it has none.
    """

    counters: "SelectionCounters"
    first_row: int

    def __init__(self, row: int, found: ObservedParameter) -> None:
        parameter: Any = found.parameter
        matrices, axis, selected, rank = found.observed
        slices = matrices.shape[axis] if rank else matrices.slices_along(axis)  # a rank counts every tap
        is_stack = matrices.is_stack
        self.parameter, self.row = parameter, row
        self.source = parameter, matrices.name
        self.info = ParameterInfo(found.group, found.name, matrices.count, slices, axis, 0 < selected < slices, rank)
        self.key = self.info.key if found.is_named else self.source
        self.count = local(parameter).shape[0] if is_stack else matrices.count
        self.counted = slices if selected else 1
        self.elements, self.held = matrices.entries, held_entries(parameter, matrices, found.name)
        self.share = self.held * matrices.count / (self.elements * max(1, self.count))
        self.mesh = mesh = getattr(parameter, "device_mesh", None)
        self.is_sharded, self.spread_over, self.spread_index = False, 1, 0
        if mesh is not None:
            sizes = zip(parameter.placements, mesh.shape, strict=True)
            self.is_sharded = any(size > 1 and not placement.is_replicate() for placement, size in sizes)
            for dim in spread_dims(parameter) if is_stack else ():
                self.spread_over *= mesh.size(dim)
                self.spread_index = self.spread_index * mesh.size(dim) + mesh.get_local_rank(dim)

    def counts(self) -> tuple[Tensor, Tensor]:
        """View its counters: last selections and numbers of selections, (count, n) each."""
        return (
            self.counters.last.narrow(0, self.first_row, self.count),
            self.counters.hits.narrow(0, self.first_row, self.count),
        )

    def gather(self, rows: Tensor) -> Tensor:
        """Return a row for each matrix of the whole stack, on the host, given those of this rank."""
        if self.spread_over > 1:
            spread: Any = placed_like_stack(rows, self.parameter, self.info.matrices)
            rows = spread.full_tensor()
        return rows.cpu().clone()

    def own_rows(self, whole: Tensor) -> Tensor:
        """Return the rows of this rank's matrices, given one for each matrix of the whole stack."""
        if self.spread_over == 1:
            return whole
        from torch.distributed.tensor import Replicate, distribute_tensor

        dims = spread_dims(self.parameter)
        placements = [each if dim in dims else Replicate() for dim, each in enumerate(self.parameter.placements)]
        return distribute_tensor(whole.to(self.parameter.device), self.mesh, placements, src_data_rank=None).to_local()


class SelectionCounters:
    """The counters of all matrices with n slices on a device.

    Attributes:
        last: Step of the last selection; if there was none, the step before the first; int32 (rows, n).
        hits: How often it was selected; int32 (rows, n).
        selected: The selections of the present step: parameter, number of its first matrix among those that this rank
            knows of, indices (count, k), and norms of all slices (count, n), None where the step has no metrics.
    """

    def __init__(self, parameters: Sequence[TrackedParameter], slices: int, device: torch.device, step: int) -> None:
        self._parameters, self._slices = parameters, slices
        rows = 0
        for each in parameters:
            each.counters, each.first_row = self, rows
            rows += each.count
        self.last = torch.full((rows, slices), step, dtype=torch.int32, device=device)
        self.hits = torch.zeros((rows, slices), dtype=torch.int32, device=device)
        self.selected: list[tuple[TrackedParameter, int, Tensor, Tensor | None]] = []

    def update(self, step: int, record: "StepRecord | None") -> None:
        """Count the selections of a step; if it has metrics, add the rows of the table to its record."""
        before = None if record is None else (self.last == step - 1) & (self.hits > 0)
        if self.selected:
            flat = torch.cat(
                [
                    each.flatten()
                    for each in torch._foreach_add(
                        [_flat_indices(indices, self._slices) for _, _, indices, _ in self.selected],
                        [(parameter.first_row + first) * self._slices for parameter, first, _, _ in self.selected],
                    )
                ]
            )
            self.last.view(-1).index_fill_(0, flat, step)
            self.hits.view(-1).index_add_(0, flat, self.hits.new_ones(1).expand(len(flat)))
        if record is not None:
            assert before is not None
            norms = dict[TrackedParameter, Tensor]()
            for parameter, _, _, its_norms in sorted(self.selected, key=lambda each: each[1]):
                assert its_norms is not None
                norms[parameter] = torch.cat([norms[parameter], its_norms]) if parameter in norms else its_norms
            record.rows.append((self._parameters, self._table_rows(step, record.window, before, norms)))
        self.selected = []

    def _table_rows(self, step: int, window: int, before: Tensor, norms: Mapping[TrackedParameter, Tensor]) -> Tensor:
        """Return a row of the table for each matrix."""
        now = (self.last == step) & (self.hits > 0)
        device = self.last.device
        dtype = sum_dtype(device)
        zeros = self.last.new_zeros((1, self._slices), dtype=torch.float32)
        mass = torch.cat([norms.get(each, zeros.expand(each.count, -1)) for each in self._parameters]).to(dtype)
        total, captured = mass.sum(1), (mass * now).sum(1)
        staleness = step - self.last
        never = self.hits == 0
        updated = now.any(1)
        zero_momentum = updated & (total == 0)
        counts = self.hits.sort(dim=1).values
        places = torch.arange(1 - self._slices, self._slices, 2, device=device)
        gini = (places * counts).sum(1).to(dtype) / (self._slices * counts.sum(1).clamp(min=1)).to(dtype)
        rows = torch.zeros((len(mass), _WIDTH), dtype=dtype, device=device)
        for name, values in {
            "matrices": torch.ones_like(total),
            "updated": updated,
            "selected": now.sum(1),
            "covered": ((staleness < window) & ~never).sum(1),
            "staleness": staleness.sum(1),
            "newly_selected": (now & ~before).sum(1),
            "captured_mass": torch.where(total == 0, 0.0, captured / total),
            "imbalance": torch.where(zero_momentum, 0.0, gini),
            "balanced": ~zero_momentum & ~never.all(1),
            "zero_momentum": zero_momentum,
            "zero_again": zero_momentum & (self.hits.sum(1) > now.sum(1)),
            "not_updated": staleness.amin(1) >= window,  # an update selects some slice
            "never_selected": never.sum(1) * updated,
            "staleness_max": staleness.amax(1),
        }.items():
            rows.select(1, COLUMNS[name]).copy_(values)
        bins = torch.zeros((self._slices, BINS), dtype=dtype, device=device)
        bins.scatter_(1, bin_of(self._slices, device).unsqueeze(1), 1.0)
        rows.narrow(1, HITS, BINS).copy_(self.hits.to(dtype) @ bins)
        quantiles = torch.linspace(0, self._slices - 1, BINS, device=device).round().long()
        rows.narrow(1, COUNTS, BINS).copy_(counts.index_select(1, quantiles))
        return rows


@dataclass
class StepRecord:
    """What a step with metrics keeps on the device.

    Attributes:
        window: Steps that coverage looks back.
        rows: The parameters of each counters, and one row of the table for each matrix.
        squares: Sums of the squared changes of parts of parameters, (1,) each.
        projections: Sums of captured energies, turns and rank uses, and number of matrices that have some, (4,) each.
        errors: Sum of orthogonality errors, and number of matrices measured, (2,) each.
        spreads: Sum of the spreads of neurons' variances, and number of matrices that have some, (2,) each.
    """

    window: int
    rows: list[tuple[Sequence[TrackedParameter], Tensor]] = field(default_factory=list)
    squares: list[tuple[TrackedParameter, Tensor]] = field(default_factory=list)
    errors: list[tuple[TrackedParameter, Tensor]] = field(default_factory=list)
    spreads: list[tuple[TrackedParameter, Tensor]] = field(default_factory=list)
    projections: list[tuple[TrackedParameter, Tensor]] = field(default_factory=list)

    def table(self, parameters: int) -> Tensor:
        """Return this rank's table, in ``sum_dtype``, one row for each parameter."""
        device = self.rows[0][1].device
        table = torch.zeros((parameters, _WIDTH), dtype=sum_dtype(device), device=device)
        longest = table.select(1, COLUMNS["staleness_max"])
        for tracked, rows in self.rows:
            index = _to_device([each.row for each in tracked for _ in range(each.count)], device)
            rows = move_sums(rows, device)
            table.index_add_(0, index, rows)
            longest.scatter_reduce_(0, index, rows.select(1, COLUMNS["staleness_max"]), "amax", include_self=False)
        by_column = {
            "squared_update": self.squares,
            "orthogonality_error": self.errors,
            "variance_spread": self.spreads,
            "captured_energy": self.projections,
        }
        for name, sums in by_column.items():
            if sums:
                index = _to_device([each.row for each, _ in sums], device)
                values = torch.stack([move_sums(value, device) for _, value in sums])
                table.narrow(1, COLUMNS[name], values.shape[1]).index_add_(0, index, values)
        return table


def add_up_over_ranks(
    table: Tensor,
    parameters: Sequence[TrackedParameter],
    process_group: "ProcessGroup | None",
    *,
    with_errors: bool,
) -> Tensor:
    """Add up what ranks hold different parts of, in one all-reduce; what every rank has in full stays bit for bit.

    The process group is that of the replicas of plain parameters. With errors, ranks have different parts of those,
    because each was measured by the rank that orthonormalized the matrix.
    """
    has_process_group = process_group is not None
    partial = [p for p in parameters if p.is_sharded or (with_errors and (p.mesh is not None or has_process_group))]
    group = _group_of(partial, process_group)
    if group is None:
        return table
    # A sum finds no maximum, so ranks that hold different experts write theirs into columns of their own.
    width = max(each.spread_over for each in parameters)
    column = _to_device([[each.spread_index] for each in parameters], table.device)
    longest = table.new_zeros(len(parameters), width)
    longest.scatter_(1, column, table.narrow(1, COLUMNS["staleness_max"], 1))
    held = _to_device([[each.held] for each in parameters], table.device)
    mine = torch.cat([table, longest, held], dim=1)
    sums = mine.clone()
    dist.all_reduce(sums, group=group)
    # Replicas add the same numbers. How many there are shows in the sums of matrices and of elements.
    matrices = _to_device([[each.info.matrices] for each in parameters], table.device)
    elements = _to_device([each.elements for each in parameters], table.device)
    copies = (sums.narrow(1, COLUMNS["matrices"], 1) / matrices).repeat(1, sums.shape[1])
    copies.select(1, COLUMNS["squared_update"]).copy_(sums.select(1, -1) / elements)
    copies.narrow(1, COLUMNS["orthogonality_error"], 2).fill_(1.0)  # only the ratio of errors and measured is used
    whole = torch.where(copies == group.size(), mine, sums / copies)
    whole.select(1, COLUMNS["staleness_max"]).copy_(whole.narrow(1, _WIDTH, width).amax(1))
    return whole.narrow(1, 0, _WIDTH)


def orthogonality_errors(orthonormal: Tensor) -> Tensor:
    """Return the sum of the errors of a stack (count, k, m), and how many matrices were measured, (2,).

    Momentum that is all zero has a zero update, which is not measured.
    """
    precise = orthonormal.to(torch.promote_types(orthonormal.dtype, torch.float32))
    if precise.shape[1] > precise.shape[2]:
        precise = precise.mT
    gram = precise @ precise.mT
    short = gram.shape[1]
    distance = torch.linalg.matrix_norm(gram - torch.eye(short, dtype=gram.dtype, device=gram.device))
    is_measured = (precise != 0).flatten(1).any(1)
    dtype = sum_dtype(orthonormal.device)
    errors = torch.where(is_measured, torch.div(distance.to(dtype), short**0.5), 0.0)
    return torch.stack([errors, is_measured.to(dtype)]).sum(1)


def variance_spreads(variance: Tensor) -> Tensor:
    """Return the sum of the spreads of the matrices' variances (count, out), and how many matrices have some, (2,).

    Neurons that no step has updated have none yet. A spread is a standard deviation over a mean.
    """
    precise = variance.to(sum_dtype(variance.device))
    neurons = (precise > 0).sum(1)
    mean = precise.sum(1) / neurons.clamp(min=1)
    deviations = torch.where(precise > 0, precise - mean.unsqueeze(1), 0.0)
    deviation = (deviations.square().sum(1) / neurons.clamp(min=1)).sqrt()
    spreads = torch.where(neurons > 0, deviation / mean, 0.0)
    return torch.stack([spreads, (neurons > 0).to(precise.dtype)]).sum(1)


def _group_of(parameters: Sequence[TrackedParameter], process_group: "ProcessGroup | None") -> "ProcessGroup | None":
    """The ranks that hold parts of the parameters."""
    meshes = dict.fromkeys(each.mesh for each in parameters if each.mesh is not None)
    group = group_around([*meshes]) if meshes else None
    if process_group is None or all(each.mesh is not None for each in parameters):
        return group
    ranks = set(dist.get_process_group_ranks(process_group))
    is_around = group is None or ranks.issuperset(dist.get_process_group_ranks(group))
    return process_group if is_around else dist.group.WORLD


def _flat_indices(indices: Tensor, slices: int) -> Tensor:
    """Turn positions in each matrix of a stack (count, k) into positions among all its slices."""
    count = len(indices)
    if count == 1:
        return indices
    return indices + torch.arange(0, count * slices, slices, device=indices.device).unsqueeze(1)


def _to_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Send numbers to a device, without waiting for it; an empty list becomes int64."""
    return torch.tensor(numbers, dtype=None if len(numbers) else torch.int64).to(device, non_blocking=True)
