"""Whether a run that goes on is the run that was begun, and how what it writes is whole or not there."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.inputs import InputError


def describe(settings: Any, free: Collection[str]) -> dict[str, Any]:
    """Returns what a run was asked for, as plain data, by the names of the command line.

    Args:
        settings: A dataclass of arguments, with those of the optimizer in `optimizer`.
        free: Arguments that may change when a run goes on; all others decide what it computes.
    """
    values = {name: value for name, value in asdict(settings).items() if name not in free}
    values |= {f"optimizer.{name}": value for name, value in values.pop("optimizer").items()}
    described: dict[str, Any] = json.loads(json.dumps(values, default=str))  # as it will be read: tuples become lists
    return described


def refuse_changes(saved: Mapping[str, Any], asked: Mapping[str, Any], begun: str) -> None:
    """Makes sure that a run goes on as it was begun.

    Args:
        saved: What :func:`describe` returned then.
        asked: What it returns now.
        begun: Where that run is, for the error.

    Raises:
        InputError: If something differs; it says what, and what to do.
    """
    different = [name for name in asked if saved.get(name) != asked[name]]
    if different:
        changes = "; ".join(f"--{name} was {saved.get(name)!r}, is {asked[name]!r}" for name in different)
        raise InputError(
            f"--resume: {begun} is of another training: {changes}. Give what it was begun with, or leave --resume out "
            "and choose another --output."
        )


def put_in_place(written: Path, place: Path) -> None:
    """Moves a file or folder, once it is written, to where it belongs; what is there is removed. One rank does it."""
    remove(place)
    written.rename(place)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
