"""The command ``dion2-report``: turns a file of selection statistics into one HTML page that needs nothing else.

::

    dion2-report statistics.json -o report.html
"""

import argparse
import base64
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final, NamedTuple

from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.metrics import MAX_ORTHOGONALITY_ERROR, MEANINGS

HEALTHY, LOOK, UNKNOWN = "healthy", "look", "no verdict"

CAPTIONS: Final[dict[str, str]] = {
    "overview": (
        "Where and when slices were selected, in the kind of matrix that is selected least evenly. How evenly the work "
        "is shared: a flat line is even, 0% was never trained. Coverage: healthy is a curve that comes near 100% and "
        "stays there. Captured mass: on the dashed line any selection would do as well; near 100% the slices left out "
        "have next to no momentum."
    ),
    "heatmap": (
        "Slices of every matrix against steps. White is the fair share, orange more, purple less. Rows that stay "
        "purple are not trained; rows that stay orange are trained all the time."
    ),
    "staleness": (
        "How long slices wait; a longest wait on the dashed diagonal is a slice that was never selected. Turnover: at "
        "0% the same slices win every step; at the dashed line selections are as good as random."
    ),
    "subspaces": (
        "Updates of low rank. Captured energy: what the update takes of the momentum; the rest waits there. On the "
        "dashed line any directions would hold as much; near 100% the momentum has about the rank of the update. "
        "Subspace turn: at 0% the directions stay, at the dashed line they are as good as random. Rank use: at 100% "
        "all directions hold as much; near 0% a few hold nearly everything, and a lower rank would take nearly as much."
    ),
    "updates": (
        "How large updates are, without weight decay: it follows the learning rate. Where neurons are normalized, the "
        "spread of their variances: what normalization evens out. Where it was measured, how far updates are from "
        "orthonormal."
    ),
}
"""What the pictures of plots.py show, by their names."""

_FORMATS: Final[dict[str, str]] = {
    **dict.fromkeys(("selected_fraction", "coverage", "turnover", "captured_mass"), "{:.1%}"),
    **dict.fromkeys(("captured_energy", "subspace_turn", "rank_use"), "{:.1%}"),
    **dict.fromkeys(("imbalance", "variance_spread", "orthogonality_error"), "{:.2f}"),
    "staleness_mean": "{:.1f} steps",
    "staleness_max": "{:.0f} steps",
    "update_rms": "{:.2e}",
}


_WITHOUT_THRESHOLD: Final[dict[str, str]] = {
    "selected_fraction": "what the settings ask for; a little more for small matrices, because k is rounded up",
    "captured_energy": "what is left waits in the momentum; if much is, a higher rank_fraction takes more",
    "subspace_turn": "0% where the directions stay, near 100% where every step takes others",
    "rank_use": "if it is low, a lower rank_fraction would capture nearly as much",
    "update_rms": "follows the learning rate",
    "variance_spread": "what the normalization of neurons evens out",
}
"""What to say of metrics that have no healthy range."""


class Verdict(NamedTuple):
    """Whether a metric looks healthy, and why, with the threshold."""

    state: str  # HEALTHY, LOOK (worth a look) or UNKNOWN
    reason: str


def verdicts(history: SelectionHistory) -> dict[str, Verdict]:
    """Judge every metric of the last step, over all matrices; docs/statistics.md says how to read them."""
    selecting = history.part(lambda info: info.selects)
    fraction, steps = _fraction(selecting), _steps_of(selecting)
    return {name: _verdict(name, value, selecting, fraction, steps) for name, value in history.overall[-1].items()}


def _fraction(history: SelectionHistory) -> float:
    """The share of the slices that the last step selected, of the parameters with gradients; 0 if none had any."""
    points = zip(history.infos, history.parameters[-1], strict=True)
    with_gradients = [(info.total_slices, metrics) for info, metrics in points if "turnover" in metrics]
    selected = sum(slices * metrics["selected_fraction"] for slices, metrics in with_gradients)
    return selected / max(1, sum(slices for slices, _ in with_gradients))


def _steps_of(history: SelectionHistory) -> list[int]:
    """How many steps each parameter has been there for."""
    steps = []
    for member in range(len(history.infos)):
        # Of a parameter that came late, only the steps since the first point that knows of it are certain.
        first = next((point for point, each in enumerate(history.parameters) if each[member]), 0)
        steps.append(history.steps[-1] - (history.steps[first] - 1 if first else 0))
    return steps


