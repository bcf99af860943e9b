"""The pretraining recipe, run for real on one process: data, model, checkpoints, figures, refusals."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from jsonargparse import auto_cli
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from dion2_lightning import OptimizerSettings, SelectionHistory
from recipes.inputs import InputError
from recipes.metrics import MetricsFile, read_metrics
from recipes.pretraining import model as models
from recipes.pretraining import ranks
from recipes.pretraining import train as recipe
from recipes.pretraining.checkpoints import Checkpoints
from recipes.pretraining.data import IGNORED, PackedTokens, fill_up, load_windows, pack, shuffled_order
from recipes.pretraining.model import build_model, make_model
from recipes.pretraining.settings import Settings
from recipes.pretraining.train import main, pretrain
from tests.recipes.pretraining import OPTIMIZER, logged, saved_logits, saved_weights, tiny_settings

EXAMPLES = sorted(Path(recipe.__file__).parent.glob("*.yaml"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What datasets keeps on disk, and Accelerate in its classes, is each test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def tiny(tmp_path: Path) -> Settings:
    return tiny_settings(tmp_path)


def again(settings: Settings, name: str, **changes: Any) -> Settings:
    """Settings of another run, with a folder of its own; a new process would begin with Accelerate's classes as new."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return replace(settings, output=settings.output.parent / name, **changes)


