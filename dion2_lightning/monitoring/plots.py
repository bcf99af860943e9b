"""What was selected, in pictures: is every part of every matrix trained, or does a quarter do all the work?

Every function makes a matplotlib ``Figure`` of a :class:`~dion2_lightning.SelectionHistory`. None touches
pyplot or settings of matplotlib, so none leaves a window or a figure behind, with or without a display.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec

from dion2_lightning.monitoring.history import BINS, SelectionHistory
from dion2_lightning.monitoring.metrics import Kind

try:
    import matplotlib.style
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'dion2-lightning[plots]'") from error

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

INK, QUIET, ABSENT = "#22303c", "#8a97a3", "#dfe3e6"
# Okabe and Ito's colours, which every kind of colour vision tells apart; their yellow is too light for a line.
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#22303c")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
SELECTION_COLORS: Final[Colormap] = matplotlib.colormaps["PuOr_r"].with_extremes(bad=ABSENT)
DEPTH_COLORS: Final[Colormap] = matplotlib.colormaps["viridis"]

_STYLE: Final[dict[str, Any]] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9edf0",
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.titlesize": 11.5,
}
_MAX_COLUMNS: Final = 36
"""Intervals that a heatmap shows; neighbours become one, or single steps would be noise."""

_MAX_ROWS: Final = 128
"""Rows of a panel of a heatmap."""

_MAX_SINGLES: Final = 24
"""Matrices without a twin in another layer that share a panel."""

_DPI: Final = 110

Arguments = ParamSpec("Arguments")


def _drawn(
    draw: Callable[Concatenate[SelectionHistory, Arguments], Figure],
) -> Callable[Concatenate[SelectionHistory, Arguments], Figure]:
    """Draw in the style of this file, whatever the user's is; refuse a history without figures."""

    def draw_in_style(history: SelectionHistory, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        if not len(history):
            raise ValueError(
                "history has no figures to draw: fewer steps were taken than from one set of figures to the next; "
                "choose a smaller `every`, or train longer"
            )
        with matplotlib.style.context(["default", _STYLE]):
            return draw(history, *args, **kwargs)

    draw_in_style.__name__, draw_in_style.__doc__ = draw.__name__, draw.__doc__
    return draw_in_style


@_drawn
def overview(history: SelectionHistory) -> Figure:
    """Draw the four panels that tell most: one kind of matrix over time, evenness, coverage, captured mass.

    The kind of matrix is the one whose slices are selected least evenly.

    Raises:
        ValueError: The history has no figures.
    """
    figure = Figure(figsize=(11, 7.4), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.15))
    (first, second), (third, fourth) = figure.subplots(2, 2)
    families = _families(history.kinds)
    family = max(families, key=lambda each: _mean_of(history, each, "imbalance"))
    mesh = _draw_heatmap(first, history, family)
    first.set_title(f"Selected where and when: {_literal(family.title) or 'all matrices'}")
    first.set_xlabel("step")
    _selection_colorbar(figure, mesh, [first])
    _draw_counts(second, history)
    _draw_curve(third, history, "coverage")
    third.legend(loc="lower right")
    third.set_title(_coverage_title(history))
    _draw_captured_mass(fourth, history, families)
    series = sum(family.depths[0] is not None for family in families)
    fourth.legend(loc="upper left", ncols=2, fontsize=7.5 if series <= 8 else 5.5, handlelength=1.8)
    fourth.set_ylim(0, 1.6 * fourth.dataLim.y1)
    fourth.set_yticks([tick for tick in fourth.get_yticks() if tick <= 1.0])
    return figure


