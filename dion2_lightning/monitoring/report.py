"""The command ``dion2-report``: of a file of selection statistics one HTML page that needs nothing else.

::

    dion2-report statistics.json -o report.html --title "MiniLM, fraction 1/4"
"""

import argparse
import base64
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final, NamedTuple

from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.metrics import FAR_FROM_ORTHONORMAL, MEANINGS, Kind

HEALTHY, LOOK, UNKNOWN = "healthy", "look", "no verdict"

CAPTIONS: Final[dict[str, str]] = {
    "overview": "The four panels that tell most. The heatmap shows the kind of matrix that is selected least evenly.",
    "heatmap": (
        "Slices of every matrix against steps. White is the fair share, orange more, purple less. Rows that stay "
        "purple are not trained; rows that stay orange are trained all the time."
    ),
    "coverage": "Healthy is a curve that comes near 100% and stays there.",
    "staleness": "How long slices wait. A longest wait on the dashed diagonal is a slice that was never selected.",
    "turnover": "At 0% the same slices win every step; at the dashed line selections are as good as random.",
    "captured_mass": (
        "On the dashed line any selection would do as well. Near 100% the slices left out have next to no momentum."
    ),
    "counts": "A flat line shares the work evenly. Where a line lies at 0%, slices have never been trained.",
}
"""What the pictures of plots.py show, by their names."""

_FORMATS: Final[dict[str, str]] = {
    "selected_fraction": "{:.1%}",
    "coverage": "{:.1%}",
    "staleness_mean": "{:.1f} steps",
    "staleness_max": "{:.0f} steps",
    "turnover": "{:.1%}",
    "captured_mass": "{:.1%}",
    "imbalance": "{:.2f}",
    "update_rms": "{:.2e}",
    "orthogonality_error": "{:.2f}",
}


_TEXTS: Final = ("group", "parameter", "which are")
"""Columns of the tables that hold no numbers."""

_NUMBER: Final = ' class="number"'


@dataclass(frozen=True)
class Verdict:
    """Whether a figure looks healthy.

    Attributes:
        state: ``"healthy"``, ``"look"`` (worth a look) or ``"no verdict"``.
        reason: Why, with the threshold.
    """

    state: str
    reason: str


ORTHONORMAL = 0.35
"""Singular values within [0.85, 1.15] give at most 0.32."""


def verdicts(history: SelectionHistory) -> dict[str, Verdict]:
    """Judge the figures of the last step by the reading guide of :class:`~dion2_lightning.Figures`.

    Args:
        history: With one point at least.

    Returns:
        A verdict for every figure of the last step.
    """
    part = _part(history)
    return {name: _verdict(name, value, part, history) for name, value in history.overall[-1].items()}


class _Part(NamedTuple):
    """What figures of some parameters are judged by.

    Attributes:
        fraction: Share of the slices that a step selects, in those that had a gradient in the last one; 0 if none had.
        steps: Since the first of the parameters came.
        shortest: Since the last of them came.
    """

    fraction: float
    steps: int
    shortest: int


def _part(history: SelectionHistory, members: Sequence[int] | None = None) -> _Part:
    """Of some parameters, by their positions; of all where none are given."""
    members = range(len(history.kinds)) if members is None else members
    selected = slices = 0.0
    for member in members:
        kind, figures = history.kinds[member], history.parameters[-1][member]
        if "turnover" in figures:
            slices += kind.matrices * kind.slices
            selected += kind.matrices * kind.slices * figures["selected_fraction"]
    steps = [_steps_of(history, member) for member in members]
    return _Part(selected / slices if slices else 0.0, max(steps, default=0), min(steps, default=0))


def _steps_of(history: SelectionHistory, member: int) -> int:
    """Steps that a parameter has had for certain: all, or since the first point that knows of it."""
    start = next((point for point, each in enumerate(history.parameters) if each[member]), 0)
    return history.steps[-1] - history.steps[start] + 1 if start else history.steps[-1]


