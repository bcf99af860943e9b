"""The table that these tests add to pytest's summary: how exactly each framework resumes under each layout."""

from collections.abc import Iterator
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

HEADER = ("framework", "layout", "ranks", "torch.optim.AdamW resumes", "Dion2 resumes")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a row for every test that recorded one, wherever it ran."""
    reports = [report for each in ("passed", "failed") for report in terminalreporter.getreports(each)]
    properties = [each for report in reports for each in getattr(report, "user_properties", ())]
    rows = sorted({tuple(_row(value)) for name, value in properties if name == "resume"})
    if not rows:
        return
    table = [HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    terminalreporter.section("train, save, kill, resume in a new process, compare with an uninterrupted run")
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())


def _row(value: list[Any]) -> list[str]:
    framework, layout, ranks, *differences = value
    return [framework, layout, str(ranks), *("bit for bit" if each == 0 else f"to {each:.0e}" for each in differences)]


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test() -> Iterator[None]:
    """All Accelerators of a process share their state, the Trainer's too, and with it how far its batches are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
