"""The recipes: each by its own command, on models with random weights and text of Python's own library."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.gpu.random_models import shared_files
from benchmarks.gpu.section import Options, Row

STEPS: Final = 12
"""Of a run; the next resumes it, up to twice as many."""


@dataclass(frozen=True)
class Recipe:
    """How a recipe is called.

    In all words, {files} is the folder of models and texts, {output} that of the run, {steps} the last step of the run,
    and {first} that of the first run.

    Attributes:
        command: Words after "python".
        resume: Added to resume the run.
        leaves: The model that it leaves in the output folder; * for any characters.
        large: Added unless tiny.
    """

    command: str
    resume: str
    leaves: str
    large: str = ""


RECIPES: Final = {
    "pretraining": Recipe(
        "recipes/pretraining/train.py --dataset {files}/texts.txt --output {output} --steps {steps}",
        "--resume true",
        "model/model.safetensors",
        "--hidden_size 768 --layers 12 --heads 12 --length 1024 --micro_batch_size 8 --compile true",
    ),
    "sft-trainer": Recipe(
        "recipes/supervised_fine_tuning/with_trainer.py --model_name_or_path {files}/decoder "
        "--dataset_name {files}/conversations.jsonl --output_dir {output} --max_steps {steps}",
        "--resume_from_checkpoint {output}/checkpoint-{first}",
        "model.safetensors",
        "--max_length 1024 --per_device_train_batch_size 8 --gradient_checkpointing true",
    ),
    "sft-lightning": Recipe(
        "recipes/supervised_fine_tuning/with_lightning.py --model.model {files}/decoder "
        "--conversations.dataset {files}/conversations.jsonl --trainer.logger.save_dir {output} "
        "--trainer.max_steps {steps} --checkpoint.every_n_train_steps {first}",
        "--ckpt_path {output}/lightning/version_0/checkpoints/last.ckpt",
        "lightning/version_*/model/model.safetensors",
        "--conversations.max_length 1024 --batch_size 8",
    ),
    "sft-accelerate": Recipe(
        "recipes/supervised_fine_tuning/with_accelerate.py --model {files}/decoder "
        "--conversations.dataset {files}/conversations.jsonl --output {output} --steps {steps} "
        "--checkpoint_every {first}",
        "--resume true",
        "model.safetensors",
        "--conversations.max_length 1024 --batch_size 8",
    ),
    "dpo": Recipe(
        "recipes/post_training/dpo.py --model_name_or_path {files}/decoder --output_dir {output} --max_steps {steps}",
        "--resume_from_checkpoint {output}/checkpoint-{first}",
        "model.safetensors",
    ),
    "grpo": Recipe(
        "recipes/post_training/grpo.py --model_name_or_path {files}/decoder --output_dir {output} --max_steps {steps}",
        "--resume_from_checkpoint {output}/checkpoint-{first}",
        "model.safetensors",
    ),
    "text": Recipe(
        "-m recipes.text_classification.train --model {files}/encoder --output {output} --max_steps {steps} "
        "--val_check_interval {first}",
        "--resume true",
        "adamw/model/model.safetensors",  # the second of its two runs
        "--max_length 128 --batch_size 64",
    ),
    "images": Recipe(
        "recipes/image_classification/train.py --output_dir {output} --max_steps {steps}",
        "--resume_from_checkpoint {output}/checkpoint-{first}",
        "model.safetensors",
        "--model {files}/vision-transformer --learning_rate 1e-3 --adamw_lr 1e-3",
    ),
}


def run_recipe(options: Options, *, recipe: str) -> Iterator[Row]:
    """Yield a row for a run of a recipe, and one for the run that resumes it."""
    output = options.folder.resolve() / "run"
    environment = os.environ | {"HF_HOME": str(options.folder.resolve() / "cache")}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    for run, words in words_of(RECIPES[recipe], shared_files(options).resolve(), output, options.tiny).items():
        for file in output.glob(RECIPES[recipe].leaves):
            file.unlink()
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        seconds = time.monotonic() - start
        print(*words, done.stdout, sep="\n", flush=True)
        if done.returncode:
            found = f"it ended with code {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"[:500]
        else:
            found = problem_of(output, RECIPES[recipe].leaves)
        yield {"recipe": recipe, "run": run, "seconds": seconds, "ok": not found, "found": found}
        if found:
            break


def words_of(recipe: Recipe, files: Path, output: Path, tiny: bool) -> dict[str, list[str]]:
    """Return the words after "python" of both runs."""
    words = f"{recipe.command} {'' if tiny else recipe.large}"
    runs = {"from the start": (words, STEPS), "resumed": (f"{words} {recipe.resume}", 2 * STEPS)}
    return {
        run: [word.format(files=files, output=output, steps=steps, first=STEPS) for word in line.split()]
        for run, (line, steps) in runs.items()
    }


def problem_of(output: Path, leaves: str) -> str:
    """Return the problem of the model that a run left, "" for none."""
    import torch
    from safetensors.torch import load_file

    models = list(output.glob(leaves))
    if not models:
        return f"it left no {leaves}"
    weights = load_file(models[0])
    wrong = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    return f"weights that are not finite: {', '.join(wrong)}"[:500] if wrong else ""
