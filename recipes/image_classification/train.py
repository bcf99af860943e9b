"""One run with the Hugging Face Trainer: load, train, measure, save. And the command, which compares several.

`python -m recipes.image_classification.train --help`; `torchrun` and `accelerate launch` start it on several devices.
"""

import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from typing_extensions import override

from dion2_lightning import Dion2Factory, SelectionCallback
from recipes.comparison import (
    Result,
    make_runs,
    planned_runs,
    print_comparison,
    run_folder,
    saved_model,
    selection_file,
    show_selection,
)
from recipes.image_classification.data import Example, Split, TrainingSequence, collate_with, load_split
from recipes.image_classification.model import load_model
from recipes.image_classification.settings import Settings
from recipes.inputs import InputError
from recipes.selection_page import look_every
from recipes.terminal import console, quiet_libraries
from recipes.throughput import Speedometer, synchronized_time, training_flops
from recipes.versions import CHECKPOINTING

COMMAND = "python -m recipes.image_classification.train"
SHOWN = ("loss", "eval_accuracy", "images_per_second", "dion2/coverage")
EVALUATION_BATCH = 64


class ImageTrainer(Trainer):
    """A Trainer whose log says how fast it goes."""

    speedometer: Speedometer

    @override
    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        self.speedometer.pause()
        metrics: dict[str, float] = super().evaluate(*arguments, **options)
        self.speedometer.go_on()
        return metrics

    @override
    def _save_checkpoint(self, *arguments: Any) -> None:
        self.speedometer.pause()
        super()._save_checkpoint(*arguments)
        self.speedometer.go_on()

    @override
    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate; the Trainer's own mean counts images twice that fill up the last batches of several ranks."""
        output = super().evaluation_loop(*arguments, **options)
        output.metrics["eval_loss"] = output.metrics.pop("eval_cross_entropy")
        return output

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.speedometer.figures()} if "loss" in logs else logs, start_time)


class StepTimer(TrainerCallback):
    """Times training steps: each with what it waits for, for the log; and alone, for the comparison.

    Args:
        speedometer: What the log reads.
        images: Those of a step on this rank.
    """

    def __init__(self, speedometer: Speedometer, images: int) -> None:
        self.speedometer, self.images = speedometer, images
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = synchronized_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(synchronized_time() - self._start)
        self.speedometer.step(self.images)


class ProgressBar(ProgressCallback):
    """The Trainer's bar, with the last figures beside it, not a line for each time that it logs."""

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, float] = {}

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        self._figures |= {name: logs[name] for name in SHOWN if logs and name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._figures)


def fine_tune(settings: Settings) -> list[Result]:
    """Trains with the chosen optimizer and its control, prints how they compare, and leaves the models in `output`.

    Raises:
        InputError: If an argument asks for something that cannot be done.
    """
    quiet_libraries()
    runs = planned_runs(settings)
    if settings.resume and not any(_last_checkpoint(run) for run in runs):
        raise InputError(f"--resume: there is no checkpoint in --output {settings.output}.")
    split = load_split(settings)
    console.print(_describe(settings, split))
    results = make_runs(runs, lambda run: train(run, split))
    print_comparison(results, "On the held-out images", "AutoModelForImageClassification", "AutoImageProcessor")
    return results


def train(settings: Settings, split: Split, progress: bool = True) -> Result:
    """Makes one run: trains, measures, and saves the checkpoint, the log and the model in its folder."""
    arguments = training_arguments(settings)
    try:
        factory = Dion2Factory.from_arguments(
            arguments,
            algorithm=settings.algorithm,
            fraction=settings.fraction,
            momentum=settings.momentum,
            adamw_lr=settings.adamw_lr,
        )
    except ValueError as error:
        raise InputError(f"--{error}") from error
    checkpoint = _checkpoint_to_start_from(settings, arguments)
    set_seed(settings.seed)
    model, processor = load_model(settings.model, split.classes)
    if checkpoint is not None:
        # The Trainer leaves out weights that are saved under other names than they have in memory, as those of ViT are.
        model, _ = load_model(checkpoint, split.classes)
    collate = collate_with(processor)
    timer = StepTimer(_speedometer(settings, arguments, model, collate, split), settings.batch_size // world_size())
    selection = _selection(settings)
    trainer = ImageTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=TrainingSequence(split.train, settings),
        eval_dataset=split.held_out,
        processing_class=processor,
        compute_metrics=_accuracy_and_loss,
        callbacks=[timer, *selection],
        optimizer_cls_and_kwargs=factory,
    )
    trainer.speedometer = timer.speedometer
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(ProgressBar)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model(str(saved_model(settings)))
    files: tuple[Path, ...] = ()
    if selection and trainer.is_world_process_zero():
        files = show_selection(settings, selection[0].tracker.history)
    metrics = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    step_seconds = statistics.median(timer.seconds) if timer.seconds else None
    return Result(settings, metrics["eval_accuracy"], metrics["eval_loss"], step_seconds, files)


