"""What was selected, in numbers: is every part of every matrix trained, or does a quarter do all the work?

:class:`SelectionStatistics` looks on while an optimizer steps. It keeps two integers for every slice, on the device:
when the slice was last selected, and how often. Every so many steps it makes figures of them, at the price of one look
of the host at the device and, where ranks hold different parts, one all-reduce.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.groups import parameter_names
from dion2_lightning.history import BINS, Kind, SelectionHistory, bin_of
from dion2_lightning.layout import Matrices, alike, local, placed_like_stack, spread_dims
from dion2_lightning.update import MatrixUpdate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dion2_lightning.optimizer import Dion2

MEANINGS: Final[dict[str, str]] = {
    "selected_fraction": "share of the slices that this step selected",
    "coverage": "share of the slices selected at least once in the last steps of the window",
    "staleness_mean": "steps since a slice was last selected, mean over the slices",
    "staleness_max": "the same, of the slice that waits longest",
    "turnover": "share of the selection that the step before had not selected",
    "captured_mass": "share of the momentum's L1 norm that lies in the selected slices",
    "imbalance": "Gini coefficient of how often each slice was selected: 0 all alike, near 1 a few do all the work",
    "update_rms": "root mean square of the change of a whole matrix, weight decay left out",
    "orthogonality_error": "Frobenius norm of O O^T - 1, over the root of k: how far the update is from orthonormal",
}
"""Every figure by its name, in a line; :class:`Figures` says more."""

FAR_FROM_ORTHONORMAL: Final = 0.5
"""Singular values within [0.85, 1.15] give at most 0.32."""

# Columns of the table that a step leaves, a row for each parameter. All but the longest staleness are sums.
(
    _MATRICES, _UPDATED, _SELECTED, _COVERED, _STALENESS, _FRESH, _CAPTURED, _IMBALANCE, _DEAD, _NEVER, _SQUARES,
    _ERROR, _MEASURED, _LONGEST, _COLUMNS,
) = range(15)  # fmt: skip
_HITS: Final = _COLUMNS
_COUNTS: Final = _COLUMNS + BINS


class SelectionWarning(UserWarning):
    """Something about the selection that a user should look at; said once for each parameter."""


@dataclass(frozen=True)
class Figures:
    """What the selection of one step looks like: every figure by name, for all matrices, each group, each parameter.

    All slices count alike, whatever matrix they are in; a figure that belongs to a matrix (captured mass, imbalance,
    orthogonality error) is the mean over the matrices. With n slices of a matrix, k selected, and step t:

    ==================== =============== ==========================================================================
    figure               range           formula, and how to read it
    ==================== =============== ==========================================================================
    selected_fraction    (0, 1]          k / n; a little over ``fraction``, for k is rounded up
    coverage             (0, 1]          share of the slices selected in one of the steps t - window + 1, ..., t. Near
                                         1 after a few times 1 / fraction steps: everything is trained. Staying well
                                         under 1: some slices are left out
    staleness_mean       [0, t]          mean of t - (step of the last selection); since the start for a slice that
                                         never was. About 1 / fraction - 1 where slices take turns
    staleness_max        [0, t]          the largest of them; growing like t: a slice is not selected any more
    turnover             [0, 1]          share of the k that step t - 1 had not selected. About 1 - fraction for random
                                         selections, 1 where slices take turns, 0 where the same ones win every time
    captured_mass        [k / n, 1]      sum of |M| over the k slices, over the sum over all, before they decay. Near
                                         k / n: slices are alike, any selection would do. Near 1: the others have
                                         next to no momentum
    imbalance            [0, 1 - 1 / n]  Gini coefficient of the slices' counts c_1 <= ... <= c_n, the sum of
                                         (2 i - n - 1) c_i over n times the sum of c. Over 0.5: a minority of the
                                         slices gets most of the steps
    update_rms           [0, inf)        root of the mean square, over all entries of the whole matrix, of what the
                                         step adds to selected slices. With ``match_rms_adamw`` about 0.2 lr, at every
                                         fraction
    orthogonality_error  [0, inf)        ||O O^T - 1|| / sqrt(k), Frobenius (O^T O where k > m). Under 0.35; more says
                                         that the submatrix is close to singular or the precision too low
    ==================== =============== ==========================================================================

    A parameter without a gradient in the step has no turnover, captured mass, update RMS and orthogonality error, and
    counts for none of those of its group.

    Attributes:
        step: Steps that the statistics have seen, this one included.
        overall: Figures of all matrices.
        groups: Figures by the name of the parameter group.
        parameters: Figures by the names of group and parameter; of a stack of experts for all of them together.
    """

    step: int
    overall: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]]
    parameters: Mapping[tuple[str, str], Mapping[str, float]]

    def named(self, *, per_matrix: bool = False) -> dict[str, float]:
        """Return the figures under the names that loggers get: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

        Args:
            per_matrix: Also ``dion2/<group>/<parameter>/coverage``, for every parameter (default: False).
        """
        parts: dict[str, Mapping[str, float]] = {"dion2": self.overall}
        parts |= {f"dion2/{group}": figures for group, figures in self.groups.items()}
        if per_matrix:
            parts |= {f"dion2/{group}/{name}": figures for (group, name), figures in self.parameters.items()}
        return {f"{prefix}/{name}": value for prefix, figures in parts.items() for name, value in figures.items()}


class SelectionStatistics:
    """Statistics of what an optimizer selects. Without one attached, an optimizer computes none.

    All ranks must make it alike and ask it after the same steps. Figures are those of whole matrices, the same under
    every layout. Steps that an optimizer does not take leave nothing: those that a GradScaler skips, and those by which
    ``torch.distributed.checkpoint`` makes an optimizer create its state.

    Args:
        every: Steps from one set of figures to the next; None: only of steps before which :meth:`ask` was called
            (default: 10).
        window: Steps that ``coverage`` looks back; also after how many steps a slice that was never selected is worth a
            warning (default: 100).
        orthogonality: Also measure how far the updates are from orthonormal, in the steps with figures, for about a
            tenth of what making them costs (default: False).

    Attributes:
        step: Steps seen.
        history: The figures so far and how often each part of each parameter was selected, for pictures.

    Raises:
        TypeError: ``every`` or ``window`` is no whole number, or ``orthogonality`` no truth value.
        ValueError: ``every`` or ``window`` is under 1.

    Example::

        statistics = SelectionStatistics(every=10)
        statistics.attach(optimizer)
        for batch in batches:
            ...
            optimizer.step()
            if (figures := statistics.take()) is not None:
                print(figures.overall["coverage"])
    """

    def __init__(self, *, every: int | None = 10, window: int = 100, orthogonality: bool = False) -> None:
        if every is not None:
            check_steps("every", every)
        check_steps("window", window)
        check_truth("orthogonality", orthogonality)
        self.every, self.window, self.orthogonality = every, window, orthogonality
        self.step = 0
        self.history = SelectionHistory(window)
        self.wants_results = False
        self._optimizer: Dion2 | None = None
        self._entries: dict[Tensor, _Entry] = {}
        self._ledgers: list[_Ledger] = []
        self._loaded: dict[str, Mapping[str, Tensor]] = {}
        self._due: _Due | None = None
        self._is_asked = False
        self._warned: set[tuple[str, tuple[str, str]]] = set()

    # Looking on

    def attach(self, optimizer: "Dion2") -> None:
        """Look on at every step of an optimizer from now on.

        Args:
            optimizer: A :class:`~dion2_lightning.Dion2`; one that a framework has wrapped is looked through.

        Raises:
            TypeError: It is another optimizer.
            RuntimeError: Other statistics look on already.
        """
        found = without_wrapper(optimizer)
        if not hasattr(found, "observer"):
            raise TypeError(
                f"optimizer must be a Dion2, got {type(found).__name__}; make it with "
                "dion2_lightning.build_optimizer(model, lr=...)"
            )
        if found.observer is not None and found.observer is not self:
            raise RuntimeError("other statistics look on at this optimizer already; detach() them first")
        self.detach()
        self._optimizer = found
        found.observer = self

    def detach(self) -> None:
        """Look on no longer; what was counted stays."""
        if self._optimizer is not None and self._optimizer.observer is self:
            self._optimizer.observer = None
        self._optimizer = None

    def begin_step(self) -> None:
        """Come before a step; called by the optimizer."""
        self._find_parameters()
        self.step += 1
        for ledger in self._ledgers:
            ledger.seen = []
        is_due = self._is_asked or (self.every is not None and self.step % self.every == 0)
        self._due = _Due(self.step, self.window) if is_due else None
        self.wants_results = is_due

    def selected(self, update: MatrixUpdate, indices: Tensor, norms: Tensor) -> None:
        """Take what was selected of a parameter; called by the optimizer."""
        entry = self._entries[update.parameter]
        entry.ledger.seen.append((entry, indices, norms))

    def orthonormalized(self, update: MatrixUpdate, result: Tensor) -> None:
        """Take orthonormal submatrices; called by the optimizer."""
        if self._due is not None and self.orthogonality:
            self._due.errors.append((self._entries[update.parameter], _orthogonality_errors(result)))

    def moved(self, update: MatrixUpdate, change: Tensor) -> None:
        """Take what a part of a parameter was changed by; called by the optimizer."""
        if self._due is not None:
            squares = torch.linalg.vector_norm(change).double().square()
            self._due.squares.append((self._entries[update.parameter], squares))

    def end_step(self) -> None:
        """Come after a step: count what was selected; called by the optimizer."""
        for ledger in self._ledgers:
            ledger.count(self.step, self._due)
        self.wants_results = False

    # Figures

    def ask(self) -> None:
        """Make figures of the next step, whatever ``every`` says; :meth:`take` ends it, also where no step was taken.

        So a framework's own count of steps, which includes those that a GradScaler skips, can say when.
        """
        self._is_asked = True

    def take(self) -> Figures | None:
        """Return the figures of the last step, once; None where nothing asked for figures of it.

        Waits for the device. Where ranks hold different parts of matrices, all of them have to call it: it adds up.
        """
        due, self._due = self._due, None
        self._is_asked = False
        if due is None or not self._entries:
            return None
        entries = list(self._entries.values())
        host = self._over_ranks(due.table(entries), entries).cpu()  # the one look at the device
        rows = [_Row(entry, *numbers) for entry, numbers in zip(entries, host[:, :_COLUMNS].tolist(), strict=True)]
        self._warn(rows)
        figures = Figures(
            step=self.step,
            overall=_figures(rows),
            groups={name: _figures(members) for name, members in alike(rows, lambda row: row.entry.group).items()},
            parameters={row.entry.key: _figures([row]) for row in rows},
        )
        hits, counts = host[:, _HITS : _HITS + BINS], host[:, _COUNTS : _COUNTS + BINS]
        self.history.append(figures, [entry.kind for entry in entries], hits, counts)
        return figures

    def _over_ranks(self, table: Tensor, entries: Sequence["_Entry"]) -> Tensor:
        """Add up over ranks what each of them has a part of; what every rank has stays as it is, bit for bit."""
        assert self._optimizer is not None
        process_group = self._optimizer.process_group
        partial = [entry for entry in entries if entry.is_partial(self.orthogonality, process_group)]
        group = _group_around(partial, process_group)
        if group is None:
            return table
        # The longest staleness is no sum: where ranks hold different experts, each has a place of its own.
        width = max(entry.spread_over for entry in entries)
        index = _to_device([[entry.spread_index] for entry in entries], table.device)
        places = table.new_zeros(len(entries), width).scatter_(1, index, table.narrow(1, _LONGEST, 1))
        mine = torch.cat([table, places], dim=1)
        sums = mine.clone()
        dist.all_reduce(sums, group=group)
        copies = [entry.copies(group.size(), process_group) for entry in entries]
        how_many = _to_device([each + each[-1:] * width for each in copies], table.device)
        whole = torch.where(how_many == group.size(), mine, sums / how_many)
        longest = whole.narrow(1, table.shape[1], width).amax(1, keepdim=True)
        is_spread = _to_device([[entry.spread_over > 1] for entry in entries], table.device)
        result = whole.narrow(1, 0, table.shape[1]).clone()
        result.narrow(1, _LONGEST, 1).copy_(torch.where(is_spread, longest, table.narrow(1, _LONGEST, 1)))
        return result

    def _warn(self, rows: Sequence["_Row"]) -> None:
        """Say once for each parameter what a user should look at, on the first rank."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        for trouble in TROUBLES:
            found = [row for row in rows if trouble.is_in(row, self.step, self.window)]
            new = [row for row in found if (trouble.what, row.entry.key) not in self._warned]
            self._warned |= {(trouble.what, row.entry.key) for row in new}
            if new:
                names = ", ".join(f"{row.entry.name} ({trouble.how_much(row)})" for row in new[:3])
                more = f" and {len(new) - 3} more parameters" if len(new) > 3 else ""
                message = f"step {self.step}, {trouble.what}: {names}{more}; {trouble.hint}"
                warnings.warn(message, SelectionWarning, stacklevel=3)

    # State

    @property
    def state_is_spread(self) -> bool:
        """Whether ranks hold different experts of a stack, so that all of them have to call :meth:`state_dict`."""
        return any(entry.spread_over > 1 for entry in self._entries.values())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that goes on after a resume: tensors on the host, and plain data.

        Where ranks hold different experts of a stack, all of them have to call it: it gathers. Otherwise any may; see
        ``state_is_spread``.
        """
        counts = {}
        for parameter, entry in self._entries.items():
            last, hits = (_whole(part, parameter, entry) for part in entry.ledger.rows_of(entry))
            counts["/".join(entry.key)] = {"last": last, "hits": hits}
        warned = sorted([kind, *key] for kind, key in self._warned)
        return {
            "step": self.step,
            "counts": counts or dict(self._loaded),
            "history": self.history.state_dict(),
            "warned": warned,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Args:
            state_dict: What it returned. Parameters are matched by the names of group and parameter; others start anew.
        """
        self.step = state_dict["step"]
        self._loaded = dict(state_dict["counts"])
        self.history.load_state_dict(state_dict["history"] | {"window": self.window})
        self._warned = {(kind, (group, name)) for kind, group, name in state_dict["warned"]}
        self._entries, self._ledgers = {}, []

    # Parameters

    def _find_parameters(self) -> None:
        """Make room for the matrices of the optimizer, where they are others than in the last step."""
        assert self._optimizer is not None
        found = [
            (parameter, group, name)
            for group in self._optimizer.param_groups
            if group["algorithm"] == "dion2"
            for parameter, name in zip(group["params"], _plain_names(group), strict=True)
        ]
        if list(map(id, self._entries)) == [id(parameter) for parameter, _, _ in found]:
            return
        kept = {
            entry.key: tuple(part.clone() for part in entry.ledger.rows_of(entry)) for entry in self._entries.values()
        }
        entries = [
            _Entry.of(position, parameter, group, name) for position, (parameter, group, name) in enumerate(found)
        ]
        self._ledgers = [
            _Ledger(members, slices, device, self.step)
            for (slices, device), members in alike(entries, lambda entry: (entry.kind.slices, entry.device)).items()
        ]
        self._entries = {parameter: entry for (parameter, _, _), entry in zip(found, entries, strict=True)}
        for parameter, entry in self._entries.items():
            loaded = self._loaded.get("/".join(entry.key))
            if entry.key in kept:
                entry.ledger.write(entry, *kept[entry.key])
            elif loaded is not None and loaded["last"].shape == (entry.kind.matrices, entry.kind.slices):
                entry.ledger.write(entry, *(_own_part(loaded[name], parameter, entry) for name in ("last", "hits")))
        self._loaded = {}


