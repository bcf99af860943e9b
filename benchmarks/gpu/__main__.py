"""Check and measure the package on a GPU, and write a report.

    python -m benchmarks.gpu                          # ten minutes of a GPU at most
    python -m benchmarks.gpu --device cpu --tiny      # try it without one
    python -m benchmarks.gpu --only machine 'step-*'  # some sections

Every section runs in a process of its own, within a time of its own. What it finds is in results.jsonl and report.md at
once; one that fails or takes too long leaves the others' results alone. The exit code is 0 if every section passed or
was skipped for want of something, 1 if one failed or was stopped, 2 if nothing was run, 3 if there was no time left for
some and the others passed.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event, Lock

import torch

from benchmarks.gpu.packages import Packages, install_wheels
from benchmarks.gpu.report import write_report
from benchmarks.gpu.section import Options, Row, Section, add_line, run_section
from benchmarks.gpu.sections import SECTIONS

PACKAGES = ("torch", "triton", "transformers", "accelerate", "lightning", "datasets", "trl", "peft", "numpy")
FILES = ("results.jsonl", "report.md", "log.txt")
FOLDERS = ("work", "packages")
"""What a check makes in the folder of its output; folders are removed at its end."""

NO_TIME = "no time left"


def main(arguments: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    """Run the sections that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in sections]
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"sections, * for any: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=10, help="for all of them together (default: 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do; for trying the check")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder, emptied (default: runs/gpu)")
    parser.add_argument("--commit", help="what the report calls the code, where git does not know (default: git's)")
    given = parser.parse_args(arguments)
    if given.minutes <= 0:
        parser.error(f"--minutes must be over 0, got {given.minutes:g}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"error: torch finds no GPU here; without one, try {parser.prog} --device cpu --tiny\n")
    for pattern in given.only or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(f"--only {pattern}: no section is called so; there are {', '.join(names)}")
    chosen = [each for each in sections if not given.only or any(fnmatchcase(each.name, only) for only in given.only)]
    return check(chosen, given.device, given.tiny, 60 * given.minutes, given.output, given.commit)


def check(
    sections: Sequence[Section], device: str, tiny: bool, seconds: float, output: Path, commit: str | None = None
) -> int:
    """Run sections one after the other; return the exit code.

    Args:
        sections: In their order.
        device: "cuda" or "cpu".
        tiny: Whether sizes are for a CPU.
        seconds: For all together.
        output: Folder for the report; what an earlier check left there is removed.
        commit: What the report calls the code (default: what git says).
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was found is written down
    try:
        output.mkdir(parents=True, exist_ok=True)
        _empty(output)
        return _check(sections, device, tiny, time.monotonic() + seconds, output, commit)
    finally:
        for folder in FOLDERS:
            shutil.rmtree(output / folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _empty(output: Path) -> None:
    """Remove what an earlier check left, also one that was killed, whose models may be of other sizes."""
    for file in FILES:
        (output / file).unlink(missing_ok=True)
    for folder in FOLDERS:
        shutil.rmtree(output / folder, ignore_errors=True)


def _check(
    sections: Sequence[Section], device: str, tiny: bool, deadline: float, output: Path, commit: str | None
) -> int:
    results, report, log = (output / name for name in FILES)
    packages = install_wheels(output, log)
    add_line(results, describe(device, commit, packages))
    not_passed: list[str] = []
    without_time: list[str] = []
    writing, ending = Lock(), Event()

    def run(section: Section) -> None:
        if ending.is_set():
            return
        start = time.monotonic()
        own, left = 60 * section.minutes, deadline - start
        if left > section.at_least:
            options = Options(device, tiny, min(own, left), str(results), section.name)
            status, why = run_section(section, options, log, packages, ending)
        else:
            status, why = "skipped", ""
        lacked_time = left <= section.at_least or (status == "stopped" and left < own and not ending.is_set())
        if lacked_time:
            why = "; ".join(filter(None, [NO_TIME, why]))
        took = round(time.monotonic() - start, 1)
        end = {"section": section.name, "title": section.title, "status": status, "seconds": took, "why": why}
        with writing:
            add_line(results, end)
            write_report(results, report)
        print(f"{section.name:<24}{status:<8} {took:6.1f} s  {why}", flush=True)
        if lacked_time:
            without_time.append(section.name)
        elif status in ("failed", "stopped"):
            not_passed.append(section.name)

    # On a CPU nothing is measured if tiny, so two may run side by side.
    with ThreadPoolExecutor(2 if tiny and device == "cpu" else 1) as pool:
        try:
            list(pool.map(run, sections))
        except BaseException:  # a signal, above all
            ending.set()
            raise
    said = [("not passed", not_passed), (NO_TIME, without_time)]
    ends = "; ".join(f"{what}: {', '.join(names)}" for what, names in said if names)
    print(f"{report}; {ends or 'all passed'}" + (f" (details in {log.name})" if not_passed else ""))
    return 1 if not_passed else 3 if without_time else 0


def describe(device: str, commit: str | None, packages: Packages) -> Row:
    """Return the first line of the results: what was run, where, and with what, carried packages among it."""
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "CPU cores": os.cpu_count(),
        "python": platform.python_version(),
        "CUDA": torch.version.cuda,
        **packages.versions(PACKAGES),
        "torch": torch.__version__,
    }
    return {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "commit": commit or checked_out(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
    }


def checked_out() -> str:
    """Return the commit that is checked out, and whether files differ from it; "unknown" outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
