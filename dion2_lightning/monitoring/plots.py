"""Pictures of the metrics: is every part of every matrix trained, or does a quarter do all the work?

Pictures are matplotlib figures of a :class:`~dion2_lightning.SelectionHistory`. Nothing here touches pyplot or the
user's settings of matplotlib, so no window or figure is left behind, with or without a display.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple

from dion2_lightning.lists import group_by
from dion2_lightning.monitoring.history import BINS, SelectionHistory
from dion2_lightning.monitoring.metrics import ParameterInfo

try:
    import matplotlib.style
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install matplotlib") from error

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

Array = NDArray[np.float64]

_INK, _QUIET, _BAND = "#22303c", "#8a97a3", "#d5dde4"
# Okabe and Ito's colours, which every kind of colour vision tells apart; their yellow is too light for a line.
_COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#22303c")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_SELECTION_COLORS: Final = matplotlib.colormaps["PuOr_r"].with_extremes(bad="#dfe3e6")
_DEPTH_COLORS: Final = matplotlib.colormaps["viridis"]
_DASHED: Final[dict[str, Any]] = {"color": _QUIET, "linestyle": (0, (4, 3)), "linewidth": 1}
_DPI: Final = 110
_MAX_COLUMNS: Final = 36  # intervals in a heatmap; of single steps it would be noise
_MAX_ROWS: Final = 128  # rows in a panel of a heatmap
_SHARES: Final = ("coverage", "turnover", "captured_mass", "captured_energy", "subspace_turn", "rank_use")
_MAX_SINGLES: Final = 24  # matrices without a twin in another layer that share a panel

_STYLE: Final[dict[str, Any]] = {
    **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _QUIET),
    **{"font.size": 9.0, "axes.titlesize": 9.5, "legend.fontsize": 8.5, "figure.titlesize": 11.5},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e9edf0", "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
}


def draw(history: SelectionHistory, name: str) -> Figure:
    """Draw a picture, in its own style whatever the user's is.

    Args:
        history: What to draw.
        name: One of ``PICTURES``.

    Raises:
        ValueError: The history has no metrics, or nothing that the picture shows, or there is no such picture.
    """
    if name not in PICTURES:
        raise ValueError(f"there is no picture {name!r}; choose from {', '.join(PICTURES)}")
    names = pictures_of(history)
    if name not in names:
        raise ValueError(f"no matrix has the metrics that the picture {name!r} shows; choose from {', '.join(names)}")
    with matplotlib.style.context(["default", _STYLE]):
        return PICTURES[name].draw(history.part(PICTURES[name].shows))


def pictures_of(history: SelectionHistory) -> list[str]:
    """Return the names of the pictures that a history has something for.

    Raises:
        ValueError: The history has no metrics.
    """
    if not len(history):
        raise ValueError(
            "history has no metrics to draw: no algorithm of the run has some, as AdamW has none, or it has taken "
            "fewer than `every` steps; choose a smaller `every`, or train longer"
        )
    return [name for name, picture in PICTURES.items() if any(map(picture.shows, history.infos))]


def draw_pictures(history: SelectionHistory) -> dict[str, bytes]:
    """Return every picture that there is something for by its name, as the bytes of a PNG file."""
    pictures = {}
    for name in pictures_of(history):
        file = io.BytesIO()
        draw(history, name).savefig(file, format="png", dpi=_DPI)
        pictures[name] = file.getvalue()
    return pictures


def save_pictures(history: SelectionHistory, folder: str | Path) -> list[Path]:
    """Write the pictures as PNG files, ``overview.png``, ``heatmap.png``, ...; files of these names are replaced.

    Args:
        history: What to draw.
        folder: Where to write; made if it is missing.

    Returns:
        The files, in the order of ``PICTURES``.

    Raises:
        ValueError: The history has no metrics.
    """
    pictures = {Path(folder) / f"{name}.png": png for name, png in draw_pictures(history).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, png in pictures.items():
        path.write_bytes(png)
    return list(pictures)


def log_pictures(history: SelectionHistory, loggers: Iterable[Any], step: int) -> list[Any]:
    """Send pictures to loggers that take images: ``dion2/overview`` and ``dion2/heatmap``; of Dion ``dion2/subspaces``.

    Where there are none of these, as of Muon, they get ``dion2/updates``.

    A logger takes images if it has ``log_image`` (Lightning's ``WandbLogger``), or if it, its ``experiment``
    (Lightning's ``TensorBoardLogger``) or its ``tracker`` (Accelerate's ``TensorBoardTracker``) has ``add_figure``
    (torch's ``SummaryWriter``), or if it has ``log_images`` (Accelerate's ``WandBTracker``).

    Args:
        history: What to draw.
        loggers: Any; those that take no images are left alone.
        step: Step that the pictures are logged under.

    Returns:
        The loggers that took them.

    Raises:
        ValueError: The history has no metrics.
    """
    senders = [(logger, send) for logger in loggers if (send := _sender(logger)) is not None]
    names = [name for name in pictures_of(history) if name in ("overview", "heatmap", "subspaces")]
    for _, send in senders:
        for name in names or ["updates"]:
            send(f"dion2/{name}", draw(history, name), step)
    return [logger for logger, _ in senders]


def _sender(logger: Any) -> Callable[[str, Figure, int], Any] | None:
    """Return the function that sends a figure to a logger; None where it takes none."""
    if hasattr(logger, "log_image"):
        return lambda name, figure, step: logger.log_image(key=name, images=[_pixels(figure)], step=step)
    for writer in (logger, getattr(logger, "experiment", None), getattr(logger, "tracker", None)):
        if hasattr(writer, "add_figure"):
            return partial(_add_figure, writer)
    if hasattr(logger, "log_images"):
        return lambda name, figure, step: logger.log_images({name: [_pixels(figure)]}, step=step)
    return None


def _add_figure(writer: Any, name: str, figure: Figure, step: int) -> None:
    writer.add_figure(name, figure, global_step=step)


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure as an array (height, width, 3)."""
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# Pictures


def _overview(history: SelectionHistory) -> Figure:
    """Four panels: the kind of matrix that is selected least evenly over time, evenness, coverage, captured mass."""
    figure = Figure(figsize=(11, 7.4), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.15))
    (first, second), (third, fourth) = figure.subplots(2, 2)

    def unevenness(family: _Family) -> float:
        mean = _mean(_values([history.parameters[-1][member] for member in family.members], "imbalance"))
        return mean if np.isfinite(mean) else -1.0

    family = max(_families(history.infos), key=unevenness)
    mesh = _draw_heatmap(first, history, family)
    first.set(title=f"Selected where and when: {_literal(family.title) or 'all matrices'}", xlabel="step")
    _selection_colorbar(figure, mesh, [first])
    _draw_counts(second, history)
    _draw_coverage(third, history)
    _draw_captured_mass(fourth, history)
    return figure


