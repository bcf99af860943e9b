"""The tests in ``tests/device``, and those of the fused kernels, on the device, a row for each test function."""

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
"""Time limit of a test."""

TESTS: Final = ("tests/device", "tests/kernels/test_fused.py")

WORKERS: Final = {"cpu": 2, "cuda": 6}
"""Processes that run tests side by side."""


def run_tests(options: Options, *, tests: Sequence[str] = TESTS) -> Iterator[Row]:
    """Yield a row for each test function, as soon as all its tests are done, and for each file that has none.

    Args:
        options: Of the section.
        tests: Files and folders.
    """
    workers = WORKERS[options.device]
    arguments = [
        *tests,
        f"--device={options.device}",
        f"--numprocesses={workers}",
        "--dist=worksteal",  # loadfile would repeat a test that ends its process again and again
        # A process that waits for a GPU cannot be interrupted; this method ends it, and only its present test fails.
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
    is_explained = code == pytest.ExitCode.OK or (code == pytest.ExitCode.TESTS_FAILED and not all_ok)
    if not is_explained:
        yield {"what": "pytest", "ok": False, "found": f"ended with code {code}; see log.txt"}


class RowPerFunction:
    """A pytest plugin that writes a row, as a line of JSON, when all tests of a function are done.

    Args:
        rows: File to write to.
    """

    def __init__(self, rows: TextIO) -> None:
        self._rows = rows
        self._left: Counter[str] = Counter()
        self._outcomes: dict[str, dict[str, str]] = {}
        self._seconds: Counter[str] = Counter()
        self._errors: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Count the tests of each function: all workers collect the same, replacements of crashed ones too."""
        self._left = self._left or Counter(map(function_of, ids))

    def pytest_collectreport(self, report: Any) -> None:
        """Write a row for a file that cannot be imported or skips itself."""
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
        """Record the outcome of a test's setup, call or teardown."""
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
        if report.when not in ("setup", "call"):  # teardown, or the report of a crashed worker
            self._left[function] -= 1
            if not self._left[function]:
                self._write(function)

    def pytest_sessionfinish(self) -> None:
        """Write rows for functions whose tests were not all run."""
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
    """Return the name of a test's function in the report: ``"update: small matrices"``."""
    path, name = test.split("[")[0].split("::", 1)
    return f"{name_of(path)}: {name_of(name)}"


def name_of(path: str) -> str:
    """Return the name of a file or a function in the report: ``"small matrices"``."""
    return Path(path).stem.removeprefix("test_").replace("_", " ")


def error_of(raised: Any) -> str:
    """Return the line that names the error: of the test, of its import, or of a child process."""
    crash = getattr(raised, "reprcrash", None)
    lines = str(raised if crash is None else crash.message).strip().splitlines() or [""]
    while_importing = [line.removeprefix("E").strip() for line in lines if line.startswith("E   ")]
    if while_importing:
        return while_importing[-1][:300]
    child_errors = [line for line in lines[1:] if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return (child_errors[-1] if "-- Process" in "".join(lines) and child_errors else lines[0])[:300]


if __name__ == "__main__":
    with open(int(sys.argv[1]), "w") as rows:
        sys.exit(pytest.main(sys.argv[2:], plugins=[RowPerFunction(rows)]))
