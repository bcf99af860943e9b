"""The recipe, run as a user runs it: offline, a few steps, one device and two."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from dion2_lightning.monitoring.history import SelectionHistory
from recipes.offline_data import MODULES, read_docstrings
from recipes.offline_models import model_folder
from recipes.text_classification import train as recipe
from recipes.text_classification.data import load_rows, split_rows
from recipes.text_classification.train import TextClassifier

SHORT = ("--max_length=16", "--batch_size=4", "--max_steps=4", "--val_check_interval=2", "--log_every_n_steps=1")
ON_CPU = ("--accelerator=cpu", "--precision=32-true", "--enable_progress_bar=false")

Write = Callable[..., str]


def run(*arguments: str) -> None:
    auto_cli(recipe.main, args=[*SHORT, *ON_CPU, *arguments], set_defaults=recipe.TRAINER)


def run_command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command that the README gives, in a process of its own, which may start others."""
    found = subprocess.run(
        [sys.executable, "-m", "recipes.text_classification.train", *SHORT, *ON_CPU, f"--output={folder}", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(recipe.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert found.returncode == 0, found.stderr
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with MiniLM's tokenizer and two random layers without dropout, so that runs can be compared exactly."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a CSV file of texts and labels and returns its path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(*rows: str, name: str = "data.csv", header: str = "text,label") -> str:
        (tmp_path / name).write_text("\n".join([header, *rows]))
        return str(tmp_path / name)

    return write


def numbered(start: int, stop: int) -> list[str]:
    return [f"text {'one' if row % 2 else 'two'} {row},{'odd' if row % 2 else 'even'}" for row in range(start, stop)]


def logits(folder: Path, texts: list[str]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    inputs = AutoTokenizer.from_pretrained(folder / "model")(
        texts, truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits


def assert_measured(folder: Path, output: str, texts: list[str], labels: list[int]) -> None:
    """The table has what the saved model reaches on all validation rows, each counted once."""
    printed = re.search(rf"^{folder.name} +([\d.]+)% +([\d.]+) ", output, re.MULTILINE)
    assert printed, output
    found, target = logits(folder, texts), torch.tensor(labels)
    assert float(printed[1]) == pytest.approx(100 * (found.argmax(-1) == target).float().mean().item(), abs=0.06)
    assert float(printed[2]) == pytest.approx(cross_entropy(found, target).item(), abs=6e-4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The command's own defaults, shortened: MiniLM on docstrings, Dion2 and its control."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_command(folder, "--validation=70")


class TestOfflineRun:
    def test_the_table_has_what_the_saved_models_reach(self, demo: Any) -> None:
        _, rows = split_rows(load_rows("docstrings", None, "train", "text", "label"), 70)
        for name in ("dion2", "adamw"):
            assert_measured(demo[0] / name, demo[1].stdout, list(rows["text"]), list(rows["label"]))

    def test_saved_models_have_the_weights_of_the_checkpoint_and_the_names_of_the_classes(self, demo: Any) -> None:
        for name in ("dion2", "adamw"):
            saved = AutoModelForSequenceClassification.from_pretrained(demo[0] / name / "model")
            assert saved.config.id2label == dict(enumerate(MODULES))
            assert saved.config.label2id == {name: number for number, name in enumerate(MODULES)}
            checkpoint = torch.load(demo[0] / name / "last.ckpt", weights_only=True)
            assert checkpoint["global_step"] == 4
            weights = {key.removeprefix("model."): each for key, each in checkpoint["state_dict"].items()}
            torch.testing.assert_close(dict(saved.state_dict()), weights, rtol=0, atol=0)

    def test_a_newcomer_sees_the_recipes_own_lines(self, demo: Any) -> None:
        printed = demo[1].stdout + demo[1].stderr
        assert "texts to train on, 70 for validation, 8 classes" in printed
        assert f"dion2-report {demo[0] / 'dion2' / 'selection.json'}" in printed
        assert demo[1].stderr.count("Dion2 and AdamW for TextClassifier: ") == 1, "it is said once"
        for word in ("warn", "hint", "tip:", "http", "Seed set", "GPU available", "callbacks"):
            assert word.lower() not in printed.lower()

    def test_what_was_selected_is_saved_beside_the_model(self, demo: Any) -> None:
        history = SelectionHistory.load(demo[0] / "dion2" / "selection.json")
        assert history.steps == [1, 2, 3, 4]
        assert len(history.infos) == 6 * 6 + 1
        assert not list(demo[0].glob("adamw/*selection*"))


class TestStart:
    def test_both_optimizers_have_one_head_and_one_order_and_the_head_follows_the_seed(
        self, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heads: list[torch.Tensor] = []
        batches: list[torch.Tensor] = []
        step = TextClassifier.training_step

        def record(self: TextClassifier, batch: Any, batch_index: int) -> torch.Tensor:
            if batch_index == 0:
                heads.append(self.model.classifier.weight.detach().clone())
            batches.append(batch["input_ids"])
            return step(self, batch, batch_index)

        monkeypatch.setattr(TextClassifier, "training_step", record)
        run(f"--model={tiny}", f"--output={tmp_path}", "--validation=8")
        assert len(batches) == 8
        assert all(torch.equal(*pair) for pair in zip(batches[:4], batches[4:], strict=True))
        run(f"--model={tiny}", f"--output={tmp_path}", "--validation=8", "--control=null", "--seed=1")
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])
        assert not torch.equal(batches[0], batches[8])

    def test_another_head_is_replaced_and_a_tokenizer_without_padding_pads_with_its_end(
        self, tiny: str, tmp_path: Path, write: Write
    ) -> None:
        start = tmp_path / "start"
        AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=5).save_pretrained(start)
        AutoTokenizer.from_pretrained(tiny, pad_token=None, eos_token="[SEP]").save_pretrained(start)
        run(f"--model={start}", f"--output={tmp_path}", f"--dataset={write(*numbered(0, 20))}", "--validation=4")
        config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dion2" / "model").config
        assert config.id2label == {0: "even", 1: "odd"}
        assert config.pad_token_id == AutoTokenizer.from_pretrained(tiny).sep_token_id


class TestResume:
    @pytest.mark.parametrize("saved", [5, 7], ids=["between epochs", "in the second epoch"])
    @pytest.mark.parametrize("algorithm", ["dion2", "adamw"])
    def test_an_interrupted_run_ends_like_an_uninterrupted_one(
        self, algorithm: str, saved: int, tiny: str, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit for bit; an epoch has five steps."""
        data = (f"--model={tiny}", f"--dataset={write(*numbered(0, 24))}", "--validation=4", "--max_steps=12")
        settings = (*data, f"--val_check_interval={saved}", f"--optimizer.algorithm={algorithm}", "--control=null")
        run(*settings, f"--output={tmp_path / 'whole'}")
        step = TextClassifier.training_step

        def fail(self: TextClassifier, batch: Any, batch_index: int) -> torch.Tensor:
            if self.trainer.global_step == saved + 1:
                raise RuntimeError("power cut")
            return step(self, batch, batch_index)

        with monkeypatch.context() as patch:
            patch.setattr(TextClassifier, "training_step", fail)
            with pytest.raises(RuntimeError, match="power cut"):
                run(*settings, f"--output={tmp_path / 'cut'}")
        run(*settings, f"--output={tmp_path / 'cut'}", "--resume=true")
        whole, resumed = (
            AutoModelForSequenceClassification.from_pretrained(tmp_path / name / algorithm / "model").state_dict()
            for name in ("whole", "cut")
        )
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
        if algorithm == "dion2":
            histories = [SelectionHistory.load(tmp_path / name / "dion2/selection.json") for name in ("cut", "whole")]
            assert histories[0].steps == histories[1].steps == list(range(1, 13))
            assert torch.equal(*(history.shares for history in histories))


class TestTwoDevices:
    @pytest.mark.timeout(240)
    def test_train_like_one_with_twice_the_batch_and_resume(self, tiny: str, tmp_path: Path, write: Write) -> None:
        """The real command, with a model and a dataset by their names on the hub, from their caches."""
        snapshot = tmp_path / "hub" / "models--lab--tiny" / "snapshots" / "0"
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(tiny)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0")
        rows = numbered(40, 171)  # two devices cannot share them evenly, and read more than one batch each
        files = {"train": write(*numbered(0, 40)), "test": write(*rows, name="test.csv")}
        builder = datasets.load_dataset_builder("csv", data_files=files, cache_dir=str(tmp_path / "other"))
        builder.dataset_name, builder.info.config_name = "reviews", "default"
        builder.download_and_prepare(str(tmp_path / "datasets" / "lab___reviews" / "default" / "0.0.0" / "0"))
        caches = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}

        steps = ("--max_steps=7", "--val_check_interval=6")  # an epoch has five; the checkpoint is in the second
        named = ("--model=lab/tiny", "--dataset=lab/reviews", "--validation=test", "--devices=2", *steps)
        output = run_command(tmp_path / "two", *named, **caches).stdout
        assert output.count("for validation") == 1, "said once"
        by_path = (f"--model={tiny}", f"--dataset={files['train']}", f"--validation={files['test']}", *steps)
        run(*by_path, "--batch_size=8", f"--output={tmp_path / 'one'}")
        texts, labels = [row.split(",")[0] for row in rows], [int(row.endswith("odd")) for row in rows]
        for name in ("dion2", "adamw"):
            assert_measured(tmp_path / "two" / name, output, texts, labels)
            expected = logits(tmp_path / "one" / name, texts)
            torch.testing.assert_close(logits(tmp_path / "two" / name, texts), expected, rtol=0, atol=1e-4)

        uninterrupted = logits(tmp_path / "two" / "dion2", texts)
        shutil.rmtree(tmp_path / "two" / "dion2" / "model")
        run_command(tmp_path / "two", *named, "--control=null", "--resume=true", **caches)
        torch.testing.assert_close(logits(tmp_path / "two" / "dion2", texts), uninterrupted, rtol=0, atol=0)


def keys(rows: datasets.Dataset) -> set[str]:
    return {" ".join(text.lower().split()) for text in rows["text"]}


class TestSplit:
    def test_no_text_is_on_both_sides(self) -> None:
        train, validation = split_rows(load_rows("docstrings", None, "train", "text", "label"), 512)
        assert len(validation) == len(keys(validation)) == 512
        assert len(train) == len(keys(train)) > 1000
        assert not keys(train) & keys(validation)
        assert train.features["label"].names == list(MODULES)
        docstrings = set(read_docstrings())
        assert all((row["text"], MODULES[row["label"]]) in docstrings for row in validation)

    def test_texts_of_a_validation_file_are_taken_from_the_training_rows(self, write: Write) -> None:
        """And a label has one number, whatever labels a file has."""
        data = write("One  text,5", "another,3", "third,4", "Third,4", "fourth,5")
        file = write("5,one text", name="validation.csv", header="stars,review")
        train, validation = split_rows(
            load_rows(data, None, "train", "text", "label"), load_rows(file, None, file, "review", "stars")
        )
        assert list(train["text"]) == ["another", "third", "fourth"]
        assert list(validation["text"]) == ["one text"]
        names = train.features["label"].names
        assert [names[label] for rows in (train, validation) for label in rows["label"]] == ["3", "4", "5", "5"]

    def test_class_names_of_a_dataset_are_kept(self) -> None:
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
        rows = datasets.Dataset.from_dict({"text": ["p", "q", "r"], "label": [0, 1, 0]}, features=features)
        assert split_rows(rows, 1)[0].features["label"].names == ["z", "a"]


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--validation=100000"], r"validation: it has \d{4} rows and leaves 0 to train on"),
            (["--validation=0"], "--validation 0: it must be the name of a part, or a number of rows over 0"),
            (["--validation=-5"], "--validation -5: it must be the name of a part"),
            (["--validation=test"], r"validation: it has \d{4} rows and leaves 0 to train on"),
            (["--optimizer.algorithm=adamw"], "control: it is adamw too, and would overwrite the first run"),
            (["--resume=true"], "resume: there is no checkpoint in"),
        ],
    )
    def test_what_would_be_silently_wrong(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            run(*arguments, f"--output={tmp_path}")