@dataclass(eq=False)
class _Entry:
    """A parameter: where its counts are, and which ranks hold what of it.

    Attributes:
        position: Its row in the table.
        group: Name of its group.
        name: Its own.
        kind: What is known of its matrices.
        count: How many of them this rank holds a part of.
        entries: Of all its matrices together.
        device: Where it is.
        mesh: The ranks that hold it; None for a plain parameter.
        held_by: How many ranks hold different parts of it.
        spread_over: Over how many ranks its matrices are spread, each whole on one or with parts on others.
        spread_index: Which of them this rank is.
    """

    position: int
    group: str
    name: str
    kind: Kind
    count: int
    entries: int
    device: torch.device
    mesh: Any
    held_by: int
    spread_over: int
    spread_index: int
    ledger: "_Ledger" = field(init=False)
    first_row: int = field(init=False)

    @classmethod
    def of(cls, position: int, parameter: Any, group: Mapping[str, Any], name: str) -> "_Entry":
        matrices = Matrices.of(parameter.shape, batched=group["batched"], transposed=group["transposed"])
        axis = matrices.selection_axis(group["select"])
        mesh = getattr(parameter, "device_mesh", None)
        held_by = spread_over = 1
        spread_index = 0
        if mesh is not None:
            sizes = [1 if each.is_replicate() else mesh.size(dim) for dim, each in enumerate(parameter.placements)]
            held_by = math.prod(sizes)
            for dim in spread_dims(parameter) if group["batched"] else ():
                spread_over *= sizes[dim]
                spread_index = spread_index * sizes[dim] + mesh.get_local_rank(dim)
        return cls(
            position=position,
            group=group["name"],
            name=name,
            kind=Kind(group["name"], name, matrices.count, matrices.shape[axis], axis),
            count=local(parameter).shape[0] if group["batched"] else 1,
            entries=parameter.numel(),
            device=parameter.device,
            mesh=mesh,
            held_by=held_by,
            spread_over=spread_over,
            spread_index=spread_index,
        )

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name

    def is_owned(self, process_group: "ProcessGroup | None") -> bool:
        """Whether its matrices may be orthonormalized, and measured, by other ranks."""
        return self.mesh is not None or process_group is not None

    def is_partial(self, orthogonality: bool, process_group: "ProcessGroup | None") -> bool:
        """Whether other ranks have something of its figures that this one lacks."""
        return self.held_by > 1 or (orthogonality and self.is_owned(process_group))

    def copies(self, ranks: int, process_group: "ProcessGroup | None") -> list[float]:
        """How many of the ranks add the same numbers, by column of the table; all of them where each has all."""
        copies = [ranks / self.spread_over] * (_COUNTS + BINS)
        copies[_SQUARES] = ranks / self.held_by
        if self.is_owned(process_group):
            copies[_ERROR] = copies[_MEASURED] = 1.0  # measured by the owner; their ratio is what counts
        return copies