def _heatmap(history: SelectionHistory) -> Figure:
    """How often each part of each matrix was selected over time, a panel for each kind of matrix, by layer.

    White is the fair share, ``fraction`` of the steps; slices lie in their own order from top to bottom.
    """
    families = _families(history.infos)
    columns = min(len(families), 3 if len(families) in (5, 6, 9) else 4)  # few empty places
    rows = -(-len(families) // columns)
    tallest = [max(len(each.members) for each in families[row * columns :][:columns]) for row in range(rows)]
    heights = [float(np.clip(0.6 + 0.26 * count, 1.6, 4.2)) for count in tallest]
    figure = Figure(figsize=(3.0 * columns + 1.7, sum(heights) + 0.45 * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat)
    for axes in panels[len(families) :]:
        axes.remove()
    del panels[len(families) :]
    for axes, family in zip(panels, families, strict=True):
        mesh = _draw_heatmap(axes, history, family)
        axes.set_title(_literal(family.title), fontsize=9)
    for axes in panels[-columns:]:
        axes.set_xlabel("step")
    figure.suptitle("How often each part of each matrix was selected", x=0.01, ha="left")
    _selection_colorbar(figure, mesh, panels, shrink=min(1.0, 3.4 / sum(heights)))
    return figure


def _staleness(history: SelectionHistory) -> Figure:
    """How many steps ago slices were last selected, the mean and the longest wait; and how the selection changes."""
    figure = Figure(figsize=(12.5, 4.0), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    fraction, last = _fraction(history.overall), history.steps[-1]
    _draw_curve(first, history, "staleness_mean")
    turns = 1 / max(fraction, 1e-9) - 1
    first.axhline(turns, label=f"slices take turns: {turns:.3g} steps", **_DASHED)
    first.set_title("Staleness: steps since a slice was selected, mean")
    _draw_curve(second, history, "staleness_max")
    second.plot([0, last], [0, last], label="a slice never selected", **_DASHED)
    second.set_title("The slice that waits longest")
    _draw_curve(third, history, "turnover")
    third.axhline(1 - fraction, label=f"random selection: {1 - fraction:.0%}", **_DASHED)
    third.set_title("Turnover: new in the selection since the step before")
    for axes, place in ((first, "upper left"), (second, "upper left"), (third, "lower right")):
        axes.legend(loc=place)
    return figure


def _subspaces(history: SelectionHistory) -> Figure:
    """What updates of low rank take of the momentum, how their subspace turns, and how much of the rank they use."""
    titles = {
        "captured_energy": "Captured energy: what the update takes",
        "subspace_turn": "Subspace turn: how new its directions are",
        "rank_use": "Rank use: how evenly directions hold it",
    }
    share = _rank_share(history.infos)
    references = {
        "captured_energy": (share, f"directions all alike: {share:.0%}"),
        "subspace_turn": (1 - share, f"random subspaces: {1 - share:.0%}"),
    }
    return _figure_of_metrics(history, titles, references)


def _updates(history: SelectionHistory) -> Figure:
    """How large updates are, and what else belongs to the updates of some algorithms, where it was measured."""
    titles = {
        "update_rms": "RMS of the update",
        "variance_spread": "Variance spread: what normalization evens out",
        "orthogonality_error": "Orthogonality error",
    }
    return _figure_of_metrics(history, titles, {})


def _figure_of_metrics(
    history: SelectionHistory, titles: Mapping[str, str], references: Mapping[str, tuple[float, str]]
) -> Figure:
    """Draw the metrics that there are: each over time, and below it, or beside a single one, by layer.

    A reference is a value and its label.
    """
    names = [name for name in titles if np.isfinite(_values(history.overall, name)).any()] or list(titles)[:1]
    shape = (2, len(names)) if len(names) > 1 else (1, 2)
    size = (max(8.4, 4.3 * len(names)), 4.0 * shape[0])
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12))
    first, second = np.reshape(figure.subplots(*shape, squeeze=False), (2, len(names)))
    for number, (name, over_steps, by_layer) in enumerate(zip(names, first, second, strict=True)):
        _draw_curve(over_steps, history, name)
        if name in references:
            value, label = references[name]
            over_steps.axhline(value, label=label, **_DASHED)
        over_steps.set_title(titles[name])
        over_steps.legend(loc="best")
        when = _draw_by_layer(by_layer, history, name, references.get(name), has_legend=number == 0)
        by_layer.set_title(f"By layer, {when}")
    return figure


def _draw_coverage(axes: Axes, history: SelectionHistory) -> None:
    """Which share of the slices was selected in the last ``window`` steps: overall, by group, and the spread."""
    _draw_curve(axes, history, "coverage")
    axes.legend(loc="lower right")
    is_over_all_steps = history.steps[-1] <= history.window
    when = "at least once" if is_over_all_steps else f"in the last {history.window} steps"
    axes.set_title(f"Coverage: share of slices selected {when}")


def _draw_captured_mass(axes: Axes, history: SelectionHistory) -> None:
    """Which share of the momentum's L1 norm the selected slices hold, by layer."""
    when = _draw_by_layer(axes, history, "captured_mass", (_fraction(history.overall), "slices all alike"))
    axes.set(title=f"Captured mass: what the selected slices hold, {when}", ylabel="share of the momentum's L1 norm")


def _draw_by_layer(
    axes: Axes,
    history: SelectionHistory,
    name: str,
    reference: tuple[float, str] | None,
    *,
    has_legend: bool = True,
) -> str:
    """Draw a metric by layer, as its mean over the last quarter of the steps; return a phrase that says so.

    A line is a kind of matrix. Matrices without a layer come last. A reference is a value and its label.
    """
    since = len(history) - max(1, len(history) // 4)
    values = _of_parameters(history, name)[since:]
    families = _families(history.infos)
    layers = sorted({depth for family in families for depth in family.depths if depth is not None})
    ticks = [str(layer) for layer in layers]
    series = 0
    for family in families:
        if family.depths[0] is None:
            y = [_mean(values[:, member]) for member in family.members]
            axes.plot(range(len(ticks), len(ticks) + len(y)), y, "o", color=_INK, markersize=5)
            ticks += [_literal(label or family.title) for label in family.labels]
            continue
        at = {depth: [m for m, d in zip(family.members, family.depths, strict=True) if d == depth] for depth in layers}
        y = [_mean(values[:, at[depth]]) for depth in layers if at[depth]]
        x = [place for place, depth in enumerate(layers) if at[depth]]
        color = _COLORS[series % len(_COLORS)]
        marker = _MARKERS[(series + series // len(_COLORS)) % len(_MARKERS)]  # shifted when colours come again
        axes.plot(x, y, color=color, marker=marker, linewidth=1.3, markersize=4, label=_literal(family.title))
        series += 1
    if reference is not None:
        axes.axhline(reference[0], label=reference[1], **_DASHED)
    places = [*range(0, len(layers), max(1, -(-len(layers) // 16))), *range(len(layers), len(ticks))]
    axes.set_xticks(places, [ticks[place] for place in places])
    for place, label in zip(places, axes.get_xticklabels(), strict=True):
        if place >= len(layers):
            label.set(rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set(xlim=(-0.5, len(ticks) - 0.5), xlabel="layer" if layers else "")
    _show_values(axes, name)
    if has_legend and axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", ncols=2, fontsize=7.5 if series <= 8 else 5.5, handlelength=1.8)
        axes.set_ylim(0, 1.6 * axes.dataLim.y1)  # room for the legend
    if name in _SHARES:
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1.0])
    return f"since step {history.steps[since]}" if since < len(history) - 1 else f"at step {history.steps[-1]}"


def _draw_counts(axes: Axes, history: SelectionHistory) -> None:
    """In which share of its steps each slice was selected, from the least to the most, a line for each parameter."""
    infos = history.infos
    depths = {m: depth for family in _families(infos) for m, depth in zip(family.members, family.depths, strict=True)}
    layers = [depth for depth in depths.values() if depth is not None]
    norm = Normalize(min(layers), max(layers)) if layers else Normalize(0, 1)
    x = np.linspace(0, 1, BINS)
    shares = []
    for member, info in enumerate(infos):
        first = next(point for point, each in enumerate(history.parameters) if each[member])
        steps = history.steps[-1] - [0, *history.steps][first]  # of a parameter that came late, those it was there
        shares.append(history.counts[member].numpy() / (info.matrices * steps))
        depth = depths[member]
        color = _QUIET if depth is None else _DEPTH_COLORS(norm(depth))
        axes.plot(x, shares[-1], color=color, linewidth=0.8, alpha=0.6)
    if len(shares) > 1:
        axes.plot(x, np.mean(shares, axis=0), color=_INK, linewidth=2.4, label="mean of the matrices")
    axes.axhline(_fraction(history.overall), label="all alike", **_DASHED)
    axes.set(title="How evenly the work is shared", xlim=(0, 1))
    axes.set(
        xlabel="slices of a matrix, from the least to the most selected", ylabel="share of the steps that selected it"
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _show_percent(axes)
    axes.legend(loc="upper left")
    if layers:
        bar = axes.figure.colorbar(ScalarMappable(norm, _DEPTH_COLORS), ax=axes, label="layer", pad=0.02, aspect=30)
        bar.locator = MaxNLocator(integer=True)
        bar.outline.set_visible(False)


class Picture(NamedTuple):
    """A picture.

    Attributes:
        shows: Whether it shows a parameter.
        draw: Draws a history of such parameters.
    """

    shows: Callable[[ParameterInfo], bool]
    draw: Callable[[SelectionHistory], Figure]


def _selects(info: ParameterInfo) -> bool:
    return info.selects


PICTURES: Final[Mapping[str, Picture]] = {
    "overview": Picture(_selects, _overview),
    "heatmap": Picture(_selects, _heatmap),
    "staleness": Picture(_selects, _staleness),
    "subspaces": Picture(lambda info: info.rank > 0, _subspaces),
    "updates": Picture(lambda info: True, _updates),
}
"""Every picture by its name in files and loggers."""


# Panels


def _draw_curve(axes: Axes, history: SelectionHistory, name: str) -> None:
    """Draw a metric over time: overall, by group if there are several, and the range of 80% of the parameters."""
    steps = history.steps
    marker = "o" if len(steps) == 1 else None
    values = _of_parameters(history, name)
    known = np.isfinite(values).any(axis=1)
    if values.shape[1] > 1 and known.any():
        low, high = np.full((2, len(steps)), np.nan)
        low[known], high[known] = np.nanpercentile(values[known], [10, 90], axis=1)
        if len(steps) == 1:
            axes.vlines(steps, low, high, color=_BAND, linewidth=6, label="80% of the matrices")
        else:
            axes.fill_between(steps, low, high, color=_BAND, linewidth=0, label="80% of the matrices")
    groups = list(dict.fromkeys(info.group for info in history.infos))
    for place, group in enumerate(groups if len(groups) > 1 else []):
        of_group = _values([point.get(group, {}) for point in history.groups], name)
        if not np.isfinite(of_group).any():
            continue  # its algorithm has no such metric
        color = _COLORS[place % len(_COLORS)]
        axes.plot(steps, of_group, color=color, linewidth=1.2, marker=marker, label=_literal(group))
    axes.plot(steps, _values(history.overall, name), color=_INK, linewidth=2, marker=marker, label="all matrices")
    axes.set(xlabel="step", xlim=(0, steps[-1] if len(steps) > 1 else 1.1 * steps[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if name.startswith("staleness"):
        axes.set(ylabel="steps", ylim=(0, max(1.0, 1.6 * axes.dataLim.y1)))  # room for the legend
    else:
        _show_values(axes, name)


def _show_values(axes: Axes, name: str) -> None:
    """Show the values of a metric from 0, shares as percentages."""
    if name in _SHARES:
        _show_percent(axes)
    elif axes.dataLim.y1 > 0:  # else there is no value, or none but zeros
        axes.set_ylim(0, 1.15 * axes.dataLim.y1)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def _show_percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.02)


def _draw_heatmap(axes: Axes, history: SelectionHistory, family: "_Family") -> QuadMesh:
    """Draw the matrices of a family below each other, each with its slices from top to bottom, against steps."""
    count = len(family.members)
    # A divisor of BINS, so that a row is made of whole bins.
    rows = next((rows for rows in (64, 32, 16, 8) if rows * count <= _MAX_ROWS), 4)
    edges, values = _heat(history, family.members, rows)
    axes.grid(False)
    mesh = axes.pcolormesh(
        edges, np.arange(len(values) + 1), values, cmap=_SELECTION_COLORS, vmin=0, vmax=1, rasterized=True
    )
    axes.set_ylim(len(values), 0)
    axes.hlines(np.arange(1, count) * rows, edges[0], edges[-1], color="white", linewidth=0.8)
    places = np.arange(0, count, 1 if family.depths[0] is None else -(-count // 12))
    axes.set_yticks((places + 0.5) * rows, [_literal(family.labels[place]) for place in places])
    axes.tick_params(axis="y", length=0, labelsize=7.5)
    if family.depths[0] is not None:
        axes.set_ylabel("layer, slices downwards", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.spines[:].set_visible(False)
    return mesh


def _heat(history: SelectionHistory, members: Sequence[int], rows: int) -> tuple[NDArray[np.int64], Array]:
    """Return the edges of the intervals, and how often slices were selected: 0 never, 0.5 fair share, 1 every step.

    The scale bends at the fair share, which is ``fraction``, so that white is the same for every fraction.
    """
    lengths = np.diff([0, *history.steps])
    size = -(-len(lengths) // _MAX_COLUMNS)
    # All but the first have equally many steps, or the last would look noisier than the others.
    parts = np.split(np.arange(len(lengths)), np.arange(len(lengths) % size or size, len(lengths), size))
    edges = np.asarray([0, *(history.steps[part[-1]] for part in parts)])
    every_share, blocks = history.shares, []
    for member in members:
        points = [point[member] for point in history.parameters]
        weights = lengths * np.asarray([bool(point) for point in points])  # none before it came
        selected = every_share[:, member].numpy().reshape(len(lengths), rows, -1).mean(axis=2) / 255
        columns = [
            (weights[part] @ selected[part]) / weights[part].sum() if weights[part].any() else np.full(rows, np.nan)
            for part in parts
        ]
        shares, fraction = np.stack(columns, axis=1), _fraction(points)
        below = shares / (2 * max(fraction, 1e-9))
        above = 0.5 + (shares - fraction) / (2 * max(1 - fraction, 1e-9))
        blocks.append(np.where(shares <= fraction, below, above))
    return edges, np.ma.masked_invalid(np.concatenate(blocks))


def _selection_colorbar(figure: Figure, mesh: QuadMesh, panels: Sequence[Axes], shrink: float = 1.0) -> None:
    bar = figure.colorbar(mesh, ax=list(panels), aspect=30, pad=0.015, fraction=0.05, shrink=shrink, anchor=(0.0, 1.0))
    bar.set_ticks([0, 0.5, 1], labels=["never", "fair\nshare", "every\nstep"])
    bar.ax.tick_params(length=0)
    lowest, _, highest = bar.ax.get_yticklabels()
    lowest.set_verticalalignment("bottom")
    highest.set_verticalalignment("top")
    bar.outline.set_visible(False)


# What the history says


def _values(points: Sequence[Mapping[str, float]], name: str) -> Array:
    """A metric over time; NaN where it is missing."""
    return np.asarray([point.get(name, np.nan) for point in points], dtype=np.float64)


def _of_parameters(history: SelectionHistory, name: str) -> Array:
    """A metric of every parameter over time, (steps, parameters)."""
    return np.stack([_values(point, name) for point in history.parameters])


def _mean(values: Array) -> float:
    """The mean of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _fraction(points: Sequence[Mapping[str, float]]) -> float:
    """Share of the slices that a step selects, from steps that selected any."""
    values = _values(points, "selected_fraction")
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.median(values)) if len(values) else 0.0


def _rank_share(infos: Sequence[ParameterInfo]) -> float:
    """The rank as a share of the shorter axis, mean over the matrices in which it is low."""
    low = [info for info in infos if info.rank < info.slices]
    return sum(info.matrices * info.rank / info.slices for info in low) / max(1, sum(info.matrices for info in low))


def _literal(name: str) -> str:
    """Escape a name for matplotlib: a dollar sign begins a formula, and legends leave out names that begin with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


# Kinds of matrices


class _Family(NamedTuple):
    """Parameters with one role in the layers of a model, like all query projections.

    Attributes:
        title: Their common name, without what all parameters of the model have in common.
        members: Their positions in the history, in the order of the layers.
        labels: Number of the layer of each, or its name if they have no role in common.
        depths: The layer of each; None without layers.
    """

    title: str
    members: list[int]
    labels: list[str]
    depths: Sequence[int | None]


def _families(infos: Sequence[ParameterInfo]) -> list[_Family]:
    """Sort parameters by their role in a layer; those that occur once come last, together."""
    names = _name_parts(infos)
    roles = group_by(range(len(names)), lambda m: tuple("*" if _is_number(part) else part for part in names[m]))
    repeated = {role: members for role, members in roles.items() if len(members) > 1}
    start = _common_length(list(repeated))
    families = []
    for role, members in repeated.items():
        numbers = {m: [int(part) for part in names[m] if _is_number(part)] for m in members}
        varying = [place for place, values in enumerate(zip(*numbers.values(), strict=True)) if len(set(values)) > 1]
        members = sorted(members, key=numbers.__getitem__)
        labels = [".".join(str(numbers[m][place]) for place in varying) for m in members]
        title = ".".join(role if role[start:] == ("*",) else role[start:])
        families.append(_Family(title, members, labels, [numbers[m][varying[0]] for m in members]))
    singles = [members[0] for members in roles.values() if len(members) == 1]
    start = _common_length(names)
    titles = [".".join(names[m][start:]) for m in singles]
    if len(singles) == 1:
        return [*families, _Family(titles[0], singles, [""], [None])]
    for first in range(0, len(singles), _MAX_SINGLES):
        members, labels = singles[first : first + _MAX_SINGLES], titles[first : first + _MAX_SINGLES]
        families.append(_Family("other matrices" if repeated else "", members, labels, [None] * len(members)))
    return families


def _is_number(part: str) -> bool:
    """Whether a part of a name is the number of a layer, or an expert; not one as "01", beside which there may be 1."""
    return part.isdecimal() and str(int(part)) == part


def _name_parts(infos: Sequence[ParameterInfo]) -> list[tuple[str, ...]]:
    """The names, ``weight`` left out where that is unambiguous, the group in front where names need it."""
    names = [tuple(info.name.split(".")) for info in infos]
    if len(set(names)) < len(names):
        names = [(info.group, *parts) for info, parts in zip(infos, names, strict=True)]
    shorter = [parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts for parts in names]
    return shorter if len(set(shorter)) == len(names) else names


def _common_length(names: Sequence[tuple[str, ...]]) -> int:
    """How many parts all names begin with, at least one part of each left out."""
    shortest = min(map(len, names), default=1)
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*(each[: shortest - 1] for each in names), strict=True))
    return len(list(common))
