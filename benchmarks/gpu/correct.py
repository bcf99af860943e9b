"""Whether the package does on the device what its tests say: ``tests/device``, a row for each test function."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import pytest

from benchmarks.gpu.section import Options, Row

SECONDS: Final = 90
"""For one test."""

WORKERS: Final = {"cpu": 2, "cuda": 6}
"""Processes that run tests side by side."""


def run_tests(options: Options, *, tests: Sequence[str] = ("tests/device",)) -> Iterator[Row]:
    """Yield a row for each test function, as soon as all its tests are through, and for each file without any.

    Args:
        options: Of the section.
        tests: Files and folders.
    """
    workers = WORKERS[options.device]
    arguments = [
        *tests,
        f"--device={options.device}",
        f"--numprocesses={workers}",
        "--dist=worksteal",  # loadfile runs a test that ends its process again and again
        # A process that waits for a GPU cannot be interrupted. It is ended, and only the test that it ran fails.
        f"--timeout={SECONDS}",
        "--timeout-method=thread",
        f"--basetemp={options.folder / 'pytest'}",
        "-pno:cacheprovider",
    ]
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.correct", str(writer), *arguments],
        pass_fds=[writer],
        env=dict(os.environ) | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))},
    )
    os.close(writer)
    all_ok = True
    with open(reader) as lines:
        for row in map(json.loads, lines):
            all_ok &= row["ok"]
            yield row
    code = process.wait()
    said = code == pytest.ExitCode.OK or (code == pytest.ExitCode.TESTS_FAILED and not all_ok)
    if not said:  # by a row
        yield {"what": "pytest", "ok": False, "found": f"ended with code {code}; see log.txt"}


class RowOfEachFunction:
    """A plugin of pytest that writes a row, as a line of JSON, when all tests of a function are through.

    Args:
        rows: What it writes to.
    """

    def __init__(self, rows: TextIO) -> None:
        self._rows = rows
        self._left: Counter[str] = Counter()
        self._outcomes: dict[str, dict[str, str]] = {}
        self._seconds: Counter[str] = Counter()
        self._errors: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Learn what will be run: every worker collects the same, and so does one that replaces another."""
        self._left = self._left or Counter(map(function_of, ids))

    def pytest_collectreport(self, report: Any) -> None:
        """Write a row of a file whose tests cannot be had: it raises an error, or skips itself."""
        if report.passed:
            return
        file = name_of(report.nodeid)
        self._outcomes[file] = {report.nodeid: report.outcome}
        if report.failed:
            self._errors[file] = error_of(report.longrepr)
        else:
            self._reasons[file] = report.longrepr[-1]
        self._write(file)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take note of what became of a test's setup, call or teardown."""
        function = function_of(report.nodeid)
        outcomes = self._outcomes.setdefault(function, {})
        if report.when == "call" or not report.passed:
            outcomes[report.nodeid] = report.outcome
        self._seconds[function] += report.duration
        if report.failed:
            test = report.nodeid.split("::")[-1]
            self._errors.setdefault(function, f"{test}: {error_of(report.longrepr)}")
        elif report.skipped:
            self._reasons.setdefault(function, report.longrepr[-1])
        if report.when not in ("setup", "call"):  # where a worker has died, it is neither teardown
            self._left[function] -= 1
            if not self._left[function]:
                self._write(function)

    def pytest_sessionfinish(self) -> None:
        """Write rows of what was left."""
        for function, left in self._left.items():
            if left:
                self._errors.setdefault(function, f"{left} were not run")
                self._write(function)

    def _write(self, function: str) -> None:
        outcomes = Counter(self._outcomes.get(function, {}).values())
        row = {
            "what": function,
            "ok": function not in self._errors,
            **{outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
            "seconds": round(self._seconds[function], 1),
            "found": self._errors.get(function, self._reasons.get(function)),
        }
        print(json.dumps(row), file=self._rows, flush=True)


def function_of(test: str) -> str:
    """Return what the report calls a test's function: ``"update: small matrices"``."""
    path, name = test.split("[")[0].split("::", 1)
    return f"{name_of(path)}: {name_of(name)}"


def name_of(path: str) -> str:
    """Return what the report calls a file or a function: ``"small matrices"``."""
    return Path(path).stem.removeprefix("test_").replace("_", " ")


def error_of(raised: Any) -> str:
    """Return the line that says what was raised, in the test, where it was imported, or in a process of its own."""
    crash = getattr(raised, "reprcrash", None)
    lines = str(raised if crash is None else crash.message).strip().splitlines() or [""]
    while_importing = [line.removeprefix("E").strip() for line in lines if line.startswith("E   ")]
    if while_importing:
        return while_importing[-1][:300]
    of_child = [line for line in lines[1:] if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return (of_child[-1] if "-- Process" in "".join(lines) and of_child else lines[0])[:300]


if __name__ == "__main__":
    with open(int(sys.argv[1]), "w") as rows:
        sys.exit(pytest.main(sys.argv[2:], plugins=[RowOfEachFunction(rows)]))
