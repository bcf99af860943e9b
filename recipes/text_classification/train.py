"""One run: load, train, measure, save. And the comparison that the command makes of several."""

import statistics
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from dion2_lightning import SelectionMonitor, build_optimizer
from recipes.batches import TrainingLoader
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
from recipes.inputs import InputError
from recipes.offline import MINILM, model_source
from recipes.selection_page import look_every
from recipes.terminal import console, quiet_libraries
from recipes.text_classification.data import Batch, ShuffledBatches, Split, collate_with, load_split
from recipes.text_classification.settings import Settings
from recipes.throughput import synchronized_time

MAX_GRADIENT_NORM = 1.0


class TextClassifier(LightningModule):
    """A Hugging Face model with a classification head, trained on cross-entropy."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        loss, _ = self._loss_and_accuracy(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        loss, accuracy = self._loss_and_accuracy(batch)
        metrics = {"held_out_loss": loss, "held_out_accuracy": accuracy}
        self.log_dict(metrics, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> Any:
        settings = self.settings
        try:
            optimizer = build_optimizer(
                self,
                lr=settings.lr,
                algorithm=settings.algorithm,
                fraction=settings.fraction,
                momentum=settings.momentum,
                adamw_lr=settings.adamw_lr,
                betas=(settings.beta1, 0.999),
                weight_decay=settings.weight_decay,
            )
        except ValueError as error:
            raise InputError(f"--{error}") from error
        schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * settings.steps), settings.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss_and_accuracy(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits.float()
        accuracy = (logits.argmax(dim=-1) == batch["labels"]).float().mean()
        return functional.cross_entropy(logits, batch["labels"]), accuracy


class StepTimer(Callback):
    """Times whole training steps, the wait for data and validation left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = synchronized_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(synchronized_time() - self._start)


def fine_tune(settings: Settings) -> list[Result]:
    """Trains with the chosen optimizer and its control, prints how they compare, and leaves the models in `output`.

    Raises:
        InputError: If an argument asks for something that cannot be done.
    """
    quiet_libraries()
    runs = planned_runs(settings)
    if settings.resume and not any(_checkpoint(run).exists() for run in runs):
        raise InputError(f"--resume: there is no checkpoint in --output {settings.output}.")
    split = load_split(settings)
    console.print(_describe(settings, split))
    results = make_runs(runs, lambda run: train(run, split))
    print_comparison(results, "On the held-out texts", "AutoModelForSequenceClassification", "AutoTokenizer")
    return results


def train(settings: Settings, split: Split, progress: bool = True) -> Result:
    """Makes one run: trains, measures, and saves the checkpoint, the metrics and the model in its folder."""
    timer, monitors = StepTimer(), _monitors(settings)
    try:
        trainer = _trainer(settings, [timer, *monitors], progress)
    except MisconfigurationException as error:
        raise InputError(f"--accelerator, --devices, --precision: {error}") from error
    seed_everything(settings.seed, verbose=False)
    model, tokenizer = load_model(settings, split.classes)
    collate = collate_with(tokenizer, split.classes, settings.max_length)
    held_out: DataLoader[Any] = DataLoader(split.held_out, batch_size=64, collate_fn=collate)  # type: ignore[arg-type]
    classifier = TextClassifier(model, settings)
    checkpoint = _checkpoint(settings)
    order = ShuffledBatches(len(split.train), settings.batch_size, settings.steps, settings.seed)
    trainer.fit(
        classifier,
        TrainingLoader(split.train, order, collate),
        held_out if settings.validate_every < settings.steps else None,
        ckpt_path=checkpoint if settings.resume and checkpoint.exists() else None,
    )
    trainer.save_checkpoint(checkpoint)
    [metrics] = trainer.validate(classifier, held_out, verbose=False)
    model.save_pretrained(saved_model(settings))
    tokenizer.save_pretrained(saved_model(settings))
    step_seconds = statistics.median(timer.seconds) if timer.seconds else None
    selection = tuple(file for monitor in monitors for file in show_selection(settings, monitor.tracker.history))
    return Result(settings, metrics["held_out_accuracy"], metrics["held_out_loss"], step_seconds, selection)


def load_model(settings: Settings, classes: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the pretrained model with a new head for the classes, ready to train, and its tokenizer.

    Raises:
        InputError: If either cannot be loaded, or `max_length` exceeds what the model reads.
    """
    source = model_source(settings.model)
    names = dict(enumerate(classes))
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForSequenceClassification.from_pretrained(
            **source,
            dtype=torch.float32,
            id2label=names,
            label2id={name: number for number, name in names.items()},
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {settings.model!r} could not be loaded. Give {MINILM!r}, a folder with a model and its "
            "tokenizer, or a name on the hub."
        ) from error
    if settings.max_length > tokenizer.model_max_length:
        raise InputError(f"--max_length {settings.max_length}: the model reads {tokenizer.model_max_length} at most.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.train(), tokenizer


def _monitors(settings: Settings) -> list[SelectionMonitor]:
    """What looks on at the selection: nothing where all of every matrix is trained in every step."""
    if settings.algorithm != "dion2":
        return []
    return [SelectionMonitor(every=look_every(settings.steps), save_to=selection_file(settings))]


def _trainer(settings: Settings, callbacks: list[Callback], progress: bool) -> Trainer:
    checkpoint = _checkpoint(settings)
    return Trainer(
        accelerator=_accelerator(settings),
        devices=settings.devices,
        precision=_precision(settings),
        max_epochs=1,
        val_check_interval=min(settings.validate_every, settings.steps),
        num_sanity_val_steps=0,
        gradient_clip_val=MAX_GRADIENT_NORM,
        logger=CSVLogger(run_folder(settings), name="", version=""),
        log_every_n_steps=10,
        callbacks=[
            *callbacks,
            ModelCheckpoint(
                checkpoint.parent,
                filename=checkpoint.stem,
                every_n_train_steps=settings.checkpoint_every,
                enable_version_counter=False,
            ),
            *([RichProgressBar()] if progress else []),
        ],
        enable_progress_bar=progress,
        enable_model_summary=False,
    )


def _accelerator(settings: Settings) -> str:
    if settings.accelerator != "auto":
        return settings.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"  # not MPS, which was never tried


def _precision(settings: Settings) -> Any:
    if settings.precision != "auto":
        return settings.precision
    on_gpu = settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def _checkpoint(settings: Settings) -> Path:
    return run_folder(settings) / "last.ckpt"


def _describe(settings: Settings, split: Split) -> str:
    return (
        f"Fine-tuning {settings.model} on {settings.dataset}: {len(split.classes)} classes, {len(split.train)} texts "
        f"to train on, {len(split.held_out)} held out; {settings.steps} steps of {settings.batch_size} texts"
    )
