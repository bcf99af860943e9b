"""The benchmark of the host's work: its steps go the way of a GPU's, and launch nothing."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import host
from benchmarks.step import weights
from dion2_lightning.kernels import triton_launch


@pytest.mark.parametrize("name", [name for name in host.OPTIMIZERS if "Dion" in name and "AdamW" not in name])
def test_a_step_prepares_launches_for_all_matrices(name: str) -> None:
    started: list[tuple[str, int]] = []

    def start(kernel: str, table: Any, matrices: int, *_: Any) -> None:
        started.append((kernel, matrices))

    with host.without_launches(), patch.object(triton_launch, "start", start):
        parameters = weights([(32, 64)] * 3 + [(64, 32)] * 2, host.CPU)
        optimizer = host.OPTIMIZERS[name](parameters)
        trained = optimizer.param_groups[0]["params"]
        before = [parameter.detach().clone() for parameter in trained]
        optimizer.step()
    for kernel in ("accumulate", "take", "apply"):
        assert sum(matrices for each, matrices in started if each == kernel) == 5
    assert all(torch.equal(parameter, its_before) for parameter, its_before in zip(trained, before, strict=True))


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    host.main(["--layers", "1", "--rounds", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert "7 matrices" in printed[0]
    assert [line[:36].strip() for line in printed[2:]] == list(host.OPTIMIZERS)
    assert all(float(line.split()[-1].removesuffix("x")) > 0.0 for line in printed[2:])