def training_arguments(settings: Settings) -> TrainingArguments:
    """Returns what the Trainer is told.

    Raises:
        InputError: If `batch_size` cannot be dealt out, `report_to` is unknown, or one process has several GPUs.
    """
    share = world_size() * settings.accumulation
    if settings.batch_size % share:
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be dealt out evenly to {world_size()} devices in "
            f"{settings.accumulation} parts. Give a multiple of {share}, or another --accumulation."
        )
    try:
        get_reporting_integration_callbacks(settings.report_to)
    except ValueError as error:
        raise InputError(f"--report_to: {error}") from error
    gpu = torch.cuda.is_available() and not settings.cpu
    auto = gpu and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(run_folder(settings)),
        seed=settings.seed,
        use_cpu=not gpu,  # not MPS, which was never tried
        bf16=auto if settings.precision == "auto" else settings.precision == "bf16",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // share,
        per_device_eval_batch_size=EVALUATION_BATCH,
        gradient_accumulation_steps=settings.accumulation,
        **{CHECKPOINTING: settings.gradient_checkpointing},
        train_sampling_strategy="sequential",  # the sequence is shuffled already
        remove_unused_columns=False,
        dataloader_num_workers=settings.workers,
        learning_rate=settings.lr,
        adam_beta1=settings.beta1,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        logging_steps=settings.log_every,
        report_to=settings.report_to or "none",
        disable_tqdm=False,
        eval_strategy="steps",
        eval_steps=settings.validate_every,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
    )
    if arguments.n_gpu > 1:
        raise InputError(
            f"{arguments.n_gpu} GPUs are visible to one process. Start with `torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m recipes.image_classification.train`, or set CUDA_VISIBLE_DEVICES=0."
        )
    return arguments


def world_size() -> int:
    """Returns how many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _selection(settings: Settings) -> list[SelectionCallback]:
    """What looks on at the selection: nothing where all of every matrix is trained in every step."""
    if settings.algorithm != "dion2":
        return []
    return [SelectionCallback(every=look_every(settings.steps), save_to=selection_file(settings), progress=False)]


def _speedometer(
    settings: Settings,
    arguments: TrainingArguments,
    model: torch.nn.Module,
    collate: Callable[[list[Example]], dict[str, Tensor]],
    split: Split,
) -> Speedometer:
    inputs = collate([split.held_out[0]])
    del inputs["labels"]
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    return Speedometer(training_flops(model, inputs), arguments.device, dtype, world_size(), unit="images")


def _accuracy_and_loss(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = torch.as_tensor(prediction.predictions).float(), torch.as_tensor(prediction.label_ids)
    return {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "cross_entropy": functional.cross_entropy(logits, labels).item(),
    }


def _checkpoint_to_start_from(settings: Settings, arguments: TrainingArguments) -> str | None:
    """The run's last checkpoint on a resume; else none, and those of an earlier run go."""
    if settings.resume:
        return _last_checkpoint(settings)
    if arguments.process_index == 0:
        for folder in run_folder(settings).glob("checkpoint-*"):
            shutil.rmtree(folder)
    return None


def _last_checkpoint(settings: Settings) -> str | None:
    folder = run_folder(settings)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _describe(settings: Settings, split: Split) -> str:
    return (
        f"Training {settings.model} on {settings.dataset}: {len(split.classes)} classes, {len(split.train)} images "
        f"to train on, {len(split.held_out)} held out; {settings.steps} steps of {settings.batch_size} images"
    )


def main(arguments: list[str] | None = None) -> None:
    try:
        fine_tune(auto_cli(Settings, args=arguments, prog=COMMAND))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
