"""The recipe, run for real in all three frameworks: offline, a few steps, on one process and on two."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from jsonargparse import auto_cli
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from dion2_lightning import Dion2, OptimizerSettings
from dion2_lightning.monitoring.history import SelectionHistory
from recipes import selection_page
from recipes.inputs import InputError
from recipes.offline import SMOLLM2, model_source
from recipes.offline_data import read_functions
from recipes.supervised_fine_tuning import command, conversations, with_accelerate, with_lightning, with_trainer
from recipes.supervised_fine_tuning import model as recipe_model
from recipes.supervised_fine_tuning.conversations import Conversation, Message, load_conversations
from recipes.supervised_fine_tuning.data import PackedConversations, collate_for, load_data, pack_training_rows
from recipes.supervised_fine_tuning.encoding import IGNORED, Encoded, encode
from recipes.supervised_fine_tuning.model import (
    autocast_dtype,
    count_flops_per_token,
    held_out_loss,
    load_model,
    save_model,
)
from recipes.supervised_fine_tuning.settings import Settings, run_folder
from recipes.supervised_fine_tuning.with_lightning import LightningSettings
from recipes.throughput import Speedometer
from recipes.versions import checkpoints_activations
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.huggingface import fsdp2_on_cpu

FRAMEWORKS = {"lightning": with_lightning, "accelerate": with_accelerate, "trainer": with_trainer}
EXAMPLES = sorted(Path(with_lightning.__file__).parent.glob("*.yaml"))
ROOT = Path(with_lightning.__file__).parents[2]
STEPS = 4
EPS = 1e-2
"""So large that AdamW's steps depend on the scale of the gradients, which the frameworks could get wrong."""

WORDS = ("red", "green", "blue", "white")


def question(number: int) -> str:
    return f"Which colour is number {number}?"


def answer(number: int) -> str:
    return " ".join(WORDS[(number + index) % len(WORDS)] for index in range(1 + number % 9))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Llama of two random layers, its embeddings tied as SmolLM2's, and a tokenizer like SmolLM2's.

    The tokenizer has the same chat template and special tokens, but knows few words.
    """
    folder = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(**model_source(SMOLLM2))
    texts = [tokenizer.apply_chat_template(talk(question(n), answer(n)), tokenize=False) for n in range(60)]
    tokenizer = tokenizer.train_new_from_iterator(texts, 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 60 short conversations, with answers of unequal lengths."""
    rows = [{"prompt": question(number), "completion": answer(number)} for number in range(60)]
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture
def tiny(tiny_model: str, dataset: str, tmp_path: Path) -> Settings:
    return Settings(
        model=tiny_model,
        dataset=dataset,
        held_out_size=5,
        length=96,
        steps=STEPS,
        batch_size=2,
        validate_every=2,
        output=tmp_path,
        optimizer=OptimizerSettings(lr=3e-3, adamw_lr=1e-3, momentum=0.8, eps=EPS, orthonormalize_dtype="float32"),
    )


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    """They take longer than a run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_page, "save_pictures", lambda history, folder: [])
        yield


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test() -> Iterator[None]:
    """All Accelerators of a process share their state, the Trainer's too."""
    yield
    forget_accelerators()


def forget_accelerators() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(*contents: str) -> list[Message]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]


def chat(*contents: str) -> Conversation:
    return Conversation(talk(*contents))


def for_framework(name: str, settings: Settings, **changes: Any) -> Any:
    """The settings as the framework's entry point takes them, with a folder of its own."""
    arguments = {**vars(settings), "output": settings.output / name, **changes}
    if name == "lightning":
        return LightningSettings(**arguments)
    return Settings(**{key: value for key, value in arguments.items() if key not in ("devices", "strategy")})


def losses(name: str, settings: Settings) -> tuple[list[float], list[float]]:
    """What a run logged: the training loss of each step, and what was held out."""
    folder = run_folder(settings)
    if name == "trainer":
        entries = json.loads((folder / "checkpoints" / "trainer_state.json").read_text())["log_history"]
        columns = ("loss", "eval_loss")
    elif name == "accelerate":
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        columns = ("train_loss", "held_out_loss")
    else:
        with (folder / "metrics.csv").open() as file:
            entries = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        columns = ("train_loss", "held_out_loss")
    train, held_out = ([entry[column] for entry in entries if column in entry] for column in columns)
    return train, held_out


def saved_weights(settings: Settings) -> dict[str, Tensor]:
    [file] = (run_folder(settings) / "model").glob("*.safetensors")
    return load_file(file)


def measure_saved_model(settings: Settings) -> float:
    """The held-out loss of what was saved, by other means than the recipe's: conversation by conversation."""
    folder = run_folder(settings) / "model"
    kind = AutoPeftModelForCausalLM if settings.lora_rank else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    _, held_out = load_conversations(settings)
    total, tokens = 0.0, 0
    for conversation in held_out:
        encoded = encode(conversation, tokenizer, settings.length)
        input_ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
        with torch.no_grad():
            logits = model(input_ids).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        ).item()
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / tokens


