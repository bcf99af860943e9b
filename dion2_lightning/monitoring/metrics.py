"""The metrics: their names and meanings, how they are computed, and the health checks that warn."""

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
    "captured_energy": "share of the momentum's squared Frobenius norm that lies in the subspace of the update",
    "subspace_turn": "mean squared sine of the angles between the subspaces of this step and the one before",
    "rank_use": "how evenly the update's directions hold what is captured: 1 all alike, 1 / r one holds everything",
    "update_rms": "root mean square of the change of a whole matrix, weight decay left out",
    "variance_spread": "standard deviation of the neurons' variances, over their mean: what normalization evens out",
    "orthogonality_error": "Frobenius norm of O O^T - 1, over the root of k: how far the update is from orthonormal",
}
"""Every metric and its meaning; docs/statistics.md says how it is computed and how to read it."""

MAX_ORTHOGONALITY_ERROR: Final = 0.5
"""Singular values within [0.85, 1.15] give at most 0.32."""


class ParameterInfo(NamedTuple):
    """The names and the shape of a parameter.

    Attributes:
        group: Name of its parameter group.
        name: Its own name.
        matrices: How many matrices it holds.
        slices: Slices of each matrix, along the axis.
        axis: What a slice is: 0 output, 1 input.
        selects: Whether steps select some of the slices, and not all of them.
        rank: The rank of its updates where that is low, else 0; then slices are along the shorter axis.
    """

    group: str
    name: str
    matrices: int
    slices: int
    axis: int
    selects: bool = True
    rank: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Names of its group and of itself, which identify it."""
        return self.group, self.name

    @property
    def total_slices(self) -> int:
        """Slices of all its matrices."""
        return self.matrices * self.slices


@dataclass(frozen=True)
class SelectionMetrics:
    """Metrics of one step: for all matrices, for each group and for each parameter.

    ``MEANINGS`` says what each is, docs/statistics.md how it is computed, how to read it, and which algorithm has it:
    what is constant by definition, as the coverage where every step selects all slices, is left out. All slices count
    alike, whatever matrix they are in. Coverage, staleness, turnover and selected fraction are of slices; update RMS is
    of entries; the others belong to a matrix, and of several matrices they are the mean.

    A matrix whose momentum is zero throughout has only metrics of slices and entries. A parameter without a gradient in
    the step has no others than selected fraction, coverage, staleness and imbalance, and only normalized neurons have a
    variance. What a matrix or parameter lacks does not count for its group.

    Attributes:
        step: Steps that were counted, this one included.
        overall: Metrics of all matrices that are not frozen.
        groups: Metrics by the name of the parameter group.
        parameters: Metrics by the names of group and parameter; a stack of experts is one parameter.
    """

    step: int
    overall: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]]
    parameters: Mapping[tuple[str, str], Mapping[str, float]]

    def named(self, *, per_matrix: bool = False) -> dict[str, float]:
        """Return the metrics under the names that loggers get: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

        A group that is the only one has no names of its own: its metrics are those of all matrices.

        Args:
            per_matrix: Also ``dion2/<group>/<parameter>/coverage``, for every parameter (default: False).
        """
        parts: dict[str, Mapping[str, float]] = {"dion2": self.overall}
        if len(self.groups) > 1:
            parts |= {f"dion2/{group}": metrics for group, metrics in self.groups.items()}
        if per_matrix:
            parts |= {f"dion2/{group}/{name}": metrics for (group, name), metrics in self.parameters.items()}
        return {f"{prefix}/{name}": value for prefix, metrics in parts.items() for name, value in metrics.items()}

    def in_short(self) -> dict[str, float]:
        """Return what a progress bar shows: coverage and captured energy of all matrices, as far as there are some."""
        return {name: self.overall[name] for name in ("coverage", "captured_energy") if name in self.overall}


class ParameterSums(NamedTuple):
    """Sums over the matrices of one parameter at one step, from which metrics are computed."""

    info: ParameterInfo
    elements: int  # entries of all its matrices
    matrices: float
    updated: float  # matrices that the step updated
    selected: float  # slices that the step selected
    covered: float  # slices selected within the window
    staleness: float  # steps since each slice was last selected
    newly_selected: float  # selected slices that the step before had not selected
    captured_mass: float
    imbalance: float
    balanced: float  # matrices with momentum of which a step has selected slices: those of the imbalance
    zero_momentum: float  # updated matrices whose momentum is zero throughout
    zero_again: float  # those of them that an earlier step had updated too
    not_updated: float  # matrices that no step within the window has updated
    never_selected: float  # slices of updated matrices that no step has selected
    squared_update: float  # squares of all changes, weight decay left out
    orthogonality_error: float
    measured: float  # matrices whose error was measured; counters.py relies on its place after the error
    variance_spread: float
    normalized: float  # matrices whose neurons have variances; their place is after the spread's too
    captured_energy: float
    subspace_turn: float
    rank_use: float
    projected: float  # matrices with an update of low rank; the three before it are in the order of MEANINGS
    staleness_max: float  # of the slice that waits longest: a maximum, not a sum


COLUMNS: Final = {name: column for column, name in enumerate(ParameterSums._fields[2:])}
"""Columns of the table that the device leaves, a row for each parameter, by name."""


def compute_metrics(rows: Sequence[ParameterSums]) -> dict[str, float]:
    """Compute the metrics of some parameters together."""

    def total(name: str, rows: Sequence[ParameterSums] = rows) -> float:
        return float(sum(getattr(row, name) for row in rows))

    metrics = {}
    if selecting := [row for row in rows if row.info.selects]:
        slices = sum(row.info.total_slices for row in selecting)
        metrics["selected_fraction"] = total("selected", selecting) / slices
        metrics["coverage"] = total("covered", selecting) / slices
        metrics["staleness_mean"] = total("staleness", selecting) / slices
        metrics["staleness_max"] = max(row.staleness_max for row in selecting)
        if balanced := total("balanced", selecting):
            metrics["imbalance"] = total("imbalance", selecting) / balanced
    if updated := [row for row in selecting if row.updated]:
        metrics["turnover"] = total("newly_selected", updated) / total("selected", updated)
        if with_momentum := total("updated", updated) - total("zero_momentum", updated):
            metrics["captured_mass"] = total("captured_mass", updated) / with_momentum
    # At full rank the subspace is everything, captures everything and never turns. Rank 1 is always used.
    low = [row for row in rows if row.info.rank < row.info.slices]
    if projected := total("projected", low):
        metrics["captured_energy"] = total("captured_energy", low) / projected
        metrics["subspace_turn"] = total("subspace_turn", low) / projected
    several = [row for row in rows if row.info.rank > 1]
    if projected := total("projected", several):
        metrics["rank_use"] = total("rank_use", several) / projected
    if updated := [row for row in rows if row.updated]:
        metrics["update_rms"] = math.sqrt(total("squared_update", updated) / total("elements", updated))
    if normalized := total("normalized"):
        metrics["variance_spread"] = total("variance_spread") / normalized
    if measured := [row for row in rows if row.measured and row.updated > row.zero_momentum]:
        # Replicas that do not share work have measured the same matrix several times.
        weights = [(row.updated - row.zero_momentum) / row.measured for row in measured]
        errors = sum(row.orthogonality_error * weight for row, weight in zip(measured, weights, strict=True))
        metrics["orthogonality_error"] = errors / (total("updated", measured) - total("zero_momentum", measured))
    return {name: metrics[name] for name in MEANINGS if name in metrics}


class HealthCheck(NamedTuple):
    """A condition that triggers a :class:`~dion2_lightning.SelectionWarning`."""

    name: str
    is_failed: Callable[[ParameterSums, int], bool]  # given the sums of a parameter and the window
    finding: Callable[[ParameterSums], str]
    advice: str


def _has_left_out(row: ParameterSums, window: int) -> bool:
    """Whether a slice has waited longer than the window and 4 / fraction steps, for which a fair draw may miss one."""
    fraction = row.selected / (row.updated * row.info.slices) if row.updated else 1.0
    return row.never_selected > 0 and row.staleness_max >= max(window, 4 / fraction)


HEALTH_CHECKS: Final = (
    HealthCheck(
        "slices never selected",
        _has_left_out,
        lambda row: f"{row.never_selected:.0f} of {row.info.total_slices}",
        "select more slices a step, or keep less momentum; a slice without any gradient is never selected",
    ),
    HealthCheck(
        "all-zero momentum",
        # At a parameter's first step, whatever is multiplied by a factor that starts at zero has no gradient yet.
        lambda row, _: row.zero_again > 0,
        lambda row: f"{row.zero_again:.0f} of {row.matrices:.0f} matrices",
        "their gradients have been zero so far: does the loss depend on them?",
    ),
    HealthCheck(
        "no gradient",
        lambda row, _: row.not_updated > 0,
        lambda row: f"{row.not_updated:.0f} of {row.matrices:.0f} matrices",
        "no step within the window had a gradient for them: does the loss depend on them? Experts that no token is "
        "routed to have none",
    ),
    HealthCheck(
        "non-finite update",
        lambda row, _: not math.isfinite(row.squared_update),
        lambda row: f"sum of squares {row.squared_update}",
        "weights are damaged; go back to a checkpoint, and let check_finite=True name bad gradients in time, or "
        '"skip" leave such steps out',
    ),
    HealthCheck(
        "update far from orthonormal",
        lambda row, _: row.measured > 0 and row.orthogonality_error / row.measured > MAX_ORTHOGONALITY_ERROR,
        lambda row: f"error {row.orthogonality_error / row.measured:.2g}",
        "try orthonormalizing in float32; slices that are nearly multiples of each other have such errors too",
    ),
)
"""What :class:`~dion2_lightning.SelectionWarning` warns of, once for each parameter."""
