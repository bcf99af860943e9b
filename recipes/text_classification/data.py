"""Texts with labels, from the hub, from files or from Python itself, split so that no held-out text is trained on."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from recipes.batches import RemainingBatches
from recipes.inputs import InputError
from recipes.offline_data import MODULES, read_docstrings
from recipes.tables import place_of_held_out, read_table
from recipes.text_classification.settings import OFFLINE_DATASET, Settings

# Every seed is measured on the same rows, so the split has a seed of its own.
SPLIT_SEED = 0
FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

Batch = dict[str, torch.Tensor]
Collate = Callable[[list["Example"]], Batch]


class Example(NamedTuple):
    text: str
    label: str


@dataclass(frozen=True)
class Split:
    """The class names, in the order of their numbers, and the two sets of examples."""

    classes: list[str]
    train: list[Example]
    held_out: list[Example]


def load_split(settings: Settings) -> Split:
    """Reads the data and holds some out; a text of the held-out set never stands in the training set.

    Raises:
        InputError: If the data cannot be read, lacks a column or a label, or does not suffice.
    """
    train, classes = _load(settings, settings.dataset, settings.train_split)
    if settings.held_out is None:
        train, held_out = _draw_held_out(_unique(train), settings.held_out_rows)
    else:
        place = place_of_held_out(
            settings.held_out, settings.dataset, files=FILES, offline=OFFLINE_DATASET, instead="--held_out_rows"
        )
        held_out, _ = _load(settings, *place)
        train = _without(_unique(train), held_out)
    _check(classes, train, held_out, settings)
    return Split(classes, train, held_out)


def collate_with(tokenizer: PreTrainedTokenizerBase, classes: list[str], max_length: int) -> Collate:
    """Returns the function that makes a batch of tensors of some examples."""
    numbers = {name: number for number, name in enumerate(classes)}

    def collate(examples: list[Example]) -> Batch:
        texts = [example.text for example in examples]
        batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([numbers[example.label] for example in examples])}

    return collate


class ShuffledBatches(RemainingBatches):
    """Row numbers for a whole run: all rows in a random order, then all in another, cut into batches."""

    def __init__(self, rows: int, batch_size: int, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        passes = -(-steps * batch_size // rows)
        order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])
        super().__init__(order[: steps * batch_size].view(steps, batch_size).tolist())


def _load(settings: Settings, source: str, split: str) -> tuple[list[Example], list[str]]:
    if source == OFFLINE_DATASET:
        return [Example(*row) for row in read_docstrings()], list(MODULES)
    table = read_table(source, split, subset=settings.subset, files=FILES, offline=OFFLINE_DATASET)
    texts = _column(table, settings.text_column, "--text_column")
    labels = _column(table, settings.label_column, "--label_column")
    feature = table.features[settings.label_column]
    if isinstance(feature, ClassLabel):
        if min(labels, default=0) < 0:
            raise InputError(f"--train_split, --held_out: {split!r} holds rows without a label. Choose another split.")
        classes, labels = feature.names, feature.int2str(labels)
    else:
        classes, labels = [str(value) for value in sorted(set(labels))], [str(value) for value in labels]
    return [Example(str(text), label) for text, label in zip(texts, labels, strict=True)], classes


def _column(table: Dataset, name: str, argument: str) -> list[Any]:
    if name not in table.column_names:
        raise InputError(f"{argument}: there is no column {name!r}. Choose one of {', '.join(table.column_names)}.")
    values = list(table[name])
    if None in values:
        raise InputError(f"{argument}: column {name!r} is empty in row {values.index(None)}. Remove such rows.")
    return values


def _key(example: Example) -> str:
    """Texts that differ in case or white space only count as one."""
    return " ".join(example.text.lower().split())


def _unique(examples: list[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(_key(example), example)
    return list(first.values())


def _without(examples: list[Example], held_out: list[Example]) -> list[Example]:
    seen = {_key(example) for example in held_out}
    return [example for example in examples if _key(example) not in seen]


def _draw_held_out(examples: list[Example], rows: int) -> tuple[list[Example], list[Example]]:
    if rows >= len(examples):
        raise InputError(f"--held_out_rows {rows} leaves nothing to train on: there are {len(examples)} texts.")
    shuffled = random.Random(SPLIT_SEED).sample(examples, len(examples))
    return shuffled[rows:], shuffled[:rows]


def _check(classes: Sequence[str], train: list[Example], held_out: list[Example], settings: Settings) -> None:
    if len({example.label for example in train}) < 2:
        raise InputError(f"--label_column {settings.label_column}: the training rows have one class; give two or more.")
    if not held_out:
        raise InputError(f"--held_out {settings.held_out}: there are no rows to measure on.")
    unknown = {example.label for example in held_out} - set(classes)
    if unknown:
        raise InputError(f"--held_out {settings.held_out}: labels that the training rows lack: {sorted(unknown)}.")
