"""Texts with labels, split so that no validation text is trained on, in batches that a resumed run continues."""

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from lightning import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from recipes.offline_data import read_docstrings
from recipes.rows import is_file, read_rows


def load_rows(source: str, subset: str | None, split: str, text_column: str, label_column: str) -> Dataset:
    """Return the docstrings, or the rows of a split or file."""
    if source == "docstrings" and not is_file(split):
        texts, modules = zip(*read_docstrings(), strict=True)
        return Dataset.from_dict({"text": texts, "label": modules})
    rows = read_rows(source, subset, split)
    return rows.select_columns([text_column, label_column]).rename_columns({text_column: "text", label_column: "label"})


def load_texts(
    dataset: str, subset: str | None, text_column: str, label_column: str, validation: int | str
) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and those for validation: texts and numbered labels."""
    rows = load_rows(dataset, subset, "train", text_column, label_column)
    if isinstance(validation, int):
        if validation < 1:
            raise ValueError(f"--validation {validation}: it must be the name of a part, or a number of rows over 0")
        return split_rows(rows, validation)
    return split_rows(rows, load_rows(dataset, subset, validation, text_column, label_column))


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


def make_loaders(
    trainer: Trainer,
    train: Dataset,
    validation: Dataset,
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    seed: int,
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the batches of an epoch and of a validation; with several devices, this one's share."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [row["text"] for row in rows]
        inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}

    rank, devices = trainer.global_rank, trainer.world_size
    # On one device too: its order follows from seed and epoch alone, so a resumed run has the same.
    order: DistributedSampler[Any] = DistributedSampler(train, devices, rank, seed=seed)
    loader = ResumableLoader(train, batch_size, sampler=order, collate_fn=collate)
    # Each row once, in as many batches on each device, as DDP needs. A DistributedSampler would repeat rows.
    count = devices * math.ceil(len(validation) / (devices * 64))
    batches = [rows.tolist() for rows in torch.arange(len(validation)).tensor_split(count)[rank::devices]]
    return loader, DataLoader(validation, batch_sampler=batches, collate_fn=collate)
