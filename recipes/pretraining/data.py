"""Documents as one stream of tokens, cut into windows of equal length, without padding."""

import random
from collections.abc import Iterable
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedTokenizerBase

from recipes.inputs import InputError
from recipes.pretraining.settings import OFFLINE_DATASET, Settings
from recipes.offline_data import read_prose
from recipes.tables import place_of_held_out, read_table

SPLIT_SEED = 0
"""Every run is measured on the same documents, whatever its seed."""

DOCUMENTS_AT_ONCE = 1000
"""Documents of a table that are packed together; what does not fill their last window is left out."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""

FILES = (".txt", ".json", ".jsonl", ".parquet")

Window = dict[str, Tensor]


class PackedTokens(Dataset[Window]):
    """Windows of a stream of tokens, as inputs and labels of a causal language model.

    Args:
        tokens: All documents, each closed by the end token.
        length: Tokens of a window; what does not fill the last one is left out.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        windows = len(tokens) // length
        self.windows = tokens[: windows * length].view(windows, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


class PackedTable(Dataset[Window]):
    """The same from a table on disk, of which no more is in memory than is read.

    Args:
        table: With a column `window` of token numbers.
    """

    def __init__(self, table: datasets.Dataset) -> None:
        self.table = table.with_format("torch")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Window:
        window = self.table[index]["window"]
        return {"input_ids": window, "labels": window}


Windows = PackedTokens | PackedTable


def load_windows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[Windows, Windows]:
    """Reads and packs the data, and returns the windows to train on and those to measure on.

    Raises:
        InputError: If the data cannot be read, has no such column, or does not suffice.
    """
    train, held_out = _pack_offline(settings, tokenizer) if _is_offline(settings) else _pack_tables(settings, tokenizer)
    for windows, argument in ((train, "--dataset"), (held_out, "--held_out, --held_out_share")):
        if not len(windows):
            raise InputError(f"{argument}: the text does not fill one window of --length {settings.length} tokens.")
    return train, held_out


def shuffled_order(windows: int, number: int, seed: int) -> list[int]:
    """Returns so many numbers of windows: all in a random order, then all in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-number // windows)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])
    numbers: list[int] = order[:number].tolist()
    return numbers


def fill_up(windows: Dataset[Window], multiple: int) -> Dataset[Window]:
    """Adds windows that count for nothing, up to a multiple: every rank then reads equally many."""
    missing = -len(windows) % multiple  # type: ignore[arg-type]
    length = len(windows[0]["input_ids"])
    empty = {"input_ids": torch.zeros(length, dtype=torch.long), "labels": torch.full((length,), IGNORED)}
    return ConcatDataset([windows, [empty] * missing]) if missing else windows  # type: ignore[list-item]


def split_documents(documents: Iterable[str], held_out_share: float) -> tuple[list[str], list[str]]:
    """Shuffles documents and returns those to train on and those held out, a share of the characters."""
    documents = list(documents)
    random.Random(SPLIT_SEED).shuffle(documents)
    wanted = held_out_share * sum(map(len, documents))
    held_out: list[str] = []
    while wanted > 0:
        held_out.append(documents.pop())
        wanted -= len(held_out[-1])
    return documents, held_out


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> PackedTokens:
    """Tokenizes documents, closes each with the end token and packs them into windows of `length` tokens."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    return PackedTokens(torch.tensor(stream, dtype=torch.int32), length)


def _is_offline(settings: Settings) -> bool:
    return settings.dataset == OFFLINE_DATASET


def _pack_offline(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedTokens, PackedTokens]:
    if settings.held_out is not None:
        raise InputError(f"--held_out {settings.held_out}: {OFFLINE_DATASET} has no splits. Use --held_out_share.")
    train, held_out = split_documents(read_prose(), settings.held_out_share)
    return pack(train, tokenizer, settings.length), pack(held_out, tokenizer, settings.length)


def _pack_tables(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedTable, PackedTable]:
    table = _read_texts(settings, settings.dataset, settings.train_split)
    if settings.held_out is not None:
        place = place_of_held_out(
            settings.held_out, settings.dataset, files=FILES, offline=OFFLINE_DATASET, instead="--held_out_share"
        )
        held_out = _read_texts(settings, *place)
    elif len(table) < 2:
        raise InputError(
            f"--dataset {settings.dataset}: one document cannot be trained on and measured on. Give --held_out, or "
            "more documents; in a .txt file a blank line separates them."
        )
    else:
        table, held_out = table.train_test_split(settings.held_out_share, seed=SPLIT_SEED).values()
    return _pack_table(table, settings, tokenizer), _pack_table(held_out, settings, tokenizer)


def _pack_table(table: datasets.Dataset, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PackedTable:
    column, length = settings.text_column, settings.length  # all that the result on disk may depend on

    def pack_documents(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"window": pack(rows[column], tokenizer, length).windows.numpy()}

    processes = settings.tokenizing_processes
    packed = table.map(
        pack_documents,
        batched=True,
        batch_size=DOCUMENTS_AT_ONCE,
        remove_columns=table.column_names,
        num_proc=processes if processes > 1 else None,
    )
    return PackedTable(packed)


def _read_texts(settings: Settings, source: str, split: str) -> datasets.Dataset:
    table = read_table(source, split, subset=settings.subset, files=FILES, offline=OFFLINE_DATASET)
    return _check_texts(table, settings.text_column, source)


def _check_texts(table: datasets.Dataset, column: str, source: str) -> datasets.Dataset:
    if column not in table.column_names:
        raise InputError(
            f"--text_column: {source} has no column {column!r}. Choose one of {', '.join(table.column_names)}."
        )
    kind = getattr(table.features[column], "dtype", "a structure")
    if kind not in ("string", "large_string"):
        raise InputError(f"--text_column {column}: {source} holds no text there, but {kind}.")
    empty = table.data.column(column).null_count
    if empty:
        raise InputError(f"--text_column {column}: {empty} rows of {source} are empty. Remove them.")
    return table
