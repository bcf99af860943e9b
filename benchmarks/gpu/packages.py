"""Packages that the sections may import: those of this Python, and wheels brought along with the project."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from threading import Event, Lock
from typing import Final

from benchmarks.gpu.processes import end, wait_for

WHEELS = Path(".gpu-wheels")
"""Where ``make gpu-wheels`` puts packages that the recipes need."""

SECONDS: Final = 100
"""Time limit for importing packages."""

IMPORT_EACH: Final = """
import importlib, json, sys
for name in sys.argv[1:]:
    problem = ""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem = "not installed" if error.name == name else f"cannot be imported ({error})"
    except Exception as error:
        problem = f"cannot be imported ({type(error).__name__}: {error})"
    print("\\n" + json.dumps([name, problem]), flush=True)
"""
"""Imports packages and prints for each a line with its problem."""


class Packages:
    """Which packages can be imported; each is tried once.

    Args:
        folder: Additional packages, besides those of this Python.
        advice: Added to the explanation of missing packages.
    """

    def __init__(self, folder: Path | None = None, advice: str = "") -> None:
        self.folder, self._advice = folder, advice
        self._problems: dict[str, str] = {}
        self._lock = Lock()

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that imports them and this project."""
        folders = [os.getcwd(), *([str(self.folder)] if self.folder else []), os.environ.get("PYTHONPATH", "")]
        return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}

    def explain_missing(self, names: Sequence[str], environment: Mapping[str, str], stop: Event) -> str:
        """Return which packages cannot be imported, why, and what to do about it; "" if all can.

        An installed package may lack a dependency, so all of them are imported, in another process.

        Args:
            names: Module names.
            environment: Of that process.
            stop: Set to stop the process.
        """
        with self._lock:
            untried = [name for name in names if name not in self._problems]
            if untried:
                self._problems.update(_problems(untried, environment, stop))
        problems = [f"{name} {self._problems[name]}" for name in names if self._problems[name]]
        return "; ".join([*problems, self._advice]) if problems else ""

    def versions(self, names: Sequence[str]) -> dict[str, str | None]:
        """Return the versions of packages; None where there is no such package."""
        places = [*sys.path, *([str(self.folder)] if self.folder else [])]
        found = {name: next(iter(metadata.distributions(name=name, path=places)), None) for name in names}
        return {name: each.version if each else None for name, each in found.items()}


def _problems(names: Sequence[str], environment: Mapping[str, str], stop: Event) -> dict[str, str]:
    """Why packages cannot be imported, "" for those that can."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPORT_EACH, *names],
            env=environment,
            stdout=printed,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = wait_for(process, SECONDS, stop)
        finally:
            end(process)
        printed.seek(0)
        problems = dict(json.loads(line) for line in printed if line.startswith('["'))
    no_answer = f"cannot be imported within {SECONDS} s" if code is None else f"ends Python with code {code}"
    return {name: problems.get(name, no_answer) for name in names}


def install_wheels(output: Path, log: Path) -> Packages:
    """Install the wheels of packages that are missing here into a folder of its own, if there are any.

    Args:
        output: Where the folder is made.
        log: File that pip's output is added to.
    """
    wheels = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if not is_installed(wheel.name.split("-")[0])]
    if not wheels:
        return Packages(advice="make gpu-wheels collects wheels to bring along")
    target = (output / "packages").resolve()  # absolute, for processes in other folders
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command = [*pip, "--disable-pip-version-check", "--target", str(target), *map(str, wheels)]
    pip_run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    with log.open("a") as file:
        file.write(pip_run.stdout)
    if pip_run.returncode:
        shutil.rmtree(target, ignore_errors=True)
        errors = [line for line in pip_run.stdout.splitlines() if line.startswith("ERROR")] or ["see log.txt"]
        return Packages(advice=f"the wheels in {WHEELS} could not be installed: {errors[0]}"[:300])
    return Packages(target, f"the wheels in {WHEELS} do not include it")


def is_installed(package: str) -> bool:
    """Return whether this Python has a package."""
    return any(metadata.distributions(name=package))
