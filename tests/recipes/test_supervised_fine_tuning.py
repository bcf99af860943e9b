"""The recipe, run in all three frameworks: offline, a few steps, on one process and on two."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
    get_cosine_schedule_with_warmup,
)

from dion2_lightning import build_optimizer
from dion2_lightning.monitoring.history import SelectionHistory
from recipes.offline_data import as_messages
from recipes.supervised_fine_tuning import with_accelerate, with_lightning, with_trainer
from recipes.supervised_fine_tuning.data import DataSettings, load_conversations, load_rows
from recipes.supervised_fine_tuning.model import IGNORED, check_packing
from tests.distributed.ranks import run_like_torchrun
from tests.installed import is_before
from tests.integrations.huggingface import fsdp2_on_cpu
from tests.recipes.colours import ROWS, chat, forget_accelerators, row, talk, write_rows

FOLDER = Path(with_trainer.__file__).parent
FRAMEWORKS = {"trainer": with_trainer, "lightning": with_lightning, "accelerate": with_accelerate}
LENGTH, STEPS = 192, 6
EPS = 1e-2
"""So large that AdamW's steps depend on the scale of the gradients."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of short conversations, with answers of unequal lengths."""
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", [chat(number) for number in range(ROWS)])


def arguments(
    framework: str,
    model: Path,
    data: Path,
    output: Path,
    batch: int = 2,
    accumulation: int = 1,
    algorithm: str = "dion2",
) -> list[str]:
    """What tells each framework the same."""
    values = {
        "trainer": {
            "model_name_or_path": model,
            "dataset_name": data,
            "output_dir": output,
            "max_length": LENGTH,
            "max_steps": STEPS,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "eval_steps": 3,
            "save_steps": 3,
            "save_total_limit": 9,
            "algorithm": algorithm,
            "learning_rate": 3e-2,
            "adamw_lr": 1e-2,
            "adam_epsilon": EPS,
            "optim_args": "orthonormalize_dtype=float32",
            "report_to": "none",
        },
        "lightning": {
            "model.model": model,
            "conversations.dataset": data,
            "conversations.max_length": LENGTH,
            "batch_size": batch,
            "trainer.max_steps": STEPS,
            "trainer.accumulate_grad_batches": accumulation,
            "trainer.val_check_interval": 3 * accumulation,
            "trainer.logger.save_dir": output,
            "trainer.logger.name": "",
            "checkpoint.every_n_train_steps": 3,
            "checkpoint.save_top_k": -1,
            **optimizer("model.optimizer", algorithm),
        },
        "accelerate": {
            "model": model,
            "conversations.dataset": data,
            "conversations.max_length": LENGTH,
            "output": output,
            "batch_size": batch,
            "steps": STEPS,
            "accumulation": accumulation,
            "validate_every": 3,
            "checkpoint_every": 3,
            **optimizer("optimizer", algorithm),
        },
    }
    return [f"--{name}={value}" for name, value in values[framework].items()]


def optimizer(prefix: str, algorithm: str) -> dict[str, Any]:
    values = {"lr": 3e-2, "adamw_lr": 1e-2, "eps": EPS, "orthonormalize_dtype": "float32", "algorithm": algorithm}
    return {f"{prefix}.{name}": value for name, value in values.items()}


def fine_tune(framework: str, *options: str) -> None:
    """Call the command's main, as if it had been called with these arguments."""
    forget_accelerators()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [framework, *options])
        FRAMEWORKS[framework].main()


def saved_model(framework: str, output: Path) -> Path:
    return output / "version_0" / "model" if framework == "lightning" else output


def weights(framework: str, output: Path) -> dict[str, Tensor]:
    return load_file(saved_model(framework, output) / "model.safetensors")


def metrics(framework: str, output: Path) -> tuple[list[float], list[float]]:
    """The training losses and the validation losses of a run."""
    if framework == "trainer":
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return [each["loss"] for each in log if "loss" in each], [
            each["eval_loss"] for each in log if "eval_loss" in each
        ]
    if framework == "lightning":
        with (output / "version_0" / "metrics.csv").open() as file:
            log = list(csv.DictReader(file))
        found = [[float(each[name]) for each in log if each.get(name)] for name in ("train_loss", "val_loss")]
        return found[0], found[1]
    log = (output / "printed.txt").read_text()
    train, validation = (re.findall(rf"step \d+: {name} ([\d.e-]+)", log) for name in ("loss", "val_loss"))
    return list(map(float, train)), list(map(float, validation))


