"""DPO and GRPO with Dion2, as their commands run them: offline, a few steps, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dion2_lightning import Dion2
from recipes.post_training import dpo, grpo
from tests.recipes.colours import chat, forget_accelerators, write_rows

PROGRAMS = {"dpo": dpo, "grpo": grpo}
ROOT = Path(dpo.__file__).parents[2]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of few prompts, each with an answer and that of another prompt."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": chat(n)["prompt"], "chosen": chat(n)["completion"], "rejected": chat(n + 1)["completion"]}
        for n in range(20)
    ]
    write_rows(folder / "train.jsonl", rows[:16])
    write_rows(folder / "test.jsonl", rows[16:])
    return folder


def arguments(program: str, model: Path, pairs: Path, output: Path, algorithm: str = "dion2") -> list[str]:
    values: dict[str, Any] = {
        "model_name_or_path": model,
        "output_dir": output,
        "algorithm": algorithm,
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 9,
        "report_to": "none",
    }
    if program == "dpo":
        values |= {"dataset_name": pairs, "eval_steps": 4}
    else:
        values |= {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
    return [f"--{name}={value}" for name, value in values.items()]


def train(program: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    forget_accelerators()
    monkeypatch.setattr(sys, "argv", [program, *options])
    return PROGRAMS[program].main()


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestPrograms:
    @pytest.mark.parametrize("algorithm", ["dion2", "adamw"])
    @pytest.mark.parametrize("program", PROGRAMS)
    def test_trains_saves_and_goes_on(
        self,
        program: str,
        algorithm: str,
        chat_model: Path,
        pairs: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        whole, rest = tmp_path / "whole", tmp_path / "rest"
        trainer = train(program, arguments(program, chat_model, pairs, whole, algorithm), monkeypatch)
        assert isinstance(trainer.optimizer.optimizer, Dion2)
        assert {group["algorithm"] for group in trainer.optimizer.param_groups} >= {algorithm}
        tokens = torch.arange(12)[None]
        saved = AutoModelForCausalLM.from_pretrained(whole)
        with torch.no_grad():
            assert torch.equal(saved(tokens).logits, trainer.model.eval()(tokens).logits)
        assert not same_weights(chat_model, whole)
        assert (whole / "dion2_selection.json").exists() == (algorithm != "adamw")

        options = [
            *arguments(program, chat_model, pairs, rest, algorithm),
            f"--resume_from_checkpoint={whole / 'checkpoint-2'}",
        ]
        train(program, options, monkeypatch)
        assert same_weights(whole, rest)

    @pytest.mark.parametrize("program", PROGRAMS)
    def test_two_processes(self, program: str, chat_model: Path, pairs: Path, tmp_path: Path) -> None:
        launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "recipes/launch/cpu.yaml"]
        command = [*launcher, f"recipes/post_training/{program}.py", *arguments(program, chat_model, pairs, tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 2
        assert not same_weights(chat_model, tmp_path)


class TestData:
    def test_pairs(self) -> None:
        """The chosen answer is the function's own docstring, and the rejected one that of another function."""
        pairs = dpo.load_pairs("functions", None)
        own = [(row["prompt"], row["completion"]) for row in dpo.read_conversations()]
        assert len(pairs["test"]) <= dpo.VALIDATION_PAIRS
        for row in [*pairs["test"], *pairs["train"].select(range(50))]:
            assert (row["prompt"], row["chosen"]) in own
            assert row["chosen"] != row["rejected"]
        assert {json.dumps(row) for row in pairs["test"]["prompt"]}.isdisjoint(
            map(json.dumps, pairs["train"]["prompt"])
        )

    def test_prompts(self) -> None:
        prompts = grpo.load_prompts()
        assert isinstance(prompts, Dataset) and len(prompts) > 500

    @pytest.mark.parametrize(
        ("answer", "kept"),
        [
            ("Return the name.", 4),
            ("Return the name.\n\nIt has no spaces = none.", 4),
            ("return the name.", 3),
            ("Return the name", 3),
            ("Return the name" + " and so on" * 9 + ".", 3),
            ("Call f(x) and return it.", 3),
            ("```python", 1),
            ("", 1),
        ],
    )
    def test_reward(self, answer: str, kept: int) -> None:
        assert grpo.reward([[{"role": "assistant", "content": answer}]]) == [kept / 4]