@pytest.fixture(scope="module")
def runs(tiny_model: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in each framework, its settings and what it returned; each step reads its rows in two parts."""
    tiny = Settings(
        model=tiny_model,
        dataset=dataset,
        held_out_size=5,
        length=96,
        steps=STEPS,
        batch_size=1,
        accumulation=2,
        max_norm=100.0,  # clipping would hide a wrong scale
        validate_every=3,
        output=tmp_path_factory.mktemp("runs"),
        optimizer=OptimizerSettings(lr=3e-3, adamw_lr=1e-3, momentum=0.8, eps=EPS, orthonormalize_dtype="float32"),
    )
    runs = {}
    for name, framework in FRAMEWORKS.items():
        settings = for_framework(name, tiny)
        runs[name] = settings, framework.fine_tune(settings)
        forget_accelerators()
    return runs


class TestRuns:
    def test_frameworks_agree(self, runs: dict[str, Any]) -> None:
        curves = {name: losses(name, settings) for name, (settings, _) in runs.items()}
        expected, weights = self.by_hand(runs["accelerate"][0])
        for name, (train, held_out) in curves.items():
            torch.testing.assert_close(saved_weights(runs[name][0]), weights, rtol=0, atol=2e-5)
            assert train == pytest.approx(expected, abs=1e-4), name
            assert len(held_out) == 3, "before the first step, after the third and the last"
            assert held_out == pytest.approx(curves["accelerate"][1], abs=1e-4), name
            assert held_out[-1] == pytest.approx(runs[name][1], abs=1e-6), name
            assert held_out[-1] < held_out[0], name

    @staticmethod
    def by_hand(settings: Settings) -> tuple[list[float], dict[str, Tensor]]:
        """Each step's loss and the weights after a plain loop over whole steps, in which no framework takes part."""
        model, tokenizer = load_model(settings)
        rows = load_data(settings, tokenizer, 1).train
        optimizer = settings.optimizer.build(model)
        found = []
        for step in range(settings.steps):
            progress = 0.0 if step == 0 else step / settings.steps
            for group in optimizer.param_groups:
                group.setdefault("peak", group["lr"])
                group["lr"] = group["peak"] * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())
            batch = default_collate([rows[2 * step], rows[2 * step + 1]])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found, {name: parameter.detach() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_the_saved_model_is_what_was_measured(self, name: str, runs: dict[str, Any]) -> None:
        settings, loss = runs[name]
        assert measure_saved_model(settings) == pytest.approx(loss, abs=1e-4)
        config = json.loads((run_folder(settings) / "model" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["use_cache"] is True
        assert "lm_head.weight" not in saved_weights(settings), "tied to the embedding"

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_shows_what_was_selected(self, name: str, runs: dict[str, Any]) -> None:
        folder = run_folder(runs[name][0])
        history = SelectionHistory.load(folder / "selection.json")
        assert history.steps == [1, 2, 3, 4]
        assert (folder / "selection.html").stat().st_size > 10_000
        other = SelectionHistory.load(run_folder(runs["trainer"][0]) / "selection.json")
        assert [each["coverage"] for each in history.overall] == [each["coverage"] for each in other.overall]

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_the_control_selects_nothing(self, name: str, tiny: Settings) -> None:
        settings = for_framework(name, tiny, optimizer=replace(tiny.optimizer, algorithm="adamw"), steps=2)
        FRAMEWORKS[name].fine_tune(settings)
        metrics = {"lightning": {"metrics.csv"}, "accelerate": {"metrics.jsonl"}, "trainer": set()}[name]
        left = {path.name for path in run_folder(settings).iterdir()}
        assert left == {"model", "checkpoints", "settings.json", "rows.txt", *metrics}

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_a_run_that_diverges_says_so(self, name: str, tiny: Settings) -> None:
        """The Trainer would log an average of earlier losses, and a mean of torchmetrics leave the loss out."""
        optimizer = replace(tiny.optimizer, lr=1e38, adamw_lr=1e38)
        settings = for_framework(name, tiny, optimizer=optimizer, max_norm=1e30, warmup=0.0, steps=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the callbacks say of it
            assert not math.isfinite(FRAMEWORKS[name].fine_tune(settings))
        train, held_out = losses(name, settings)
        assert math.isfinite(train[0])
        assert not math.isfinite(train[1])
        assert math.isfinite(held_out[0])

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_a_resumed_run_ends_like_an_uninterrupted_one(
        self, name: str, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        framework = FRAMEWORKS[name]
        # Adapters with dropout would do, but for the framework's generators; here the weights say all.
        tiny = replace(tiny, checkpoint_every=2, accumulation=2, batch_size=1)
        whole = for_framework(name, replace(tiny, output=tiny.output / "whole"))
        framework.fine_tune(whole)
        forget_accelerators()

        part = for_framework(name, tiny)
        interrupt(framework, part, 4)
        interrupt(framework, replace(part, resume=True), 1)
        assert not (run_folder(part) / "model").exists()
        loss = framework.fine_tune(replace(part, resume=True))

        torch.testing.assert_close(saved_weights(part), saved_weights(whole), rtol=0, atol=0)
        assert loss == losses(name, whole)[1][-1]
        history, expected = (SelectionHistory.load(run_folder(each) / "selection.json") for each in (part, whole))
        assert history.overall == expected.overall
        kept = {path.name for path in (run_folder(part) / "checkpoints").iterdir()} - {"trainer_state.json"}
        assert kept == {f"checkpoint-{STEPS}" if name == "trainer" else f"step-{STEPS}"}
        forget_accelerators()
        with pytest.raises(InputError, match=r"there are checkpoints of an earlier run in .* Go on from them"):
            framework.fine_tune(part)
        with pytest.raises(InputError, match=r"--resume: the run in .* is of another training: --seed was 0, is 1"):
            framework.fine_tune(replace(part, resume=True, seed=1))
        shutil.rmtree(run_folder(part) / "model")  # as if it was cut just before that
        add_other_checkpoints(name, part)
        assert framework.fine_tune(replace(part, resume=True)) == loss, "a finished run is only measured again"
        torch.testing.assert_close(saved_weights(part), saved_weights(whole), rtol=0, atol=0)
        if name != "lightning":  # which begins another file
            assert losses(name, part) == losses(name, whole)

    @pytest.mark.parametrize(("validate_every", "checkpoint_every"), [(1, 3), (2, 2), (3, 1), (3, 2), (100, 3)])
    def test_lightning_goes_on_after_a_step_whether_or_not_it_measured(
        self, validate_every: int, checkpoint_every: int, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last step is measured and saved once, whatever divides the number of steps."""
        monkeypatch.setattr(with_lightning, "look_every", lambda steps: 2)
        every = {"validate_every": validate_every, "checkpoint_every": checkpoint_every}
        whole = for_framework("lightning", replace(tiny, output=tiny.output / "whole"), **every)
        with_lightning.fine_tune(whole)
        part = for_framework("lightning", tiny, **every)
        interrupt(with_lightning, part, 4)
        with_lightning.fine_tune(replace(part, resume=True, validate_every=validate_every + 1))
        assert SelectionHistory.load(run_folder(part) / "selection.json").steps == [2, 4]
        torch.testing.assert_close(saved_weights(part), saved_weights(whole), rtol=0, atol=0)
        _, measured = losses("lightning", whole)
        assert len(measured) == 1 + math.ceil(STEPS / validate_every)

    @pytest.mark.parametrize("name", ["lightning", "accelerate"])
    def test_figures_are_on_the_disk_before_the_checkpoint(
        self, name: str, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run that is killed then has lost none of those that do not come again."""
        settings = for_framework(name, tiny, checkpoint_every=2, log_every=2)
        keep, found = command.keep_checkpoint, []

        def look(*arguments: Any) -> None:
            found.append(tuple(map(len, losses(name, settings))))
            keep(*arguments)

        monkeypatch.setattr(FRAMEWORKS[name], "keep_checkpoint", look)
        FRAMEWORKS[name].fine_tune(settings)
        assert found == [(1, 2), (2, 3)], "training losses and measurements"

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_the_clock_stands_still_while_a_run_measures_and_saves(
        self, name: str, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[int] = []
        stands = False
        found: dict[str, list[bool]] = {"measures": [], "saves": []}

        def stop(value: bool) -> None:
            nonlocal stands
            stands = value

        def look(kind: type, method: str, what: str) -> None:
            original = getattr(kind, method)

            def watched(self: Any, *arguments: Any, **options: Any) -> Any:
                if steps and not getattr(self, "training", False):
                    found[what].append(stands)
                return original(self, *arguments, **options)

            monkeypatch.setattr(kind, method, watched)

        monkeypatch.setattr(Speedometer, "step", lambda self, tokens: steps.append(tokens))
        monkeypatch.setattr(Speedometer, "pause", lambda self: stop(True))
        monkeypatch.setattr(Speedometer, "go_on", lambda self: stop(False))
        look(LlamaForCausalLM, "forward", "measures")
        look(Dion2, "state_dict", "saves")
        FRAMEWORKS[name].fine_tune(for_framework(name, tiny, validate_every=1, checkpoint_every=1))
        assert len(steps) == STEPS
        for times in found.values():
            assert len(times) >= STEPS
            assert all(times)
        assert not stands

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_a_line_holds_the_mean_loss_since_the_last(self, name: str, tiny: Settings) -> None:
        tiny = replace(tiny, optimizer=replace(tiny.optimizer, algorithm="muon"))  # the Trainer logs each selection
        found = []
        for log_every in (1, 2):
            settings = for_framework(name, replace(tiny, output=tiny.output / str(log_every)), log_every=log_every)
            FRAMEWORKS[name].fine_tune(settings)
            forget_accelerators()
            found.append(losses(name, settings)[0])
        each, pairs = found
        assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], abs=1e-6)

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_a_run_goes_on_with_the_same_rows_alone(self, name: str, tiny: Settings, tmp_path: Path) -> None:
        file = tmp_path / "data.jsonl"
        shutil.copy(tiny.dataset, file)
        settings = for_framework(name, tiny, dataset=str(file), checkpoint_every=2)
        interrupt(FRAMEWORKS[name], settings, 3)
        file.write_text(file.read_text().replace("red", "blue"))
        with pytest.raises(InputError, match=r"--resume: --dataset .*data.jsonl now gives other rows than when"):
            FRAMEWORKS[name].fine_tune(replace(settings, resume=True))


def interrupt(framework: ModuleType, settings: Settings, step: int) -> None:
    """Trains until the power is cut, in the optimizer step of this number."""
    taken: list[None] = []
    take = Dion2.step

    def fail(self: Dion2, *arguments: Any, **options: Any) -> Any:
        taken.append(None)
        if len(taken) == step:
            raise RuntimeError("power cut")
        return take(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dion2, "step", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            framework.fine_tune(settings)
    forget_accelerators()


def add_other_checkpoints(name: str, settings: Settings) -> None:
    """What is left of one whose writing was interrupted, and what the user calls so."""
    for each in ("checkpoint-99", "checkpoint-best") if name == "trainer" else ("unfinished", "step-best"):
        folder = run_folder(settings) / "checkpoints" / each
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"half")


class TestBeginRun:
    """Which checkpoints a run goes on from; each refusal says what helps."""

    def test_the_last_whole_one(self, tiny: Settings) -> None:
        assert command.begin_run(tiny, "trainer", 1) == (0, None)
        folder = run_folder(tiny) / "checkpoints"
        for name in ("checkpoint-8", "checkpoint-10", "checkpoint-12", "checkpoint-10-copy", "checkpoint-best"):
            (folder / name).mkdir(parents=True)
            if name != "checkpoint-12":
                (folder / name / "seal").touch()
        found = command.begin_run(replace(tiny, resume=True), "trainer", 1, "checkpoint-", seal="seal")
        assert found == (10, folder / "checkpoint-10")

    def test_one_that_was_not_finished(self, tiny: Settings) -> None:
        command.begin_run(tiny, "accelerate", 1)
        (run_folder(tiny) / "checkpoints" / "unfinished").mkdir(parents=True)
        with pytest.raises(InputError, match=r"None is finished and of this kind\. Choose another --output, or remove"):
            command.begin_run(tiny, "accelerate", 1)
        with pytest.raises(InputError, match=r"no finished checkpoint in .* Begin anew without --resume, in another"):
            command.begin_run(replace(tiny, resume=True), "accelerate", 1)

    def test_those_of_another_framework(self, tiny: Settings) -> None:
        command.begin_run(tiny, "lightning", 1)
        (run_folder(tiny) / "checkpoints" / "step-2").mkdir(parents=True)
        with pytest.raises(InputError, match="there are checkpoints of an earlier run"):
            command.begin_run(tiny, "trainer", 1, "checkpoint-")
        for framework in ("accelerate", "trainer"):
            with pytest.raises(
                InputError, match=r"was begun by with_lightning\.py.* Go on with that, or leave --resume"
            ):
                command.begin_run(replace(tiny, resume=True), framework, 1)

    def test_those_of_another_precision(self, tiny: Settings) -> None:
        """However it is asked for."""
        command.begin_run(tiny, "lightning", 1)
        (run_folder(tiny) / "checkpoints" / "step-2").mkdir(parents=True)
        precision = "float32" if autocast_dtype(tiny) == torch.float32 else "bf16"
        other = "bf16" if precision == "float32" else "float32"
        command.begin_run(replace(tiny, resume=True, precision=precision), "lightning", 1)
        with pytest.raises(InputError, match=f"--precision was '{precision}', is '{other}'. Give what it was begun"):
            command.begin_run(replace(tiny, resume=True, precision=other), "lightning", 1)


class TestRealModel:
    def test_the_default(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SmolLM2 on functions of the standard library, as the command line starts it."""
        functions = read_functions()[:600]  # real ones, parsed once
        monkeypatch.setattr(conversations, "read_functions", lambda: functions)
        arguments = ["--length=64", "--batch_size=1", "--steps=2", "--held_out_size=16", f"--output={tmp_path}"]
        try:
            command.run(with_accelerate.fine_tune, Settings, arguments)
            settings = Settings(length=64, held_out_size=16, steps=2, output=tmp_path)
            _, held_out = losses("accelerate", settings)
            assert held_out[-1] < held_out[0] < 5, "a pretrained model, and better after two steps"
            printed = capsys.readouterr().out
            assert f'from_pretrained("{run_folder(settings) / "model"}")' in printed
            assert f"Held-out loss {held_out[-1]:.4f}" in printed
            assert measure_saved_model(settings) == pytest.approx(held_out[-1], abs=1e-4)
        finally:
            shutil.rmtree(tmp_path)  # two gigabytes


LAUNCHERS = {
    "lightning": [sys.executable],
    "trainer": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
        *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}


@pytest.fixture(scope="module")
def expected(tiny_model: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings, losses and weights of one process: by Dion2, and by Muon, which leaves no pictures to be drawn."""
    return {kind: run_on_one_process(kind, tiny_model, dataset, tmp_path_factory) for kind in ("dion2", "muon")}


def run_on_one_process(kind: Any, tiny_model: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = Settings(
        model=tiny_model,
        dataset=dataset,
        held_out_size=5,
        length=96,
        steps=2,
        batch_size=4,
        max_norm=1.5,  # a little less than the gradients have
        validate_every=2,
        output=tmp_path_factory.mktemp("one"),
        optimizer=OptimizerSettings(
            algorithm=kind, lr=3e-3, adamw_lr=1e-3, momentum=0.8, eps=EPS, orthonormalize_dtype="float32"
        ),
    )
    with_accelerate.fine_tune(settings)
    forget_accelerators()
    return settings, losses("accelerate", settings), saved_weights(settings)


class TestTwoProcesses:
    """Two processes that read half of each step: the losses and the model of one process that reads it whole."""

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_replicas_through_the_launcher(self, name: str, expected: Any, tmp_path: Path) -> None:
        expected = expected["muon"]
        settings = for_framework(name, replace(expected[0], output=tmp_path), batch_size=1, accumulation=2)
        file = tmp_path / "settings.yaml"
        plain = {key: value for key, value in vars(settings).items() if key not in ("optimizer", "output")}
        plain |= {"output": str(settings.output), "optimizer": vars(settings.optimizer)}
        plain["optimizer"] = {**plain["optimizer"], "betas": list(settings.optimizer.betas)}
        file.write_text(json.dumps(plain))
        script = Path(FRAMEWORKS[name].__file__).relative_to(ROOT)
        devices = ["--devices=2"] if name == "lightning" else []
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        launched = subprocess.Popen(
            [*LAUNCHERS[name], str(script), f"--config={file}", *devices],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = launched.communicate(timeout=110)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launched.pid, signal.SIGKILL)  # what it started outlives it otherwise
        assert launched.returncode == 0, errors
        assert output.count("Load the fine-tuned model with") == 1, "one process tells"
        self.check(name, settings, expected)

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_shards(self, name: str, expected: Any, tmp_path: Path) -> None:
        expected = expected["dion2"]
        changes = {"batch_size": 2, "devices": 2, "strategy": "fsdp2"}
        settings = for_framework(name, replace(expected[0], output=tmp_path), **changes)
        run_like_torchrun(2, fine_tune_sharded, name, settings)
        self.check(name, settings, expected)

    @pytest.mark.parametrize("name", ["accelerate", "trainer"])
    def test_shards_with_products_in_bf16(self, name: str, expected: Any, tmp_path: Path) -> None:
        """Losses and gradients are summed in float32: of a sum over tokens, three digits would be left."""
        expected = expected["dion2"]
        settings = for_framework(
            name, replace(expected[0], output=tmp_path), batch_size=2, precision="bf16", validate_every=1
        )
        run_like_torchrun(2, fine_tune_sharded, name, settings)
        train, held_out = losses(name, settings)
        # Of two ranks, sums and means of bfloat16 are multiples of 1/128, if each gives 1 or more.
        assert all(4 < loss < 8 for loss in train)
        assert all(loss * 128 % 1 for loss in train)
        assert held_out[0] == pytest.approx(expected[1][1][0], abs=2e-3)

    @pytest.mark.parametrize("name", ["lightning", "accelerate"])
    def test_a_resumed_run_on_shards(self, name: str, expected: Any, tmp_path: Path) -> None:
        """Interrupted at the second step, it ends as the run on one process does that was not."""
        expected = expected["dion2"]
        changes = {"batch_size": 2, "devices": 2, "strategy": "fsdp2", "checkpoint_every": 1}
        settings = for_framework(name, replace(expected[0], output=tmp_path), **changes)
        run_like_torchrun(2, fine_tune_sharded, name, settings, 2)
        assert not (run_folder(settings) / "model").exists()
        with pytest.raises(InputError, match=r"was begun by 2 processes.*; now there are 1"):
            command.begin_run(replace(settings, resume=True), name, 1)
        add_other_checkpoints(name, settings)
        run_like_torchrun(2, fine_tune_sharded, name, replace(settings, resume=True))
        torch.testing.assert_close(saved_weights(settings), expected[2], rtol=0, atol=2e-5)
        shutil.rmtree(run_folder(settings) / "model")
        run_like_torchrun(2, fine_tune_sharded, name, replace(settings, resume=True))
        torch.testing.assert_close(saved_weights(settings), expected[2], rtol=0, atol=2e-5)

    def test_shards_of_adapters(self, expected: Any, tmp_path: Path) -> None:
        """LoRA over FSDP2: what is saved is whole."""
        changes = {"batch_size": 2, "devices": 2, "strategy": "fsdp2", "lora_rank": 2}
        settings = for_framework("lightning", replace(expected["dion2"][0], output=tmp_path), **changes)
        run_like_torchrun(2, fine_tune_sharded, "lightning", settings)
        assert measure_saved_model(settings) == pytest.approx(losses("lightning", settings)[1][-1], abs=1e-4)

    @staticmethod
    def check(name: str, settings: Settings, expected: Any) -> None:
        _, (train, held_out), weights = expected
        found = losses(name, settings)
        assert found[0] == pytest.approx(train, abs=1e-4)
        assert found[1] == pytest.approx(held_out, abs=1e-4)
        torch.testing.assert_close(saved_weights(settings), weights, rtol=0, atol=2e-5)


def fine_tune_sharded(name: str, settings: Settings, interrupted_at: int = 0) -> None:
    if name != "lightning":
        fsdp2_on_cpu()
        # As accelerate launch says what its configuration file says.
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        }
    selection_page.save_pictures = lambda history, folder: []  # this process ends with the run
    kinds: list[str] = []
    taken: list[None] = []
    step = Dion2.step

    def look(self: Dion2, *arguments: Any, **options: Any) -> Any:
        kinds.extend(type(parameter).__name__ for group in self.param_groups for parameter in group["params"])
        taken.append(None)
        if len(taken) == interrupted_at:
            raise RuntimeError("power cut")
        return step(self, *arguments, **options)

    Dion2.step = look  # type: ignore[assignment, method-assign]
    if interrupted_at:
        with pytest.raises(RuntimeError, match="power cut"):
            FRAMEWORKS[name].fine_tune(settings)
    else:
        FRAMEWORKS[name].fine_tune(settings)
    assert set(kinds) == {"DTensor"}, "the model was not sharded"


def raise_no_space(*_: Any, **__: Any) -> None:
    raise OSError("no space left")


class TestModel:
    def test_packed_conversations_do_not_see_each_other(
        self, tiny: Settings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """The logits of a conversation are those of it alone, wherever it lies, in batches of several rows too."""
        conversations = [encode(chat(question(n), answer(n)), tokenizer, 96) for n in range(8)]
        rows = PackedConversations(conversations, 96)
        assert len(rows) < len(conversations)
        batch = default_collate([rows[index] for index in range(len(rows))])
        long_row = collate_for("flash_attention_2")([rows[index] for index in range(len(rows))])
        assert long_row["input_ids"].shape == (1, 96 * len(rows))
        for attention in ("sdpa", "eager"):
            model, _ = load_model(replace(tiny, attention=attention))
            model.eval()
            with torch.no_grad():
                packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
                flat = model(input_ids=long_row["input_ids"], position_ids=long_row["position_ids"]).logits
            torch.testing.assert_close(flat.view_as(packed), packed, rtol=0, atol=1e-4)
            compared = 0
            for index, row in enumerate(rows._rows):
                start = 0
                for conversation in row:
                    with torch.no_grad():
                        alone = model(torch.tensor([conversation.input_ids])).logits[0]
                    end = start + len(conversation.input_ids)
                    torch.testing.assert_close(packed[index, start:end], alone, rtol=0, atol=1e-4)
                    start = end
                    compared += 1
            assert compared == len(conversations)

    def test_its_loss_is_that_of_the_conversations_alone(
        self, tiny: Settings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model, _ = load_model(tiny)
        conversations = [encode(chat(question(n), answer(n)), tokenizer, 96) for n in range(5)]
        rows = PackedConversations(conversations, 96)
        rows.pad_rows(4)
        alone = PackedConversations(conversations, 96, rows=None)
        total = sum(
            model(torch.tensor([each.input_ids]), labels=torch.tensor([each.labels]), num_items_in_batch=1).loss
            for each in conversations
        )
        batches = [default_collate([rows[index], rows[index + 1]]) for index in range(0, len(rows), 2)]
        assert held_out_loss(model, batches) == pytest.approx(total.item() / sum(alone.targets), abs=1e-4)
        assert model.training

    def test_checkpointing_changes_no_gradient(self, tiny: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        rows = pack_training_rows([chat(question(1), answer(1))], tokenizer, tiny, 1)
        gradients = []
        for checkpointing in (False, True):
            model, _ = load_model(replace(tiny, gradient_checkpointing=checkpointing))
            assert checkpoints_activations(model) is checkpointing
            model(**default_collate([rows[0]])).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_adapters(self, name: str, tiny: Settings) -> None:
        """LoRA with checkpointing: only factors are trained and saved, B by Dion2, and the folder loads."""
        optimizer = replace(tiny.optimizer, lora="B")
        settings = for_framework(name, tiny, lora_rank=2, gradient_checkpointing=True, optimizer=optimizer)
        loss = FRAMEWORKS[name].fine_tune(settings)
        assert measure_saved_model(settings) == pytest.approx(loss, abs=1e-4)
        weights = saved_weights(settings)
        assert len(weights) == 2 * 2 * 7
        assert all("lora_A" in key or "lora_B" in key for key in weights)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert all(weight.any() for key, weight in weights.items() if "lora_B" in key), "trained; B begins at zero"
        if name != "lightning":
            forget_accelerators()
            other = for_framework("lightning", settings, output=tiny.output / "other")
            with_lightning.fine_tune(other)
            torch.testing.assert_close(weights, saved_weights(other), rtol=0, atol=2e-5)
        history = SelectionHistory.load(run_folder(settings) / "selection.json")
        assert len(history.infos) == 2 * 7
        assert all("lora_B" in info.name for info in history.infos)

    def test_a_saved_model_is_whole_and_alone(
        self, tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Adapters that an earlier run left beside it would be added to its weights when it is loaded."""
        folder = tmp_path / "model"
        save_model(*load_model(replace(tiny, lora_rank=2)), folder)
        before = {path.name for path in folder.iterdir()}
        assert "adapter_config.json" in before
        model, tokenizer = load_model(tiny)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(type(tokenizer), "save_pretrained", raise_no_space)
            save_model(model, tokenizer, folder)
        assert {path.name for path in folder.iterdir()} == before
        save_model(model, tokenizer, folder)
        assert not [path for path in folder.iterdir() if path.name.startswith("adapter")]
        assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

    def test_adapters_follow_the_seed(self, tiny: Settings) -> None:
        weights = []
        for seed in (0, 0, 1):
            model, _ = load_model(replace(tiny, lora_rank=2, seed=seed))
            weights.append(next(p for name, p in model.named_parameters() if "lora_A" in name))
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_flops_that_cannot_be_counted_end_no_run(
        self, tiny: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("not without values")

        model, _ = load_model(tiny)
        monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
        assert count_flops_per_token(model, tiny.length) == 0.0
        assert "model_flops_utilisation is not known for this model: not without values" in caplog.text

    def test_flops_of_a_token(self, tiny: Settings) -> None:
        """6 for a weight that multiplies; attention twice 2 x length x width, forward once and backward twice."""
        model, _ = load_model(tiny)
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        attention = 2 * 2 * 2 * tiny.length * 16
        with FlopCounterMode(display=False) as frequencies:  # older versions of transformers multiply there too
            model.model.rotary_emb(torch.zeros(1, 1, 16), torch.zeros(1, 1, dtype=torch.long))
        of_positions = frequencies.get_total_flops()
        assert count_flops_per_token(model, tiny.length) == 6 * linear + 3 * attention + 3 * of_positions
        frozen, _ = load_model(replace(tiny, lora_rank=2))
        assert count_flops_per_token(frozen, tiny.length) < count_flops_per_token(model, tiny.length)
        assert not any(parameter.is_meta for parameter in model.parameters())

    @pytest.mark.parametrize(
        ("precision", "launched_with", "dtype"),
        [
            ("bf16", "no", torch.bfloat16),
            ("float32", "bf16", torch.float32),
            ("auto", "bf16", torch.bfloat16),
        ],
    )
    def test_precision(
        self, precision: Any, launched_with: str, dtype: torch.dtype, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Weights in float32, products as the settings say, or else as `accelerate launch` does, in every framework."""
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
        for name in FRAMEWORKS:
            seen: list[torch.dtype] = []

            def look(x: Tensor, *_: Any, seen: list[torch.dtype] = seen, **__: Any) -> Tensor:
                if not x.is_meta:  # FLOPs are being counted
                    seen.append(x.dtype)
                return x * x.sigmoid()

            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "silu", look)
                patch.setattr(recipe_model, "check_packing", lambda *_: None)  # in float32, before training
                settings = for_framework(name, tiny, precision=precision, steps=1)
                FRAMEWORKS[name].fine_tune(settings)
            forget_accelerators()
            assert set(seen) == {dtype}, name
            assert all(weight.dtype == torch.float32 for weight in saved_weights(settings).values()), name


class TestPacking:
    @staticmethod
    def conversation(number: int, size: int, learnt: int) -> Encoded:
        """Tokens that tell conversations apart; the last ones are learnt."""
        tokens = [100 * number + index for index in range(size)]
        return Encoded(tokens, [IGNORED] * (size - learnt) + tokens[size - learnt :])

    def test_rows(self) -> None:
        """Every conversation once and whole; padding after them; what no other conversation foretells unlabelled."""
        sizes = [7, 3, 6, 4, 10, 2, 9, 1 + 5]
        conversations = [self.conversation(number, size, size) for number, size in enumerate(sizes, 1)]
        rows = PackedConversations(conversations, 10)
        tokens: list[int] = []
        for index in range(len(rows)):
            row = rows[index]
            assert all(values.shape == (10,) and values.dtype == torch.int64 for values in row.values())
            used = rows.tokens[index]
            starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], 10], strict=True):
                assert row["position_ids"][start:end].tolist() == list(range(end - start))
                assert row["labels"][start] == IGNORED
                expected = row["input_ids"][start + 1 : end] if start < used else torch.tensor([IGNORED])
                assert torch.equal(row["labels"][start + 1 : end], expected.expand(end - start - 1))
            assert int((row["labels"] != IGNORED).sum()) == rows.targets[index]
            tokens += row["input_ids"][:used].tolist()
        assert sorted(tokens) == sorted(token for each in conversations for token in each.input_ids)
        assert sum(rows.tokens) == sum(sizes)
        assert rows.packed == len(sizes)
        assert len(rows) == 5, "47 tokens"

    def test_what_has_nothing_to_learn_is_dropped_and_counted(self) -> None:
        rows = PackedConversations([self.conversation(1, 5, 2), self.conversation(2, 5, 0)], 10)
        assert (rows.dropped, rows.packed, rows.tokens) == (1, 1, [5])

    def test_padding_rows(self) -> None:
        rows = PackedConversations([self.conversation(1, 5, 2)], 10)
        rows.pad_rows(4)
        assert len(rows) == 4
        assert rows.targets == [2, 0, 0, 0]
        assert (rows[3]["labels"] == IGNORED).all()

    def test_a_run_has_its_rows_however_many_are_asked_for(
        self, tiny: Settings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Two processes with half the batch read what one reads; the seed decides the order; passes go on and on."""
        conversations = [chat(question(n), answer(n)) for n in range(40)]
        few, many, other = (
            pack_training_rows(conversations, tokenizer, replace(tiny, seed=seed), rows)
            for seed, rows in ((0, 6), (0, 60), (1, 6))
        )
        assert len(few) == 6 and len(many) == 60
        assert few._rows == many._rows[:6] != other._rows
        assert many.packed > 2 * len(conversations)
        assert sum(few.tokens) > 0.8 * 6 * tiny.length

    def test_what_was_dropped_is_told(
        self, tiny: Settings, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", logger="recipes")
        conversations = [chat(question(1), answer(1)), chat("word " * 100, "no room for this")]
        pack_training_rows(conversations, tokenizer, tiny, 20)
        assert " 1 dropped" in caplog.text, "however often it was passed by"
        with pytest.raises(InputError, match="--length 10: no answer begins within so many tokens"):
            pack_training_rows(conversations, tokenizer, replace(tiny, length=10), 1)


class TestConversations:
    def test_functions_are_held_out_whatever_the_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functions = read_functions()
        monkeypatch.setattr(conversations, "read_functions", lambda: functions)
        train, held_out = load_conversations(Settings())
        assert len(held_out) == 32
        assert len(train) > 4000
        contents = [{m["content"] for each in side for m in each.messages} for side in (train, held_out)]
        assert not contents[0] & contents[1]
        assert (train, held_out) == load_conversations(Settings(seed=1))

    @pytest.mark.parametrize(
        "row",
        [
            lambda n: {"messages": talk(question(n), answer(n))},
            lambda n: {"prompt": question(n), "completion": answer(n)},
            lambda n: {"prompt": talk(question(n)), "completion": talk("", answer(n))[1:]},
        ],
        ids=["messages", "texts", "lists"],
    )
    @pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
    def test_files(self, row: Callable[[int], dict[str, Any]], suffix: str, tmp_path: Path) -> None:
        import datasets

        path = tmp_path / f"data{suffix}"
        rows = datasets.Dataset.from_list([row(n) for n in range(6)])
        rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path)
        train, held_out = load_conversations(Settings(dataset=str(path), held_out_size=2))
        found = [each.messages for each in train + held_out]
        assert sorted(map(str, found)) == sorted(str(talk(question(n), answer(n))) for n in range(6))
        assert len(held_out) == 2

    def test_texts_of_a_held_out_file_are_taken_from_the_training_rows(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", logger="recipes")
        long = "an answer that is too long to be given twice by chance"
        rows = [("How?", "so"), ("Why?", long), ("When?", "now"), ("Who?", "so")]
        path = write_rows(tmp_path / "a.jsonl", [{"messages": talk(*row)} for row in rows])
        held_out = write_rows(tmp_path / "b.jsonl", [{"messages": talk("how? ", "so")}, {"messages": talk("x", long)}])
        train, measured = load_conversations(Settings(dataset=path, held_out=held_out))
        assert [each.messages[0]["content"] for each in train] == ["When?", "Who?"]
        assert [each.messages[0]["content"] for each in measured] == ["how? ", "x"]
        assert "2 left out that share a text" in caplog.text


class TestCommand:
    def test_a_file_of_settings_and_overrides(self, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text("steps: 7\noptimizer: {fraction: 0.5}\n")
        settings = auto_cli(LightningSettings, args=[f"--config={file}", "--steps=9", "--optimizer.lr=1e-3"])
        defaults = LightningSettings()
        assert settings == replace(defaults, steps=9, optimizer=replace(defaults.optimizer, lr=1e-3, fraction=0.5))

    @pytest.mark.parametrize(("file", "kind"), list(product(EXAMPLES, (Settings, LightningSettings))))
    def test_the_example_files_are_valid(self, file: Path, kind: type[Settings]) -> None:
        assert isinstance(auto_cli(kind, args=[f"--config={file}"]), kind)

    @pytest.mark.parametrize("kind", [Settings, LightningSettings])
    def test_help_explains_every_argument(self, kind: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            command.run(lambda settings: None, kind, ["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert "Tokens of a row, into which conversations are packed" in printed
        assert "Share of each matrix's slices to select" in printed
        assert ("Processes on each machine" in printed) is (kind is LightningSettings)
        assert "} (type:" not in printed, "an argument without a description"


class TestBadInput:
    """Every error names the argument and what to do."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "--steps has to be 1 or more, got 0"),
            ({"warmup": 1.0}, "--warmup has to be from 0 to below 1, got 1.0"),
            ({"max_norm": 0.0}, "--max_norm has to be above 0"),
            ({"lora_rank": -1}, "--lora_rank is 0 for no adapters"),
            ({"model": "missing/model"}, "--model 'missing/model', --attention sdpa: it could not be loaded"),
            ({"length": 1000}, "--length 1000: the model reads 256 tokens at most"),
            ({"attention": "flash_attention_2"}, "--attention flash_attention_2: it could not be loaded"),
            ({"dataset": "missing.jsonl"}, "--dataset, --held_out: there is no file missing.jsonl"),
            (
                {"dataset": "functions", "held_out": "test", "held_out_size": 32},
                "--held_out test: functions has no splits",
            ),
            ({"held_out": "x.jsonl"}, "--held_out_size 5 would have no effect: --held_out x.jsonl is held out as a"),
            (
                {"train_split": "test"},
                "--train_split test would have no effect: .*data.jsonl has no subsets and splits",
            ),
            ({"subset": "all", "dataset": "functions"}, "--subset all would have no effect: functions has no"),
            ({"lora_alpha": 8}, "--lora_alpha 8 would have no effect: there are no adapters without --lora_rank"),
            (
                {"optimizer": OptimizerSettings(lr=1e-3, lora="B")},
                "--optimizer.lora B: there are no adapters without --lora_rank",
            ),
            ({"held_out_size": 100}, "60 conversations are held out and 0 are left to train on"),
            ({"messages_column": "x", "prompt_column": "y"}, "there is neither a column 'x' nor both of 'y' and"),
            ({"resume": True}, "--resume: there is no finished checkpoint in"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
    def test_arguments(self, framework: ModuleType, arguments: dict[str, Any], message: str, tiny: Settings) -> None:
        name = next(key for key, value in FRAMEWORKS.items() if value is framework)
        with pytest.raises(InputError, match=message):
            framework.fine_tune(for_framework(name, tiny, **arguments))

    @pytest.mark.parametrize(
        ("conversation", "problem"),
        [
            ("text", "it is no list of messages"),
            ([{"role": "user"}], "a message has no role or no content in text"),
            (talk("a", "b")[1:], "it does not begin with the user"),
            (talk("a"), "the assistant says nothing"),
            (talk("a", " "), "the assistant says nothing"),
        ],
    )
    def test_conversations(self, conversation: Any, problem: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "data.jsonl", [{"messages": conversation}])
        with pytest.raises(InputError, match=f"row 0 of .*: {problem}"):
            load_conversations(Settings(dataset=path))

    def test_a_model_without_a_chat_template(self, tiny: Settings, tmp_path: Path) -> None:
        shutil.copytree(tiny.model, tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").unlink()
        with pytest.raises(InputError, match=r"its tokenizer has no chat template. Choose an instruct model"):
            load_model(replace(tiny, model=str(tmp_path / "model")))

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_overrides_that_match_nothing(self, name: str, tiny: Settings) -> None:
        optimizer = replace(tiny.optimizer, overrides={"absent": "adamw"})
        with pytest.raises(InputError, match=r"--optimizer: override .*absent"):
            FRAMEWORKS[name].fine_tune(for_framework(name, tiny, optimizer=optimizer))

    @pytest.mark.parametrize("name", ["accelerate", "trainer"])
    def test_a_launch_configuration_with_tensor_parallelism(
        self, name: str, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        framework = FRAMEWORKS[name]
        refuse = framework.refuse_model_parallelism
        asked = SimpleNamespace(parallelism_config=ParallelismConfig(tp_size=2))
        monkeypatch.setattr(framework, "refuse_model_parallelism", lambda accelerator: refuse(asked))
        with pytest.raises(
            InputError, match="asks for tp_size 2, cp_size 1 and sp_size 1, which this recipe cannot do"
        ):
            framework.fine_tune(tiny)

    def test_one_process_with_several_gpus(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """The Trainer would replicate the model by threads, and read more than a step's rows."""
        monkeypatch.setattr(with_trainer.TrainingArguments, "n_gpu", 2)
        with pytest.raises(InputError, match="torchrun --nproc_per_node 2"):
            with_trainer.fine_tune(tiny)

    def test_a_launcher_that_started_more_processes_than_lightning_is_told(
        self, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each would train by itself, in the same folder."""
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match=r"--devices, --nodes: they make 1 processes, the launcher started 2"):
            with_lightning.fine_tune(for_framework("lightning", tiny))

    def test_quantized_weights(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """They would be saved as numbers that nobody can read."""

        def load_quantized(*arguments: Any, **options: Any) -> LlamaForCausalLM:
            model = LlamaForCausalLM.from_pretrained(*arguments, **options)
            model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
            model.hf_quantizer = SimpleNamespace(quantization_config=model.config.quantization_config)
            model.is_quantized = True
            return model

        monkeypatch.setattr("recipes.supervised_fine_tuning.model.AutoModelForCausalLM.from_pretrained", load_quantized)
        with pytest.raises(InputError, match=r"its weights are quantized \(bitsandbytes\), which this recipe does not"):
            load_model(replace(tiny, lora_rank=2))

    def test_checkpointing_that_a_model_lacks(self, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
        with pytest.raises(InputError, match="--gradient_checkpointing: LlamaForCausalLM does not support"):
            load_model(replace(tiny, gradient_checkpointing=True))

    def test_a_precision_of_the_launcher_that_the_recipe_lacks(
        self, tiny: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        with pytest.raises(InputError, match="mixed_precision is fp16, which this recipe does not do"):
            autocast_dtype(tiny)
        assert autocast_dtype(replace(tiny, precision="bf16")) == torch.bfloat16

    @pytest.mark.parametrize("argument", ["--optimizer.lr=-1", "--optimizer.fraction=2"])
    def test_settings_of_the_optimizer(self, argument: str) -> None:
        name = argument.split("=")[0].removeprefix("--optimizer.")
        with pytest.raises(SystemExit, match=f"error: --optimizer.{name} must"):
            command.run(with_trainer.fine_tune, Settings, [argument])

    def test_the_command_ends_with_the_message_alone(self) -> None:
        with pytest.raises(SystemExit, match="error: --steps has to be 1 or more"):
            command.run(with_trainer.fine_tune, Settings, ["--steps=0"])
