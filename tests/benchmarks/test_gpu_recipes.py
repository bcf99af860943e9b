"""How the GPU check runs the recipes, and which problems it finds; the commands themselves run by the check alone."""

from pathlib import Path

import pytest

from benchmarks.gpu import recipes
from benchmarks.gpu.recipes import RECIPES, Recipe, run_recipe, words_of
from benchmarks.gpu.section import Options, Row
from tests.integrations.test_docs import ROOT

SAVES_A_MODEL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file

output, steps, value, *resume = sys.argv[1:]
Path(output).mkdir(exist_ok=True)
if not resume or value != "left":
    save_file({"weight": torch.tensor([float(value) if value != "left" else 1.0])}, Path(output) / "model.safetensors")
sys.exit("error: no step 24" if value == "2" and steps == "24" else 0)
"""


def rows(value: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    script = folder / "recipe.py"
    script.write_text(SAVES_A_MODEL)
    recipe = Recipe(f"{script} {{output}} {{steps}} {value}", "resume", "model.safetensors")
    monkeypatch.setattr(recipes, "RECIPES", {"some": recipe})
    monkeypatch.setattr(recipes, "shared_files", lambda _: folder)
    options = Options("cpu", True, 60, str(folder / "results.jsonl"), "section")
    options.folder.mkdir(parents=True)
    return list(run_recipe(options, recipe="some"))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1", ["", ""]),
        ("nan", ["weights that are not finite: weight"]),
        ("2", ["", "it ended with code 1: ['error: no step 24']"]),
        ("left", ["", "it left no model.safetensors"]),  # the file of the run before does not count
    ],
)
def test_problems(value: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows(value, tmp_path, monkeypatch)
    assert [row["found"] for row in made] == found
    assert [row["ok"] for row in made] == [not each for each in found]
    assert [row["run"] for row in made] == ["from the start", "resumed"][: len(found)]


@pytest.mark.parametrize("name", RECIPES)
def test_words(name: str) -> None:
    """Of each command; a folder with a space stays one word."""
    tiny, large = (words_of(RECIPES[name], Path("/the files"), Path("/out"), tiny)["resumed"] for tiny in (True, False))
    program = tiny[1].replace(".", "/") + ".py" if tiny[0] == "-m" else tiny[0]
    assert (ROOT / program).exists()
    assert "24" in tiny
    assert all(word in large for word in tiny)
    assert not [word for word in large if "{" in word or word in ("/the", "files")]
