"""Tables of text from a file or the hub, with errors that name the arguments that every recipe has for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from recipes.inputs import InputError

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""By the end of a file's name: the reader of `datasets`, and its options."""


def read_table(source: str, split: str, *, subset: str | None, files: Sequence[str], offline: str) -> Dataset:
    """Reads a file, or a split of a hub dataset.

    Args:
        source: A file, or a name on the hub.
        split: Of the hub dataset; a file has none.
        subset: Configuration of the hub dataset, if it has several.
        files: Ends of file names that the recipe takes.
        offline: What the recipe's own dataset is called, for the error.

    Raises:
        InputError: If it cannot be read.
    """
    end = Path(source).suffix
    if end in files and not Path(source).exists():
        raise InputError(f"--dataset, --held_out: there is no file {source}.")
    try:
        if end not in files:
            return load_dataset(source, subset, split=split)
        reader, options = READERS[end]
        return load_dataset(reader, data_files=source, split="train", **options)
    except Exception as error:  # every reader raises errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--dataset, --subset, --train_split, --held_out: {split!r} of {source!r} could not be read: {reason}. "
            f"Give {offline!r}, a file ending in {', '.join(files)}, or a name on the hub."
        ) from error


def place_of_held_out(
    held_out: str, dataset: str, *, files: Sequence[str], offline: str, instead: str
) -> tuple[str, str]:
    """Returns source and split of what `held_out` names: a file, or a split of the hub dataset that is trained on.

    Args:
        held_out: What was asked for.
        dataset: What is trained on.
        files: Ends of file names that the recipe takes.
        offline: What the recipe's own dataset is called.
        instead: The argument that holds out a part of a dataset without splits.

    Raises:
        InputError: If a dataset without splits is asked for one.
    """
    if Path(held_out).suffix in files:
        return held_out, "train"
    if dataset == offline or Path(dataset).suffix in files:
        raise InputError(f"--held_out {held_out}: {dataset} has no splits. Give a file, or {instead}.")
    return dataset, held_out
