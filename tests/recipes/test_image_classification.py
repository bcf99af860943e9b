"""Image classification as its command runs it: offline, a few steps, on one process and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dion2_lightning.monitoring.history import SelectionHistory
from recipes.image_classification import train as recipe
from recipes.image_classification.train import ImageTrainer, RecipeArguments, load_model, load_rows, main

PROGRAM = Path(recipe.__file__)


def options(output: Path, **changes: Any) -> list[str]:
    values = {
        "output_dir": output,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "validation_rows": 70,
        "logging_steps": 1,
    }
    return [f"--{name}={value}" for name, value in (values | changes).items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT's body of two random layers, and its image processor, as a pretrained model comes."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of dark cats and bright dogs, 20 in train/ and 7 in test/; some are grey, some have transparency."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(27):
        name, brightness = ("dog", 200 + number) if number % 2 else ("cat", number)
        file = tmp_path / "pets" / ("train" if number < 20 else "test") / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (brightness,) * 3).convert(("L", "RGBA", "RGB")[number % 3]).save(file)
    return tmp_path / "pets"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("algorithm", "fractions"), [("dion2", {0.25}), ("muon", {1}), ("adamw", set())])
def test_saves_what_it_trained(algorithm: str, fractions: set[float], tmp_path: Path) -> None:
    """The default model and data; its figures are those of the saved model on all validation images, not shifted."""
    trainer = main(options(tmp_path, algorithm=algorithm))
    groups = trainer.optimizer.param_groups
    assert {group["fraction"] for group in groups if group["algorithm"] == "dion2"} == fractions

    saved = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert_same_weights(saved.state_dict(), trainer.model.state_dict())
    assert saved.config.id2label == {number: str(number) for number in range(10)}
    validation = load_rows(RecipeArguments(validation_rows=70))[1]
    images = [image.convert("RGB") for image in validation["image"]]
    batch = AutoImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")
    labels = torch.tensor(validation["label"])
    with torch.no_grad():
        logits, expected = saved(**batch).logits, trainer.model.eval()(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # memory's alignment may change the last bit
    [metrics] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)

    selection = tmp_path / "dion2_selection.json"
    assert selection.exists() == (algorithm != "adamw")
    assert not selection.exists() or SelectionHistory.load(selection).steps == [1, 2, 3, 4]


@pytest.mark.timeout(300)
def test_two_processes_train_and_measure_like_one(model: Path, pets: Path, tmp_path: Path) -> None:
    """Started by torchrun, offline, model and data by their names on the hub; a step in two parts on each process."""
    same = {"shift": 0, "validation_split": "test", "learning_rate": 1e-3}
    one = main(options(tmp_path / "one", model=model, dataset=pets, **same)).state.log_history

    hub = tmp_path / "home" / "hub" / "models--org--tiny"
    shutil.copytree(model, hub / "snapshots" / "0")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0")
    shutil.copytree(tmp_path / "cache" / "pets", tmp_path / "home" / "datasets" / "org___pets")
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    names = {"model": "org/tiny", "dataset": "org/pets"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PROGRAM)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[2])}
    subprocess.run(
        command + options(tmp_path / "two", **names, **same, **parts),
        env=os.environ | environment | {"HF_HOME": str(tmp_path / "home")},
        timeout=240,
        check=True,
    )
    two = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for name, count in (("loss", 4), ("grad_norm", 4), ("eval_loss", 2), ("eval_accuracy", 2)):
        expected = [entry[name] for entry in one if name in entry]
        assert len(expected) == count
        assert [entry[name] for entry in two if name in entry] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize(("algorithm", "step"), [("dion2", 2), ("dion2", 3), ("adamw", 2)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    algorithm: str, step: int, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from a checkpoint within an epoch of three steps and from one at its end."""
    changes = {"algorithm": algorithm, "dataset": pets, "validation_split": "test", "max_steps": 7}
    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    changes |= {"save_strategy": "steps", "save_steps": step, "eval_strategy": "steps", "eval_steps": 1}
    main(options(tmp_path / "whole", **changes))

    training_step = Trainer.training_step

    def fail(self: Trainer, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == step + 1:
            raise RuntimeError("power cut")
        return training_step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Trainer, "training_step", fail)
        main(options(tmp_path / "parts", **changes))
    main(options(tmp_path / "parts", resume_from_checkpoint=tmp_path / "parts" / f"checkpoint-{step}", **changes))
    assert_same_weights(weights_in(tmp_path / "parts"), weights_in(tmp_path / "whole"))
    if algorithm == "dion2":
        parts, whole = (SelectionHistory.load(tmp_path / run / "dion2_selection.json") for run in ("parts", "whole"))
        assert parts.steps == whole.steps == [1, 2, 3, 4, 5, 6, 7]
        assert torch.equal(parts.shares, whole.shares)


