"""Check and measure the package on a GPU, and write a report.

    python -m benchmarks.gpu                          # ten minutes of a GPU at most
    python -m benchmarks.gpu --device cpu --tiny      # try it without one
    python -m benchmarks.gpu --only machine 'step-*'  # some sections

Every section runs in a process of its own, within its own time limit. Its results are in results.jsonl and report.md at
once, so one that fails or takes too long does not harm the others. The exit code is 0 if every section passed or was
skipped because a package or a GPU is missing, 1 if one failed or was stopped, 2 if nothing was run, 3 if there was no
time left for some and the others passed.
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
"""Files and folders that a check writes to its output folder; the folders are removed at its end."""

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
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be over 0, got {options.minutes:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"error: torch finds no GPU here; without one, try {parser.prog} --device cpu --tiny\n")
    for pattern in options.only or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(f"--only {pattern}: no such section; there are {', '.join(names)}")
    chosen = [
        each for each in sections if not options.only or any(fnmatchcase(each.name, only) for only in options.only)
    ]
    return check(chosen, options.device, options.tiny, 60 * options.minutes, options.output, options.commit)


def check(
    sections: Sequence[Section], device: str, tiny: bool, seconds: float, output: Path, commit: str | None = None
) -> int:
    """Run sections one after the other; return the exit code.

    Args:
        sections: In their order.
        device: "cuda" or "cpu".
        tiny: Whether sizes are for a CPU.
        seconds: For all together.
        output: Folder for the report; results of an earlier check are removed.
        commit: What the report calls the code (default: what git says).
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that results so far are written
    try:
        output.mkdir(parents=True, exist_ok=True)
        _remove_earlier_results(output)
        return _run_sections(sections, device, tiny, time.monotonic() + seconds, output, commit)
    finally:
        for folder in FOLDERS:
            shutil.rmtree(output / folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _remove_earlier_results(output: Path) -> None:
    """Remove the results of an earlier check, and models left by one that was killed, which may have other sizes."""
    for file in FILES:
        (output / file).unlink(missing_ok=True)
    for folder in FOLDERS:
        shutil.rmtree(output / folder, ignore_errors=True)


def _run_sections(
    sections: Sequence[Section], device: str, tiny: bool, deadline: float, output: Path, commit: str | None
) -> int:
    results, report, log = (output / name for name in FILES)
    packages = install_wheels(output, log)
    add_line(results, describe(device, commit, packages))
    not_passed: list[str] = []
    without_time: list[str] = []
    write_lock, stop = Lock(), Event()

    def run(section: Section) -> None:
        if stop.is_set():
            return
        start = time.monotonic()
        own, left = 60 * section.minutes, deadline - start
        if left > section.min_seconds:
            section_options = Options(device, tiny, min(own, left), str(results), section.name)
            status, why = run_section(section, section_options, log, packages, stop)
        else:
            status, why = "skipped", ""
        ran_out_of_time = left <= section.min_seconds or (status == "stopped" and left < own and not stop.is_set())
        if ran_out_of_time:
            why = "; ".join(filter(None, [NO_TIME, why]))
        elapsed = round(time.monotonic() - start, 1)
        end = {"section": section.name, "title": section.title, "status": status, "seconds": elapsed, "why": why}
        with write_lock:
            add_line(results, end)
            write_report(results, report)
        print(f"{section.name:<24}{status:<8} {elapsed:6.1f} s  {why}", flush=True)
        if ran_out_of_time:
            without_time.append(section.name)
        elif status in ("failed", "stopped"):
            not_passed.append(section.name)

    # Times do not matter with --tiny on a CPU, so two sections may run side by side.
    with ThreadPoolExecutor(2 if tiny and device == "cpu" else 1) as pool:
        try:
            list(pool.map(run, sections))
        except BaseException:  # above all SystemExit, from SIGTERM
            stop.set()
            raise
    kinds = [("not passed", not_passed), (NO_TIME, without_time)]
    summary = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds if names)
    print(f"{report}; {summary or 'all passed'}" + (f" (details in {log.name})" if not_passed else ""))
    return 1 if not_passed else 3 if without_time else 0


def describe(device: str, commit: str | None, packages: Packages) -> Row:
    """Return the first line of the results: command, commit, date, machine, and versions of packages."""
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
        "commit": commit or git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
    }


def git_commit() -> str:
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