class _Ledger:
    """When each slice was last selected, and how often, for all matrices of n slices on a device.

    Attributes:
        last: Step of the last selection; the step before the first one for a slice that never was; int32 (rows, n).
        hits: How often it was selected; int32 (rows, n).
        seen: What a step selected.
    """

    def __init__(self, entries: Sequence[_Entry], slices: int, device: torch.device, step: int) -> None:
        self._entries, self._slices = entries, slices
        rows = 0
        for entry in entries:
            entry.ledger, entry.first_row = self, rows
            rows += entry.count
        self.last = torch.full((rows, slices), step, dtype=torch.int32, device=device)
        self.hits = torch.zeros((rows, slices), dtype=torch.int32, device=device)
        self.seen: list[tuple[_Entry, Tensor, Tensor]] = []

    def rows_of(self, entry: _Entry) -> tuple[Tensor, Tensor]:
        """View what belongs to a parameter, (count, n) each."""
        return tuple(each.narrow(0, entry.first_row, entry.count) for each in (self.last, self.hits))  # type: ignore[return-value]

    def write(self, entry: _Entry, last: Tensor, hits: Tensor) -> None:
        for own, given in zip(self.rows_of(entry), (last, hits), strict=True):
            own.copy_(given)

    def count(self, step: int, due: "_Due | None") -> None:
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

    def _rows(self, step: int, window: int, before: Tensor, norms: Mapping[_Entry, Tensor]) -> Tensor:
        """The table's columns of every matrix, the hits of its slices in bins, and its sorted counts."""
        now = (self.last == step) & (self.hits > 0)
        zeros = self.last.new_zeros((1, self._slices), dtype=torch.float32)
        mass = torch.cat([norms.get(entry, zeros.expand(entry.count, -1)) for entry in self._entries]).double()
        total, captured = mass.sum(1), (mass * now).sum(1)
        staleness = step - self.last
        never = self.hits == 0
        updated = now.any(1)
        counts = self.hits.sort(dim=1).values
        places = torch.arange(1 - self._slices, self._slices, 2, device=counts.device)
        gini = (places * counts).sum(1).double() / (self._slices * counts.sum(1).clamp(min=1)).double()
        rows = torch.zeros((len(mass), _COUNTS + BINS), dtype=torch.float64, device=mass.device)
        for column, values in {
            _MATRICES: torch.ones_like(total),
            _UPDATED: updated,
            _SELECTED: now.sum(1),
            _COVERED: ((staleness < window) & ~never).sum(1),
            _STALENESS: staleness.sum(1),
            _FRESH: (now & ~before).sum(1),
            _CAPTURED: torch.where(total > 0, captured / total, 0.0),
            _IMBALANCE: gini,
            _DEAD: updated & (total == 0),
            _NEVER: never.sum(1) * updated,
            _LONGEST: staleness.amax(1),
        }.items():
            rows.select(1, column).copy_(values)
        rows.narrow(1, _HITS, BINS).copy_(self.hits.double() @ _bins(self._slices, counts.device))
        quantiles = torch.linspace(0, self._slices - 1, BINS, device=counts.device).round().long()
        rows.narrow(1, _COUNTS, BINS).copy_(counts.index_select(1, quantiles))
        return rows


