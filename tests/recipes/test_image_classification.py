"""The recipe, run for real: offline, a few steps, both optimizers, one process and two."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from jsonargparse import auto_cli
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dion2_lightning.monitoring.history import SelectionHistory
from recipes import selection_page
from recipes.comparison import Result, run_folder, saved_model
from recipes.image_classification import train as recipe
from recipes.image_classification.data import Images, TrainingSequence, collate_with, load_split
from recipes.image_classification.model import load_model
from recipes.image_classification.settings import Settings
from recipes.image_classification.train import ImageTrainer, fine_tune, main, training_arguments
from recipes.inputs import InputError
from recipes.throughput import training_flops
from recipes.versions import checkpoints_activations
from tests.distributed.ranks import run_like_torchrun

EXAMPLES = sorted(Path(recipe.__file__).parent.glob("*.yaml"))
DIGITS = [str(number) for number in range(10)]
SMALL = {"held_out_rows": 70, "steps": 4, "batch_size": 8, "cpu": True}
"""70 rows are a whole batch of the measurement and a short one."""


def save_tiny_vit(folder: Path, dropout: float = 0.0) -> str:
    """Saves a body of two random layers, without a head, and its image processor, as a pretrained model comes."""
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vit(tmp_path_factory.mktemp("tiny"))


def draw_nothing(history: SelectionHistory, folder: Path) -> list[Path]:
    """Pictures take longer than a short run."""
    return []


@pytest.fixture
def tiny(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(selection_page, "save_pictures", draw_nothing)
    return Settings(model=tiny_model, output=tmp_path / "runs", control=False, **SMALL)


@pytest.fixture
def folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Black cats and white dogs, in train/ and test/; one of them grey, one with transparency."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "pets"
    for part, count in (("train", 6), ("test", 2)):
        for name, brightness in (("cat", 0), ("dog", 255)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                mode = ("L", "RGBA", "RGB")[number % 3]
                Image.new("RGB", (20, 30), (brightness,) * 3).convert(mode).save(folder / f"{number}.png")
    return str(root)


def saved_weights(settings: Settings) -> dict[str, torch.Tensor]:
    return load_file(saved_model(settings) / "model.safetensors")


def log_of(settings: Settings) -> list[dict[str, float]]:
    history = json.loads((run_folder(settings) / "trainer_state.json").read_text())["log_history"]
    assert isinstance(history, list)
    return history


def everything(images: Images, processor: Any) -> dict[str, torch.Tensor]:
    return collate_with(processor)([images[index] for index in range(len(images))])


@pytest.fixture(scope="module")
def trained() -> list[tuple[Any, Any]]:
    """The models and processors of the runs of `results`, as they are in memory when these have ended."""
    return []


@pytest.fixture(scope="module")
def results(trained: list[tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """The command's own defaults, shortened: the small ViT on digits, Dion2 and its control."""

    def load_and_keep(*arguments: Any) -> tuple[Any, Any]:
        trained.append(load_model(*arguments))
        return trained[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "load_model", load_and_keep)
        return fine_tune(Settings(output=tmp_path_factory.mktemp("runs"), **SMALL))