def test_shifts_are_random_and_as_far_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, inputs: inputs["pixel_values"])
    trainer = object.__new__(ImageTrainer)
    dots = torch.zeros(500, 3, 40, 20)
    dots[:, :, 19:21, 9:11] = 1

    def moved(shift: float) -> torch.Tensor:
        trainer.shift = shift
        return trainer.training_step(None, {"pixel_values": dots.clone()})

    torch.testing.assert_close(moved(0), dots)
    across = (moved(0.25).sum((1, 2)) * torch.arange(20)).sum(1) / 12 - 9.5
    down = (moved(0.25).sum((1, 3)) * torch.arange(40)).sum(1) / 12 - 19.5
    for centers, farthest in ((across, 5), (down, 10)):
        assert -farthest <= centers.min() + 0.01 < -0.9 * farthest
        assert 0.9 * farthest < centers.max() - 0.01 <= farthest


def test_digits_keep_their_labels_and_are_split_whatever_the_seed() -> None:
    digits = load_digits()
    pixels = (digits.images * 255 / 16).astype("uint8")
    labels = {image.tobytes(): label for image, label in zip(pixels, digits.target, strict=True)}
    train, validation = load_rows(RecipeArguments())
    images = [[numpy.asarray(image).tobytes() for image in rows["image"]] for rows in (train, validation)]
    assert (len(set(images[0])), len(set(images[1]))) == (1400, 397)
    assert not set(images[0]) & set(images[1])
    for rows, those in zip((train, validation), images, strict=True):
        assert list(rows["label"]) == [labels[image] for image in those]
        assert set(rows["label"]) == set(range(10))
    numpy.random.seed(1)
    torch.manual_seed(1)
    again = load_rows(RecipeArguments())
    assert [list(rows["label"]) for rows in again] == [list(train["label"]), list(validation["label"])]


def test_copies_of_validation_images_are_left_out(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(pets / "test" / "cat" / "20.png", pets / "train" / "cat" / "copy.png")
    train, validation = load_rows(RecipeArguments(dataset=str(pets), validation_split="test"))
    assert (len(train), len(validation), train.features["label"].names) == (20, 7, ["cat", "dog"])
    assert "1 training images are left out" in caplog.text


@pytest.mark.parametrize(("labels", "names"), [(["b", "a", "c"], ["a", "b", "c"]), ([10, 9, 11], ["10", "11", "9"])])
def test_labels_get_the_same_numbers_in_both_splits(
    labels: list[Any], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = tmp_path / "table"
    table.mkdir()
    value = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    features = datasets.Features({"img": datasets.Image(), "kind": value})
    for split, those in (("train", labels), ("test", labels[1:])):
        images = [Image.new("L", (4, 4), len(those) * 9 + row) for row in range(len(those))]
        datasets.Dataset.from_dict({"img": images, "kind": those}, features).to_parquet(table / f"{split}.parquet")
    arguments = RecipeArguments(dataset=str(table), image_column="img", label_column="kind", validation_split="test")
    for rows, those in zip(load_rows(arguments), (labels, labels[1:]), strict=True):
        assert rows.features["label"].names == names
        assert rows.features["label"].int2str(list(rows["label"])) == [str(label) for label in those]


def test_a_pretrained_body_gets_a_head_for_the_classes(model: Path, tmp_path: Path) -> None:
    body = ViTModel.from_pretrained(model, add_pooling_layer=False)
    folder = model
    for classes in (["a", "b"], ["a", "b", "c"]):  # the second time it has a head already, for others
        loaded, processor = load_model(str(folder), classes)
        assert_same_weights(loaded.vit.state_dict(), body.state_dict())
        assert loaded.classifier.weight.shape == (len(classes), 32)
        assert loaded.config.label2id == {name: number for number, name in enumerate(classes)}
        assert processor.size["height"] == 16
        folder = tmp_path / "model"
        loaded.save_pretrained(folder)
        processor.save_pretrained(folder)
