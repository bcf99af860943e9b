"""The recipes: each by its own command, on a model with random weights and on text of Python's own library.

A recipe's first run is ended once it has a checkpoint, like a job whose time is up; the next goes on from there.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.random_models import (
    CONVERSATIONS,
    DECODER,
    ENCODER,
    TEXTS,
    VISION_TRANSFORMER,
    shared_files,
)
from benchmarks.gpu.section import Options, Row

STEPS = 40
CHECKPOINT = 24
"""Step of the first checkpoint. A speed is logged from the 22nd step of a process on."""

SCHEDULE = {"steps": STEPS, "checkpoint_every": CHECKPOINT, "validate_every": 30}

TEXTS_IN_STEP = 64
"""In a step of text classification, which logs no speed but prints the time of a step."""


@dataclass(frozen=True)
class Call:
    """One call of a recipe.

    Attributes:
        run: What the report calls it.
        arguments: By their names on the command line.
        interrupted: Whether it is ended when the first checkpoint is there.
        output: Name of its folder; a call that goes on with another has that one's.
    """

    run: str
    arguments: dict[str, Any]
    interrupted: bool = False
    output: str = "run"


@dataclass(frozen=True)
class Recipe:
    """How a recipe is called.

    Attributes:
        command: Of Python.
        checkpoint: What its output holds when a checkpoint is whole.
        calls: Returns its calls; those that are tiny make the first alone, to its end, unless ``resumes_tiny``.
        resumes_tiny: Whether all of them are made then too.
    """

    command: Sequence[str]
    checkpoint: str
    calls: Callable[[Options], list[Call]]
    resumes_tiny: bool = False


def run_recipe(options: Options, recipe: str) -> Iterator[Row]:
    """Yield a row for each optimizer of each call of a recipe."""
    chosen = RECIPES[recipe]
    earlier: dict[Path, list[Row]] = {}
    for call in calls_of(chosen, options):
        output = options.folder / call.output
        start = time.monotonic()
        printed, problem = make_call(chosen, call, output, options)
        seconds = time.monotonic() - start
        print(printed, flush=True)
        for folder in [output / name for name in ("dion2", "adamw") if (output / name).exists()] or [output]:
            log = read_log(folder)
            before = earlier.get(folder, [])
            if before:
                log = [line for line in log if line["step"] > CHECKPOINT]
            earlier[folder] = log
            run = ", ".join(filter(None, (call.run, "control" if folder.name == "adamw" else "")))
            row = {"recipe": recipe, "run": run, **figures(log)}
            if recipe == "text":
                row |= {"a second": texts_per_second(printed, folder.name), "unit": "texts"}
            found = problem or wrong(log, before, on_gpu=options.device == "cuda" and recipe != "text")
            yield {**row, "seconds": seconds, "ok": not found, "found": found}


def calls_of(recipe: Recipe, options: Options) -> list[Call]:
    """Return the calls that are made of a recipe."""
    calls = recipe.calls(options)
    return [replace(calls[0], interrupted=False)] if options.tiny and not recipe.resumes_tiny else calls


def make_call(recipe: Recipe, call: Call, output: Path, options: Options) -> tuple[str, str]:
    """Make a call; return what it printed, and what went wrong, if anything."""
    environment = os.environ | {"HF_HOME": str((options.folder / "cache").resolve())}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *recipe.command, *command_line({**call.arguments, "output": output})]
    printed = options.folder / "printed.txt"
    ended = False
    with printed.open("w") as file:
        print(*command, file=file, flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if call.interrupted and not ended and any(output.glob(recipe.checkpoint)):
                process.terminate()
                ended = True
            time.sleep(0.01)
    text = printed.read_text(errors="replace")
    if call.interrupted != ended or (process.returncode and not ended):
        return text, f"ended with code {process.returncode}: {text.strip().splitlines()[-1]}"[:500]
    return text, ""


def command_line(arguments: dict[str, Any]) -> list[str]:
    """Return arguments as a command takes them."""
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def read_log(folder: Path) -> list[Row]:
    """Return the lines of the log in a folder that was written last, whichever framework did."""
    names = ("metrics.jsonl", "metrics.csv", "trainer_state.json")
    files = [file for name in names for file in folder.rglob(name)]
    if not files:
        return []
    newest = max(files, key=lambda file: file.stat().st_mtime)
    text = newest.read_text()
    if newest.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if newest.suffix == ".json":
        lines: list[Row] = json.loads(text)["log_history"]
        return lines
    return [{name: float(value) for name, value in line.items() if value} for line in csv.DictReader(text.splitlines())]


def losses_of(log: Sequence[Row]) -> list[float]:
    """Return the training losses of a log: of the Trainer, or of any other."""
    return [line[name] for line in log for name in ("loss", "train_loss") if name in line]


def figures(log: Sequence[Row]) -> Row:
    """Return what a log says, as a part of a row."""
    losses = losses_of(log)
    last = {name: value for line in log for name, value in line.items()}
    unit = next((unit for unit in ("tokens", "images") if f"{unit}_per_second" in last), None)
    return {
        "losses": len(losses),
        "first loss": losses[0] if losses else None,
        "last loss": losses[-1] if losses else None,
        "a second": last.get(f"{unit}_per_second"),
        "unit": unit,
        "MFU": last.get("model_flops_utilisation"),
        "peak GB": last.get("peak_memory_gb"),
    }


def texts_per_second(printed: str, algorithm: str) -> float | None:
    """Return the speed that the time of a step in text classification's table makes, if there is one."""
    found = re.search(rf"{algorithm}\b.*?(\d+) ms", printed, re.IGNORECASE)
    return 1000 * TEXTS_IN_STEP / max(1, int(found[1])) if found else None