class TestRun:
    def test_the_default_from_end_to_end(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """As it is, but for its length: the model, the bytes and the documents that the command begins with."""
        read: list[Any] = []

        def keep(settings: Settings, tokenizer: Any) -> Any:
            read.extend(load_windows(settings, tokenizer))
            return read

        monkeypatch.setattr(recipe, "load_windows", keep)
        output = tmp_path / "run"
        main(["--steps=3", "--log_every=1", "--held_out_windows=16", f"--output={output}"])
        settings = Settings(output=output)
        model = AutoModelForCausalLM.from_pretrained(output / "model")
        tokenizer = AutoTokenizer.from_pretrained(output / "model")
        assert isinstance(tokenizer, ByT5Tokenizer)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert all(weight.dtype == torch.float32 for weight in model.parameters())

        windows = torch.stack([read[1][index]["input_ids"] for index in range(16)])
        assert len(tokenizer.decode(windows[0], skip_special_tokens=True).split()) > 10, "English"
        with torch.no_grad():
            logits = model(input_ids=windows).logits
        by_hand = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert logged(settings, "held_out_loss") == pytest.approx([by_hand.item()], rel=1e-5)
        losses = logged(settings, "train_loss")
        assert losses[0] == pytest.approx(math.log(384), abs=0.1)
        assert losses[0] > losses[1] > losses[2]
        assert len(logged(settings, "dion2/coverage")) == 3

        assert len([record for record in caplog.records if record.name == "dion2_lightning"]) == 1
        printed = capfd.readouterr()
        assert "warn" not in (printed.out + printed.err).lower()
        assert f'AutoModelForCausalLM.from_pretrained("{output / "model"}")' in printed.out
        assert SelectionHistory.load(output / "selection.json").steps == [1, 2, 3]

    def test_what_is_saved_is_what_was_trained(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        trained: list[nn.Module] = []
        save_model = recipe.save_model

        def keep(accelerator: Any, settings: Settings, model: nn.Module, tokenizer: Any) -> None:
            trained.append(model)
            save_model(accelerator, settings, model, tokenizer)

        monkeypatch.setattr(recipe, "save_model", keep)
        pretrain(tiny)
        with torch.no_grad():
            logits = trained[0].eval()(input_ids=torch.arange(tiny.length)[None]).logits
        assert torch.equal(saved_logits(tiny), logits)

    def test_accumulation_changes_nothing(self, tiny: Settings) -> None:
        pretrain(tiny)
        pretrain(parts := again(tiny, "parts", micro_batch_size=2))
        for name in ("train_loss", "gradient_norm", "held_out_loss"):
            assert logged(parts, name) == pytest.approx(logged(tiny, name), abs=1e-5)
        assert len(logged(tiny, "train_loss")) == 4

    def test_gradient_checkpointing_changes_nothing(self, tiny: Settings) -> None:
        pretrain(tiny)
        pretrain(checkpointed := again(tiny, "checkpointed", gradient_checkpointing=True))
        assert logged(checkpointed, "train_loss") == logged(tiny, "train_loss")

    def test_compiles_the_decoder_layers_and_nothing_else(
        self, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled: list[str] = []
        compile_module = nn.Module.compile

        def compile_without_code(self: nn.Module) -> None:
            compiled.append(type(self).__name__)
            compile_module(self, backend="eager")

        monkeypatch.setattr(nn.Module, "compile", compile_without_code)
        pretrain(again(tiny, "compiled", compile=True))
        assert compiled == ["LlamaDecoderLayer"] * 2
        pretrain(again(tiny, "plain"))
        assert saved_weights(again(tiny, "compiled")).keys() == saved_weights(again(tiny, "plain")).keys()
        expected = logged(again(tiny, "plain"), "train_loss")
        assert logged(again(tiny, "compiled"), "train_loss") == pytest.approx(expected, abs=1e-5)

    def test_the_control_begins_alike_and_selects_nothing(self, tiny: Settings) -> None:
        pretrain(tiny)
        pretrain(control := again(tiny, "control", optimizer=replace(OPTIMIZER, algorithm="adamw")))
        assert logged(control, "train_loss")[0] == logged(tiny, "train_loss")[0]
        assert logged(control, "train_loss")[2] != logged(tiny, "train_loss")[2]
        assert logged(control, "dion2/coverage") == []
        assert not (control.output / "selection.json").exists()

    def test_the_schedule_rises_stays_and_falls(self, tiny: Settings) -> None:
        pretrain(replace(tiny, steps=8, warmup=0.25, decay=0.5, checkpoint_every=8))
        rates = [rate / OPTIMIZER.lr for rate in logged(tiny, "learning_rate")]
        assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25])

    def test_bfloat16_is_for_computing_alone(self, tiny: Settings) -> None:
        pretrain(replace(tiny, precision="bf16"))
        assert all(weight.dtype == torch.float32 for weight in saved_weights(tiny).values())
        pretrain(exact := again(tiny, "exact", precision="no"))
        difference = abs(logged(exact, "train_loss")[0] - logged(tiny, "train_loss")[0])
        assert 0 < difference < 0.01

    def test_trackers_get_every_figure(self, tiny: Settings) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        pretrain(replace(tiny, log_with=["tensorboard"]))
        events = EventAccumulator(str(tiny.output / "pretraining")).Reload()
        assert {"train_loss", "held_out_loss", "dion2/coverage"} <= set(events.Tags()["scalars"])
        written = [event.value for event in events.Scalars("train_loss")]
        assert written == pytest.approx(logged(tiny, "train_loss"))

    def test_speed_is_logged(self, tiny: Settings) -> None:
        pretrain(replace(tiny, steps=23, checkpoint_every=100, log_every=23))
        [speed] = logged(tiny, "tokens_per_second")
        assert speed > 0


class TestHeldOutLoss:
    def test_is_the_mean_over_tokens_however_they_are_divided(self) -> None:
        accelerator = recipe.make_accelerator(Settings())
        torch.manual_seed(0)
        model = make_model(Settings(hidden_size=32, layers=1, length=16), ByT5Tokenizer())
        windows = PackedTokens(torch.randint(0, 256, (7 * 16,)), 16)
        with torch.no_grad():
            by_hand = model(input_ids=windows.windows, labels=windows.windows).loss.item()
        for size in (1, 4, 8):
            loader = DataLoader(fill_up(windows, size), batch_size=size)
            assert recipe.measure(accelerator, model, loader) == pytest.approx(by_hand, rel=1e-6)


class PowerCutError(Exception):
    pass


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ends a run right after its first checkpoint; `undo` brings the power back."""
    save = Checkpoints.save

    def save_and_fail(self: Checkpoints, step: int) -> None:
        save(self, step)
        raise PowerCutError

    monkeypatch.setattr(Checkpoints, "save", save_and_fail)
    return monkeypatch


class TestResume:
    def test_ends_like_an_uninterrupted_run(self, tiny: Settings, power_cut: pytest.MonkeyPatch) -> None:
        with pytest.raises(PowerCutError):
            pretrain(tiny)
        power_cut.undo()
        assert not (tiny.output / "model").exists()
        pretrain(again(tiny, "run", resume=True))
        pretrain(whole := again(tiny, "whole"))
        weights, expected = saved_weights(tiny), saved_weights(whole)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        for name in ("train_loss", "gradient_norm", "learning_rate", "held_out_loss", "dion2/turnover"):
            assert logged(tiny, name) == logged(whole, name), name
        history, other = (SelectionHistory.load(run.output / "selection.json") for run in (tiny, whole))
        assert history.steps == other.steps == [1, 2, 3, 4]
        assert history.overall == other.overall

    def test_dropout_goes_on_with_the_same_masks(
        self, tiny: Settings, tmp_path: Path, power_cut: pytest.MonkeyPatch
    ) -> None:
        GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=32).save_pretrained(tmp_path / "gpt2")
        tiny = replace(tiny, model=str(tmp_path / "gpt2"))
        with pytest.raises(PowerCutError):
            pretrain(tiny)
        power_cut.undo()
        pretrain(again(tiny, "run", resume=True))
        pretrain(whole := again(tiny, "whole"))
        assert logged(tiny, "train_loss") == logged(whole, "train_loss")

    def test_a_run_can_be_made_longer_before_its_decay(self, tiny: Settings, power_cut: pytest.MonkeyPatch) -> None:
        with pytest.raises(PowerCutError):
            pretrain(replace(tiny, warmup=0.0, decay=0.5))
        power_cut.undo()
        pretrain(again(tiny, "run", warmup=0.0, decay=0.5, steps=6, resume=True))
        pretrain(whole := again(tiny, "whole", warmup=0.0, decay=0.5, steps=6))
        assert logged(tiny, "train_loss") == logged(whole, "train_loss")

    def test_a_run_whose_rate_has_begun_to_fall_is_not_made_longer(self, tiny: Settings) -> None:
        pretrain(replace(tiny, warmup=0.0, decay=0.5))
        with pytest.raises(InputError, match=r"--resume --steps 6: .*step-00000004 .* to fall, after step 2 of 4"):
            pretrain(replace(tiny, warmup=0.0, decay=0.5, steps=6, resume=True))

    def test_other_parts_of_a_batch(self, tiny: Settings, power_cut: pytest.MonkeyPatch) -> None:
        """Three steps of four parts end where a step of eight does not: a counter that goes on would be out of step."""
        with pytest.raises(PowerCutError):
            pretrain(replace(tiny, checkpoint_every=3, micro_batch_size=2))
        power_cut.undo()
        pretrain(again(tiny, "run", micro_batch_size=1, resume=True))
        pretrain(whole := again(tiny, "whole"))
        assert logged(tiny, "train_loss") == pytest.approx(logged(whole, "train_loss"), abs=1e-5)

    def test_a_finished_run_is_measured_again(self, tiny: Settings) -> None:
        first = pretrain(tiny)
        assert pretrain(again(tiny, "run", resume=True)) == first

    def test_only_the_newest_checkpoints_are_kept(self, tiny: Settings) -> None:
        pretrain(replace(tiny, checkpoint_every=1, keep_checkpoints=2))
        kept = sorted(path.name for path in (tiny.output / "checkpoints").iterdir())
        assert kept == ["step-00000003", "step-00000004"]

    def test_a_checkpoint_that_was_cut_off_is_not_used(self, tiny: Settings) -> None:
        pretrain(tiny)
        expected = saved_weights(tiny)
        last = tiny.output / "checkpoints" / "step-00000004"
        (last / "settings.json").unlink()
        (last / "common.bin").write_bytes(b"half")
        pretrain(again(tiny, "run", resume=True))
        assert all(torch.equal(weight, expected[name]) for name, weight in saved_weights(tiny).items())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"batch_size": 16}, r"another training: --batch_size was 8, is 16\. Give what"),
            ({"seed": 1, "length": 16}, "--length was 32, is 16; --seed was 0, is 1"),
            ({"optimizer": replace(OPTIMIZER, fraction=0.5)}, r"--optimizer\.fraction was 0\.25, is 0\.5"),
            ({"steps": 1}, "--resume: 4 steps have been made already, --steps is 1"),
            ({"resume": False}, "holds checkpoints. Go on with --resume true, give another folder"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes: dict[str, Any], message: str, tiny: Settings) -> None:
        pretrain(tiny)
        with pytest.raises(InputError, match=message):
            pretrain(again(tiny, "run", **{"resume": True, **changes}))

    def test_without_a_checkpoint(self, tiny: Settings) -> None:
        with pytest.raises(InputError, match="--resume: there is no checkpoint in --output"):
            pretrain(replace(tiny, resume=True))


class TestModel:
    def test_takes_a_configuration_and_no_weights(self, tiny: Settings, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        source = GPT2LMHeadModel(config)
        source.save_pretrained(tmp_path / "gpt2")
        pretrain(replace(tiny, model=str(tmp_path / "gpt2")))
        model = AutoModelForCausalLM.from_pretrained(tiny.output / "model")
        assert isinstance(model, GPT2LMHeadModel)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (2, 32, 384)
        assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 1)
        correlated = torch.stack([model.transformer.wpe.weight.flatten(), source.transformer.wpe.weight.flatten()])
        assert abs(torch.corrcoef(correlated)[0, 1].item()) < 0.1

    def test_the_vocabulary_is_rounded_up(self) -> None:
        tokenizer = ByT5Tokenizer(extra_ids=130)
        assert len(tokenizer) == 389
        assert make_model(Settings(hidden_size=32), tokenizer).config.vocab_size == 448

    def test_a_model_that_keeps_its_vocabulary(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = build_model(64, length=8, hidden_size=32, layers=1, heads=4)
        monkeypatch.setattr(models, "_build_like", lambda *_: kept)
        with pytest.raises(InputError, match="it keeps a vocabulary of 64, and --tokenizer bytes has 384"):
            make_model(Settings(model="other"), ByT5Tokenizer())

    def test_the_seed_decides_the_weights_and_the_order(self, tiny: Settings) -> None:
        losses = []
        for name, seed in (("one", 0), ("same", 0), ("other", 1)):
            pretrain(run := again(tiny, name, steps=1, seed=seed))
            losses.append(logged(run, "train_loss"))
        assert losses[0] == losses[1] != losses[2]


class TestData:
    TEXTS = ("one", "two and more", "three")

    def write(self, folder: Path, *texts: str, name: str = "data.jsonl") -> str:
        path = folder / name
        if path.suffix == ".txt":
            path.write_text("\n\n".join(texts))
        elif path.suffix == ".parquet":
            datasets.Dataset.from_dict({"text": list(texts)}).to_parquet(path)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    @staticmethod
    def texts(windows: Any) -> set[tuple[int, ...]]:
        return {tuple(windows[index]["input_ids"].tolist()) for index in range(len(windows))}

    @pytest.mark.parametrize(("name", "processes"), [("data.txt", 1), ("data.jsonl", 1), ("data.parquet", 2)])
    def test_a_file_is_packed_like_a_list(self, name: str, processes: int, tmp_path: Path) -> None:
        data = self.write(tmp_path, *self.TEXTS, name=name)
        held_out = self.write(tmp_path, "something else", name="held_out.jsonl")
        tokenizer = ByT5Tokenizer()
        settings = Settings(dataset=data, held_out=held_out, length=8, tokenizing_processes=processes)
        windows, measured = load_windows(settings, tokenizer)
        expected = pack(self.TEXTS, tokenizer, 8)
        assert len(windows) == len(expected) == 2
        for index in range(2):
            assert torch.equal(windows[index]["input_ids"], expected[index]["input_ids"])
            assert torch.equal(windows[index]["labels"], expected[index]["labels"])
        assert tokenizer.decode(measured[0]["input_ids"]) == "somethin"
        assert tokenizer.decode(torch.cat([windows[0]["input_ids"], windows[1]["input_ids"]])) == "one</s>two and more"

    def test_it_is_tokenized_once(self, tmp_path: Path) -> None:
        """What a later call may change decides nothing about the windows, so they come from disk."""
        data = self.write(tmp_path, *(f"document {number:02}" for number in range(40)))
        settings = Settings(dataset=data, length=12)

        def files_after(settings: Settings) -> set[Path]:
            load_windows(settings, ByT5Tokenizer())
            return set((tmp_path / "cache").rglob("*.arrow"))

        first = files_after(settings)
        resumed = replace(settings, resume=True, steps=800, seed=1, log_every=3, output=tmp_path / "elsewhere")
        assert files_after(resumed) == first
        assert files_after(replace(settings, length=16)) > first

    def test_the_held_out_share_does_not_follow_the_seed(self, tmp_path: Path) -> None:
        data = self.write(tmp_path, *(f"document {number:02}" for number in range(40)))
        settings = Settings(dataset=data, held_out_share=0.25, length=12)
        parts = [load_windows(replace(settings, seed=seed), ByT5Tokenizer()) for seed in (0, 1)]
        (train, held_out), (other_train, other_held_out) = [map(self.texts, windows) for windows in parts]
        assert (len(train), len(held_out)) == (30, 10)
        assert not train & held_out
        assert (train, held_out) == (other_train, other_held_out)

    def test_an_order_covers_all_windows_before_it_repeats(self) -> None:
        order = shuffled_order(6, 15, seed=0)
        assert sorted(order[:6]) == sorted(order[6:12]) == list(range(6))
        assert order[:10] == shuffled_order(6, 10, seed=0)
        assert order != shuffled_order(6, 15, seed=1)

    def test_filling_up_adds_windows_that_do_not_count(self) -> None:
        windows = PackedTokens(torch.arange(12), 4)
        filled = fill_up(windows, 4)
        assert len(filled) == 4
        assert (filled[3]["labels"] == IGNORED).all()
        assert torch.equal(filled[2]["labels"], windows[2]["labels"])
        assert fill_up(windows, 3) is windows

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dataset": "missing.txt"}, "--dataset, --held_out: there is no file missing.txt"),
            ({"dataset": "missing/dataset"}, "--dataset, .* of 'missing/dataset' could not be read"),
            ({"text_column": "body"}, "--text_column: .* has no column 'body'. Choose one of text"),
            ({"length": 1000}, "--dataset: the text does not fill one window of --length 1000"),
            ({"held_out": "test"}, "--held_out test: .* has no splits. Give a file"),
            ({"dataset": "python", "held_out": "test"}, "--held_out test: python has no splits"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        data = self.write(tmp_path, *self.TEXTS)
        with pytest.raises(InputError, match=message):
            load_windows(Settings(**{"dataset": data, "length": 4, **arguments}), ByT5Tokenizer())

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ('{"text": 1}\n{"text": 2}\n', "--text_column text: .* holds no text there, but int64"),
            ('{"text": "a"}\n{"text": null}\n', "--text_column text: 1 rows of .* are empty"),
            ('{"text": "all of it"}\n', "one document cannot be trained on and measured on"),
        ],
    )
    def test_columns(self, rows: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").write_text(rows)
        with pytest.raises(InputError, match=message):
            load_windows(Settings(dataset=str(tmp_path / "data.jsonl"), length=4), ByT5Tokenizer())


class TestMetricsFile:
    def test_drops_what_will_come_again(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "metrics.jsonl"
        first = MetricsFile(path, 0)
        first.start()
        for step in (1, 2, 3):
            first.log({"loss": step / 2}, step=step)
        MetricsFile(path, 2).start()
        assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
        assert list(path.parent.iterdir()) == [path]

    def test_a_new_run_begins_an_empty_file(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n')
        MetricsFile(path, 0).start()
        assert read_metrics(path) == []

    def test_a_line_that_was_not_finished_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "lo')
        MetricsFile(path, 1).start()
        assert read_metrics(path) == [{"step": 0, "loss": 3.0}], "of a resumed run, the measurement before it too"

    def test_is_whole_or_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\n')
        write = Path.write_text

        def write_half(self: Path, text: str, **options: Any) -> None:
            write(self, text[: len(text) // 2], **options)
            raise OSError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write_half)
            with pytest.raises(OSError, match="no space left"):
                MetricsFile(path, 1).start()
        assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


class TestCommand:
    def test_a_file_may_give_some_of_the_optimizer_settings(self, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text("steps: 7\noptimizer:\n  lr: 1.0e-4\n")
        settings = auto_cli(Settings, args=[f"--config={file}", "--optimizer.fraction=0.5"])
        assert settings.steps == 7
        assert settings.optimizer == replace(Settings().optimizer, lr=1e-4, fraction=0.5)

    @pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
    def test_the_example_files_are_valid(self, file: Path) -> None:
        settings = auto_cli(Settings, args=[f"--config={file}"])
        assert isinstance(settings.optimizer, OptimizerSettings)
        size, parts = recipe.share_of_batch(settings, 8)
        assert 8 * size * parts == settings.batch_size

    def test_there_is_an_example(self) -> None:
        assert [file.name for file in EXAMPLES] == ["gpt2-size.yaml"]

    def test_help_explains_every_argument(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert "Share of the steps in which the learning rate rises. (type: float, default: 0.1)" in printed
        assert "--optimizer.algorithm {dion2,muon,adamw}" in printed
        assert "} (type:" not in printed, "an argument without a description"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--steps=0"], "error: --steps has to be 1 or more, got 0"),
            (["--micro_batch_size=0"], "error: --micro_batch_size has to be 1 or more"),
            (["--micro_batch_size=3"], "error: --batch_size 16 cannot be divided over 1 ranks that read 3 windows at"),
            (["--warmup=0.6", "--decay=0.6"], "error: --warmup and --decay are shares of the steps"),
            (["--held_out_share=1"], "error: --held_out_share is a share of the data"),
            (["--max_gradient_norm=0"], "error: --max_gradient_norm has to be over 0"),
            (["--hidden_size=100", "--heads=3"], "error: --hidden_size 100 has to be a multiple of twice --heads 3"),
            (["--optimizer.fraction=2"], r"error: --optimizer\.fraction must lie in \(0, 1\], got 2"),
            (["--model=missing/model"], "error: --model 'missing/model': no configuration of a causal language model"),
            (["--tokenizer=missing/one"], "error: --tokenizer 'missing/one' could not be loaded"),
            (["--precision=fp16"], "error: --precision fp16 needs a GPU"),
            (["--optimizer.overrides={nothing.*: adamw}"], r"error: --optimizer: .*nothing\.\*"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_bad_input_ends_with_the_message_alone(self, arguments: list[str], message: str, tiny: Settings) -> None:
        line = [f"--{name}={getattr(tiny, name)}" for name in ("dataset", "length", "output", "layers")]
        with pytest.raises(SystemExit, match=message):
            main([*line, *arguments])

    def test_a_tracker_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ranks, "get_available_trackers", lambda: ["tensorboard"])
        with pytest.raises(InputError, match="--log_with wandb: not installed"):
            ranks.make_accelerator(Settings(log_with=["tensorboard", "wandb"]))

    def test_longer_windows_than_the_model_reads(self, tiny: Settings, tmp_path: Path) -> None:
        GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16).save_pretrained(tmp_path / "gpt2")
        with pytest.raises(InputError, match="--length 32: the model reads 16 tokens at most"):
            pretrain(replace(tiny, model=str(tmp_path / "gpt2")))
        shutil.rmtree(tmp_path / "gpt2")
