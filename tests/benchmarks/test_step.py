"""The benchmark of steps: its floor does what it says, and its figures are written."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step
from benchmarks.step import Floor, weights
from benchmarks.traffic import PRODUCTS, TrafficCounter
from dion2_lightning.kernels.orthonormalize import POLAR_EXPRESS

SIZES = [(64, 160), (64, 160), (160, 64)]


def test_the_floor_moves_20_bytes_a_parameter_and_makes_the_products() -> None:
    floor = Floor(weights(SIZES, torch.device("cpu")), 0.5, "float32")
    with TrafficCounter("cpu") as counter:
        floor.step()
    entries = sum(rows * columns for rows, columns in SIZES)
    moved = counter.beside_products.moved - 2 * 4 * 3 * 32 * len(POLAR_EXPRESS)  # a I in the polynomials
    assert moved == 20 * entries
    k, m = 32, 160  # all three submatrices, by their Gram matrices
    assert counter.flops == 3 * (4 * k * k * m + 34 * k**3)
    assert counter.by_phase[PRODUCTS].operations == 2 + 5 + 4 + 8


def test_the_table_the_file_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(step.LAYERS, "gpt2", SIZES)
    files = [f"--json={tmp_path / 'figures.json'}", f"--picture={tmp_path / 'figures.png'}"]
    step.main(["--shapes", "gpt2", "--layers", "1", "--rounds", "1", "--phases", *files])
    (table,) = json.loads((tmp_path / "figures.json").read_text())
    assert {"torch.optim.AdamW, fused", "Dion2 at 1/4", "Dion at 1/4", "NorMuon"} < set(table["ms"])
    assert all(value > 0.0 for value in table["ms"].values())
    assert sum(table["phases"]["Dion2 at 1/4"].values()) == pytest.approx(100.0)
    assert (tmp_path / "figures.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    ratio = table["ms"]["Dion2 at 1/4"] / table["ms"]["floor of Dion2 at 1/4"]
    row = next(line for line in printed.splitlines() if line.startswith("Dion2 at 1/4  "))
    assert f" {ratio:.2f}x " in row
    bound = 4 * (32 * 160 * 3) * 9  # copies of all submatrices, in float32
    assert 0 < table["memory"]["Dion2 at 1/4"] < table["memory"]["Dion2 at 1"] < bound


def test_medians_and_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.LAYERS, "gpt2", SIZES)
    monkeypatch.setattr(step, "take_turns", lambda names, _: {name: [1.0, 2.0, 6.0] for name in names})
    step.main(["--shapes", "gpt2", "--layers", "1", "--only", "Dion2 at 1/4", f"--json={tmp_path / 'figures.json'}"])
    (table,) = json.loads((tmp_path / "figures.json").read_text())
    assert set(table["ms"].values()) == {2.0}
    assert set(table["mean_ms"].values()) == {3.0}


@pytest.mark.parametrize("has_gpu", [False, True])
def test_kernels_of_torch_are_compared_where_a_gpu_is_asked_for(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for device in ("cpu", "cuda"):
        names = [name for name, _ in step.optimizers("gpt2", None, torch.device(device))]
        assert sum(name.endswith("kernels=torch") for name in names) == (2 if device == "cuda" else 0)


def test_a_picture_needs_adamw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "compare", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        step.main(["--only", "Dion2", f"--picture={tmp_path / 'figures.png'}"])
    assert "--only 'Dion2' leaves out" in capsys.readouterr().err
