"""Fine-tune a text classifier under Lightning with Dion2, then with AdamW, its control, on the same data.

`python -m recipes.text_classification.train --help` lists all arguments, those of Lightning's Trainer among them.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from jsonargparse import auto_cli
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dion2_lightning import OptimizerSettings, SelectionMonitor
from recipes.offline_models import model_folder
from recipes.text_classification.data import load_texts, make_loaders

DION2 = OptimizerSettings(lr=2.4e-3, adamw_lr=1.6e-3, fraction=0.25, momentum=0.24)
ADAMW = OptimizerSettings(lr=4e-4, adamw_lr=1.6e-3, algorithm="adamw")
TRAINER = {  # defaults other than Lightning's, which would pick a Mac's GPU, where this was never tried
    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
    "precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
    "devices": 1,
    "max_steps": 80,
    "max_epochs": 1000,  # so that the steps end the run
    "gradient_clip_val": 1.0,
    "val_check_interval": 50,
    "log_every_n_steps": 5,
}


class TextClassifier(LightningModule):
    """A Hugging Face model with a classification head."""

    def __init__(self, model: Any, optimizer: OptimizerSettings, steps: int) -> None:
        super().__init__()
        self.model = model
        self.optimizer_settings = optimizer
        self.steps = steps
        self.val_loss = MeanMetric(nan_strategy="disable")  # a loss that is no number should show
        self.val_accuracy = MulticlassAccuracy(model.config.num_labels, average="micro")

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        output = self.model(**batch)
        self.val_loss.update(output.loss, len(batch["labels"]))
        self.val_accuracy.update(output.logits, batch["labels"])
        self.log_dict({"val_loss": self.val_loss, "val_accuracy": self.val_accuracy}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_settings.build(self)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(0.1 * self.steps), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(
    model: str = "minilm",
    dataset: str = "docstrings",
    subset: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    validation: int | str = 512,
    max_length: int = 64,
    batch_size: int = 16,
    optimizer: OptimizerSettings = DION2,
    control: OptimizerSettings | None = ADAMW,
    seed: int = 0,
    output: Path = Path("runs/text_classification"),
    resume: bool = False,
    **trainer_arguments: Any,
) -> None:
    """Fine-tune a text classifier with Dion2, then with AdamW, its control, on the same data.

    Args:
        model: "minilm", a name on the hub, or a folder.
        dataset: "docstrings" of Python's library, a name on the hub, or a .csv, .json, .jsonl or .parquet file.
        subset: Configuration of a dataset on the hub that has several.
        text_column: Column of the texts.
        label_column: Column of the labels, numbers or names.
        validation: So many rows of the dataset, another split of it on the hub, or a file.
        max_length: Tokens after which a text is cut.
        batch_size: Texts in a step, on each device.
        optimizer: What trains the model.
        control: What trains it again, from the same start and in the same order; null: nothing.
        seed: Decides the initial head, the order of the texts and dropout.
        output: Folder for models, checkpoints and metrics.
        resume: Continue from the checkpoints in the output folder.
        **trainer_arguments: More for Lightning's Trainer.
    """
    show_own_lines_only()
    say = rank_zero_only(print)
    runs = [optimizer] if control is None else [optimizer, control]
    if control and control.algorithm == optimizer.algorithm:
        raise ValueError(f"control: it is {control.algorithm} too, and would overwrite the first run; make it null")
    if resume and not any(output.glob("*/last.ckpt")):
        raise ValueError(f"resume: there is no checkpoint in {output}; correct output, or leave resume out")

    train, measured = load_texts(dataset, subset, text_column, label_column, validation)
    classes = train.features["label"].names
    say(f"{len(train)} texts to train on, {len(measured)} for validation, {len(classes)} classes")

    tokenizer = AutoTokenizer.from_pretrained(model_folder(model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    results = {}
    for settings in runs:
        say(f"\n{settings.algorithm}, lr {settings.lr:g}")
        folder = output / settings.algorithm
        last = folder / "last.ckpt"
        seed_everything(seed, verbose=False)
        network = AutoModelForSequenceClassification.from_pretrained(
            model_folder(model),
            dtype=torch.float32,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
        )
        saver = ModelCheckpoint(folder, "last", enable_version_counter=False)  # after each validation
        monitors = [SelectionMonitor(save_to=folder / "selection.json")] if settings.algorithm != "adamw" else []
        trainer = Trainer(
            callbacks=[saver, *monitors],
            logger=CSVLogger(output, name=settings.algorithm, version=""),
            check_val_every_n_epoch=None,  # val_check_interval counts batches, whatever the epochs
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **trainer_arguments,
        )
        loaders = make_loaders(trainer, train, measured, tokenizer, max_length, batch_size, seed)
        # Lightning's own estimate would load the data before a checkpoint restores its place in them.
        by_epochs = (trainer.max_epochs or 0) * math.ceil(len(loaders[0]) / trainer.accumulate_grad_batches)
        steps = min(limit for limit in (trainer.max_steps, by_epochs) if limit > 0)
        classifier = TextClassifier(network.train(), settings, steps)
        trainer.fit(classifier, *loaders, ckpt_path=last if resume and last.exists() else None)
        [results[folder]] = trainer.validate(classifier, loaders[1], verbose=False)
        if trainer.is_global_zero:
            network.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        logging.getLogger("dion2_lightning").setLevel(logging.WARNING)  # the routing is reported once

    say("\n          val_accuracy  val_loss  model")
    for folder, metrics in results.items():
        say(f"{folder.name:8}  {metrics['val_accuracy']:12.1%}  {metrics['val_loss']:8.3f}  {folder / 'model'}")
    if "dion2" in [settings.algorithm for settings in runs]:
        say(f"\nWhat Dion2 selected, as a page: dion2-report {output / 'dion2' / 'selection.json'}")


def show_own_lines_only() -> None:
    """Leave progress, and what the recipe and the optimizer report; take away the libraries' hints."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dion2_lightning").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    auto_cli(main, set_defaults=TRAINER)
