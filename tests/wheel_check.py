"""Check an installed wheel; ``make wheel-check`` runs it where only the wheel and its dependencies are installed."""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

import dion2_lightning
from dion2_lightning import SelectionTracker, build_optimizer

OPTIONAL = ("accelerate", "lightning", "matplotlib", "numpy", "pytorch_lightning", "transformers")


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("dion2-report")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def main() -> None:
    present = [name for name in OPTIONAL if find_spec(name)]
    assert not present, f"the wheel has installed {', '.join(present)}"
    assert Path(sys.prefix) in Path(dion2_lightning.__file__).parents, dion2_lightning.__file__
    assert version("dion2-lightning") == dion2_lightning.__version__

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 16), torch.nn.Linear(16, 32), torch.nn.Linear(32, 4))
    optimizer = build_optimizer(model, lr=0.1)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.arange(10)).square().mean().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters())), "a parameter has not moved"
    assert tracker.pop_metrics() is not None

    result = report("--help")
    assert result.returncode == 0 and "usage: dion2-report" in result.stdout, result
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/statistics.json"
        tracker.history.save(file)
        result = report(file)
    assert result.returncode == 1 and "pip install matplotlib" in result.stderr, result
    print(f"dion2-lightning {dion2_lightning.__version__} works with torch {torch.__version__} alone")


if __name__ == "__main__":
    main()
