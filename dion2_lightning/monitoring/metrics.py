"""The figures of a selection: their names and meanings, how they are made, and when they are worth a warning."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

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


class Kind(NamedTuple):
    """What is known of a parameter's matrices.

    Attributes:
        group: Name of its parameter group.
        name: Its own.
        matrices: How many it holds.
        slices: Of each.
        axis: What a slice is: 0 output, 1 input.
    """

    group: str
    name: str
    matrices: int
    slices: int
    axis: int


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

    A matrix whose momentum is zero throughout has no captured mass, imbalance and orthogonality error, and counts for
    none of these means.

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


@dataclass(frozen=True)
class Row:
    """A parameter and its row of the ledgers' table, on the host, in the order of the columns (ledger.py)."""

    kind: Kind
    entries: int
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
    idle: float
    longest: float

    @property
    def key(self) -> tuple[str, str]:
        """The names of its group and its own."""
        return self.kind.group, self.kind.name

    @property
    def fraction(self) -> float:
        """Share of the slices that a step selects, in the matrices that it updated; 1 if it updated none."""
        return self.selected / (self.updated * self.kind.slices) if self.updated else 1.0

    @property
    def slices(self) -> float:
        """Of all its matrices."""
        return self.matrices * self.kind.slices


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of some parameters together."""
    slices = sum(row.slices for row in rows)
    figures = {
        "selected_fraction": sum(row.selected for row in rows) / slices,
        "coverage": sum(row.covered for row in rows) / slices,
        "staleness_mean": sum(row.staleness for row in rows) / slices,
        "staleness_max": max(row.longest for row in rows),
    }
    counted = sum(row.matrices - row.dead for row in rows)
    if counted:
        figures["imbalance"] = sum(row.imbalance for row in rows) / counted
    updated = [row for row in rows if row.updated]
    if updated:
        figures["turnover"] = sum(row.fresh for row in updated) / sum(row.selected for row in updated)
        alive = sum(row.updated - row.dead for row in updated)
        if alive:
            figures["captured_mass"] = sum(row.captured for row in updated) / alive
        entries = sum(row.entries for row in updated)
        figures["update_rms"] = math.sqrt(sum(row.squares for row in updated) / entries)
    measured = [row for row in rows if row.measured and row.updated > row.dead]
    if measured:
        # Replicas that do not share the work have measured the same matrix several times.
        weights = [(row.updated - row.dead) / row.measured for row in measured]
        errors = sum(row.error * weight for row, weight in zip(measured, weights, strict=True))
        figures["orthogonality_error"] = errors / sum(row.updated - row.dead for row in measured)
    return {name: figures[name] for name in MEANINGS if name in figures}


class Trouble(NamedTuple):
    """Something to warn of: what it is called, where it is, how much of it, and what to do."""

    what: str
    is_in: Callable[[Row, int, int], bool]
    how_much: Callable[[Row], str]
    hint: str


TROUBLES: Final = (
    Trouble(
        "slices never selected",
        # Counted from when the parameter came; and so few slices that a fair draw could miss some for longer.
        lambda row, step, window: row.never > 0 and row.longest >= max(window, 4 / row.fraction),
        lambda row: f"{row.never:.0f} of {row.slices:.0f}",
        "a lower momentum or a higher fraction selects more of them; a slice without any gradient is never selected",
    ),
    Trouble(
        "all-zero momentum",
        # At its own first step, what lies behind a factor that starts at zero has no gradient yet.
        lambda row, step, window: row.idle > 0,
        lambda row: f"{row.idle:.0f} of {row.matrices:.0f} matrices",
        "their gradients have been zero so far: does the loss depend on them?",
    ),
    Trouble(
        "non-finite update",
        lambda row, step, window: not math.isfinite(row.squares),
        lambda row: f"sum of squares {row.squares}",
        "weights are damaged; go back to a checkpoint, and let check_finite=True name bad gradients in time",
    ),
    Trouble(
        "update far from orthonormal",
        lambda row, step, window: row.measured > 0 and row.error / row.measured > FAR_FROM_ORTHONORMAL,
        lambda row: f"error {row.error / row.measured:.2g}",
        "try orthonormalize_dtype='float32'; slices that are nearly multiples of each other have such errors too",
    ),
)
"""What :class:`SelectionWarning` warns of."""