@pytest.fixture(scope="module")
def runs(chat_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of an uninterrupted run with each framework."""
    folders = {}
    for framework in FRAMEWORKS:
        folders[framework] = tmp_path_factory.mktemp(framework)
        run_and_keep_output(framework, arguments(framework, chat_model, data, folders[framework]), folders[framework])
    return folders


def run_and_keep_output(framework: str, options: list[str], output: Path) -> None:
    with redirect_stdout(StringIO()) as printed:
        fine_tune(framework, *options)
    (output / "printed.txt").write_text(printed.getvalue())


class TestRun:
    def test_the_losses_are_those_of_a_loop_without_packing(
        self, runs: dict[str, Path], chat_model: Path, data: Path
    ) -> None:
        """Each conversation alone, in float32, summed by hand; validation before the first step and after 3 and 6."""
        train, validation = by_hand(chat_model, data)
        for framework, output in runs.items():
            losses, val_losses = metrics(framework, output)
            assert losses == pytest.approx(train, abs=1e-4), framework
            assert val_losses == pytest.approx(validation, abs=1e-4), framework
        assert max(train) - min(train) > 0.1  # it trains

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_the_saved_model_has_the_last_validation_loss(
        self, framework: str, runs: dict[str, Path], chat_model: Path, data: Path
    ) -> None:
        folder = saved_model(framework, runs[framework])
        AutoTokenizer.from_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder)
        _, rows = load_rows(settings_of(data), AutoTokenizer.from_pretrained(chat_model))
        loss = sum(sum_of_losses(saved, row) for row in rows).item() / sum(map(count_labels, rows))
        assert metrics(framework, runs[framework])[1][-1] == pytest.approx(loss, abs=1e-5)

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_leaves_what_was_selected(self, framework: str, runs: dict[str, Path]) -> None:
        folder = saved_model(framework, runs[framework])
        file = (folder.parent if framework == "lightning" else folder) / "dion2_selection.json"
        assert len(SelectionHistory.load(file)) > 1

    @pytest.mark.parametrize("algorithm", ["dion2", "adamw"])
    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_a_run_that_goes_on_ends_with_the_same_weights(
        self, framework: str, algorithm: str, runs: dict[str, Path], chat_model: Path, data: Path, tmp_path: Path
    ) -> None:
        """From the checkpoint in the middle, of which a copy is all that is left."""
        options = arguments(framework, chat_model, data, tmp_path / "whole", algorithm=algorithm)
        if algorithm == "dion2":
            whole = runs[framework]
        else:
            whole = tmp_path / "whole"
            fine_tune(framework, *options)
        rest = tmp_path / "rest"
        options = arguments(framework, chat_model, data, rest, algorithm=algorithm)
        if framework == "trainer":
            options += [f"--resume_from_checkpoint={whole / 'checkpoint-3'}"]
        elif framework == "lightning":
            [checkpoint] = whole.glob("version_0/checkpoints/*step=3.ckpt")
            options += [f"--ckpt_path={checkpoint}"]
        else:
            shutil.copytree(whole / "checkpoints" / "checkpoint_3", rest / "checkpoints" / "checkpoint_3")
            options += ["--resume=true"]
        fine_tune(framework, *options)
        expected, found = weights(framework, whole), weights(framework, rest)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    def test_a_finished_run_takes_more_steps(self, chat_model: Path, data: Path, tmp_path: Path) -> None:
        """Under Accelerate, whose folders are named by the program: also after a last checkpoint between two others."""
        options = arguments("accelerate", chat_model, data, tmp_path)
        fine_tune("accelerate", *options, "--checkpoint_every=4")
        fine_tune("accelerate", *options, "--checkpoint_every=4", "--steps=9", "--resume=true")
        assert {each.name for each in (tmp_path / "checkpoints").iterdir()} == {"checkpoint_8", "checkpoint_9"}

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_accumulation_changes_nothing(
        self, framework: str, runs: dict[str, Path], chat_model: Path, data: Path, tmp_path: Path
    ) -> None:
        fine_tune(framework, *arguments(framework, chat_model, data, tmp_path, batch=1, accumulation=2))
        compare(weights(framework, tmp_path), weights(framework, runs[framework]))


def answer_of(row: dict[str, Any]) -> str:
    return f"{row['completion'][0]['content']}<|im_end|>\n"


def settings_of(data: Path) -> DataSettings:
    return DataSettings(str(data), max_length=LENGTH, seed=42)


def by_hand(chat_model: Path, data: Path) -> tuple[list[float], list[float]]:
    """The same training without packing, and without any of the frameworks."""
    net = AutoModelForCausalLM.from_pretrained(chat_model)
    rows, validation = load_rows(settings_of(data), AutoTokenizer.from_pretrained(chat_model))
    adjusted = build_optimizer(
        net, lr=3e-2, adamw_lr=1e-2, eps=EPS, fraction=0.25, momentum=0.81, orthonormalize_dtype="float32"
    )
    schedule = get_cosine_schedule_with_warmup(adjusted, 1, STEPS)

    def validate() -> float:
        with torch.no_grad():
            return sum(sum_of_losses(net, row) for row in validation).item() / sum(map(count_labels, validation))

    losses, val_losses = [], [validate()]
    for step in range(STEPS):
        batch = [rows[2 * step], rows[2 * step + 1]]
        loss = sum(sum_of_losses(net, row) for row in batch) / sum(map(count_labels, batch))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adjusted.step()
        adjusted.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step + 1 in (3, 6):
            val_losses.append(validate())
    return losses, val_losses


def conversations(row: dict[str, list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token numbers and labels of each conversation in a row."""
    sizes = row["seq_lengths"]
    return zip(torch.tensor(row["input_ids"]).split(sizes), torch.tensor(row["labels"]).split(sizes), strict=True)


def sum_of_losses(net: nn.Module, row: dict[str, list[int]]) -> Tensor:
    total = torch.zeros(())
    for tokens, labels in conversations(row):
        total = total + cross_entropy(
            net(tokens[None]).logits[0, :-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        )
    return total


def count_labels(row: dict[str, list[int]]) -> int:
    return sum(int((labels[1:] != IGNORED).sum()) for _, labels in conversations(row))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() - {"lm_head.weight"} == expected.keys()  # of shards, tied weights are saved twice
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name


LAUNCHERS = {
    "trainer": ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "recipes/launch/cpu.yaml"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "recipes/launch/cpu.yaml"],
    "lightning": [],
}


SHARDS = [
    "--trainer.devices=2",
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
]


class TestSeveralProcesses:
    """Two processes that read one row each are one process that reads two."""

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_replicas_through_the_launcher(
        self, framework: str, runs: dict[str, Path], chat_model: Path, data: Path, tmp_path: Path
    ) -> None:
        options = arguments(framework, chat_model, data, tmp_path, batch=1)
        options += ["--trainer.devices=2"] if framework == "lightning" else []
        launch([*LAUNCHERS[framework], f"recipes/supervised_fine_tuning/with_{framework}.py", *options])
        compare(weights(framework, tmp_path), weights(framework, runs[framework]))

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_shards(self, framework: str, runs: dict[str, Path], chat_model: Path, data: Path, tmp_path: Path) -> None:
        if framework != "lightning" and is_before("torch", "2.13"):
            pytest.skip("torch before 2.13: FSDP2 fails where TRL's loss takes a tied head without calling it")
        options = arguments(framework, chat_model, data, tmp_path, batch=1)
        options += SHARDS if framework == "lightning" else []
        run_like_torchrun(2, fine_tune_shards, framework, options)
        compare(weights(framework, tmp_path), weights(framework, runs[framework]))
        saved = AutoModelForCausalLM.from_pretrained(saved_model(framework, tmp_path))
        assert saved.lm_head.weight is saved.model.embed_tokens.weight


def fine_tune_shards(framework: str, options: list[str]) -> None:
    torch.set_num_threads(1)
    if framework != "lightning":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_VERSION"] = "2"
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
        fsdp2_on_cpu()
    fine_tune(framework, *options)


def launch(arguments: list[str], **environment: str) -> str:
    """Run Python with these arguments from the project's folder, and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ".", **environment}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA_LIKE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}


class TestPacking:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("config", [LlamaConfig(**LLAMA_LIKE), Qwen3Config(**LLAMA_LIKE)])
    def test_models_that_keep_conversations_apart(self, config: Any, attention: str) -> None:
        check_packing(AutoModelForCausalLM.from_config(config, attn_implementation=attention))

    @pytest.mark.parametrize(
        "config",
        [
            OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16),
            pytest.param(
                FalconConfig(**SMALL, alibi=True),
                marks=pytest.mark.skipif(
                    not is_before("transformers", "5.24"), reason="from transformers 5.24 on it keeps them apart"
                ),
            ),
            MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4),
            GptOssConfig(**LLAMA_LIKE, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2),
        ],
        ids=lambda config: config.model_type,
    )
    def test_models_that_mix_them_up_are_refused(self, config: Any) -> None:
        with pytest.raises(ValueError, match=r"packing: .* mixes up conversations in one row; pass --packing false"):
            check_packing(AutoModelForCausalLM.from_config(config))

    def test_the_trainer_gives_each_a_row_where_it_is_asked_to(
        self, chat_model: Path, data: Path, tmp_path: Path
    ) -> None:
        net = AutoModelForCausalLM.from_config(
            OPTConfig(**{**SMALL, "vocab_size": 400}, ffn_dim=24, word_embed_proj_dim=16)
        )
        net.save_pretrained(tmp_path / "opt")
        AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "opt")
        options = arguments("trainer", tmp_path / "opt", data, tmp_path / "run")
        with pytest.raises(ValueError, match="pass --packing false"):
            fine_tune("trainer", *options)
        fine_tune("trainer", *options, "--packing=false")


class TestData:
    def test_only_answers_and_what_ends_them_are_trained_on(self, chat_model: Path, data: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(chat_model)
        for rows, packed in zip(
            load_conversations(settings_of(data)), load_rows(settings_of(data), tokenizer), strict=True
        ):
            expected = [
                (tokenizer.apply_chat_template(each["prompt"] + each["completion"], tokenize=False), answer_of(each))
                for each in rows
            ]
            found = [
                (tokenizer.decode(tokens), tokenizer.decode(labels[labels != IGNORED]))
                for row in packed
                for tokens, labels in conversations(row)
            ]
            assert sorted(found) == sorted(expected)

    def test_messages(self, chat_model: Path, tmp_path: Path) -> None:
        """The template that comes with the recipe says the same as SmolLM2's, and marks every answer."""
        tokenizer = AutoTokenizer.from_pretrained(chat_model)
        talks = [talk(number) + talk(number + 1) for number in range(0, ROWS, 2)]
        file = write_rows(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
        settings = DataSettings(str(file), max_length=256, chat_template=FOLDER / "smollm2_training.jinja")
        expected = {
            (
                tokenizer.apply_chat_template(each, tokenize=False),
                f"{each[1]['content']}<|im_end|>{each[3]['content']}<|im_end|>",
            )
            for each in talks
        }
        train, validation = load_rows(settings, tokenizer)
        found = [
            (tokenizer.decode(tokens), tokenizer.decode(labels[labels != IGNORED]))
            for packed in [*train, *validation]
            for tokens, labels in conversations(packed)
        ]
        assert len(found) > 40 and set(found) <= expected

    def test_texts_are_a_users_and_the_assistants(self, data: Path, tmp_path: Path) -> None:
        texts = write_rows(tmp_path / "texts.jsonl", [row(number) for number in range(ROWS)])
        assert [list(rows) for rows in load_conversations(settings_of(texts))] == [
            list(rows) for rows in load_conversations(settings_of(data))
        ]

    def test_no_text_of_the_validation_rows_is_trained_on(self, tmp_path: Path) -> None:
        """Neither prompts nor long answers, in whatever case and with whatever white space."""
        answer = "an answer that is too long to be the same by chance"
        rows = [{"prompt": f"question {n}", "completion": f"short {n}"} for n in range(20)]
        copies = [
            {"prompt": "QUESTION  7", "completion": "another"},
            {"prompt": "new", "completion": answer.upper()},
            {"prompt": "fresh", "completion": "short 7"},
        ]
        validation = [rows[7], {"prompt": "other", "completion": answer}]
        settings = DataSettings(
            str(write_rows(tmp_path / "train.jsonl", rows + copies)),
            validation_split=str(write_rows(tmp_path / "validation.jsonl", validation)),
        )
        train, held = load_conversations(settings)
        assert list(held) == [as_messages(**each) for each in validation]
        assert list(train) == [as_messages(**each) for each in [*rows[:7], *rows[8:], copies[2]]]

    def test_the_validation_rows_do_not_depend_on_the_seed(self, data: Path) -> None:
        first, second = (load_conversations(DataSettings(str(data), seed=seed))[1] for seed in (0, 1))
        assert list(first) == list(second)

    def test_the_default_is_read_from_python(self) -> None:
        train, validation = load_conversations(DataSettings())
        assert len(validation) == 32 and len(train) > 4000
        assert train[0]["prompt"][0]["content"].startswith("Write the docstring of this Python function.\n\ndef ")

    def test_columns_of_other_names(self, tmp_path: Path) -> None:
        file = write_rows(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}])
        with pytest.raises(
            ValueError, match=r"rows of train need messages, or prompt and completion, got \['question', 'answer'\]"
        ):
            load_conversations(DataSettings(str(file)))


