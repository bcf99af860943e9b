"""Tracks how an optimizer updates: is every part of every matrix trained, or does a quarter do all the work?

:class:`SelectionTracker` observes the steps of an optimizer. It keeps two integers for every slice, on the device
(counters.py): when the slice was last selected, and how often. Every few steps it computes metrics from them
(metrics.py), with one copy to the host and, where ranks hold different parts, one all-reduce.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dion2_lightning.distributed.collectives import is_first_rank
from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.lists import first_few, group_by
from dion2_lightning.matrices.views import ObservedParameter, Source
from dion2_lightning.monitoring.counters import (
    COUNTS,
    HITS,
    SelectionCounters,
    StepRecord,
    TrackedParameter,
    add_up_over_ranks,
    orthogonality_errors,
    variance_spreads,
)
from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.metrics import HEALTH_CHECKS, ParameterSums, SelectionMetrics, compute_metrics
from dion2_lightning.monitoring.subspaces import captured_energies, rank_uses, turns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SelectionWarning(UserWarning):
    """A finding about the selection that a user should look at."""


class ObservableOptimizer(Protocol):
    """An optimizer that sends events to an observer, as :class:`~dion2_lightning.Dion2` does."""

    observer: Any
    process_group: "ProcessGroup | None"

    def observed_parameters(self) -> list[ObservedParameter]:
        """Return the parameters to observe."""


class SelectionTracker:
    """Tracks which slices an optimizer selects, and how else it updates; without one it computes nothing for it.

    Every rank must make its tracker with the same arguments and pop metrics after the same steps. Metrics are those of
    whole matrices, the same under every layout. Steps that are not taken are not counted: those that a GradScaler
    skips, and those by which ``torch.distributed.checkpoint`` makes an optimizer create its state.

    Args:
        every: Steps between metrics. None: only at steps before which :meth:`request` was called (default: 10).
        window: Steps that ``coverage`` looks back. A slice that was never selected is worth a warning after as many
            steps, or after 4 / ``fraction`` if that is more (default: 100).
        orthogonality: Also measure, at steps with metrics, how far the updates are from orthonormal, for about a tenth
            of the cost of the orthonormalization (default: False).

    Attributes:
        step: Steps counted.
        history: The metrics so far and how often each part of each parameter was selected, for pictures.
        name: Its name in warnings: that of the callback it belongs to, or ``"SelectionTracker"``.

    Raises:
        TypeError: ``every`` or ``window`` is no whole number, or ``orthogonality`` no truth value.
        ValueError: ``every`` or ``window`` is under 1.

    Example::

        tracker = SelectionTracker(every=10)
        tracker.attach(optimizer)
        for batch in batches:
            ...
            optimizer.step()
            if (metrics := tracker.pop_metrics()) is not None:
                print(metrics.overall["coverage"])
    """

    def __init__(self, *, every: int | None = 10, window: int = 100, orthogonality: bool = False) -> None:
        if every is not None:
            check_steps("every", every)
        check_steps("window", window)
        check_bool("orthogonality", orthogonality)
        self.every, self.window, self.orthogonality = every, window, orthogonality
        self.name = type(self).__name__
        self.step = 0
        self.history = SelectionHistory(window)
        self.wants_results = False
        self._optimizer: ObservableOptimizer | None = None
        self._parameters: dict[tuple[Tensor, str], TrackedParameter] = {}
        self._counters: list[SelectionCounters] = []
        self._signature: Sequence[tuple[object, ...]] = []
        self._loaded: dict[str, Mapping[str, Tensor]] = {}
        self._detached: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._record: StepRecord | None = None
        self._is_requested = False
        self._warned: set[tuple[str, tuple[str, str]]] = set()

    # Observing

    def attach(self, optimizer: Any) -> None:
        """Observe every step of an optimizer from now on; a present observer is replaced, with a warning.

        Args:
            optimizer: A :class:`~dion2_lightning.Dion2`, or a framework's wrapper around one.

        Raises:
            TypeError: It is another optimizer.
        """
        found = without_wrapper(optimizer)
        if not hasattr(found, "observer"):
            raise TypeError(
                f"optimizer must be a Dion2, got {type(found).__name__}; make it with "
                "dion2_lightning.build_optimizer(model, lr=...)"
            )
        if self.is_attached and self._optimizer is found:
            return
        self.detach()
        replaced = found.observer
        if replaced is not None and is_first_rank():
            name = getattr(replaced, "name", type(replaced).__name__)
            message = f"{self.name} replaces {name} as the optimizer's observer; {name} records nothing from now on"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        self._optimizer = found
        found.observer = self

    def detach(self) -> None:
        """Stop observing; what was counted stays, and keeps no parameter alive.

        It does where parameters have no names, or ranks hold different experts of a stack: then it stays with them.
        """
        if self._optimizer is not None and self._optimizer.observer is self:
            self._optimizer.observer = None
        self._optimizer = self._record = None
        if not self.state_is_spread and all(each.key == each.info.key for each in self._parameters.values()):
            self._detached |= {each.key: each.counts() for each in self._parameters.values()}
            self._parameters, self._counters, self._signature = {}, [], []

    @property
    def is_attached(self) -> bool:
        """Whether it is the observer of an optimizer."""
        return self._optimizer is not None and self._optimizer.observer is self

    def begin_step(self) -> None:
        """Get ready for a step; called by the optimizer."""
        self._find_parameters()
        self.step += 1
        for counters in self._counters:
            counters.selected = []
        self.wants_results = self._is_requested or (self.every is not None and self.step % self.every == 0)
        self._record = StepRecord(self.window) if self.wants_results else None

    def selected(self, source: Source, indices: Tensor, norms: Tensor | None) -> None:
        """Record what was selected of some matrices; called by the optimizer."""
        tracked = self._tracked(source)
        tracked.counters.selected.append((tracked, source.first, indices, norms))

    def orthonormalized(self, source: Source, result: Tensor) -> None:
        """Record the errors of orthonormal submatrices; called by the optimizer."""
        if self._record is not None and self.orthogonality:
            self._record.errors.append((self._tracked(source), orthogonality_errors(result)))

    def normalized(self, source: Source, variance: Tensor) -> None:
        """Record the spread of neurons' variances; called by the optimizer."""
        if self._record is not None:
            self._record.spreads.append((self._tracked(source), variance_spreads(variance)))

    def moved(self, source: Source, change: Tensor) -> None:
        """Record by how much a part of some matrices changes; called by the optimizer."""
        if self._record is not None:
            norms = torch.linalg.vector_norm(change, dim=-1).to(sum_dtype(change.device))
            squares = norms.square().sum().view(1)
            self._record.squares.append((self._tracked(source), squares))

    def _tracked(self, source: Source) -> TrackedParameter:
        return self._parameters[source.parameter, source.block]

    def projected(
        self,
        sources: Sequence[Source],
        counts: Sequence[int],
        energies: Tensor,
        captured: Tensor,
        norms: Tensor,
        grams: Tensor,
        squares: Tensor,
        is_taken: Tensor | None,
    ) -> None:
        """Record what updates of low rank take of the momenta of some matrices; called by the optimizer."""
        if self._record is None:
            return
        is_measured = energies != 0 if is_taken is None else (energies != 0) & is_taken
        measured = (
            captured_energies(energies, captured),
            turns(grams),
            rank_uses(grams, norms),
            torch.ones_like(energies),
        )
        values = torch.where(is_measured.unsqueeze(1), torch.stack(measured, dim=1), 0.0)
        parts = (each.split(counts) for each in (energies, squares, values))
        for source, its_energies, its_squares, its_values in zip(sources, *parts, strict=True):
            each, its_energies = self._tracked(source), its_energies.unsqueeze(1)
            only = torch.zeros_like(its_energies, dtype=torch.int64)
            each.counters.selected.append((each, source.first, only, its_energies))
            self._record.squares.append((each, its_squares.sum(0, keepdim=True) * each.share))
            self._record.projections.append((each, its_values.sum(0)))

    def end_step(self) -> None:
        """Count what the step selected; called by the optimizer."""
        for counters in self._counters:
            counters.update(self.step, self._record)
        self.wants_results = False

    # Metrics

    def request(self) -> None:
        """Request metrics of the next step, whatever ``every`` says; :meth:`pop_metrics` ends the request.

        With it a framework's own count of steps, which includes those that a GradScaler skips, can decide.
        """
        self._is_requested = True

    def pop_metrics(self) -> SelectionMetrics | None:
        """Return the metrics of the last step, once; None if it has none.

        Waits for the device. If ranks hold different parts of matrices, all of them have to call it.
        """
        record, self._record, self._is_requested = self._record, None, False
        if record is None or not self._parameters or not self.is_attached:
            return None
        assert self._optimizer is not None
        tracked = list(self._parameters.values())
        table = record.table(len(tracked))
        table = add_up_over_ranks(table, tracked, self._optimizer.process_group, with_errors=self.orthogonality)
        host = table.cpu()  # the one wait for the device
        sums = host[:, :HITS].tolist()
        rows = [ParameterSums(p.info, p.elements, *row) for p, row in zip(tracked, sums, strict=True)]
        # What is frozen by now is in a group too, and is meant to have no gradient.
        trained = [row for row, p in zip(rows, tracked, strict=True) if p.parameter.requires_grad]
        self._check_health(trained)
        metrics = SelectionMetrics(
            step=self.step,
            overall=compute_metrics(trained),
            groups={name: compute_metrics(of) for name, of in group_by(trained, lambda row: row.info.group).items()},
            parameters={row.info.key: compute_metrics([row]) for row in rows},
        )
        self.history.append(metrics, [each.info for each in tracked], host[:, HITS:COUNTS], host[:, COUNTS:])
        return metrics

    def _check_health(self, rows: Sequence[ParameterSums]) -> None:
        """Warn once for each parameter that fails a health check, on the first rank."""
        if not is_first_rank():
            return
        for check in HEALTH_CHECKS:
            failed = [row for row in rows if check.is_failed(row, self.window)]
            new = [row for row in failed if (check.name, row.info.key) not in self._warned]
            self._warned |= {(check.name, row.info.key) for row in new}
            if new:
                names = first_few([f"{row.info.name} ({check.finding(row)})" for row in new])
                message = f"step {self.step}, {check.name}: {names}; {check.advice}"
                warnings.warn(message, SelectionWarning, stacklevel=3)

    # State

    @property
    def state_is_spread(self) -> bool:
        """Whether ranks hold different experts of a stack, so that all of them have to call :meth:`state_dict`."""
        return any(each.spread_over > 1 for each in self._parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors on the host, and plain data.

        If ``state_is_spread``, it gathers, and all ranks have to call it.
        """
        return {
            "step": self.step,
            "counts": self._counts(),
            "history": self.history.state_dict(),
            "warned": sorted([check, *key] for check, key in self._warned),
        }

    def _counts(self) -> dict[str, Mapping[str, Tensor]]:
        """What was counted of each parameter, also of those that are yet to come."""
        counts = dict(self._loaded)
        for key, (last, hits) in self._detached.items():
            counts["/".join(key)] = {"last": last.cpu(), "hits": hits.cpu()}
        for each in self._parameters.values():
            last, hits = (each.gather(part) for part in each.counts())
            counts["/".join(each.info.key)] = {"last": last, "hits": hits}
        return counts

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from where :meth:`state_dict` was called.

        Args:
            state_dict: What it returned. Parameters are matched by the names of group and parameter; the counters of
                others start at zero.
        """
        self.step = state_dict["step"]
        self._loaded = dict(state_dict["counts"])
        self.history.load_state_dict(state_dict["history"] | {"window": self.window})
        self._warned = {(check, (group, name)) for check, group, name in state_dict["warned"]}
        self._parameters, self._counters, self._signature, self._detached = {}, [], [], {}

    # Parameters

    def _find_parameters(self) -> None:
        """Make new counters if the optimizer's parameters have changed since the last step."""
        assert self._optimizer is not None
        found = self._optimizer.observed_parameters()
        # The tracked parameters are kept alive, so an id stands for one of them.
        signature = [(id(each.parameter), each.parameter.device, each.observed) for each in found]
        if signature == self._signature:
            return
        self._signature = signature
        known = {each.key: [part.clone() for part in each.counts()] for each in self._parameters.values()}
        known |= {key: [*counts] for key, counts in self._detached.items()}
        self._detached = {}
        tracked = [TrackedParameter(row, each) for row, each in enumerate(found)]
        self._counters = [
            SelectionCounters(members, slices, device, self.step)
            for (slices, device), members in group_by(tracked, lambda p: (p.counted, p.parameter.device)).items()
        ]
        self._parameters = {each.source: each for each in tracked}
        for each in tracked:
            counts = known.get(each.key)
            saved = self._loaded.pop("/".join(each.info.key), None) if counts is None else None
            if saved is not None and saved["last"].shape == (each.info.matrices, each.counted):
                counts = [each.own_rows(saved[part]) for part in ("last", "hits")]
            if counts is not None and counts[0].shape == (each.count, each.counted):
                for own, value in zip(each.counts(), counts, strict=True):
                    own.copy_(value)


def check_steps(name: str, value: object) -> None:
    """Raise an error unless an argument is a number of steps."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of steps, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value}")


def check_bool(name: str, value: object) -> None:
    """Raise an error unless an argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def without_wrapper(optimizer: Any) -> Any:
    """Return the optimizer that a framework's wrapper steps.

    Some wrappers forward no attributes; others look like the optimizer, but what is set on them does not reach it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