def wrong(log: Sequence[Row], before: Sequence[Row], on_gpu: bool) -> str:
    """Return what is wrong with a run, if anything.

    Args:
        log: Of the run.
        before: Log of the run that it goes on with, if it does.
        on_gpu: Whether its log has to show that it was on a GPU.
    """
    losses, others = losses_of(log), losses_of(before)
    if len(set(losses)) < 2 or not all(map(math.isfinite, losses)):
        return f"training losses: {losses}"
    if others and abs(losses[0] - others[-1]) > abs(losses[0] - others[0]):
        return f"it went on with a loss of {losses[0]:.4g}; the run before had begun at {others[0]:.4g}"
    if on_gpu and "peak_memory_gb" not in {name for line in log for name in line}:
        return "it has not been on a GPU"
    return ""


def pretraining(options: Options) -> list[Call]:
    """A Llama of GPT-2's width and depth on bytes."""
    sizes = {"hidden_size": 64, "layers": 2, "heads": 4, "length": 64, "batch_size": 8, "micro_batch_size": 4}
    if not options.tiny:
        sizes = {
            "hidden_size": 768,
            "layers": 12,
            "heads": 12,
            "length": 1024,
            "batch_size": 32,
            "micro_batch_size": 16,
        }
    given = {**SCHEDULE, **sizes, "log_every": 4, "dataset": shared_files(options) / TEXTS}
    return [
        Call("compiled" if not options.tiny else "", given | {"compile": not options.tiny}, interrupted=True),
        Call("resumed, gradient checkpointing", given | {"gradient_checkpointing": True, "resume": True}),
    ]


def fine_tuning(options: Options) -> dict[str, Any]:
    """Arguments for a language model of SmolLM2-135M's size on packed docstrings."""
    sizes = {"length": 128, "batch_size": 2} if options.tiny else {"length": 1024, "batch_size": 8}
    return {
        **SCHEDULE,
        **sizes,
        "log_every": 4,
        "optimizer.lr": 5e-3,
        "optimizer.adamw_lr": 2e-3,
        "model": shared_files(options) / DECODER,
        "dataset": shared_files(options) / CONVERSATIONS,
    }


def with_trainer(options: Options) -> list[Call]:
    given = fine_tuning(options)
    return [Call("all weights", given, interrupted=True), Call("resumed", given | {"resume": True})]


def with_lightning(options: Options) -> list[Call]:
    given = fine_tuning(options)
    return [
        Call("gradient checkpointing", given | {"gradient_checkpointing": True}, interrupted=True),
        Call("resumed", given | {"resume": True}),
    ]


def with_accelerate(options: Options) -> list[Call]:
    given = fine_tuning(options)
    adapters = given | {"lora_rank": 16, "optimizer.lora": "B"}
    return [
        Call("LoRA", adapters, interrupted=True),
        Call("resumed, LoRA", adapters | {"resume": True}),
        Call("all weights, accumulation", given | {"batch_size": 4, "accumulation": 2}, output="all"),
    ]


def text_classification(options: Options) -> list[Call]:
    """An encoder of MiniLM-L6's size on docstrings."""
    sizes = {"max_length": 32, "batch_size": 8} if options.tiny else {"max_length": 128, "batch_size": TEXTS_IN_STEP}
    device = {"accelerator": "cpu"} if options.device == "cpu" else {"accelerator": "gpu", "devices": "[0]"}
    given = {**SCHEDULE, **sizes, **device, "model": shared_files(options) / ENCODER}
    return [Call("", given, interrupted=True), Call("resumed", given | {"resume": True})]


def image_classification(options: Options) -> list[Call]:
    """A vision transformer of DeiT-small's size on scikit-learn's digits."""
    given: dict[str, Any] = {**SCHEDULE, "log_every": 4, "held_out_rows": 128}
    if options.tiny:
        given |= {"batch_size": 16}
    else:
        model = shared_files(options) / VISION_TRANSFORMER
        given |= {"model": model, "workers": 4}
    return [
        Call("", given, interrupted=True),
        Call("resumed, gradient checkpointing", given | {"gradient_checkpointing": True, "resume": True}),
    ]


RECIPES = {
    "pretraining": Recipe(
        ("recipes/pretraining/train.py",), "checkpoints/step-*/settings.json", pretraining, resumes_tiny=True
    ),
    "sft-trainer": Recipe(
        ("recipes/supervised_fine_tuning/with_trainer.py",),
        "dion2/checkpoints/checkpoint-*/trainer_state.json",
        with_trainer,
    ),
    "sft-lightning": Recipe(
        ("recipes/supervised_fine_tuning/with_lightning.py",), "dion2/checkpoints/step-*", with_lightning
    ),
    "sft-accelerate": Recipe(
        ("recipes/supervised_fine_tuning/with_accelerate.py",), "dion2/checkpoints/step-*", with_accelerate
    ),
    "text": Recipe(("-m", "recipes.text_classification"), "dion2/seed-0/last.ckpt", text_classification),
    "images": Recipe(
        ("-m", "recipes.image_classification.train"),
        "dion2/seed-0/checkpoint-*/trainer_state.json",
        image_classification,
    ),
}
