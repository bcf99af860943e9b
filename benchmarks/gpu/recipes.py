"""The recipes: each by its own command, on a model with random weights and on text of Python's own library.

A recipe's first run is interrupted after its first checkpoint, like a job whose time is up; the next resumes it.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.random_models import CONVERSATIONS, DECODER, ENCODER, TEXTS, VISION_TRANSFORMER, shared_files
from benchmarks.gpu.section import Options, Row

CHECKPOINT: Final = 24
"""Step of the first checkpoint. A speed is logged from the 22nd step of a process on."""

SCHEDULE: Final = {"steps": 2 * CHECKPOINT, "checkpoint_every": CHECKPOINT, "validate_every": 30}
"""As many steps after the checkpoint as before it, so that the resumed run logs a speed too."""


@dataclass(frozen=True)
class Call:
    """One call of a recipe's command.

    Attributes:
        run: Name in the report.
        arguments: By name, as on the command line.
        interrupted: Whether it is interrupted after the first checkpoint.
    """

    run: str
    arguments: dict[str, Any]
    interrupted: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a recipe is called.

    Attributes:
        command: Arguments of Python.
        checkpoint: Pattern, in the output folder, of what exists once a checkpoint is complete.
        calls: Returns the calls to make.
        resumed_if_tiny: Whether it is resumed even if tiny; one recipe for each framework is.
    """

    command: Sequence[str]
    checkpoint: str
    calls: Callable[[Options], list[Call]]
    resumed_if_tiny: bool = False


def run_recipe(options: Options, *, recipe: str) -> Iterator[Row]:
    """Yield a row for each optimizer of each call of a recipe."""
    output = options.folder / "run"
    earlier: dict[Path, list[Row]] = {}
    for call in calls_of(RECIPES[recipe], options):
        start = time.monotonic()
        printed, problem = make_call(RECIPES[recipe], call, output, options)
        seconds = time.monotonic() - start
        print(printed, flush=True)
        for folder in [output / name for name in ("dion2", "adamw") if (output / name).exists()] or [output]:
            before = earlier.get(folder, [])
            log = [line for line in read_log(folder) if not before or line["step"] > CHECKPOINT]
            earlier[folder] = log
            run = f"{call.run}, control" if folder.name == "adamw" else call.run
            row = {"recipe": recipe, "run": run, **summary_of(log)}
            if recipe == "text":
                speed = texts_per_second(printed, folder.name, call.arguments["batch_size"])
                row |= {"a second": speed, "unit": "texts"}
            found = problem or problem_of(log, before, on_gpu=options.device == "cuda" and recipe != "text")
            yield {**row, "seconds": seconds, "ok": not found, "found": found}


def calls_of(recipe: Recipe, options: Options) -> list[Call]:
    """Return the calls to make; if tiny, of some recipes the first alone, because processes are slow to start."""
    calls = recipe.calls(options)
    return calls[:1] if options.tiny and not recipe.resumed_if_tiny else calls


def make_call(recipe: Recipe, call: Call, output: Path, options: Options) -> tuple[str, str]:
    """Make a call; return what it printed, and its problem, "" for none."""
    environment = os.environ | {"HF_HOME": str((options.folder / "cache").resolve())}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *recipe.command, *command_line({**call.arguments, "output": output})]
    was_interrupted = False
    with (options.folder / "printed").open("w+", errors="replace") as printed:
        print(*command, file=printed, flush=True)
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if call.interrupted and not was_interrupted and any(output.glob(recipe.checkpoint)):
                time.sleep(0.1)  # the Trainer may still be writing the file
                was_interrupted = process.poll() is None
                process.terminate()
            time.sleep(0.01)
        printed.seek(0)
        text = printed.read()
    if call.interrupted == was_interrupted and (was_interrupted or process.returncode == 0):
        return text, ""
    return text, f"ended by itself with code {process.returncode}: {text.strip().splitlines()[-1]}"[:500]


def command_line(arguments: dict[str, Any]) -> list[str]:
    """Return arguments as words of a command line."""
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def read_log(folder: Path) -> list[Row]:
    """Return the lines of the newest log in a folder, whichever framework wrote it."""
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
    """Return the training losses of a log."""
    trainer_losses = [line["loss"] for line in log if "loss" in line]  # its train_loss is the mean of the whole run
    return trainer_losses or [line["train_loss"] for line in log if "train_loss" in line]


def summary_of(log: Sequence[Row]) -> Row:
    """Return losses, speed and memory of a log, as part of a row."""
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


def texts_per_second(printed: str, algorithm: str, batch_size: int) -> float | None:
    """Return the speed by the step time in the printed table: the log of text classification has none."""
    found = re.search(rf"^.*\b{algorithm}\b.*?(\d+) ms", printed, re.IGNORECASE | re.MULTILINE)
    return 1000 * batch_size / max(1, int(found[1])) if found else None


