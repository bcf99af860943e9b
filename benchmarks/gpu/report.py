"""The report: the lines of a results file as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Row


def write_report(results: Path, report: Path) -> None:
    """Write the report of all complete lines so far; a section may be writing another."""
    lines = [json.loads(line) for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
    report.write_text("\n".join(_report(lines)) + "\n")


def _report(lines: Sequence[Row]) -> list[str]:
    head = lines[0]
    text = ["# The package on a GPU", "", f"`{head['command']}`, commit {head['commit']}, {head['date']}", ""]
    text += _table([{"": name, "found": value} for name, value in head["machine"].items()])
    finished = [line for line in lines if "status" in line]
    overview = ("section", "status", "seconds", "why")
    text += ["", "## Sections", "", *_table([{name: line[name] for name in overview} for line in finished])]
    names = dict.fromkeys(line["section"] for line in lines[1:])
    titles = {line["section"]: line["title"] for line in finished}
    for name in names:
        rows = [line["row"] for line in lines[1:] if line["section"] == name and "row" in line]
        if rows:
            text += ["", f"## {titles.get(name, name)}", "", *_tables(rows)]
    return text


def _tables(rows: Sequence[Row]) -> list[str]:
    """Tables of rows that have the same columns, one after the other."""
    text: list[str] = []
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index].keys() != rows[start].keys():
            text += [*([""] if text else []), *_table(rows[start:index])]
            start = index
    return text


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(rows[0]) if rows else []
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    return [_line(columns), _line(["---"] * len(columns)), *(_line(row) for row in cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
