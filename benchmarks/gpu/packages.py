"""What the sections may import: the packages of this Python, and those that were carried along with the project."""

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
"""Where ``make gpu-wheels`` puts what the recipes need."""

SECONDS: Final = 100
"""For importing packages."""

LOOK: Final = """
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
"""Imports packages, and prints a line about each."""


class Packages:
    """What can be imported, which is tried once for every package.

    Args:
        folder: Of packages besides those of this Python, if any.
        advice: What to do about those that cannot be imported.
    """

    def __init__(self, folder: Path | None = None, advice: str = "") -> None:
        self.folder, self._advice = folder, advice
        self._problems: dict[str, str] = {}
        self._looking = Lock()

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that is to import them, and this project."""
        folders = [os.getcwd(), *([str(self.folder)] if self.folder else []), os.environ.get("PYTHONPATH", "")]
        return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}

    def what_is_missing(self, names: Sequence[str], environment: Mapping[str, str], ending: Event) -> str:
        """Say which packages cannot be imported, why, and what to do about it; nothing if all can.

        A package that is there may want another that is not, so all of them are imported, in a process of their own.

        Args:
            names: What they are imported as.
            environment: Of that process.
            ending: Set when it is to be ended.
        """
        with self._looking:
            unknown = [name for name in names if name not in self._problems]
            if unknown:
                self._problems.update(_problems(unknown, environment, ending))
        problems = [f"{name} {self._problems[name]}" for name in names if self._problems[name]]
        return "; ".join([*problems, self._advice]) if problems else ""

    def versions(self, names: Sequence[str]) -> dict[str, str | None]:
        """Return the versions of packages; None where there is no such package."""
        places = [*sys.path, *([str(self.folder)] if self.folder else [])]
        found = {name: next(iter(metadata.distributions(name=name, path=places)), None) for name in names}
        return {name: each.version if each else None for name, each in found.items()}


def _problems(names: Sequence[str], environment: Mapping[str, str], ending: Event) -> dict[str, str]:
    """What keeps packages from being imported, "" for none."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", LOOK, *names],
            env=environment,
            stdout=printed,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = wait_for(process, SECONDS, ending)
        finally:
            end(process)
        printed.seek(0)
        said = dict(json.loads(line) for line in printed if line.startswith('["'))
    without_word = f"cannot be imported within {SECONDS} s" if code is None else f"ends Python with code {code}"
    return {name: said.get(name, without_word) for name in names}


def install_wheels(output: Path, log: Path) -> Packages:
    """Install what was carried along and is not here into a folder of its own, if there is any.

    Args:
        output: Where the folder is made.
        log: File that pip's output is added to.
    """
    wheels = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if not is_installed(wheel.name.split("-")[0])]
    if not wheels:
        return Packages(advice="make gpu-wheels collects what can be carried along")
    target = (output / "packages").resolve()  # for processes wherever they run
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command = [*pip, "--disable-pip-version-check", "--target", str(target), *map(str, wheels)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    with log.open("a") as file:
        file.write(ended.stdout)
    if ended.returncode:
        shutil.rmtree(target, ignore_errors=True)
        said = [line for line in ended.stdout.splitlines() if line.startswith("ERROR")] or ["see log.txt"]
        return Packages(advice=f"the wheels in {WHEELS} could not be installed: {said[0]}"[:300])
    return Packages(target, f"the wheels in {WHEELS} do not bring it")


def is_installed(package: str) -> bool:
    """Say whether this Python has a package."""
    return any(metadata.distributions(name=package))