def _verdict(name: str, value: float, history: SelectionHistory, fraction: float, steps: Sequence[int]) -> Verdict:
    def healthy_if(is_healthy: bool, reason: str) -> Verdict:
        return Verdict(HEALTHY if is_healthy else LOOK, reason)

    if not math.isfinite(value):
        return Verdict(LOOK, "not a finite number: weights are damaged, go back to a checkpoint")
    if name in _WITHOUT_THRESHOLD:
        return Verdict(UNKNOWN, _WITHOUT_THRESHOLD[name])
    if name == "orthogonality_error":
        return healthy_if(value <= MAX_ORTHOGONALITY_ERROR, f"healthy up to {MAX_ORTHOGONALITY_ERROR:g}")
    if fraction == 0:
        return Verdict(UNKNOWN, "the last step selected nothing: it had no gradients")
    if fraction == 1:
        return Verdict(HEALTHY, "every step selects all slices")
    if name == "captured_mass":
        limit = 1 - 0.1 * (1 - fraction)
        left_out = f"over {limit:.1%} the slices left out have under a tenth of their share of the momentum"
        return healthy_if(value <= limit, f"{left_out}; {fraction:.0%} is that of slices all alike")
    needed = math.ceil(4 / fraction)
    longest, shortest = max(steps), min(steps)
    if shortest < needed:
        which = "" if shortest == longest else " with every parameter, of which some came late"
        return Verdict(UNKNOWN, f"too early: judged after 4 / fraction = {needed} steps{which}")
    if name == "coverage" and history.window < needed:
        return Verdict(UNKNOWN, f"a window of {history.window} steps is too short: 4 / fraction = {needed} are needed")
    if name == "coverage":
        return healthy_if(value >= 0.95, "healthy from 95%; under it some slices are left out")
    if name == "staleness_mean":
        limit, turns = 3 / fraction, 1 / fraction - 1
        reason = f"healthy up to 3 / fraction = {limit:.3g} steps; {turns:.3g} where slices take turns"
        return healthy_if(value <= limit, reason)
    if name == "staleness_max":
        # Drawn by chance, one of all the slices waits longer than this in one run of a thousand.
        slices = sum(info.total_slices for info in history.infos)
        by_chance = math.log(1000 * slices) / -math.log1p(-fraction)
        if longest <= by_chance:
            return Verdict(UNKNOWN, f"too early: of so many slices one may wait {by_chance:.0f} steps by chance")
        limit, rule = max(
            (by_chance, "of so many slices one may wait as long by chance"),
            min((longest / 2, "half of all"), (100 / fraction, "100 / fraction")),
        )
        reason = f"healthy up to {limit:.0f} steps: {rule}; {longest} is a slice that was never selected"
        return healthy_if(value <= limit, reason)
    if name == "turnover":
        limit = 0.1 * (1 - fraction)
        random = f"random selections have {1 - fraction:.0%}, the same slices every step 0%"
        return healthy_if(value >= limit, f"healthy from {limit:.1%}; {random}")
    return healthy_if(value <= 0.5, "healthy up to 0.5; over it a minority of the slices gets most of the steps")


def render_report(
    history: SelectionHistory, *, title: str = "What was selected", pictures: Sequence[Path] | None = None
) -> str:
    """Make the page.

    Args:
        history: What to report.
        title: Heading of the page (default: ``"What was selected"``).
        pictures: What ``plots.save_pictures`` returned for this history (default: None, pictures are drawn, which takes
            a second or two).

    Returns:
        HTML that refers to no other file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The history has no metrics.
    """
    if pictures is None:
        from dion2_lightning.monitoring.plots import draw_pictures  # needs matplotlib

        images = draw_pictures(history)
    else:
        images = {path.stem: path.read_bytes() for path in pictures}
    infos, overall, parameters = history.infos, history.overall[-1], history.parameters[-1]
    names = [name for name in MEANINGS if any(name in point for point in (overall, *parameters))]
    counts = Counter(info.group for info in infos)
    by_group = [_row([group, counts[group]], metrics, names) for group, metrics in history.groups[-1].items()]
    if len(by_group) > 1:
        by_group.append(_row(["all", len(infos)], overall, names))
    by_parameter = [
        _row(
            [info.name, info.group, info.matrices, info.slices, ("outputs", "inputs")[info.axis], info.rank or "-"],
            values,
            names,
        )
        for info, values in zip(infos, parameters, strict=True)
    ]
    facts = {
        "steps": f"{history.steps[-1]:,}",
        "parameters": f"{len(infos):,}",
        "matrices": f"{sum(info.matrices for info in infos):,}",
    }
    if any(info.selects for info in infos):
        facts["slices"] = f"{sum(info.total_slices for info in infos if info.selects):,}"
        facts["selected a step"] = f"{_fraction(history):.1%}"
    facts["groups" if len(counts) > 1 else "group"] = ", ".join(counts)
    judged = verdicts(history)
    looks = ", ".join(_words(name) for name, verdict in judged.items() if verdict.state == LOOK)
    page = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(title),
        facts="".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()),
        points=len(history),
        step=history.steps[-1],
        summary=f"Worth a look: {looks}." if looks else "Nothing stands out over all matrices.",
        headline="".join(_headline_row(history, name, *judged[name]) for name in judged),
        pictures="\n".join(_picture(name, image) for name, image in images.items()),
        groups=_table(["group", "parameters"], names, by_group),
        parameters=_table(["parameter", "group", "matrices", "slices", "which are", "rank"], names, by_parameter),
    )


