"""Rows of a dataset on the hub, or of a file."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""By the end of a file's name. In a text file a blank line stands between two rows."""


def is_file(split: str) -> bool:
    """Return whether what stands for a split is a file."""
    return Path(split).suffix in READERS


def read_rows(dataset: str, subset: str | None, split: str) -> Dataset:
    """Return a split, such as train[:5%], of a dataset on the hub or of a file; or all of the file that split names."""
    if is_file(split):
        dataset, split = split, "train"
    reader = READERS.get(Path(dataset).suffix)
    if reader is None:
        return load_dataset(dataset, subset, split=split)
    options: dict[str, Any] = {"sample_by": "paragraph"} if reader == "text" else {}
    return load_dataset(reader, data_files=dataset, split=split, **options)