@dataclass
class _Due:
    """What a step leaves on the device where figures are due."""

    step: int
    window: int
    parts: list[tuple[Sequence[_Entry], Tensor]] = field(default_factory=list)
    squares: list[tuple[_Entry, Tensor]] = field(default_factory=list)
    errors: list[tuple[_Entry, Tensor]] = field(default_factory=list)

    def table(self, entries: Sequence[_Entry]) -> Tensor:
        """Return the table, float64, a row for each parameter, of what this rank holds."""
        device = self.parts[0][1].device
        table = torch.zeros((len(entries), _COUNTS + BINS), dtype=torch.float64, device=device)
        for its_entries, rows in self.parts:
            position_of_row = [entry.position for entry in its_entries for _ in range(entry.count)]
            positions = _to_device(position_of_row, device)
            rows = rows.to(device)
            longest = rows.select(1, _LONGEST).clone()
            rows.select(1, _LONGEST).zero_()
            table.index_add_(0, positions, rows)
            table.select(1, _LONGEST).scatter_reduce_(0, positions, longest, "amax")
        for column, pairs in ((_SQUARES, self.squares), (_ERROR, self.errors)):
            if pairs:
                positions = _to_device([entry.position for entry, _ in pairs], device)
                values = torch.stack([each.sum().to(device) for _, each in pairs])
                table.select(1, column).index_add_(0, positions, values)
        if self.errors:
            positions = _to_device([entry.position for entry, _ in self.errors], device)
            measured = _to_device([float(len(each)) for _, each in self.errors], device).double()
            table.select(1, _MEASURED).index_add_(0, positions, measured)
        return table