def _slices(history: SelectionHistory) -> int:
    """Of all matrices."""
    return sum(kind.matrices * kind.slices for kind in history.kinds)


def _verdict(name: str, value: float, part: _Part, history: SelectionHistory) -> Verdict:
    fraction, steps = part.fraction, part.steps
    if not math.isfinite(value):
        return Verdict(LOOK, "not a finite number: weights are damaged, go back to a checkpoint")
    if name == "selected_fraction":
        return Verdict(UNKNOWN, "what fraction asks for, a little more for small matrices: k is rounded up")
    if name == "update_rms":
        return Verdict(UNKNOWN, "follows the learning rate; about 0.2 lr with match_rms_adamw")
    if name == "orthogonality_error":
        text = f"healthy under {ORTHONORMAL:g}, worth a look over {FAR_FROM_ORTHONORMAL:g}"
        between = UNKNOWN if value > ORTHONORMAL else HEALTHY
        return Verdict(LOOK if value > FAR_FROM_ORTHONORMAL else between, text)
    if fraction == 0:
        return Verdict(UNKNOWN, "the last step selected nothing: it had no gradients")
    if fraction == 1:
        return Verdict(HEALTHY, "every step selects all slices")
    turns = 1 / fraction - 1
    needed = math.ceil(4 / fraction)
    if name == "captured_mass":
        limit = 1 - 0.1 * (1 - fraction)
        text = (
            f"over {limit:.1%} the slices left out have under a tenth of their share of the momentum; {fraction:.0%} "
            "is that of slices all alike"
        )
        return Verdict(LOOK if value > limit else HEALTHY, text)
    if part.shortest < needed:
        which = "" if part.shortest == steps else " with every parameter, of which some came late"
        return Verdict(UNKNOWN, f"too early: judged after 4 / fraction = {needed} steps{which}")
    match name:
        case "coverage":
            if history.window < needed:
                text = f"a window of {history.window} steps is too short: 4 / fraction = {needed} are needed"
                return Verdict(UNKNOWN, text)
            return Verdict(HEALTHY if value >= 0.95 else LOOK, "healthy from 95%; under it some slices are left out")
        case "staleness_mean":
            limit = 3 * (turns + 1)
            text = f"healthy up to 3 / fraction = {limit:.3g} steps; {turns:.3g} where slices take turns"
            return Verdict(LOOK if value > limit else HEALTHY, text)
        case "staleness_max":
            # Drawn by chance, one of all the slices waits longer than this in one run of a thousand.
            by_chance = math.log(1000 * _slices(history)) / -math.log1p(-fraction)
            if steps <= by_chance:
                return Verdict(UNKNOWN, f"too early: of so many slices one may wait {by_chance:.0f} steps by chance")
            limit, rule = max(
                (by_chance, "of so many slices one may wait as long by chance"),
                min((steps / 2, "half of all"), (100 / fraction, "100 / fraction")),
            )
            text = f"healthy up to {limit:.0f} steps: {rule}; {steps} is a slice that was never selected"
            return Verdict(LOOK if value > limit else HEALTHY, text)
        case "turnover":
            limit = 0.1 * (1 - fraction)
            text = f"healthy from {limit:.1%}; random selections have {1 - fraction:.0%}, the same slices every step 0%"
            return Verdict(HEALTHY if value >= limit else LOOK, text)
        case "imbalance":
            text = "healthy up to 0.5; over it a minority of the slices gets most of the steps"
            return Verdict(LOOK if value > 0.5 else HEALTHY, text)
    return Verdict(UNKNOWN, "")


