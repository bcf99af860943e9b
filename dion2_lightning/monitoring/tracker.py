"""What was selected, in numbers: is every part of every matrix trained, or does a quarter do all the work?

:class:`SelectionStatistics` looks on while an optimizer steps. It keeps two integers for every slice, on the device
(ledger.py): when the slice was last selected, and how often. Every so many steps it makes figures of them (figures.py),
at the price of one look of the host at the device and, where ranks hold different parts, one all-reduce.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.matrices.layout import alike
from dion2_lightning.monitoring.counters import (
    COLUMNS,
    COUNTS,
    HITS,
    LONGEST,
    Due,
    Entry,
    Ledger,
    group_around,
    orthogonality_errors,
    own_part,
    to_device,
    whole_rows,
)
from dion2_lightning.monitoring.history import BINS, SelectionHistory
from dion2_lightning.monitoring.metrics import TROUBLES, Figures, Row, figures_of

if TYPE_CHECKING:
    from dion2_lightning.optimizer import MatrixOptimizer


class SelectionWarning(UserWarning):
    """Something about the selection that a user should look at; said once for each parameter."""


class Owner(Protocol):
    """Who made statistics for its own use, as the callbacks of the frameworks do."""

    name: str

    def is_running(self) -> bool:
        """Whether the training that they are for goes on."""


class SelectionStatistics:
    """Statistics of what an optimizer selects. Without one attached, an optimizer computes none.

    All ranks must make it alike and ask it after the same steps. Figures are those of whole matrices, the same under
    every layout. Steps that an optimizer does not take leave nothing: those that a GradScaler skips, and those by which
    ``torch.distributed.checkpoint`` makes an optimizer create its state.

    Args:
        every: Steps from one set of figures to the next; None: only of steps before which :meth:`ask` was called
            (default: 10).
        window: Steps that ``coverage`` looks back; a slice that was never selected is worth a warning after as many, or
            after 4 / ``fraction`` if that is more (default: 100).
        orthogonality: Also measure how far the updates are from orthonormal, in the steps with figures, for about a
            tenth of what making them costs (default: False).

    Attributes:
        step: Steps seen.
        history: The figures so far and how often each part of each parameter was selected, for pictures.
        owner: The callback that they belong to; None for those of a loop of one's own.

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
        self.owner: Owner | None = None
        self.wants_results = False
        self._optimizer: MatrixOptimizer | None = None
        self._entries: dict[Tensor, Entry] = {}
        self._ledgers: list[Ledger] = []
        self._signature: Sequence[tuple[object, ...]] = []
        self._loaded: dict[str, Mapping[str, Tensor]] = {}
        self._due: Due | None = None
        self._is_asked = False
        self._warned: set[tuple[str, tuple[str, str]]] = set()

    # Looking on

    def attach(self, optimizer: "MatrixOptimizer") -> None:
        """Look on at every step of an optimizer from now on.

        Statistics of a callback whose training is over look on no longer: after an exception, no framework may have
        told it so.

        Args:
            optimizer: A :class:`~dion2_lightning.Dion2`; one that a framework has wrapped is looked through.

        Raises:
            TypeError: It is another optimizer.
            RuntimeError: Other statistics look on already, and are in use.
        """
        found = without_wrapper(optimizer)
        if not hasattr(found, "observer"):
            raise TypeError(
                f"optimizer must be a Dion2, got {type(found).__name__}; make it with "
                "dion2_lightning.build_optimizer(model, lr=...)"
            )
        if found.observer is not None and found.observer is not self:
            owner: Owner | None = found.observer.owner
            if owner is None:
                raise RuntimeError("other statistics look on at this optimizer already; detach() them first")
            if owner.is_running():
                raise RuntimeError(
                    f"{owner.name} looks on at this optimizer already, and its training is running; "
                    "leave one of the two out"
                )
            found.observer.detach()
        self.detach()
        self._optimizer = found
        found.observer = self

    def detach(self) -> None:
        """Look on no longer; what was counted stays."""
        if self.is_attached:
            assert self._optimizer is not None
            self._optimizer.observer = None
        self._optimizer = None

    @property
    def is_attached(self) -> bool:
        """Whether they look on."""
        return self._optimizer is not None and self._optimizer.observer is self

    def begin_step(self) -> None:
        """Come before a step; called by the optimizer."""
        self._find_parameters()
        self.step += 1
        for ledger in self._ledgers:
            ledger.seen = []
        is_due = self._is_asked or (self.every is not None and self.step % self.every == 0)
        self._due = Due(self.step, self.window) if is_due else None
        self.wants_results = is_due

    def selected(self, parameter: Tensor, indices: Tensor, norms: Tensor) -> None:
        """Take what was selected of a parameter; called by the optimizer."""
        entry = self._entries[parameter]
        entry.ledger.seen.append((entry, indices, norms))

    def orthonormalized(self, parameter: Tensor, result: Tensor) -> None:
        """Take orthonormal submatrices; called by the optimizer."""
        if self._due is not None and self.orthogonality:
            self._due.errors.append((self._entries[parameter], orthogonality_errors(result)))

    def moved(self, parameter: Tensor, change: Tensor) -> None:
        """Take what a part of a parameter was changed by; called by the optimizer."""
        if self._due is not None:
            squares = torch.linalg.vector_norm(change).to(sum_dtype(change.device)).square()
            self._due.squares.append((self._entries[parameter], squares))

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
        if due is None or not self._entries or self._optimizer is None:
            return None
        entries = list(self._entries.values())
        host = self._over_ranks(due.table(entries), entries).cpu()  # the one look at the device
        rows = [
            Row(entry.kind, entry.entries, *numbers)
            for entry, numbers in zip(entries, host[:, :COLUMNS].tolist(), strict=True)
        ]
        self._warn(rows)
        figures = Figures(
            step=self.step,
            overall=figures_of(rows),
            groups={name: figures_of(members) for name, members in alike(rows, lambda row: row.kind.group).items()},
            parameters={row.key: figures_of([row]) for row in rows},
        )
        hits, counts = host[:, HITS : HITS + BINS], host[:, COUNTS : COUNTS + BINS]
        self.history.append(figures, [entry.kind for entry in entries], hits, counts)
        return figures

    def _over_ranks(self, table: Tensor, entries: Sequence["Entry"]) -> Tensor:
        """Add up over ranks what each of them has a part of; what every rank has stays as it is, bit for bit."""
        assert self._optimizer is not None
        process_group = self._optimizer.process_group
        partial = [entry for entry in entries if entry.is_partial(self.orthogonality, process_group)]
        group = group_around(partial, process_group)
        if group is None:
            return table
        # The longest staleness is no sum: where ranks hold different experts, each has a place of its own.
        width = max(entry.spread_over for entry in entries)
        index = to_device([[entry.spread_index] for entry in entries], table.device)
        places = table.new_zeros(len(entries), width).scatter_(1, index, table.narrow(1, LONGEST, 1))
        mine = torch.cat([table, places], dim=1)
        sums = mine.clone()
        dist.all_reduce(sums, group=group)
        copies = [entry.copies(group.size(), process_group) for entry in entries]
        how_many = to_device([each + each[-1:] * width for each in copies], table.device)
        whole = torch.where(how_many == group.size(), mine, sums / how_many)
        longest = whole.narrow(1, table.shape[1], width).amax(1, keepdim=True)
        is_spread = to_device([[entry.spread_over > 1] for entry in entries], table.device)
        result = whole.narrow(1, 0, table.shape[1]).clone()
        result.narrow(1, LONGEST, 1).copy_(torch.where(is_spread, longest, table.narrow(1, LONGEST, 1)))
        return result

    def _warn(self, rows: Sequence["Row"]) -> None:
        """Say once for each parameter what a user should look at, on the first rank."""
        if not is_first_rank():
            return
        for trouble in TROUBLES:
            found = [row for row in rows if trouble.is_in(row, self.step, self.window)]
            new = [row for row in found if (trouble.what, row.key) not in self._warned]
            self._warned |= {(trouble.what, row.key) for row in new}
            if new:
                names = ", ".join(f"{row.kind.name} ({trouble.how_much(row)})" for row in new[:3])
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
            last, hits = (whole_rows(part, parameter, entry) for part in entry.ledger.rows_of(entry))
            counts["/".join(entry.key)] = {"last": last, "hits": hits}
        warned = sorted([kind, *key] for kind, key in self._warned)
        return {
            "step": self.step,
            "counts": {**self._loaded, **counts},  # what was loaded and has not come yet is kept
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
        self._entries, self._ledgers, self._signature = {}, [], []

    # Parameters

    def _find_parameters(self) -> None:
        """Make room for the matrices of the optimizer, where they are others than in the last step."""
        assert self._optimizer is not None
        found = self._optimizer.sliced_parameters()
        # The entries hold the parameters, so an id stands for one of them.
        signature = [(id(each.parameter), each.parameter.device, each.matrices, each.axis) for each in found]
        if signature == self._signature:
            return
        self._signature = signature
        kept = {
            parameter: tuple(part.clone() for part in entry.ledger.rows_of(entry))
            for parameter, entry in self._entries.items()
        }
        kept_by_name = {self._entries[parameter].key: rows for parameter, rows in kept.items()}
        entries = [Entry.of(position, each) for position, each in enumerate(found)]
        self._ledgers = [
            Ledger(members, slices, device, self.step)
            for (slices, device), members in alike(entries, lambda entry: (entry.kind.slices, entry.device)).items()
        ]
        self._entries = {each.parameter: entry for each, entry in zip(found, entries, strict=True)}
        for each, entry in zip(found, entries, strict=True):
            name, parameter = "/".join(entry.key), each.parameter
            rows = kept.get(parameter)
            # Frameworks replace parameters; what has no name cannot be found again.
            if rows is None and each.is_named:
                rows = kept_by_name.get(entry.key)
            if rows is None and name in self._loaded:
                saved = self._loaded.pop(name)
                if saved["last"].shape == (entry.kind.matrices, entry.kind.slices):
                    rows = tuple(own_part(saved[part], parameter, entry) for part in ("last", "hits"))
            if rows is not None and rows[0].shape == (entry.count, entry.kind.slices):
                entry.ledger.write(entry, *rows)


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


def is_first_rank() -> bool:
    """Whether this process is the one that says what all have found."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def without_wrapper(optimizer: Any) -> Any:
    """Return the optimizer that a framework's wrapper steps.

    Some wrappers forward no attributes; others look like the optimizer, and what is set on them does not reach it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
