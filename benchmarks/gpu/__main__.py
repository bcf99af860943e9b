"""Check and measure the package on a GPU, and write a report.

    python -m benchmarks.gpu                          # about ten minutes of a GPU
    python -m benchmarks.gpu --device cpu --tiny      # try it without one
    python -m benchmarks.gpu --only machine 'step-*'  # some sections

Every section runs in a process of its own, within a time of its own. What it finds is in results.jsonl and report.md at
once; one that fails or takes too long leaves the others' results alone. The exit code is 0 if every section passed or
was skipped for want of something, 1 if one failed or was stopped, 2 if nothing was run.
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
from importlib import metadata
from pathlib import Path
from threading import Lock

import torch

from benchmarks.gpu.report import write_report
from benchmarks.gpu.section import Options, Row, Section, add_line, run_section
from benchmarks.gpu.sections import SECTIONS

PACKAGES = ("torch", "triton", "transformers", "accelerate", "lightning", "datasets", "trl", "peft", "numpy")
WHEELS = Path(".gpu-wheels")
"""Where ``make gpu-wheels`` puts what the recipes need."""


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section that runs is ended too
    deadline = time.monotonic() + seconds
    results, report, log = (output / name for name in ("results.jsonl", "report.md", "log.txt"))
    output.mkdir(parents=True, exist_ok=True)
    for file in (results, report, log):
        file.unlink(missing_ok=True)
    packages = install_wheels(output, log)
    add_line(results, describe(device, commit, packages))
    bad = []
    ended = Lock()

    def run(section: Section) -> None:
        start = time.monotonic()
        own = min(60 * section.minutes, deadline - start)
        options = Options(device, tiny, own, str(results), section.name)
        status, why = run_section(section, options, log, packages) if own > 0 else ("stopped", "no time was left")
        took = round(time.monotonic() - start, 1)
        end = {"section": section.name, "title": section.title, "status": status, "seconds": took, "why": why}
        with ended:
            add_line(results, end)
            write_report(results, report)
        print(f"{section.name:<24}{status:<8} {took:6.1f} s  {why}", flush=True)
        if status in ("failed", "stopped"):
            bad.append(section.name)

    if tiny and device == "cpu":  # nothing is measured, so two may run side by side
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, sections))
    else:
        for section in sections:
            run(section)
    if packages:
        shutil.rmtree(packages)
    shutil.rmtree(output / "work", ignore_errors=True)
    print(f"{report}" + (f"; not passed: {', '.join(bad)} (details in {log.name})" if bad else "; all passed"))
    return 1 if bad else 0


def describe(device: str, commit: str | None, packages: Path | None) -> Row:
    """Return the first line of the results: what was run, where, and with what, carried packages among it."""
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "CPU cores": os.cpu_count(),
        "python": platform.python_version(),
        "CUDA": torch.version.cuda,
    }
    places = [*sys.path, *([str(packages)] if packages else [])]
    for name in PACKAGES:
        found = next(iter(metadata.distributions(name=name, path=places)), None)
        machine[name] = found.version if found else None
    machine["torch"] = torch.__version__
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


def is_installed(package: str) -> bool:
    """Say whether this Python has a package."""
    return any(metadata.distributions(name=package))


def install_wheels(output: Path, log: Path) -> Path | None:
    """Install what was carried along and is not here into a folder of its own, if there is any, and return it."""
    wheels = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if not is_installed(wheel.name.split("-")[0])]
    if not wheels:
        return None
    target = (output / "packages").resolve()  # for processes wherever they run
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    with log.open("a") as file:
        done = subprocess.run([*pip, "--target", target, *wheels], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        print(f"the wheels in {WHEELS} could not be installed; see {log}")
        return None
    return target


if __name__ == "__main__":
    sys.exit(main())
