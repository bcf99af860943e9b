"""The pretraining recipe, run for real on one process: model, data, metrics, resuming, refusals."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.utils import set_seed
from jsonargparse import auto_cli
from torch import nn
from torch.nn import functional
from torch.utils.data import RandomSampler
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from dion2_lightning import OptimizerSettings, SelectionHistory
from recipes.pretraining import train as recipe
from recipes.pretraining.data import load_tokenizer, load_windows
from recipes.pretraining.train import Settings, make_model, train
from tests.recipes.pretraining import (
    OPTIMIZER,
    alone,
    assert_same,
    logged,
    run,
    run_launcher,
    run_until_power_cut,
    saved_logits,
    saved_model,
    tiny_settings,
)

FOLDER = Path(recipe.__file__).parent


@pytest.fixture(autouse=True)
def alone_in_a_folder(tmp_path: Path) -> Iterator[None]:
    with alone(tmp_path / "cache"):
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Settings:
    return tiny_settings(tmp_path)


@pytest.fixture
def gpt2(tmp_path: Path) -> GPT2LMHeadModel:
    """Saved in the folder of that name; it has tied weights, and dropout."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.save_pretrained(tmp_path / "gpt2")
    return model


class TestRun:
    @pytest.mark.timeout(300)  # reads the sources of Python's library
    def test_the_default_from_end_to_end(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """As it is, but for its length: the model, the bytes and the documents that the command begins with."""
        read: list[tuple[datasets.Dataset, datasets.Dataset]] = []

        def keep(*arguments: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
            read.append(load_windows(*arguments))
            return read[0]

        monkeypatch.setattr(recipe, "load_windows", keep)
        arguments = ["--steps=3", "--log_every=1", "--validation_windows=21", "--log_with=tensorboard"]
        settings = auto_cli(Settings, args=[*arguments, f"--output={tmp_path / 'run'}"])
        val_loss = train(settings)
        model, tokenizer = saved_model(settings), AutoTokenizer.from_pretrained(settings.output / "model")
        assert isinstance(tokenizer, ByT5Tokenizer)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.use_cache
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}

        windows = read[0][1][:]["input_ids"]
        assert windows.shape == (21, 128)
        assert len(tokenizer.decode(windows[0], skip_special_tokens=True).split()) > 10, "English"
        with torch.no_grad():
            by_hand = functional.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert val_loss == pytest.approx(by_hand.item(), rel=1e-5)
        assert logged(settings, "val_loss") == pytest.approx([val_loss])
        losses = logged(settings, "train_loss")
        set_seed(settings.seed)
        untrained, some = make_model(settings, tokenizer), read[0][0][:64]["input_ids"]
        with torch.no_grad():
            logits = untrained(some).logits[:, :-1].flatten(0, 1)
        assert losses[0] == pytest.approx(functional.cross_entropy(logits, some[:, 1:].flatten()).item(), abs=0.05)
        assert losses[0] > losses[1] > losses[2]
        assert len(logged(settings, "dion2/coverage")) == 3
        assert SelectionHistory.load(tmp_path / "run" / "selection.json").steps == [1, 2, 3]

        assert len([record for record in caplog.records if record.name == "dion2_lightning"]) == 1
        printed = capfd.readouterr()
        assert f"val_loss {val_loss:.5g}\n" in printed.out
        assert "warn" not in (printed.out + printed.err).lower()

    def test_what_is_saved_is_what_was_trained(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        trained: list[nn.Module] = []
        validate = recipe.validate

        def keep(accelerator: Any, model: nn.Module, loader: Any) -> float:
            trained.append(model)
            return validate(accelerator, model, loader)

        monkeypatch.setattr(recipe, "validate", keep)
        run(tiny)
        with torch.no_grad():
            logits = trained[-1].eval()(input_ids=torch.arange(tiny.length)[None]).logits
        assert torch.equal(saved_logits(tiny), logits)

    @pytest.mark.parametrize("changes", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}], ids=str)
    def test_what_saves_memory_changes_nothing(self, changes: dict[str, Any], tiny: Settings) -> None:
        whole = run(tiny)
        found = run(tiny, output=tiny.output.parent / "other", **changes)
        for name in ("train_loss", "gradient_norm", "val_loss"):
            assert logged(found, name) == pytest.approx(logged(whole, name), abs=1e-5)
        assert len(logged(whole, "train_loss")) == 4

    def test_gradient_checkpointing_is_turned_on(self) -> None:
        models = [make_model(Settings(gradient_checkpointing=on), ByT5Tokenizer()) for on in (False, True)]
        found = [any(getattr(each, "gradient_checkpointing", False) for each in model.modules()) for model in models]
        assert found == [False, True]

    def test_compiles_the_decoder_layers_and_nothing_else(
        self, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled: list[str] = []
        compile_module = nn.Module.compile

        def compile_without_code(self: nn.Module) -> None:
            compiled.append(type(self).__name__)
            compile_module(self, backend="eager")

        monkeypatch.setattr(nn.Module, "compile", compile_without_code)
        found = run(tiny, compile=True)
        assert compiled == ["LlamaDecoderLayer"] * 2
        plain = run(tiny, output=tiny.output.parent / "plain")
        assert saved_model(found).state_dict().keys() == saved_model(plain).state_dict().keys()
        assert logged(found, "train_loss") == pytest.approx(logged(plain, "train_loss"), abs=1e-5)

    def test_the_control_begins_alike_and_selects_nothing(self, tiny: Settings) -> None:
        run(tiny)
        control = run(tiny, output=tiny.output.parent / "adamw", optimizer=replace(OPTIMIZER, algorithm="adamw"))
        assert logged(control, "train_loss")[0] == logged(tiny, "train_loss")[0]
        assert logged(control, "train_loss")[2] != logged(tiny, "train_loss")[2]
        assert not (control.output / "selection.json").exists()

    def test_the_schedule_rises_stays_and_falls(self, tiny: Settings) -> None:
        run(tiny, steps=8, warmup=0.25, decay=0.5)
        rates = [rate / OPTIMIZER.lr for rate in logged(tiny, "learning_rate")]
        assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25])

    def test_bfloat16_is_for_computing_alone(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        exact = run(tiny)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as a launcher does
        found = run(tiny, output=tiny.output.parent / "bf16")
        assert {weight.dtype for weight in saved_model(found).parameters()} == {torch.float32}
        assert 0 < abs(logged(found, "train_loss")[0] - logged(exact, "train_loss")[0]) < 0.01


class TestResume:
    @pytest.mark.parametrize("algorithm", ["dion2", "adamw"])
    def test_ends_like_an_uninterrupted_run(self, algorithm: Any, tiny: Settings, gpt2: GPT2LMHeadModel) -> None:
        """Bit for bit, in the middle of the data, of the schedule and of the random numbers of dropout."""
        tiny = replace(tiny, model=str(tiny.output.parent / "gpt2"), optimizer=replace(OPTIMIZER, algorithm=algorithm))
        whole = run(tiny, output=tiny.output.parent / "whole")
        cut = run(run_until_power_cut(tiny))
        assert_same(cut, whole)
        if algorithm == "dion2":
            history, other = (SelectionHistory.load(each.output / "selection.json") for each in (cut, whole))
            assert history.steps == other.steps == [1, 2, 3, 4]
            assert history.overall == other.overall

    def test_longer_and_in_other_parts_of_a_batch(self, tiny: Settings) -> None:
        """Three steps of four parts end where a step of eight does not: a counter that goes on would be out of step."""
        tiny = replace(tiny, warmup=0.0, decay=0.25)
        cut = run_until_power_cut(tiny, checkpoint_every=3, micro_batch_size=2)
        run(cut, steps=6, micro_batch_size=1)
        whole = run(tiny, steps=6, output=tiny.output.parent / "whole")
        assert logged(tiny, "train_loss") == pytest.approx(logged(whole, "train_loss"), abs=1e-5)

    def test_a_finished_run_is_validated_again(self, tiny: Settings) -> None:
        run(tiny, checkpoint_every=1)
        assert sorted(path.name for path in (tiny.output / "checkpoints").iterdir()) == ["checkpoint_3", "checkpoint_4"]
        before = saved_model(tiny).state_dict()
        run(tiny, resume=True)
        assert all(torch.equal(weight, before[name]) for name, weight in saved_model(tiny).state_dict().items())
        assert len(set(logged(tiny, "val_loss")[-2:])) == 1


class TestModel:
    def test_takes_a_configuration_and_no_weights(self, tiny: Settings, gpt2: GPT2LMHeadModel) -> None:
        run(tiny, model=str(tiny.output.parent / "gpt2"))
        model = saved_model(tiny)
        assert isinstance(model, GPT2LMHeadModel)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (2, 32, 384)
        assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 1)
        correlated = torch.stack([model.transformer.wpe.weight.flatten(), gpt2.transformer.wpe.weight.flatten()])
        assert abs(torch.corrcoef(correlated)[0, 1].item()) < 0.1

    def test_the_vocabulary_is_rounded_up(self) -> None:
        tokenizer = ByT5Tokenizer(extra_ids=130)
        assert len(tokenizer) == 389
        assert make_model(Settings(hidden_size=32), tokenizer).config.vocab_size == 448

    @pytest.mark.timeout(300)
    def test_model_and_dataset_by_their_names_on_the_hub(self, tiny: Settings, gpt2: GPT2LMHeadModel) -> None:
        """From their caches, by the command."""
        folder = tiny.output.parent
        snapshot = folder / "hub" / "models--org--tiny" / "snapshots" / "0"
        snapshot.parent.mkdir(parents=True)
        (folder / "gpt2").rename(snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0")
        files = {"train": tiny.dataset, "test": tiny.dataset.replace("text.txt", "test.txt")}
        Path(files["test"]).write_text("A text that is in no manual. " * 20)
        builder = datasets.load_dataset_builder("text", data_files=files, cache_dir=str(folder / "other"))
        builder.dataset_name, builder.info.config_name = "manual", "default"
        builder.download_and_prepare(str(folder / "datasets" / "org___manual" / "default" / "0.0.0" / "0"))
        arguments = ("--model=org/tiny", "--dataset=org/manual", "--validation=test", "--length=32", "--steps=2")
        printed = run_launcher(
            [sys.executable, str(FOLDER / "train.py"), *arguments, f"--output={tiny.output}"],
            seconds=240,
            PYTHONPATH=str(FOLDER.parents[1]),
            HF_HUB_CACHE=str(folder / "hub"),
            HF_DATASETS_CACHE=str(folder / "datasets"),
        )
        assert "18 to validate on" in printed
        assert isinstance(saved_model(tiny), GPT2LMHeadModel)


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(*texts: str, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        if path.suffix == ".txt":
            path.write_text("\n\n".join(texts))
        elif path.suffix == ".parquet":
            datasets.Dataset.from_dict({"text": list(texts)}).to_parquet(path)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write_file


def decoded(windows: datasets.Dataset) -> list[str]:
    return [ByT5Tokenizer().decode(window["input_ids"]) for window in windows]


class TestData:
    @pytest.mark.parametrize(("name", "processes"), [("data.txt", None), ("data.jsonl", None), ("data.parquet", 2)])
    def test_documents_are_closed_and_packed(self, name: str, processes: int | None, write: Write) -> None:
        data = write("one", "two and more", "three", name=name)
        settings = Settings(dataset=data, validation=write("something else", name="v.jsonl"), length=8)
        train, validation = load_windows(replace(settings, tokenizing_processes=processes), ByT5Tokenizer())
        assert decoded(train) == ["one</s>two ", "and more"]
        assert decoded(validation) == ["somethin"]

    def test_validation_documents_are_not_trained_on(self, write: Write) -> None:
        data = write("A   text of two\nlines", "another text", "a text", "Another  TEXT")
        settings = Settings(dataset=data, validation=write("a text of two lines", "another text", name="v.txt"))
        train, _ = load_windows(replace(settings, length=2), ByT5Tokenizer())
        assert "".join(decoded(train)) == "a text"

    def test_a_share_for_validation_does_not_follow_the_seed(self, write: Write) -> None:
        data = write(*(f"document {number:02}" for number in range(40)))
        settings = Settings(dataset=data, validation=0.25, length=12)
        parts = [[*map(decoded, load_windows(replace(settings, seed=seed), ByT5Tokenizer()))] for seed in (0, 1)]
        assert parts[0] == parts[1]
        train, validation = parts[0]
        assert (len(train), len(validation)) == (30, 10)
        assert len({*train, *validation}) == 40

    def test_it_is_tokenized_once(self, tmp_path: Path, write: Write) -> None:
        """What a later call may change decides nothing about the windows, so they come from disk."""
        settings = Settings(dataset=write(*(f"document {number:02}" for number in range(40))), length=12)

        def files_after(settings: Settings) -> set[Path]:
            load_windows(settings, ByT5Tokenizer())
            return set((tmp_path / "cache").rglob("*.arrow"))

        first = files_after(settings)
        resumed = replace(settings, resume=True, steps=800, seed=1, log_every=3, output=tmp_path / "elsewhere")
        assert files_after(resumed) == first
        assert files_after(replace(settings, length=16)) > first

    def test_an_order_covers_all_windows_before_it_repeats(self, tiny: Settings, monkeypatch: Any) -> None:
        read: list[int] = []

        class Order(RandomSampler):
            def __iter__(self) -> Iterator[int]:
                for index in super().__iter__():
                    read.append(index)
                    yield index

        monkeypatch.setattr(recipe, "RandomSampler", Order)
        tiny = run(tiny, steps=3, batch_size=4, length=2000, validation=0.4)
        windows = len(load_windows(tiny, ByT5Tokenizer())[0])
        assert 6 <= windows < 12
        assert len(read) == 12
        assert sorted(read[:windows]) == list(range(windows))
        assert len(set(read[windows:])) == 12 - windows
        assert read[windows:] != read[: 12 - windows]


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"warmup": 0.6, "decay": 0.6},
                "--warmup 0.6, --decay 0.6: they are shares of the steps, together at most 1",
            ),
            ({"warmup": -1.0}, "--warmup -1.0, --decay 0.5: they are shares of the steps"),
            ({"validate_every": 0}, "--validate_every 0: it must be at least 1"),
            ({"micro_batch_size": 3}, "--batch_size 8 is no multiple of 1 ranks times 3 windows"),
            ({"length": 30_000}, "0 windows of --length 30000 to train on, 0 to validate on"),
        ],
        ids=str,
    )
    def test_what_would_silently_go_wrong(self, changes: dict[str, Any], message: str, tiny: Settings) -> None:
        with pytest.raises(ValueError, match=message):
            run(tiny, **changes)

    def test_checkpoints_of_another_run(self, tiny: Settings) -> None:
        run_until_power_cut(tiny)
        with pytest.raises(ValueError, match=r"--output .* holds checkpoints. Give --resume true, or another folder"):
            run(tiny)

    def test_a_tokenizer_without_an_end_token(self, tmp_path: Path) -> None:
        tokenizer = GPT2TokenizerFast(vocab={"a": 0}, merges=[], eos_token=None)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(ValueError, match="has no end token, which has to close every document"):
            load_tokenizer(str(tmp_path / "tokenizer"))


class TestCommand:
    def test_the_example_file_is_valid(self) -> None:
        settings = auto_cli(Settings, args=[f"--config={FOLDER / 'gpt2-size.yaml'}"])
        assert isinstance(settings.optimizer, OptimizerSettings)
        assert settings.validation == 0.001
        assert settings.batch_size % (8 * settings.micro_batch_size) == 0