def problem_of(log: Sequence[Row], before: Sequence[Row], on_gpu: bool) -> str:
    """Return the problem of a run, "" for none.

    Args:
        log: Of the run.
        before: Log of the run that it resumes, if it does.
        on_gpu: Whether its log must show that it ran on a GPU.
    """
    losses, earlier = losses_of(log), losses_of(before)
    if len(set(losses)) < 2 or not all(map(math.isfinite, losses)):
        return f"training losses: {losses}"
    # While the loss has hardly fallen, it does not tell a resumed run from a new one.
    if earlier and earlier[-1] < 0.9 * earlier[0] and losses[0] > (earlier[0] + earlier[-1]) / 2:
        return f"it resumed with a loss of {losses[0]:.4g} after {earlier[-1]:.4g}"
    if on_gpu and "peak_memory_gb" not in {name for line in log for name in line}:
        return "it did not run on a GPU"
    return ""


def pretraining(options: Options) -> list[Call]:
    """A Llama of GPT-2's width and depth on bytes."""
    sizes = (
        {"hidden_size": 64, "layers": 2, "heads": 4, "length": 64, "batch_size": 8, "micro_batch_size": 4}
        if options.tiny
        else {"hidden_size": 768, "layers": 12, "heads": 12, "length": 1024, "batch_size": 32, "micro_batch_size": 16}
    )
    rates = {} if options.tiny else {"optimizer.lr": 3e-3, "optimizer.adamw_lr": 3e-3}  # as in gpt2-size.yaml
    arguments = {**SCHEDULE, **sizes, **rates, "log_every": 4, "dataset": shared_files(options) / TEXTS}
    return [
        # On a CPU compiling takes longer than the whole run.
        Call("as it is" if options.tiny else "compiled", arguments | {"compile": not options.tiny}, interrupted=True),
        Call("resumed, gradient checkpointing", arguments | {"gradient_checkpointing": True, "resume": True}),
    ]


def fine_tuning(options: Options, *, run: str, changes: dict[str, Any]) -> list[Call]:
    """A language model of SmolLM2-135M's size on packed docstrings."""
    arguments = {
        **SCHEDULE,
        **({"length": 256, "batch_size": 2} if options.tiny else {"length": 1024, "batch_size": 8}),
        "log_every": 4,
        "model": shared_files(options) / DECODER,
        "dataset": shared_files(options) / CONVERSATIONS,
        "optimizer.lr": 2e-3,  # the defaults are for pretrained weights
        "optimizer.adamw_lr": 1e-3,
        **changes,
    }
    return [Call(run, arguments, interrupted=True), Call(f"{run}, resumed", arguments | {"resume": True})]


def text_classification(options: Options) -> list[Call]:
    """An encoder of MiniLM-L6's size on docstrings."""
    arguments = {
        **SCHEDULE,
        **({"max_length": 32, "batch_size": 8} if options.tiny else {"max_length": 128, "batch_size": 64}),
        "accelerator": "cpu" if options.device == "cpu" else "gpu",
        "devices": 1 if options.device == "cpu" else [0],
        "model": shared_files(options) / ENCODER,
    }
    return [
        Call("all weights", arguments, interrupted=True),
        Call("all weights, resumed", arguments | {"resume": True}),
    ]


def image_classification(options: Options) -> list[Call]:
    """A vision transformer of DeiT-small's size on scikit-learn's digits."""
    arguments: dict[str, Any] = {**SCHEDULE, "log_every": 4, "held_out_rows": 128}
    if options.tiny:
        arguments |= {"batch_size": 16}
    else:  # the default rates are for the default model, which is small
        arguments |= {"model": shared_files(options) / VISION_TRANSFORMER, "workers": 4}
        arguments |= {"lr": 1e-3, "adamw_lr": 1e-3, "control_lr": 1e-3}
    return [
        Call("all weights", arguments, interrupted=True),
        Call("resumed, gradient checkpointing", arguments | {"gradient_checkpointing": True, "resume": True}),
    ]


RECIPES: Final = {
    "pretraining": Recipe(["recipes/pretraining/train.py"], "checkpoints/step-*/settings.json", pretraining),
    "sft-trainer": Recipe(
        ["recipes/supervised_fine_tuning/with_trainer.py"],
        "dion2/checkpoints/checkpoint-*/trainer_state.json",
        partial(fine_tuning, run="all weights", changes={}),
        resumed_if_tiny=True,
    ),
    "sft-lightning": Recipe(
        ["recipes/supervised_fine_tuning/with_lightning.py"],
        "dion2/checkpoints/step-*",
        partial(fine_tuning, run="gradient checkpointing", changes={"gradient_checkpointing": True}),
        resumed_if_tiny=True,
    ),
    "sft-accelerate": Recipe(
        ["recipes/supervised_fine_tuning/with_accelerate.py"],
        "dion2/checkpoints/step-*",
        partial(fine_tuning, run="LoRA", changes={"lora_rank": 16, "optimizer.lora": "B"}),
        resumed_if_tiny=True,
    ),
    "text": Recipe(["-m", "recipes.text_classification"], "dion2/seed-0/last.ckpt", text_classification),
    "images": Recipe(
        ["-m", "recipes.image_classification.train"],
        "dion2/seed-0/checkpoint-*/trainer_state.json",
        image_classification,
    ),
}