class TestOfflineRun:
    def test_trains_dion2_and_its_control(self, results: list[Result]) -> None:
        assert [result.settings.algorithm for result in results] == ["dion2", "adamw"]
        assert [result.settings.lr for result in results] == [Settings.lr, Settings.control_lr]
        assert all(result.settings.adamw_lr == Settings.adamw_lr for result in results)
        assert all(result.step_seconds is not None and result.step_seconds > 0 for result in results)

    def test_saved_models_load_with_from_pretrained(
        self, results: list[Result], trained: list[tuple[Any, Any]]
    ) -> None:
        """They have the weights of what was trained, bit for bit, and the figures that were reported."""
        held_out = load_split(results[0].settings).held_out
        for result, (its_model, its_processor) in zip(results, trained, strict=True):
            processor = AutoImageProcessor.from_pretrained(saved_model(result.settings))
            model = AutoModelForImageClassification.from_pretrained(saved_model(result.settings)).eval()
            batch, its_batch = everything(held_out, processor), everything(held_out, its_processor)
            with torch.no_grad():
                logits, expected = model(**batch).logits, its_model.eval()(**its_batch).logits
            weights, its_weights = model.state_dict(), its_model.state_dict()
            assert weights.keys() == its_weights.keys()
            assert all(torch.equal(weights[name], its_weights[name]) for name in weights)
            # Products of the same weights differ in the last bit where these lie elsewhere in memory.
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            accuracy = (logits.argmax(-1) == batch["labels"]).float().mean().item()
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"]).item()
            assert result.accuracy == pytest.approx(accuracy, abs=1e-6)
            assert result.loss == pytest.approx(loss, rel=1e-5)

    def test_saved_models_know_their_labels(self, results: list[Result]) -> None:
        for result in results:
            config = AutoModelForImageClassification.from_pretrained(saved_model(result.settings)).config
            assert config.id2label == dict(enumerate(DIGITS))
            assert config.label2id == {name: number for number, name in enumerate(DIGITS)}

    def test_shows_what_was_selected(self, results: list[Result]) -> None:
        """Statistics of every step, a page and pictures; nothing for the control, which selects nothing."""
        dion2, adamw = results
        folder = run_folder(dion2.settings)
        assert dion2.selection[:2] == (folder / "selection.html", folder / "selection.json")
        assert folder / "pictures" / "overview.png" in dion2.selection
        assert all(file.stat().st_size > 1000 for file in dion2.selection)
        assert "small-vit on digits: what Dion2 selected" in dion2.selection[0].read_text()
        history = SelectionHistory.load(dion2.selection[1])
        assert history.steps == [1, 2, 3, 4]
        assert len(history.infos) == 6 * 4
        assert adamw.selection == ()
        assert not [file for file in run_folder(adamw.settings).iterdir() if "selection" in file.name]

    def test_logs_what_was_selected_beside_the_loss(self, results: list[Result]) -> None:
        [*lines, _] = (line for line in log_of(results[0].settings) if "loss" in line or "train_loss" in line)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(0 < line["dion2/coverage"] <= 1 and line["loss"] > 0 for line in lines)