@dataclass(frozen=True)
class _Row:
    """A parameter's row of the table, on the host, in the order of its columns."""

    entry: _Entry
    matrices: float
    updated: float
    selected: float
    covered: float
    staleness: float
    fresh: float
    captured: float
    imbalance: float
    dead: float
    never: float
    squares: float
    error: float
    measured: float
    longest: float

    @property
    def slices(self) -> float:
        return self.matrices * self.entry.kind.slices


class _Trouble(NamedTuple):
    """Something to warn of: what it is called, where it is, how much of it, and what to do."""

    what: str
    is_in: Callable[[_Row, int, int], bool]
    how_much: Callable[[_Row], str]
    hint: str


TROUBLES: Final = (
    _Trouble(
        "slices never selected",
        lambda row, step, window: row.never > 0 and step >= window,
        lambda row: f"{row.never:.0f} of {row.slices:.0f}",
        "a lower momentum or a higher fraction selects more of them; a slice without any gradient is never selected",
    ),
    _Trouble(
        "all-zero momentum",
        lambda row, step, window: row.dead > 0,
        lambda row: f"{row.dead:.0f} of {row.matrices:.0f} matrices",
        "their gradients have been zero so far: does the loss depend on them?",
    ),
    _Trouble(
        "non-finite update",
        lambda row, step, window: not math.isfinite(row.squares),
        lambda row: f"sum of squares {row.squares}",
        "weights are damaged; go back to a checkpoint, and let check_finite=True name bad gradients in time",
    ),
    _Trouble(
        "update far from orthonormal",
        lambda row, step, window: row.measured > 0 and row.error / row.measured > FAR_FROM_ORTHONORMAL,
        lambda row: f"error {row.error / row.measured:.2g}",
        "try orthonormalize_dtype='float32'; slices that are nearly multiples of each other have such errors too",
    ),
)
"""What :class:`SelectionWarning` warns of."""