def render_report(
    history: SelectionHistory, *, title: str = "What Dion2 selected", pictures: Sequence[Path] | None = None
) -> str:
    """Make the page.

    Args:
        history: What to report.
        title: Heading of the page (default: ``"What Dion2 selected"``).
        pictures: What ``plots.save_pictures`` returned for this history (default: None, pictures
            are drawn, which takes a second or two).

    Returns:
        HTML that refers to no other file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The history has no figures.
    """
    if pictures is None:
        from dion2_lightning.monitoring.plots import draw_pictures  # needs matplotlib

        images = draw_pictures(history)
    else:
        images = {path.stem: path.read_bytes() for path in pictures}
    names = [
        name for name in MEANINGS if any(name in point for point in (history.overall[-1], *history.parameters[-1]))
    ]
    sections = [
        f"<h1>{escape(title)}</h1>",
        _what_was_trained(history),
        "<h2>Is every part trained?</h2>",
        _headline(history),
        "<h2>Pictures</h2>",
        '<div class="pictures">',
        *(_picture(name, image) for name, image in images.items()),
        "</div>",
        "<h2>Figures by group</h2>",
        _table(history, _group_rows(history), ("group", "parameters"), names),
        "<h2>Figures by parameter</h2>",
        '<p class="note">At the last step with figures; times in steps. Click a heading to sort.</p>',
        _table(history, _parameter_rows(history), ("parameter", "group", "matrices", "slices", "which are"), names),
        _meanings(names),
    ]
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _picture(name: str, png: bytes) -> str:
    caption = escape(CAPTIONS[name])
    image = f'<img alt="{caption}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f'<figure id="{name}">{image}<figcaption>{caption}</figcaption></figure>'


def _what_was_trained(history: SelectionHistory) -> str:
    kinds = history.kinds
    matrices, slices = sum(kind.matrices for kind in kinds), _slices(history)
    groups = list(dict.fromkeys(kind.group for kind in kinds))
    selected = _part(history).fraction
    facts = {
        "steps": f"{history.steps[-1]:,}",
        "parameters": f"{len(kinds):,}",
        "matrices": f"{matrices:,}",
        "slices": f"{slices:,}",
        "selected a step": f"{selected:.1%}",
        "groups" if len(groups) > 1 else "group": ", ".join(groups),
    }
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return (
        f'<dl class="facts">{items}</dl>\n<p class="note">Figures of {len(history)} steps, the last of them step '
        f"{history.steps[-1]}. Parameters that AdamW trains are not here: they are trained whole in every step.</p>"
    )