def _headline_row(history: SelectionHistory, name: str, state: str, reason: str) -> str:
    """A metric over all matrices: its meaning, its value, its verdict and the parameter to look at first."""
    meaning = MEANINGS[name].replace("the last steps of the window", f"the last {history.window} steps")
    points = zip((point.get(name, math.nan) for point in history.parameters[-1]), history.infos, strict=True)
    known = [(value, info.name) for value, info in points if math.isfinite(value)]
    worst = ""
    if len(known) > 1 and name not in ("selected_fraction", "update_rms"):
        value, parameter = (min if name in ("coverage", "turnover", "captured_energy", "rank_use") else max)(known)
        worst = f"{_show(name, value)}<small>{_breakable(parameter)}</small>"
    return (
        f'<tr><th scope="row">{_words(name)}<small>{escape(meaning)}</small></th>'
        f'<td class="number">{_show(name, history.overall[-1][name])}</td>'
        f'<td><span class="badge {state.replace(" ", "-")}">{state}</span><small>{escape(reason)}</small></td>'
        f"<td>{worst}</td></tr>"
    )


def _picture(name: str, png: bytes) -> str:
    caption = escape(CAPTIONS[name])
    image = f'<img alt="{caption}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f'<figure id="{name}">{image}<figcaption>{caption}</figcaption></figure>'


def _table(labels: Sequence[str], names: Sequence[str], rows: Sequence[str]) -> str:
    """A table whose headings sort it."""
    headings = [
        f'<th scope="col"{_NUMBER * (label not in _TEXT_COLUMNS)}><button type="button">{label}</button></th>'
        for label in (*labels, *map(_words, names))
    ]
    head, body = "".join(headings), "".join(rows)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


_TEXT_COLUMNS: Final = ("group", "parameter", "which are")
_NUMBER: Final = ' class="number"'


def _row(description: Sequence[str | int], metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """A row of a table; cells carry the plain number to sort by."""
    cells = [
        f'<td class="number" data-value="{value}">{value:,}</td>'
        if isinstance(value, int)
        else f"<td>{_breakable(value)}</td>"
        for value in description
    ]
    for name in names:
        value = metrics.get(name, math.nan)
        number = f' data-value="{value!r}"' if math.isfinite(value) else ""
        text = _show(name, value).removesuffix(" steps") if name in metrics else "-"
        cells.append(f'<td class="number"{number}>{text}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _breakable(name: str) -> str:
    """A dotted name that a narrow column may break at its dots."""
    return escape(name).replace(".", ".<wbr>")


def _words(name: str) -> str:
    return name.replace("_", " ").replace("rms", "RMS")


def _show(name: str, value: float) -> str:
    return _FORMATS[name].format(value) if math.isfinite(value) else "not finite"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 if the file cannot be read, drawn or written. Wrong arguments exit with 2."""
    parser = argparse.ArgumentParser(
        prog="dion2-report",
        description="Turn a history of the selection into one HTML page with pictures, which opens from disk.",
        epilog="Callbacks such as SelectionMonitor(save_to=...) write one; so does tracker.history.save(path).",
    )
    parser.add_argument("history", type=Path, help="JSON file of a history")
    parser.add_argument(
        "-o", "--output", type=Path, help="page to write (default: beside the history, with the ending .html)"
    )
    options = parser.parse_args(arguments)
    output: Path = options.output or options.history.with_suffix(".html")
    try:
        if not output.parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
        if output.exists() and output.samefile(options.history):
            raise ValueError(f"--output {output} would overwrite the history; choose another name with -o")
        page = render_report(SelectionHistory.load(options.history))
        output.write_text(page, encoding="utf-8")
    except FileNotFoundError as error:
        message = f"there is no file {error.filename}; SelectionMonitor(save_to=...) writes one"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    except (ImportError, ValueError) as error:
        message = str(error)
    else:
        print(output)
        return 0
    print(f"dion2-report: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