def _figures(rows: Sequence[_Row]) -> dict[str, float]:
    """The figures of some parameters together."""
    slices = sum(row.slices for row in rows)
    figures = {
        "selected_fraction": sum(row.selected for row in rows) / slices,
        "coverage": sum(row.covered for row in rows) / slices,
        "staleness_mean": sum(row.staleness for row in rows) / slices,
        "staleness_max": max(row.longest for row in rows),
        "imbalance": sum(row.imbalance for row in rows) / sum(row.matrices for row in rows),
    }
    updated = [row for row in rows if row.updated]
    if updated:
        figures["turnover"] = sum(row.fresh for row in updated) / sum(row.selected for row in updated)
        figures["captured_mass"] = sum(row.captured for row in updated) / sum(row.updated for row in updated)
        entries = sum(row.entry.entries for row in updated)
        figures["update_rms"] = math.sqrt(sum(row.squares for row in updated) / entries)
    measured = [row for row in rows if row.measured]
    if measured:
        # Replicas that do not share the work have measured the same matrix several times.
        weights = [row.updated / row.measured for row in measured]
        errors = sum(row.error * weight for row, weight in zip(measured, weights, strict=True))
        figures["orthogonality_error"] = errors / sum(row.updated for row in measured)
    return {name: figures[name] for name in MEANINGS if name in figures}


