"""Images with labels, from the hub, from folders or from scikit-learn, and what the steps of a run see of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL.Image import Image as Picture
from PIL.Image import Resampling, Transform, Transpose, fromarray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils import data
from transformers import BaseImageProcessor

from recipes.image_classification.settings import OFFLINE_DATASET, Settings
from recipes.inputs import InputError

SPLIT_SEED = 0
"""Every run is measured on the same rows, whatever its seed."""


class Example(NamedTuple):
    image: Picture
    label: int


class Images(data.Dataset[Example]):
    """Images of a table, decoded when they are asked for, and the numbers of their classes."""

    def __init__(self, table: Dataset, column: str, labels: list[int]) -> None:
        self.table, self.column, self.labels = table, column, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self.table[index][self.column].convert("RGB"), self.labels[index])

    def select(self, rows: list[int]) -> "Images":
        return Images(self.table.select(rows), self.column, [self.labels[row] for row in rows])


class TrainingSequence(data.Dataset[Example]):
    """All images that a run sees, in their order: each once, shuffled, then each again in another order, and so on.

    An image, its shift and whether it is mirrored follow from its place and the seed alone. So every optimizer sees the
    same, on however many ranks and workers, in however many parts, and also after a resume.
    """

    def __init__(self, images: Images, settings: Settings) -> None:
        self.images, self.settings = images, settings
        self._pass, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.settings.steps * self.settings.batch_size

    def __getitem__(self, place: int) -> Example:
        number, index = divmod(place, len(self.images))
        if number != self._pass:
            generator = torch.Generator().manual_seed(self._seed("order", number))
            self._pass, self._order = number, torch.randperm(len(self.images), generator=generator)
        image, label = self.images[int(self._order[index])]
        return Example(self._augmented(image, random.Random(self._seed("augmentation", place))), label)

    def _augmented(self, image: Picture, dice: random.Random) -> Picture:
        across, down = (dice.uniform(-1, 1) * self.settings.shift * size for size in image.size)
        if self.settings.shift:
            image = image.transform(image.size, Transform.AFFINE, (1, 0, across, 0, 1, down), Resampling.BILINEAR)
        if self.settings.flip and dice.random() < 0.5:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return image

    def _seed(self, purpose: str, number: int) -> int:
        return random.Random(f"{self.settings.seed} {purpose} {number}").getrandbits(63)


@dataclass(frozen=True)
class Split:
    """The class names, in the order of their numbers, and the two sets of images."""

    classes: list[str]
    train: Images
    held_out: Images


def load_split(settings: Settings) -> Split:
    """Reads the data and holds some out.

    Raises:
        InputError: If the data cannot be read, lacks a column or a label, or does not suffice.
    """
    table = _read_table(settings, settings.train_split)
    classes = _class_names(table, settings)
    train = _images(table, classes, settings)
    if settings.held_out is not None:
        return Split(classes, train, _images(_read_table(settings, settings.held_out), classes, settings))
    rows = settings.held_out_rows
    if rows >= len(train):
        raise InputError(f"--held_out_rows {rows} leaves nothing to train on: there are {len(train)} images.")
    shuffled = random.Random(SPLIT_SEED).sample(range(len(train)), len(train))
    return Split(classes, train.select(shuffled[rows:]), train.select(shuffled[:rows]))


def collate_with(processor: BaseImageProcessor) -> Callable[[list[Example]], dict[str, Tensor]]:
    """Returns the function that makes a batch of tensors of some examples, resized and normalized for the model."""

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        batch = processor([example.image for example in examples], return_tensors="pt")
        return {**batch, "labels": torch.tensor([example.label for example in examples])}

    return collate


def _read_table(settings: Settings, split: str) -> Dataset:
    source = settings.dataset
    if source == OFFLINE_DATASET:
        if split != "train":
            raise InputError(f"--train_split, --held_out: {source} has the split 'train' alone, got {split!r}.")
        return _read_digits()
    try:
        return load_dataset(source, settings.subset, split=split)
    except Exception as error:  # every reader raises errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--dataset, --subset, --train_split, --held_out: {split!r} of {source!r} could not be read: {reason}. "
            f"Give {OFFLINE_DATASET!r}, a folder of images, or a name on the hub."
        ) from error


def _read_digits() -> Dataset:
    digits = load_digits()
    pixels = (digits.images * (255 / digits.images.max())).astype(numpy.uint8)
    columns = {"image": [fromarray(image) for image in pixels], "label": digits.target.tolist()}
    names = [str(name) for name in digits.target_names]
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _images(table: Dataset, classes: list[str], settings: Settings) -> Images:
    column = settings.image_column
    if column not in table.column_names:
        raise _no_column("image_column", column, table)
    if not isinstance(table.features[column], Image):
        raise InputError(f"--image_column {column}: this column holds no images.")
    labels, feature = _labels(table, settings), table.features[settings.label_column]
    names = list(feature.int2str(labels)) if isinstance(feature, ClassLabel) else [str(label) for label in labels]
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise InputError(f"--held_out {settings.held_out}: labels that the training rows lack: {unknown}.")
    numbers = {name: number for number, name in enumerate(classes)}
    return Images(table.select_columns(column), column, [numbers[name] for name in names])


def _class_names(table: Dataset, settings: Settings) -> list[str]:
    labels, feature = _labels(table, settings), table.features[settings.label_column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(label) for label in sorted(set(labels))]
    if len(names) < 2:
        raise InputError(f"--label_column {settings.label_column}: there is one class; give two or more.")
    return list(names)


def _labels(table: Dataset, settings: Settings) -> list[Any]:
    """The labels as they are stored, none missing."""
    column = settings.label_column
    if column not in table.column_names:
        raise _no_column("label_column", column, table)
    labels = list(table[column])
    if None in labels:
        raise InputError(f"--label_column: column {column!r} is empty in row {labels.index(None)}. Remove such rows.")
    if isinstance(table.features[column], ClassLabel) and min(labels, default=0) < 0:
        raise InputError("--train_split, --held_out: there are rows without a label. Choose another split.")
    return labels


def _no_column(argument: str, name: str, table: Dataset) -> InputError:
    return InputError(f"--{argument}: there is no column {name!r}. Choose one of {', '.join(table.column_names)}.")