@_drawn
def heatmap(history: SelectionHistory) -> Figure:
    """Draw how often each part of each matrix was selected over time, a panel for each kind of matrix, by layer.

    White is the fair share, ``fraction`` of the steps; slices lie in their own order from top to bottom.

    Raises:
        ValueError: The history has no figures.
    """
    families = _families(history.kinds)
    columns = _grid_columns(len(families))
    rows = -(-len(families) // columns)
    tallest = [max(len(each.members) for each in families[row * columns :][:columns]) for row in range(rows)]
    heights = [float(np.clip(0.6 + 0.26 * count, 1.6, 4.2)) for count in tallest]
    figure = Figure(figsize=(3.0 * columns + 1.7, sum(heights) + 0.45 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    panels = list(grid.flat)
    for axes, family in zip(panels, families, strict=False):
        mesh = _draw_heatmap(axes, history, family)
        axes.set_title(_literal(family.title), fontsize=9)
    for axes in panels[len(families) :]:
        axes.remove()
    for axes in panels[max(0, len(families) - columns) : len(families)]:
        axes.set_xlabel("step")
    figure.suptitle("How often each part of each matrix was selected", x=0.01, ha="left")
    _selection_colorbar(figure, mesh, panels[: len(families)], shrink=min(1.0, 3.4 / sum(heights)))
    return figure


@_drawn
def coverage(history: SelectionHistory) -> Figure:
    """Draw which share of the slices was selected in the last ``window`` steps: overall, by group, and the spread.

    Raises:
        ValueError: The history has no figures.
    """
    figure, axes = _single()
    _draw_curve(axes, history, "coverage")
    axes.legend(loc="lower right")
    axes.set_title(_coverage_title(history))
    return figure


@_drawn
def staleness(history: SelectionHistory) -> Figure:
    """Draw how many steps ago slices were last selected: the mean, and the slice that waits longest.

    Raises:
        ValueError: The history has no figures.
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    expected = 1 / max(_fraction(history.overall), 1e-9) - 1
    _draw_curve(left, history, "staleness_mean")
    _draw_reference(left, expected, f"slices take turns: {expected:.3g} steps")
    left.legend(loc="upper left")
    left.set_title("Staleness: steps since a slice was last selected, mean")
    _draw_curve(right, history, "staleness_max")
    last = history.steps[-1]
    right.plot([0, last], [0, last], color=QUIET, linestyle=(0, (4, 3)), linewidth=1, label="a slice never selected")
    right.legend(loc="upper left")
    right.set_title("The slice that waits longest")
    return figure


@_drawn
def turnover(history: SelectionHistory) -> Figure:
    """Draw which share of the selection the step before had not selected: overall, by group, and the spread.

    Raises:
        ValueError: The history has no figures.
    """
    figure, axes = _single()
    _draw_curve(axes, history, "turnover")
    expected = 1 - _fraction(history.overall)
    _draw_reference(axes, expected, f"random selection: {expected:.0%}")
    axes.legend(loc="lower right")
    axes.set_title("Turnover: share of the selection that is new since the step before")
    return figure


@_drawn
def captured_mass(history: SelectionHistory) -> Figure:
    """Draw which share of the momentum's L1 norm the selected slices hold, by depth, a line for each kind of matrix.

    Raises:
        ValueError: The history has no figures.
    """
    figure, axes = _single()
    families = _families(history.kinds)
    _draw_captured_mass(axes, history, families)
    series = sum(family.depths[0] is not None for family in families)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8.5 if series <= 12 else 6.5, handlelength=1.8)
    return figure


@_drawn
def counts(history: SelectionHistory) -> Figure:
    """Draw how evenly the work is shared: how often slices were selected, sorted, a line for each parameter.

    Raises:
        ValueError: The history has no figures.
    """
    figure, axes = _single()
    _draw_counts(axes, history)
    return figure


PICTURES: Final[Mapping[str, Callable[[SelectionHistory], Figure]]] = {
    "overview": overview,
    "heatmap": heatmap,
    "staleness": staleness,
    "coverage": coverage,
    "turnover": turnover,
    "captured_mass": captured_mass,
    "counts": counts,
}
"""Every picture by its name: that of its file, and the end of its name in a logger."""


def save_pictures(history: SelectionHistory, folder: str | Path) -> list[Path]:
    """Write every picture as a PNG file, ``overview.png``, ``heatmap.png``, ...; files of these names are replaced.

    Args:
        history: What to draw.
        folder: Where to write; made if it is missing.

    Returns:
        The files, in the order of ``PICTURES``.

    Raises:
        ValueError: The history has no figures.
    """
    pictures = draw_pictures(history)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder) / f"{name}.png" for name in pictures]
    for path, png in zip(paths, pictures.values(), strict=True):
        path.write_bytes(png)
    return paths


def draw_pictures(history: SelectionHistory) -> dict[str, bytes]:
    """Return every picture by its name, as what is in a PNG file.

    Raises:
        ValueError: The history has no figures.
    """
    pictures = {}
    for name, draw in PICTURES.items():
        file = io.BytesIO()
        draw(history).savefig(file, format="png", dpi=_DPI)
        pictures[name] = file.getvalue()
    return pictures


def log_pictures(
    history: SelectionHistory, loggers: Iterable[Any], step: int, *, names: Sequence[str] = ("overview", "heatmap")
) -> list[Any]:
    """Send pictures to loggers that take images, as ``dion2/overview``, ``dion2/heatmap``, ...

    A logger takes images if it has ``log_image`` (Lightning's ``WandbLogger``), or if it, its ``experiment``
    (Lightning's ``TensorBoardLogger``) or its ``tracker`` (Accelerate's ``TensorBoardTracker``) has ``add_figure``
    (torch's ``SummaryWriter``), or if it has ``log_images`` (Accelerate's ``WandBTracker``).

    Args:
        history: What to draw.
        loggers: Any; those that take no images are left alone.
        step: Step that the pictures are logged under.
        names: Which of ``PICTURES`` (default: ``("overview", "heatmap")``).

    Returns:
        The loggers that took them.

    Raises:
        ValueError: The history has no figures, or there is no picture of a name.
    """
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise ValueError(f"names: there is no picture {unknown[0]!r}; choose from {', '.join(PICTURES)}")
    taken = []
    for logger in loggers:
        send = _sender(logger)
        if send is None:
            continue
        for name in names:
            send(f"dion2/{name}", PICTURES[name](history), step)
        taken.append(logger)
    return taken


def _sender(logger: Any) -> Callable[[str, Figure, int], Any] | None:
    """How a logger takes a figure; None where it does not."""
    if callable(log_image := getattr(logger, "log_image", None)):
        return lambda name, figure, step: log_image(key=name, images=[_pixels(figure)], step=step)
    for owner in (logger, getattr(logger, "experiment", None), getattr(logger, "tracker", None)):
        if callable(add_figure := getattr(owner, "add_figure", None)):
            return lambda name, figure, step, add=add_figure: add(name, figure, global_step=step)  # type: ignore[misc]
    if callable(log_images := getattr(logger, "log_images", None)):
        return lambda name, figure, step: log_images({name: [_pixels(figure)]}, step=step)
    return None


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure into an array (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# Kinds of matrices


@dataclass(frozen=True)
class _Family:
    """Parameters with one role in the layers of a model, like all query projections.

    Attributes:
        title: Their common name, without what all parameters of the model have in common.
        members: Their positions in the history, in the order of the layers.
        labels: What tells them apart: the number of the layer, or the name where they have no role in common.
        depths: The layer of each; None without layers.
    """

    title: str
    members: list[int]
    labels: list[str]
    depths: list[int | None]


def _families(kinds: Sequence[Kind]) -> list[_Family]:
    """Sort parameters by their role in a layer; those that occur once come last, together."""
    names = _parts_of_names(kinds)
    by_role: dict[tuple[str, ...], list[int]] = {}
    for position, parts in enumerate(names):
        by_role.setdefault(tuple("*" if part.isdecimal() else part for part in parts), []).append(position)
    roles = [role for role, members in by_role.items() if len(members) > 1]
    start = _common_beginning(roles)
    families = []
    for role in roles:
        places = [place for place, part in enumerate(role) if part == "*"]
        numbers = {member: [int(names[member][place]) for place in places] for member in by_role[role]}
        varying = [i for i in range(len(places)) if len({each[i] for each in numbers.values()}) > 1]
        members = sorted(numbers, key=numbers.__getitem__)
        families.append(
            _Family(
                title=".".join(role if role[start:] == ("*",) else role[start:]),
                members=members,
                labels=[".".join(str(numbers[member][i]) for i in varying) for member in members],
                depths=[numbers[member][varying[0]] for member in members],
            )
        )
    singles = [members[0] for members in by_role.values() if len(members) == 1]
    start = _common_beginning(names)
    titles = [".".join(names[member][start:]) for member in singles]
    if len(singles) == 1:
        return [*families, _Family(titles[0], singles, [""], [None])]
    for first in range(0, len(singles), _MAX_SINGLES):
        shown = slice(first, first + _MAX_SINGLES)
        title = "other matrices" if roles else ""
        families.append(_Family(title, singles[shown], titles[shown], [None] * len(singles[shown])))
    return families


def _parts_of_names(kinds: Sequence[Kind]) -> list[tuple[str, ...]]:
    """The names, ``weight`` left out where that is unambiguous, the group in front where names need it."""
    names = [tuple(kind.name.split(".")) for kind in kinds]
    if len(set(names)) < len(names):
        names = [(kind.group, *parts) for kind, parts in zip(kinds, names, strict=True)]
    shorter = [parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts for parts in names]
    return shorter if len(set(shorter)) == len(names) else names


def _common_beginning(names: Sequence[tuple[str, ...]]) -> int:
    """How many parts all names begin with, at least one part of each left out."""
    length = 0
    shortest = min(map(len, names), default=0)
    while length + 1 < shortest and len({each[length] for each in names}) == 1:
        length += 1
    return length


# What the history says


def _steps(history: SelectionHistory) -> NDArray[np.int64]:
    return np.asarray(history.steps)


def _values(points: Sequence[Mapping[str, float]], name: str) -> NDArray[np.float64]:
    """A figure over time; NaN where there was none."""
    return np.asarray([point.get(name, np.nan) for point in points], dtype=np.float64)


def _of_parameters(history: SelectionHistory, name: str) -> NDArray[np.float64]:
    """A figure of every parameter over time, (steps, parameters)."""
    return np.stack([_values(point, name) for point in history.parameters])


def _mean(values: NDArray[np.float64]) -> float:
    """Of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _mean_of(history: SelectionHistory, family: _Family, name: str) -> float:
    values = _values([history.parameters[-1][member] for member in family.members], name)
    mean = _mean(values)
    return mean if np.isfinite(mean) else -1.0


def _fraction(points: Sequence[Mapping[str, float]]) -> float:
    """Share of the slices that a step selects, from steps that selected any."""
    values = _values(points, "selected_fraction")
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.median(values)) if len(values) else 0.0


def _start_of(history: SelectionHistory, member: int) -> int:
    """The first point that knows of a parameter: others had been there before."""
    return next(point for point, each in enumerate(history.parameters) if each[member])


def _groups(history: SelectionHistory) -> list[str]:
    return list(dict.fromkeys(kind.group for kind in history.kinds))


# Panels


def _single() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    return figure, figure.subplots()


def _draw_curve(axes: Axes, history: SelectionHistory, name: str) -> None:
    """Draw a figure over time: overall, of each group where there are several, and what 80% of the parameters have."""
    steps = _steps(history)
    marker = "o" if len(steps) == 1 else None
    values = _of_parameters(history, name)
    known = np.isfinite(values).any(axis=1)
    if values.shape[1] > 1 and known.any():
        low, high = np.full((2, len(steps)), np.nan)
        low[known], high[known] = np.nanpercentile(values[known], [10, 90], axis=1)
        if len(steps) == 1:
            axes.vlines(steps, low, high, color="#d5dde4", linewidth=6, label="80% of the matrices")
        else:
            axes.fill_between(steps, low, high, color="#d5dde4", linewidth=0, label="80% of the matrices")
    groups = _groups(history)
    for place, group in enumerate(groups if len(groups) > 1 else []):
        of_group = _values([point.get(group, {}) for point in history.groups], name)
        axes.plot(
            steps, of_group, color=COLORS[place % len(COLORS)], linewidth=1.2, marker=marker, label=_literal(group)
        )
    axes.plot(steps, _values(history.overall, name), color=INK, linewidth=2, marker=marker, label="all matrices")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, steps[-1] if len(steps) > 1 else 1.1 * steps[-1])
    if name.startswith("staleness"):
        axes.set_ylabel("steps")
        axes.set_ylim(0, max(1.0, 1.35 * axes.dataLim.y1))  # room for the legend
    else:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1.02)


def _draw_reference(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, label=label)


def _literal(name: str) -> str:
    """A name for matplotlib: there a dollar sign begins a formula, and legends leave out what begins with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _coverage_title(history: SelectionHistory) -> str:
    if history.steps[-1] <= history.window:
        return "Coverage: share of slices selected at least once"
    return f"Coverage: share of slices selected in the last {history.window} steps"


def _draw_captured_mass(axes: Axes, history: SelectionHistory, families: Sequence[_Family]) -> None:
    """Draw the mean over the last quarter of the steps against the number of the layer; names stand after layers."""
    since = len(history) - max(1, len(history) // 4)
    values = _of_parameters(history, "captured_mass")[since:]
    layers = sorted({depth for family in families for depth in family.depths if depth is not None})
    places = {depth: place for place, depth in enumerate(layers)}
    names: list[str] = []
    series = 0
    for family in families:
        if family.depths[0] is None:
            start = len(layers) + len(names)
            names += [_literal(label or family.title) for label in family.labels]
            y = [_mean(values[:, member]) for member in family.members]
            axes.plot(range(start, start + len(y)), y, "o", color=INK, markersize=5)
            continue
        depths = sorted({depth for depth in family.depths if depth is not None})
        y = [
            _mean(values[:, [m for m, at in zip(family.members, family.depths, strict=True) if at == depth]])
            for depth in depths
        ]
        color = COLORS[series % len(COLORS)]
        marker = MARKERS[(series + series // len(COLORS)) % len(MARKERS)]  # shifted when colours come again
        x = [places[depth] for depth in depths]
        axes.plot(x, y, color=color, marker=marker, linewidth=1.3, markersize=4, label=_literal(family.title))
        series += 1
    _draw_reference(axes, _fraction(history.overall), "slices all alike")
    every = max(1, -(-len(layers) // 16))
    ticks = list(range(0, len(layers), every)) + list(range(len(layers), len(layers) + len(names)))
    axes.set_xticks(ticks, [str(layers[tick]) if tick < len(layers) else names[tick - len(layers)] for tick in ticks])
    for label in axes.get_xticklabels()[len(ticks) - len(names) :] if names else ():
        label.set(rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set_xlim(-0.5, len(layers) + len(names) - 0.5)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of the momentum's L1 norm")
    axes.set_xlabel("layer" if layers else "")
    since_step = f"since step {history.steps[since]}" if since < len(history) - 1 else f"at step {history.steps[-1]}"
    axes.set_title(f"Captured mass: what the selected slices hold, {since_step}")


def _draw_counts(axes: Axes, history: SelectionHistory) -> None:
    """Draw in which share of its steps each slice was selected, slices from the least to the most selected one."""
    kinds = history.kinds
    depths = {m: depth for family in _families(kinds) for m, depth in zip(family.members, family.depths, strict=True)}
    layers = [depth for depth in depths.values() if depth is not None]
    norm = Normalize(min(layers), max(layers)) if layers else Normalize(0, 1)
    starts = [0, *history.steps]
    shares = np.stack(
        [
            history.counts[member].numpy() / (kind.matrices * (history.steps[-1] - starts[_start_of(history, member)]))
            for member, kind in enumerate(kinds)
        ]
    )
    x = np.linspace(0, 1, BINS)
    for member, share in enumerate(shares):
        depth = depths[member]
        color = QUIET if depth is None else DEPTH_COLORS(norm(depth))
        axes.plot(x, share, color=color, linewidth=0.8, alpha=0.6)
    if len(shares) > 1:
        axes.plot(x, shares.mean(axis=0), color=INK, linewidth=2.4, label="mean of the matrices")
    _draw_reference(axes, _fraction(history.overall), "all alike")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("slices of a matrix, from the least to the most selected")
    axes.set_ylabel("share of the steps that selected it")
    axes.set_title("How evenly the work is shared")
    axes.legend(loc="upper left")
    if layers:
        bar = axes.figure.colorbar(ScalarMappable(norm, DEPTH_COLORS), ax=axes, label="layer", pad=0.02, aspect=30)
        bar.locator = MaxNLocator(integer=True)
        bar.outline.set_visible(False)


# The heatmap


def _grid_columns(panels: int) -> int:
    """Columns that leave the fewest empty places in a grid of up to four; the wider of equals."""
    return min(range(min(panels, 4), min(panels, 3) - 1, -1), key=lambda columns: -panels % columns)


def _draw_heatmap(axes: Axes, history: SelectionHistory, family: _Family) -> QuadMesh:
    """Draw the matrices of a family below each other, each with its slices from top to bottom, against steps."""
    rows = _rows_of_matrix(len(family.members))
    edges, values = _heat(history, family.members, rows)
    axes.grid(False)
    mesh = axes.pcolormesh(
        edges, np.arange(len(values) + 1), values, cmap=SELECTION_COLORS, vmin=0, vmax=1, rasterized=True
    )
    axes.set_ylim(len(values), 0)
    axes.hlines(np.arange(1, len(family.members)) * rows, edges[0], edges[-1], color="white", linewidth=0.8)
    every = 1 if family.depths[0] is None else -(-len(family.members) // 12)
    places = np.arange(0, len(family.members), every)
    axes.set_yticks((places + 0.5) * rows, [_literal(family.labels[place]) for place in places])
    axes.tick_params(axis="y", length=0, labelsize=7.5)
    if family.depths[0] is not None:
        axes.set_ylabel("layer, slices downwards", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.spines[:].set_visible(False)
    return mesh


def _rows_of_matrix(matrices: int) -> int:
    """A divisor of ``BINS``, so that a row is made of whole bins."""
    return next((rows for rows in (64, 32, 16, 8) if rows * matrices <= _MAX_ROWS), 4)


def _heat(
    history: SelectionHistory, members: Sequence[int], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the edges of the intervals, and how often slices were selected: 0 never, 0.5 fair share, 1 every step.

    The scale bends at the fair share, which is ``fraction``, so that white is the same for every fraction.
    """
    lengths = np.diff([0, *history.steps])
    size = -(-len(lengths) // _MAX_COLUMNS)
    # Equally many each but for the first, or the last ones would look noisier than the others.
    parts = np.split(np.arange(len(lengths)), np.arange(len(lengths) % size or size, len(lengths), size))
    edges = np.asarray([0, *(history.steps[part[-1]] for part in parts)])
    blocks = []
    for member in members:
        is_there = np.asarray([bool(point[member]) for point in history.parameters])
        shares = history.shares[:, member].numpy().reshape(len(lengths), rows, -1).mean(axis=2) / 255
        weights = lengths * is_there
        columns = [
            (weights[part] @ shares[part]) / weights[part].sum() if weights[part].any() else np.full(rows, np.nan)
            for part in parts
        ]
        fraction = _fraction([point[member] for point in history.parameters])
        blocks.append(_bend(np.stack(columns, axis=1), fraction))
    return edges, np.ma.masked_invalid(np.concatenate(blocks))


def _bend(shares: NDArray[np.float64], fraction: float) -> NDArray[np.float64]:
    below = shares / (2 * max(fraction, 1e-9))
    above = 0.5 + (shares - fraction) / (2 * max(1 - fraction, 1e-9))
    return np.where(shares <= fraction, below, above)


def _selection_colorbar(figure: Figure, mesh: QuadMesh, panels: Sequence[Axes], shrink: float = 1.0) -> None:
    bar = figure.colorbar(mesh, ax=list(panels), aspect=30, pad=0.015, fraction=0.05, shrink=shrink, anchor=(0.0, 1.0))
    bar.set_ticks([0, 0.5, 1], labels=["never", "fair\nshare", "every\nstep"])
    bar.ax.tick_params(length=0)
    lowest, _, highest = bar.ax.get_yticklabels()
    lowest.set_verticalalignment("bottom")
    highest.set_verticalalignment("top")
    bar.outline.set_visible(False)
