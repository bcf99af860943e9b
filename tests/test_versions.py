"""Lower bounds in pyproject.toml are the versions that ``make test-oldest`` installs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dion2_lightning.integrations.transformers import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEPENDENCIES = [*PROJECT["dependencies"], *(each for extra in EXTRAS if extra != "dev" for each in EXTRAS[extra])]
REQUIREMENTS = [Requirement(each) for each in DEPENDENCIES]
BOUNDED = [requirement for requirement in REQUIREMENTS if requirement.name != PROJECT["name"]]

WITHOUT_DISTRIBUTED = """
import importlib, sys
import torch

# As in a torch built without it: the package exists and is almost empty.
del torch._C._c10d_init
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    del sys.modules[name]
sys.modules["torch._C._distributed_c10d"] = None
torch.distributed = importlib.import_module("torch.distributed")
assert not torch.distributed.is_available()

from dion2_lightning import build_optimizer

model = torch.nn.Linear(8, 8)
optimizer = build_optimizer(model, lr=0.1)
before = model.weight.clone()
model(torch.ones(2, 8)).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert not torch.equal(before, model.weight)
"""


def pinned(file: str) -> dict[str, Version]:
    lines = (line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    return {name: Version(version) for name, version in lines}


@pytest.mark.parametrize("requirement", BOUNDED, ids=str)
def test_bounds(requirement: Requirement) -> None:
    (bound,) = requirement.specifier
    assert bound.operator == ">=", "upper bounds stay open"
    assert Version(bound.version) == pinned("constraints-oldest.txt")[requirement.name]
    assert pinned("constraints.txt")[requirement.name] in requirement.specifier


def test_the_factory_takes_the_oldest_transformers() -> None:
    assert pinned("constraints-oldest.txt")["transformers"] >= Version(OLDEST_TRANSFORMERS)


def test_a_torch_that_was_built_without_distributed() -> None:
    command = [sys.executable, "-c", WITHOUT_DISTRIBUTED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
