"""Fine-tune a text classifier under Lightning with Dion2, then with AdamW, its control, on the same data.

`python -m recipes.text_classification.train --help` lists all arguments, those of Lightning's Trainer among them.
"""

import logging
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset
from jsonargparse import auto_cli
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dion2_lightning import OptimizerSettings, SelectionMonitor
from recipes.offline_data import read_docstrings
from recipes.offline_models import model_folder

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
FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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


class ResumableLoader(DataLoader[Any]):
    """Continues in the middle of an epoch: Lightning keeps its state in checkpoints."""

    start = 0
    position = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self.start = self.start, 0
        for self.position, batch in enumerate(super().__iter__(), 1):
            if self.position > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self)


def load_rows(source: str, subset: str | None, split: str, text_column: str, label_column: str) -> Dataset:
    """Return the docstrings, the rows of a file, or those of a split on the hub."""
    if source == "docstrings":
        texts, modules = zip(*read_docstrings(), strict=True)
        return Dataset.from_dict({"text": texts, "label": modules})
    if Path(source).suffix in FILES:
        rows = load_dataset(FILES[Path(source).suffix], data_files=source, split="train")
    else:
        rows = load_dataset(source, subset, split=split)
    return rows.select_columns([text_column, label_column]).rename_columns({text_column: "text", label_column: "label"})


def split_rows(rows: Dataset, validation: Dataset | int) -> tuple[Dataset, Dataset]:
    """Return the rows to train on, each text once, and those for validation, whose texts are not among them."""
    given = 0 if isinstance(validation, int) else len(validation)
    if given:
        rows = concatenate_datasets([validation, rows])  # together, so that a label has one number
    if not isinstance(rows.features["label"], ClassLabel):
        rows = rows.class_encode_column("label")
    places: dict[str, int] = {}
    for place, text in enumerate(rows["text"]):
        places.setdefault(" ".join(text.lower().split()), place)
    train, chosen = [place for place in places.values() if place >= given], list(range(given))
    if isinstance(validation, int):
        shuffled = random.Random(0).sample(train, len(train))  # the same rows for every seed of a run
        train, chosen = shuffled[validation:], shuffled[:validation]
    if not train or not chosen:
        raise ValueError(f"validation: it has {len(chosen)} rows and leaves {len(train)} to train on; change it")
    return rows.select(train), rows.select(chosen)


def make_loaders(
    trainer: Trainer, train: Dataset, validation: Dataset, collate: Any, batch_size: int, seed: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the batches of an epoch and of a validation; with several devices, this one's share."""
    rank, devices = trainer.global_rank, trainer.world_size
    # On one device too: its order follows from seed and epoch alone, so a resumed run has the same.
    order: DistributedSampler[Any] = DistributedSampler(train, devices, rank, seed=seed)
    loader = ResumableLoader(train, batch_size, sampler=order, collate_fn=collate)
    # Each row once, in as many batches on each device, as DDP needs. A DistributedSampler would repeat rows.
    count = devices * math.ceil(len(validation) / (devices * 64))
    batches = [rows.tolist() for rows in torch.arange(len(validation)).tensor_split(count)[rank::devices]]
    return loader, DataLoader(validation, batch_sampler=batches, collate_fn=collate)


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

    chosen: Dataset | int | str = validation
    if isinstance(chosen, str):
        source = chosen if Path(chosen).suffix in FILES else dataset
        chosen = load_rows(source, subset, chosen, text_column, label_column)
    train, measured = split_rows(load_rows(dataset, subset, "train", text_column, label_column), chosen)
    classes = train.features["label"].names
    say(f"{len(train)} texts to train on, {len(measured)} for validation, {len(classes)} classes")

    tokenizer = AutoTokenizer.from_pretrained(model_folder(model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [row["text"] for row in rows]
        inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}

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
        monitors = [SelectionMonitor(save_to=folder / "selection.json")] if settings.algorithm == "dion2" else []
        trainer = Trainer(
            callbacks=[saver, *monitors],
            logger=CSVLogger(output, name=settings.algorithm, version=""),
            check_val_every_n_epoch=None,  # val_check_interval counts steps, whatever the epochs
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **trainer_arguments,
        )
        loaders = make_loaders(trainer, train, measured, collate, batch_size, seed)
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
