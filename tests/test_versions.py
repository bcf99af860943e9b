"""The ranges in pyproject.toml are those that were tried: their lower bounds are what ``make test-oldest`` installs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dion2_lightning.integrations.transformers import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [*PROJECT["dependencies"], *(each for extra in EXTRAS if extra != "dev" for each in EXTRAS[extra])]
REQUIREMENTS = [Requirement(each) for each in ASKED]
BOUNDED = [requirement for requirement in REQUIREMENTS if requirement.name != PROJECT["name"]]


def pinned(file: str) -> dict[str, Version]:
    lines = (line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    return {name: Version(version) for name, version in lines}


@pytest.mark.parametrize("requirement", BOUNDED, ids=str)
def test_bounds(requirement: Requirement) -> None:
    (bound,) = requirement.specifier
    assert bound.operator == ">=", "upper bounds stay open"
    assert Version(bound.version) == pinned("constraints-oldest.txt")[requirement.name]
    assert pinned("constraints.txt")[requirement.name] in requirement.specifier


def test_what_is_installed_the_factory_takes() -> None:
    assert pinned("constraints-oldest.txt")["transformers"] >= Version(OLDEST_TRANSFORMERS)
