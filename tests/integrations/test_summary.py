"""Each framework shows what the optimizer says when it is built, once, in a program that configures no logging."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAMS = {
    "Lightning": """
from tests.integrations.lightning_training import fit
fit("one device", steps=1)
""",
    "Trainer": """
import tempfile
from tests.integrations.test_trainer import arguments, make_model, make_trainer
with tempfile.TemporaryDirectory() as folder:
    make_trainer(arguments(folder, steps=1), make_model()).train()
""",
    "Accelerate": """
from accelerate import Accelerator
from dion2_lightning import build_optimizer
from tests.integrations.training import make_model
accelerator = Accelerator(cpu=True)
model = make_model()
accelerator.prepare(model, build_optimizer(model, strategy=accelerator))
""",
}


@pytest.mark.parametrize("framework", PROGRAMS)
def test_the_summary_is_seen_once(framework: str) -> None:
    program = [sys.executable, "-c", PROGRAMS[framework]]
    result = subprocess.run(program, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    assert (result.stdout + result.stderr).count("Dion2 and AdamW for ") == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Dion2 and AdamW for Llama")]
    assert line.endswith(": of 43,168 trainable parameters dion2 42.7% (14 tensors), adamw 57.3% (7 tensors)")
