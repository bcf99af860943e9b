"""One section of the check: its options, and how it runs in a process of its own, within its time limit.

A section yields rows of plain data; one with ``"ok": False`` makes it fail. Each row is written to the results file at
once, so a section that fails or is stopped keeps the rows before.
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
"""The reason given for a section that was stopped before its time was up."""


@dataclass(frozen=True)
class Options:
    """The options of every section.

    Attributes:
        device: "cuda" or "cpu".
        tiny: Whether sizes are so small that a CPU takes seconds: for trying the check, not for measuring.
        seconds: Time limit.
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
        """Folder for temporary files of a section; removed when it ends."""
        return Path(self.results).parent / "work" / self.section


@dataclass(frozen=True)
class Section:
    """One part of the check.

    Attributes:
        name: For the command line.
        title: For the report.
        function: "module:function"; called as ``function(options, **arguments)``, it yields rows.
        minutes: Its time budget.
        arguments: Keyword arguments for the function.
        needs: Packages; it is skipped if one cannot be imported.
        cuda_only: Whether it is skipped on a CPU.
        min_seconds: It is skipped if fewer are left.
    """

    name: str
    title: str
    function: str
    minutes: float
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    cuda_only: bool = False
    min_seconds: float = 0.0


def run_section(section: Section, options: Options, log: Path, packages: Packages, stop: Event) -> tuple[Status, str]:
    """Run a section in a process of its own; end it and its child processes when its time is up.

    Args:
        section: What to run.
        options: Its options.
        log: File that its output is added to.
        packages: The packages that it may import.
        stop: Set to stop the section.

    Returns:
        How it ended, and why if it did not pass.
    """
    if section.cuda_only and options.device == "cpu":
        return "skipped", "needs a GPU"
    deadline = time.monotonic() + options.seconds
    environment = packages.environment()
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # threads cost more than they save at tiny sizes
    missing = packages.explain_missing(section.needs, environment, stop)
    if stop.is_set():
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
            code = wait_for(process, deadline - time.monotonic(), stop)
        finally:
            end(process)
            shutil.rmtree(options.folder, ignore_errors=True)
    if code is None:
        return "stopped", ENDED if stop.is_set() else f"not through after {options.seconds:.0f} s"
    if code == 0:
        return "passed", ""
    return "failed", "" if code == 1 else f"its process ended with code {code}; see {log.name}"


def add_line(results: str | Path, line: Row) -> None:
    """Append a line of JSON to a file and flush it to the disk."""
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows_of(function: str, options: Options, arguments: dict[str, Any]) -> Iterator[Row]:
    """Yield a section's rows; an error it raises is its last row."""
    module, name = function.split(":")
    try:
        imported = importlib.import_module(module)
        if "torch" in sys.modules:  # some sections use it in other processes only
            sys.modules["torch"].manual_seed(0)
        yield from getattr(imported, name)(options, **arguments)
    except Exception as error:
        traceback.print_exc()
        yield {"what": "error", "ok": False, "found": f"{type(error).__name__}: {error}"[:500]}


def main(function: str, options: str, arguments: str) -> int:
    """Run one section in this process; return 1 if one of its rows is not ok."""
    section_options = Options(**json.loads(options))
    all_ok = True
    for row in rows_of(function, section_options, json.loads(arguments)):
        add_line(section_options.results, {"section": section_options.section, "row": row})
        print(row)
        all_ok &= row.get("ok", True)
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