def _orthogonality_errors(orthonormal: Tensor) -> Tensor:
    """The error of each of a stack (count, k, m), in float32 at least."""
    precise = orthonormal.to(torch.promote_types(orthonormal.dtype, torch.float32))
    if precise.shape[1] > precise.shape[2]:
        precise = precise.mT
    gram = precise @ precise.mT
    short = gram.shape[1]
    distance = torch.linalg.matrix_norm(gram - torch.eye(short, dtype=gram.dtype, device=gram.device))
    return torch.div(distance.double(), short**0.5)


def _group_around(entries: Sequence[_Entry], process_group: "ProcessGroup | None") -> "ProcessGroup | None":
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


def check_steps(name: str, value: object) -> None:
    """Raise an error where an argument is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of steps, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value}")


def check_truth(name: str, value: object) -> None:
    """Raise an error where an argument is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def without_wrapper(optimizer: Any) -> Any:
    """Return the optimizer that a framework's wrapper steps.

    Some wrappers forward no attributes; others look like the optimizer, and what is set on them does not reach it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _plain_names(group: Mapping[str, Any]) -> Sequence[str]:
    names: Sequence[str] | None = group.get("param_names")
    return parameter_names(group) if names is None else names


def _from_first_row(indices: Tensor, slices: int) -> Tensor:
    """Positions among all slices of a stack, given those in each of its matrices (count, k)."""
    count = len(indices)
    if count == 1:
        return indices
    return indices + torch.arange(0, count * slices, slices, device=indices.device).unsqueeze(1)


def _bins(slices: int, device: torch.device) -> Tensor:
    """Which bin each slice falls into, (slices, BINS), one-hot."""
    bins = bin_of(slices, device)
    return torch.zeros((slices, BINS), dtype=torch.float64, device=device).scatter_(1, bins.unsqueeze(1), 1.0)


def _to_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(numbers).to(device, non_blocking=True)


def _whole(rows: Tensor, parameter: Any, entry: _Entry) -> Tensor:
    """The rows of all matrices of a stack, on the host; gathered where ranks hold different ones."""
    if entry.spread_over > 1:
        spread: Any = placed_like_stack(rows, parameter, entry.kind.matrices)
        rows = spread.full_tensor()
    return rows.cpu().clone()


def _own_part(whole: Tensor, parameter: Any, entry: _Entry) -> Tensor:
    """This rank's rows of a tensor with one for each matrix of a stack."""
    if entry.spread_over == 1:
        return whole
    from torch.distributed.tensor import Replicate, distribute_tensor

    dims = spread_dims(parameter)
    placements = [each if dim in dims else Replicate() for dim, each in enumerate(parameter.placements)]
    return distribute_tensor(whole.to(entry.device), entry.mesh, placements, src_data_rank=None).to_local()
