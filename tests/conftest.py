"""The option --device, for the tests in ``device/``, and a table in pytest's summary.

The tests of the frameworks add to the table: how exactly each resumes under each layout.
"""

import gc
import os
from typing import Any

import pytest

HEADER = ("framework", "layout", "ranks", "torch.optim.AdamW resumes", "Dion2, Dion3 and Dion resume")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device here: pytest takes options from the outermost conftest.py only."""
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="for tests/device (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there; allow deterministic matrix products on it.

    On a CPU let Triton's interpreter run its kernels: Triton asks when it is first imported, be it by torch.
    """
    if config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no GPU here")
        # cuBLAS reads it at its first use; without it torch refuses products in deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what was imported: the frameworks call it in every run.

    Optimizers that were made before are not found by routing/late_parameters.py.
    """
    gc.freeze()


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