class TestNamesAndFiles:
    def test_names_on_the_hub(self, chat_model: Path, data: Path, tmp_path: Path) -> None:
        """Both are in the caches of the hub, as if they had been downloaded before; no network is used."""
        hub, datasets = tmp_path / "hub", tmp_path / "datasets"
        fill_hub_cache(hub, chat_model)
        fill_datasets_cache(datasets, data, tmp_path / "built")
        options = arguments("trainer", Path("org/tiny"), Path("org/talks"), tmp_path / "run")
        launch(
            ["recipes/supervised_fine_tuning/with_trainer.py", *options],
            HF_HUB_CACHE=str(hub),
            HF_DATASETS_CACHE=str(datasets),
        )
        AutoModelForCausalLM.from_pretrained(tmp_path / "run")

    def test_adapters(self, chat_model: Path, data: Path, tmp_path: Path) -> None:
        """LoRA by the Trainer's own arguments; Dion2 trains the factors B, and only adapters are saved."""
        options = arguments("trainer", chat_model, data, tmp_path)
        fine_tune("trainer", *options, "--use_peft", "--lora_target_modules=all-linear", "--lora=B")
        adapters = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
        trained = [tensor for name, tensor in adapters.named_parameters() if "lora_B" in name]
        assert trained and all(tensor.abs().max() > 0 for tensor in trained)
        names = {info.name for info in SelectionHistory.load(tmp_path / "dion2_selection.json").infos}
        assert names and all("lora_B" in name for name in names)

    def test_the_example_file_is_valid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = []

        def stop(settings: DataSettings) -> None:
            read.append(settings)
            sys.exit()

        monkeypatch.setattr(with_trainer, "load_conversations", stop)
        with pytest.raises(SystemExit):
            fine_tune("trainer", "--config", str(FOLDER / "smollm2-1.7b.yaml"))
        assert read[0].dataset == "HuggingFaceTB/smoltalk" and read[0].validation_split == "test[:500]"


def fill_hub_cache(hub: Path, chat_model: Path) -> None:
    repository, commit = hub / "models--org--tiny", "0" * 40
    shutil.copytree(chat_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def fill_datasets_cache(cache: Path, data: Path, built: Path) -> None:
    load_dataset("json", data_files=str(data), cache_dir=str(built))
    [file] = built.glob("json/*/*/*/dataset_info.json")
    info = json.loads(file.read_text())
    info |= {"dataset_name": "talks", "config_name": "default"}
    place = cache / "org___talks" / "default" / "0.0.0" / ("0" * 40)
    place.mkdir(parents=True)
    (place / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(file.with_name("json-train.arrow"), place / "talks-train.arrow")