class TestCommand:
    def test_a_file_of_settings_equals_the_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text("steps: 7\nlr: 3.0e-4\ncontrol: false\nreport_to: [tensorboard]\nheld_out: validation\n")
        line = ["--steps=7", "--lr=3e-4", "--control=false", "--report_to=[tensorboard]", "--held_out=validation"]
        assert auto_cli(Settings, args=[f"--config={file}"]) == auto_cli(Settings, args=line)

    def test_the_command_line_overrides_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text("steps: 7\n")
        assert auto_cli(Settings, args=[f"--config={file}", "--steps=9"]).steps == 9

    @pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
    def test_the_example_files_are_valid(self, file: Path) -> None:
        assert isinstance(auto_cli(Settings, args=[f"--config={file}"]), Settings)

    def test_tells_the_routing_once_and_how_to_load_the_model(
        self, tiny: Settings, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        main([f"--{name}={getattr(tiny, name)}" for name in ("model", "output", *SMALL)])
        printed = capfd.readouterr()
        assert "10 classes, 1727 images to train on, 70 held out" in " ".join(printed.out.split())
        assert f'AutoImageProcessor.from_pretrained("{saved_model(tiny)}")' in printed.out
        assert str(run_folder(tiny) / "selection.html") in printed.out
        assert "warn" not in (printed.out + printed.err).lower()
        assert "'loss'" not in printed.out, "the Trainer's own lines"
        assert len([record for record in caplog.records if record.name == "dion2_lightning"]) == 1

    def test_the_first_beta_is_the_one_that_adamw_trains_with(self, tiny: Settings) -> None:
        assert recipe.training_arguments(replace(tiny, beta1=0.5)).adam_beta1 == 0.5

    def test_trains_with_muon(self, tiny: Settings) -> None:
        [result] = fine_tune(replace(tiny, algorithm="muon"))
        assert result.selection == ()
        assert saved_model(result.settings).is_dir()

    def test_help_explains_every_argument(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert "Images in a step, on all devices together. (type: int, default: 64)" in printed
        assert "} (type:" not in printed, "an argument without a description"


class TestOneStart:
    def test_both_optimizers_see_the_same(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same weights, the new head among them, then the same images in the same order, shifted alike."""
        weights: list[torch.Tensor] = []
        batches: list[torch.Tensor] = []
        training_step = ImageTrainer.training_step

        def record(self: ImageTrainer, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
            if self.state.global_step == 0:
                weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
            batches.append(inputs["pixel_values"])
            return training_step(self, model, inputs, *rest)

        monkeypatch.setattr(ImageTrainer, "training_step", record)
        fine_tune(replace(tiny, control=True))
        assert torch.equal(*weights)
        assert len(batches) == 8
        assert all(torch.equal(*pair) for pair in zip(batches[:4], batches[4:], strict=True))

    def test_weights_follow_the_seed(self, tiny: Settings) -> None:
        heads = []
        for seed in (0, 0, 1):
            recipe.set_seed(seed)
            heads.append(load_model(tiny.model, ["a", "b"])[0].classifier.weight)
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])


class TestHowItIsComputed:
    """Parts, workers, checkpointing and ranks change how a step is computed, not what is learned."""

    @pytest.mark.parametrize(
        "arguments",
        [{"accumulation": 4}, {"workers": 2}, {"gradient_checkpointing": True}],
        ids=lambda it: next(iter(it)),
    )
    def test_the_same_weights(self, arguments: dict[str, Any], tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        [plain] = fine_tune(replace(tiny, output=tiny.output / "plain"))
        seen: list[tuple[int, int, bool]] = []
        training_step = ImageTrainer.training_step

        def record(self: ImageTrainer, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
            workers = self.callback_handler.train_dataloader.num_workers
            seen.append((len(inputs["labels"]), workers, checkpoints_activations(model)))
            return training_step(self, model, inputs, *rest)

        monkeypatch.setattr(ImageTrainer, "training_step", record)
        [other] = fine_tune(replace(tiny, **arguments))
        parts = arguments.get("accumulation", 1)
        expected = (8 // parts, arguments.get("workers", 0), arguments.get("gradient_checkpointing", False))
        assert seen == [expected] * 4 * parts
        self.assert_same_course(other.settings, plain.settings)

    def test_two_ranks(self, tiny: Settings, tmp_path: Path) -> None:
        two = replace(tiny, output=tmp_path / "two", log_every=1)
        run_like_torchrun(2, train_on_rank, two)
        fine_tune(tiny)
        self.assert_same_course(two, tiny)
        history, expected = (SelectionHistory.load(run_folder(run) / "selection.json") for run in (two, tiny))
        assert torch.equal(history.shares, expected.shares)

    @staticmethod
    def assert_same_course(settings: Settings, expected: Settings) -> None:
        """Equal to rounding: losses and gradient norms of every step, and what is measured in the end."""
        names = ("loss", "grad_norm", "eval_loss", "eval_accuracy")
        courses = [
            [line[name] for line in log_of(run) for name in names if name in line] for run in (settings, expected)
        ]
        assert len(courses[1]) == 4 + 4 + 2
        assert courses[0] == pytest.approx(courses[1], rel=1e-4)


def train_on_rank(settings: Settings) -> None:
    counted: list[int] = []
    selection_page.save_pictures = draw_nothing  # type: ignore[assignment]
    recipe.Speedometer.step = lambda self, tokens: counted.append(tokens)  # type: ignore[method-assign]
    [result] = fine_tune(settings)
    assert bool(result.selection) == (os.environ["RANK"] == "0")
    assert counted == [4] * 4, "a rank's half of the batch, four times"


class TestLog:
    def test_figures_of_a_longer_run(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """A schedule from zero to the peak and back, images a second from step 21 on, files for TensorBoard."""
        tiny = replace(tiny, algorithm="adamw", lr=1e-3, steps=24, warmup=0.25, log_every=1, report_to=["tensorboard"])
        fine_tune(tiny)
        lines = [line for line in log_of(tiny) if "loss" in line]
        rates = [line["learning_rate"] for line in lines]
        assert rates[:7] == pytest.approx([1e-3 * step / 6 for step in range(7)])
        assert rates[12] == pytest.approx(0.75e-3), "a third of the way down a half cosine"
        assert rates[-1] < 1e-4
        assert all(line["images_per_second"] > 0 for line in lines[22:])
        assert "images_per_second" not in lines[10]
        assert list(run_folder(tiny).rglob("events.out.tfevents.*"))

    def test_operations_of_training(self, tiny: Settings) -> None:
        """A product of (n, m) with (m, k) is 2 n m k; backward passes through activations and weights, if trained."""
        model, _ = load_model(tiny.model, ["a", "b"])
        tokens, width = 5, 32
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width
        layer = attention + 2 * tokens * width * 64
        forward = 2 * (4 * width * 3 * 8 * 8 + 2 * layer + width * 2)
        inputs = {"pixel_values": torch.zeros(3, 3, 16, 16)}
        assert training_flops(model, inputs) == 3 * 3 * forward
        model.requires_grad_(False)
        assert training_flops(model, inputs) == 3 * 2 * forward
        assert model.training


class TestResume:
    def test_a_resumed_run_ends_like_an_uninterrupted_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit for bit, dropout and shifts included, with a part of the images seen twice."""
        monkeypatch.setattr(selection_page, "save_pictures", draw_nothing)
        model = save_tiny_vit(tmp_path / "model", dropout=0.1)
        whole = Settings(
            model=model,
            output=tmp_path / "whole",
            control=False,
            checkpoint_every=2,
            accumulation=2,
            **{**SMALL, "steps": 6, "held_out_rows": 1777},
        )
        fine_tune(whole)
        runs = replace(whole, output=tmp_path / "runs")
        training_step = ImageTrainer.training_step

        def fail_at_the_fourth(self: ImageTrainer, *rest: Any) -> torch.Tensor:
            if self.state.global_step == 3:
                raise RuntimeError("power cut")
            return training_step(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(ImageTrainer, "training_step", fail_at_the_fourth)
            with pytest.raises(RuntimeError, match="power cut"):
                fine_tune(runs)
        assert [path.name for path in run_folder(runs).glob("checkpoint-*")] == ["checkpoint-2"]

        fine_tune(replace(runs, resume=True))
        torch.testing.assert_close(saved_weights(runs), saved_weights(whole), rtol=0, atol=0)
        history, expected = (SelectionHistory.load(run_folder(run) / "selection.json") for run in (runs, whole))
        assert history.steps == [1, 2, 3, 4, 5, 6]
        assert torch.equal(history.shares, expected.shares)

    def test_a_finished_run_is_not_trained_again(self, tiny: Settings) -> None:
        [first] = fine_tune(tiny)
        [again] = fine_tune(replace(tiny, resume=True))
        assert (again.accuracy, again.loss, again.step_seconds) == (first.accuracy, first.loss, None)

    def test_checkpoints_of_an_earlier_run_go(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else a run that is interrupted before its first checkpoint would be resumed from another run's."""

        def fail(self: ImageTrainer, *rest: Any) -> torch.Tensor:
            raise RuntimeError("power cut")

        fine_tune(tiny)
        monkeypatch.setattr(ImageTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            fine_tune(tiny)
        with pytest.raises(InputError, match="--resume: there is no checkpoint"):
            fine_tune(replace(tiny, resume=True))


class TestModel:
    def test_pretrained_weights_and_processor_are_used_with_a_new_head(self, tiny: Settings) -> None:
        model, processor = load_model(tiny.model, ["a", "b"])
        body = ViTModel.from_pretrained(tiny.model, add_pooling_layer=False)
        torch.testing.assert_close(model.vit.state_dict(), body.state_dict(), rtol=0, atol=0)
        assert model.config.id2label == {0: "a", 1: "b"}
        assert model.classifier.weight.shape == (2, 32)
        assert processor.size["height"] == 16

    def test_a_head_for_other_classes_is_replaced(self, tiny: Settings) -> None:
        fine_tune(tiny)
        model, _ = load_model(str(saved_model(tiny)), ["a", "b"])
        assert model.config.id2label == {0: "a", 1: "b"}
        assert model.classifier.weight.shape == (2, 32)

    def test_precision(self) -> None:
        assert not training_arguments(Settings(cpu=True)).bf16
        assert training_arguments(Settings(cpu=True, precision="bf16")).bf16


class TestSplit:
    def test_no_digit_stands_on_both_sides(self) -> None:
        split = load_split(Settings())
        train, held_out = ({example.image.tobytes() for example in images} for images in (split.train, split.held_out))
        assert (len(train), len(held_out)) == (1400, 397)
        assert not train & held_out

    def test_it_has_every_class_and_does_not_follow_the_seed(self) -> None:
        split, other = load_split(Settings()), load_split(Settings(seed=1))
        assert split.classes == DIGITS
        assert set(split.train.labels) == set(split.held_out.labels) == set(range(10))
        assert [image.tobytes() for image, _ in split.held_out] == [image.tobytes() for image, _ in other.held_out]

    def test_digits_keep_their_labels_and_their_range(self) -> None:
        """An eight has ink in the middle, a zero none; the darkest ink is white on black."""
        train = load_split(Settings()).train
        middle: dict[int, list[int]] = {0: [], 8: []}
        for image, label in train:
            if label in middle:
                middle[label].append(max(image.getpixel((x, y))[0] for x in (3, 4) for y in (3, 4)))
        assert sum(middle[8]) / len(middle[8]) > 180
        assert sum(middle[0]) / len(middle[0]) < 60
        assert max(image.getextrema()[0][1] for image, _ in train) == 255

    def test_a_folder_of_images(self, folder_of_images: str, tiny: Settings) -> None:
        settings = replace(tiny, dataset=folder_of_images, held_out="test", lr=1e-2, adamw_lr=1e-2, steps=12)
        split = load_split(settings)
        assert (split.classes, len(split.train), len(split.held_out)) == (["cat", "dog"], 12, 4)
        assert {(image.size, image.getpixel((0, 0)), label) for image, label in split.held_out} == {
            ((20, 30), (0, 0, 0), 0),
            ((20, 30), (255, 255, 255), 1),
        }
        [result] = fine_tune(settings)
        assert result.accuracy == 1
        config = AutoModelForImageClassification.from_pretrained(saved_model(settings)).config
        assert config.id2label == {0: "cat", 1: "dog"}

    def test_labels_that_are_numbers_are_sorted_as_numbers(self, table: Callable[..., str]) -> None:
        split = load_split(Settings(dataset=table([10, 9, 2, 9]), held_out_rows=1))
        assert split.classes == ["2", "9", "10"]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a table of images, whose brightness is their row, and labels, and returns its folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(labels: list[Any], label: Any = None, split: str = "train") -> str:
        features = datasets.Features(
            {"image": datasets.Image(), "label": label or datasets.Value("string" if "a" in labels else "int64")}
        )
        images = [Image.new("L", (4, 4), row) for row in range(len(labels))]
        folder = tmp_path / "table"
        folder.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
        return str(folder)

    return write


class TestTrainingSequence:
    @pytest.fixture
    def images(self) -> Images:
        """Six images whose brightness is their label."""
        features = datasets.Features({"image": datasets.Image()})
        pictures = [Image.new("RGB", (8, 8), (100 + label,) * 3) for label in range(6)]
        return Images(datasets.Dataset.from_dict({"image": pictures}, features=features), "image", list(range(6)))

    def test_all_images_come_before_one_comes_again(self, images: Images) -> None:
        sequence = TrainingSequence(images, Settings(steps=3, batch_size=4))
        labels = [sequence[place].label for place in range(len(sequence))]
        assert sorted(labels[:6]) == sorted(labels[6:]) == list(range(6))
        assert labels[:6] != labels[6:]

    def test_an_example_follows_from_place_and_seed(self, images: Images) -> None:
        settings = Settings(steps=3, batch_size=4, flip=True)
        there = [pixels(example) for example in map(TrainingSequence(images, settings).__getitem__, range(12))]
        back = TrainingSequence(images, settings)
        assert [pixels(back[place]) for place in reversed(range(12))] == there[::-1]
        other = TrainingSequence(images, replace(settings, seed=1))
        assert [pixels(other[place]) for place in range(12)] != there

    def test_shifts_move_black_in_by_their_share_at_most(self, images: Images) -> None:
        still = TrainingSequence(images, Settings(steps=4, batch_size=16, shift=0))
        assert all(example.image.getextrema()[0][0] >= 100 for example in map(still.__getitem__, range(64)))
        moved = TrainingSequence(images, Settings(steps=4, batch_size=16, shift=0.25))
        edges = [
            [moved[place].image.getpixel(spot)[0] for place in range(64)] for spot in ((0, 4), (7, 4), (4, 0), (4, 7))
        ]
        assert all(min(edge) < 50 and max(edge) >= 100 for edge in edges)
        assert all(moved[place].image.getpixel((4, 4))[0] >= 100 for place in range(64))

    def test_flips_mirror_every_other_image(self) -> None:
        features = datasets.Features({"image": datasets.Image()})
        picture = Image.new("L", (2, 1))
        picture.putpixel((1, 0), 255)
        images = Images(datasets.Dataset.from_dict({"image": [picture]}, features=features), "image", [0])
        settings = Settings(steps=4, batch_size=50, shift=0)
        never = TrainingSequence(images, settings)
        assert {never[place].image.getpixel((1, 0))[0] for place in range(200)} == {255}
        flipped = TrainingSequence(images, replace(settings, flip=True))
        mirrored = sum(flipped[place].image.getpixel((0, 0))[0] == 255 for place in range(200))
        assert 70 < mirrored < 130


def pixels(example: Any) -> tuple[bytes, int]:
    return example.image.tobytes(), example.label


class TestBadInput:
    """Every error names the argument and what to do."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "--steps has to be 1 or more, got 0"),
            ({"warmup": 1.0}, "--warmup has to be from 0 to below 1, got 1.0"),
            ({"control_beta1": 1.0}, "--control_beta1 has to be from 0 to below 1"),
            ({"shift": 1.0}, "--shift has to be from 0 to below 1"),
            ({"workers": -1}, "--workers has to be 0 or more, got -1"),
            ({"batch_size": 9, "accumulation": 2}, "--batch_size 9 cannot be dealt out .* Give a multiple of 2"),
            ({"dataset": "missing/data"}, "--dataset, .*'train' of 'missing/data' could not be read"),
            ({"model": "missing/model"}, "--model 'missing/model' could not be loaded"),
            ({"held_out_rows": 1797}, "--held_out_rows 1797 leaves nothing to train on: there are 1797 images"),
            ({"held_out": "test"}, "digits has the split 'train' alone, got 'test'"),
            ({"fraction": 2.0}, r"--fraction must lie in \(0, 1\], got 2.0"),
            ({"report_to": ["nowhere"]}, "--report_to: nowhere is not supported"),
            ({"resume": True}, "--resume: there is no checkpoint in --output"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            fine_tune(Settings(**{"output": tmp_path, "cpu": True, **arguments}))

    @pytest.mark.parametrize(
        ("labels", "arguments", "message"),
        [
            (
                [0, 1],
                {"image_column": "picture"},
                "--image_column: there is no column 'picture'. Choose one of image, label",
            ),
            ([0, 1], {"image_column": "label"}, "--image_column label: this column holds no images"),
            ([0, 1], {"label_column": "class"}, "--label_column: there is no column 'class'"),
            ([0, None], {}, "--label_column: column 'label' is empty in row 1"),
            ([0, 0], {}, "--label_column label: there is one class"),
        ],
    )
    def test_columns(
        self, labels: list[Any], arguments: dict[str, Any], message: str, table: Callable[..., str]
    ) -> None:
        with pytest.raises(InputError, match=message):
            load_split(Settings(dataset=table(labels), held_out_rows=1, **arguments))

    def test_rows_without_a_label(self, table: Callable[..., str]) -> None:
        data = table([0, 1, -1], datasets.ClassLabel(names=["a", "b"]))
        with pytest.raises(InputError, match=r"there are rows without a label\. Choose another split"):
            load_split(Settings(dataset=data, held_out_rows=1))

    def test_unknown_labels_among_the_held_out_rows(self, table: Callable[..., str]) -> None:
        table(["a", "b"])
        with pytest.raises(InputError, match=r"--held_out test: labels that the training rows lack: \['c'\]"):
            load_split(Settings(dataset=table(["a", "c"], split="test"), held_out="test"))

    def test_a_model_without_an_image_processor(self, tmp_path: Path) -> None:
        model = save_tiny_vit(tmp_path)
        (tmp_path / "preprocessor_config.json").unlink()
        with pytest.raises(InputError, match=r"--model .* could not be loaded: .*image processor"):
            load_model(model, DIGITS)

    def test_several_gpus_in_one_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(InputError, match=r"2 GPUs are visible to one process\. Start with `torchrun"):
            training_arguments(Settings(cpu=True))

    def test_the_command_ends_with_the_message_alone(self) -> None:
        with pytest.raises(SystemExit, match="error: --steps has to be 1 or more"):
            main(["--steps=0"])
