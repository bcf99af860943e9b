"""One section of the check: what it is given, and how it runs, in a process of its own and within its time.

A section yields rows, plain data. A row with ``"ok": False`` makes it a failed one. Each row is in the results file as
soon as it is there, so a section that fails or is stopped keeps those before.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Final, Literal

from benchmarks.gpu.packages import Packages
from benchmarks.gpu.processes import end, wait_for

Row = dict[str, Any]
Status = Literal["passed", "failed", "stopped", "skipped"]

ENDED: Final = "the check was ended"
"""Why a section was stopped that had time left."""


@dataclass(frozen=True)
class Options:
    """What every section is given.

    Attributes:
        device: "cuda" or "cpu".
        tiny: Whether sizes are such that a CPU does it in seconds: for trying the check, not for measuring.
        seconds: Within which the section has to end.
        results: The file that rows are added to.
        section: Name of the section.
    """

    device: str
    tiny: bool
    seconds: float
    results: str
    section: str

    @property
    def folder(self) -> Path:
        """Folder for what a section leaves behind; emptied when the check begins."""
        return Path(self.results).parent / "work" / self.section


@dataclass(frozen=True)
class Section:
    """One part of the check.

    Attributes:
        name: For the command line.
        title: For the report.
        function: "module:function"; called as ``function(options, **arguments)``, it yields rows.
        minutes: Its time budget.
        arguments: More for the function.
        needs: Packages without which it is skipped.
        cuda_only: Whether it is skipped on a CPU.
        at_least: Seconds without which it is not begun.
    """

    name: str
    title: str
    function: str
    minutes: float
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    cuda_only: bool = False
    at_least: float = 0.0


def run_section(section: Section, options: Options, log: Path, packages: Packages, ending: Event) -> tuple[Status, str]:
    """Run a section in a process of its own; end it, and all that it started, when its time is up.

    Args:
        section: What to run.
        options: What it is given.
        log: File that its output is added to.
        packages: What it may import.
        ending: Set when the section is to be ended.

    Returns:
        How it ended, and why if it did not pass.
    """
    if section.cuda_only and options.device == "cpu":
        return "skipped", "needs a GPU"
    deadline = time.monotonic() + options.seconds
    environment = packages.environment()
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other cost more than tiny sizes do
    missing = packages.what_is_missing(section.needs, environment, ending)
    if ending.is_set():
        return "stopped", ENDED
    if missing:
        return "skipped", missing
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = [section.function, json.dumps(asdict(options)), json.dumps(section.arguments)]
    with log.open("a") as output:
        print(f"\n==== {section.name}", file=output, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.section", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            code = wait_for(process, deadline - time.monotonic(), ending)
        finally:
            end(process)
            shutil.rmtree(options.folder, ignore_errors=True)
    if code is None:
        return "stopped", ENDED if ending.is_set() else f"not through after {options.seconds:.0f} s"
    if code == 0:
        return "passed", ""
    return "failed", "" if code == 1 else f"its process ended with code {code}; see {log.name}"


def add_line(results: str | Path, line: Row) -> None:
    """Add a line of JSON to a file, on the disk when this returns."""
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows_of(function: str, options: Options, arguments: dict[str, Any]) -> Iterator[Row]:
    """Yield a section's rows; an error it raises is its last row."""
    module, name = function.split(":")
    try:
        imported = importlib.import_module(module)
        if "torch" in sys.modules:  # some sections leave it to other processes
            sys.modules["torch"].manual_seed(0)
        yield from getattr(imported, name)(options, **arguments)
    except Exception as error:
        traceback.print_exc()
        yield {"what": "error", "ok": False, "found": f"{type(error).__name__}: {error}"[:500]}


def main(function: str, options: str, arguments: str) -> int:
    """Run one section in this process; return 1 if a row of it says that something is wrong."""
    given = Options(**json.loads(options))
    all_ok = True
    for row in rows_of(function, given, json.loads(arguments)):
        add_line(given.results, {"section": given.section, "row": row})
        print(row)
        all_ok &= row.get("ok", True)
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