def _headline(history: SelectionHistory) -> str:
    figures = history.overall[-1]
    rows = []
    for name, verdict in verdicts(history).items():
        state = verdict.state.replace(" ", "-")
        worst = _furthest(history, name)
        rows.append(
            f'<tr><th scope="row">{_words(name)}<small>{escape(_meaning(name, history.window))}</small></th>'
            f'<td class="number">{_show(name, figures[name])}</td>'
            f'<td><span class="badge {state}">{verdict.state}</span><small>{escape(verdict.reason)}</small></td>'
            f"<td>{worst}</td></tr>"
        )
    return (
        f'<p class="summary">{_summary(history)}</p>\n<div class="wide"><table class="headline"><thead><tr>'
        f'<th>figure</th><th class="number">at step {history.steps[-1]}</th><th>verdict</th>'
        f"<th>furthest from healthy</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _summary(history: SelectionHistory) -> str:
    looks = [_words(name) for name, verdict in verdicts(history).items() if verdict.state == LOOK]
    named = [name for name in history.overall[-1] if _worth_a_look(history, name)]
    text = f"Worth a look: {', '.join(looks)}." if looks else "Nothing stands out over all matrices."
    if named and len(history.kinds) > 1:
        text += f" Single parameters stand out in {', '.join(map(_words, named))}; they are marked in the table below."
    return text


def _furthest(history: SelectionHistory, name: str) -> str:
    """The parameter to look at first."""
    if name in ("selected_fraction", "update_rms") or len(history.kinds) == 1:
        return ""
    known = [
        (point[name], kind)
        for point, kind in zip(history.parameters[-1], history.kinds, strict=True)
        if math.isfinite(point.get(name, math.nan))
    ]
    if not known:
        return ""
    pick = min if name in ("coverage", "turnover") else max
    value, kind = pick(known, key=lambda each: each[0])
    count = len(_worth_a_look(history, name))
    marked = f"<small>{count} of {len(history.kinds)} parameters worth a look</small>" if count else ""
    return f"{_show(name, value)}<small>{_breakable(kind.name)}</small>{marked}"


def _worth_a_look(history: SelectionHistory, name: str) -> list[int]:
    """The parameters that would be worth a look if they were all there is."""
    points = enumerate(history.parameters[-1])
    return [
        place for place, point in points if name in point and _is_marked(name, point, _part(history, [place]), history)
    ]


def _is_marked(name: str, figures: Mapping[str, float], part: _Part, history: SelectionHistory) -> bool:
    return _verdict(name, figures[name], part, history).state == LOOK


def _breakable(name: str) -> str:
    """A dotted name that a narrow column may break at its dots."""
    return escape(name).replace(".", ".<wbr>")


class _Row(NamedTuple):
    """Of a table: what comes before the figures, these, and what they are judged by."""

    described: Sequence[str | int]
    figures: Mapping[str, float]
    part: _Part


def _group_rows(history: SelectionHistory) -> list[_Row]:
    rows = []
    for group, figures in history.groups[-1].items():
        members = [place for place, kind in enumerate(history.kinds) if kind.group == group]
        rows.append(_Row([group, len(members)], figures, _part(history, members)))
    if len(rows) > 1:
        rows.append(_Row(["all", len(history.kinds)], history.overall[-1], _part(history)))
    return rows


def _parameter_rows(history: SelectionHistory) -> list[_Row]:
    points = zip(history.kinds, history.parameters[-1], strict=True)
    return [_Row(_described(kind), point, _part(history, [place])) for place, (kind, point) in enumerate(points)]


def _described(kind: Kind) -> list[str | int]:
    return [kind.name, kind.group, kind.matrices, kind.slices, ("outputs", "inputs")[kind.axis]]


def _table(history: SelectionHistory, rows: Sequence[_Row], labels: Sequence[str], names: Sequence[str]) -> str:
    """A table whose headings sort it; cells carry the plain number to sort by."""
    headings = "".join(
        f'<th scope="col"{"" if label in _TEXTS else _NUMBER}><button type="button">{escape(label)}</button></th>'
        for label in (*labels, *(_words(name) for name in names))
    )
    body = []
    for described, figures, part in rows:
        cells = [
            f'<td class="number" data-value="{value}">{value:,}</td>'
            if isinstance(value, int)
            else f"<td>{_breakable(value)}</td>"
            for value in described
        ]
        for name in names:
            value = figures.get(name, math.nan)
            number = f' data-value="{value!r}"' if math.isfinite(value) else ""
            marked = " look" if name in figures and _is_marked(name, figures, part, history) else ""
            text = _show(name, value).removesuffix(" steps") if name in figures else "-"
            cells.append(f'<td class="number{marked}"{number}>{text}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{headings}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def _meanings(names: Sequence[str]) -> str:
    items = "".join(f"<dt>{_words(name)}</dt><dd>{escape(MEANINGS[name])}</dd>" for name in names)
    return (
        '<h2>What the figures mean</h2>\n<p class="note">A slice is a row or a column of a matrix: Dion2 selects those '
        f"with the largest momentum, and updates only them.</p>\n<dl>{items}</dl>"
    )


def _words(name: str) -> str:
    return name.replace("_", " ").replace("rms", "RMS")


def _meaning(name: str, window: int) -> str:
    return MEANINGS[name].replace("the last steps of the window", f"the last {window} steps")


def _show(name: str, value: float) -> str:
    return _FORMATS[name].format(value) if math.isfinite(value) else "not finite"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Of the command line (default: those of the process).

    Returns:
        0, or 1 where the file cannot be read, drawn or written; wrong arguments exit with 2.
    """
    parser = argparse.ArgumentParser(
        prog="dion2-report",
        description="Turn a file of selection statistics into one HTML page with pictures, which opens from disk.",
        epilog="Such a file is written by SelectionMonitor(save_to=...), or by statistics.history.save(path).",
    )
    parser.add_argument("statistics", type=Path, help="JSON file of selection statistics")
    parser.add_argument(
        "-o", "--output", type=Path, help="page to write (default: beside the statistics, with the ending .html)"
    )
    parser.add_argument("--title", default="What Dion2 selected", help="heading of the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    output: Path = options.output or options.statistics.with_suffix(".html")
    try:
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; name a file in it: -o {output / 'report.html'}")
        if not output.parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
        if output.exists() and output.samefile(options.statistics):
            raise ValueError(f"--output {output} would overwrite the statistics; choose another name with -o")
        page = render_report(SelectionHistory.load(options.statistics), title=options.title)
        output.write_text(page, encoding="utf-8")
    except FileNotFoundError as error:
        return _fail(f"there is no file {error.filename}; SelectionMonitor(save_to=...) writes one")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}")
    except (ImportError, ValueError) as error:
        return _fail(str(error))
    print(output)
    return 0


def _fail(message: str) -> int:
    print(f"dion2-report: error: {message}", file=sys.stderr)
    return 1


_CSS: Final = """
:root { color-scheme: light dark; --ink: #22303c; --quiet: #5d6b78; --line: #dde3e8; --page: #fff; --card: #f5f7f9;
  --good: #00674a; --bad: #a34700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ed; --quiet: #9fadb9; --line: #37434d; --page: #161b20; --card: #20272e; --good: #4fcfa5;
    --bad: #ff9d57; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
small, .note, figcaption { color: var(--quiet); font-size: .85rem; }
small { display: block; font-weight: 400; overflow-wrap: anywhere; }
.summary { font-size: 1.05rem; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .5rem .9rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .7rem; text-align: left; vertical-align: top; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.headline td.number { font-size: 1.1rem; }
.sortable { font-size: .82rem; }
.sortable td, .sortable th { padding: .35rem .4rem; }
.sortable td:first-child { min-width: 13rem; }
.headline { min-width: 44rem; }
.sortable button { all: unset; cursor: pointer; }
.sortable button:focus-visible { outline: 2px solid var(--quiet); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.number { white-space: nowrap; }
.badge { border: 1px solid; border-radius: 1rem; padding: 0 .6rem; font-size: .85rem; white-space: nowrap; }
.badge.healthy { color: var(--good); } .badge.look, td.look { color: var(--bad); font-weight: 600; }
.badge.no-verdict { color: var(--quiet); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; break-inside: avoid; }
#overview, #heatmap, #staleness { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem; }
dl:not(.facts) dt { font-weight: 600; } dl:not(.facts) dd { margin: 0 0 .5rem; }
@media print {
  :root { color-scheme: light; --ink: #000; --quiet: #444; --line: #bbb; --page: #fff; --card: #fff; --good: #00674a;
    --bad: #a34700; }
  main { padding: 0; max-width: none; }
  .sortable { font-size: .6rem; }
  .sortable td:first-child { min-width: 0; }
  tr { break-inside: avoid; }
  .wide { overflow: visible; } }
"""

_SCRIPT: Final = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", event => {
    const heading = event.target.closest("th");
    if (!heading) return;
    const ascending = heading.ariaSort !== "ascending", column = heading.cellIndex, body = table.tBodies[0];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.ariaSort = ascending ? "ascending" : "descending";
    const is_number = row => "value" in row.cells[column].dataset;
    const compare = (a, b) => {
      if (is_number(a) && is_number(b)) return a.cells[column].dataset.value - b.cells[column].dataset.value;
      if (is_number(a) !== is_number(b)) return is_number(a) ? 1 : -1;
      return a.cells[column].textContent.localeCompare(b.cells[column].textContent, undefined, {numeric: true});
    };
    body.append(...Array.from(body.rows).sort((a, b) => ascending ? compare(a, b) : compare(b, a)));
  });
}
"""

if __name__ == "__main__":
    sys.exit(main())
