"""Documents, tokenized and packed into windows of equal length, without padding."""

from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from recipes.offline_data import read_prose
from recipes.rows import is_file, read_rows

if TYPE_CHECKING:
    from recipes.pretraining.train import Settings


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = ByT5Tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {name} has no end token, which has to close every document. Choose another.")
    return tokenizer


def load_windows(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Returns the windows to train on and those to validate on, whatever the seed; no document is in both."""
    documents = load_documents(settings, settings.train_split)
    if isinstance(settings.validation, float):
        documents, others = documents.train_test_split(settings.validation, seed=0).values()
    else:
        others = load_documents(settings, settings.validation)
    train = pack(without(documents, others, settings), tokenizer, settings)
    validation = pack(others, tokenizer, settings)
    if not len(train) or not len(validation):
        raise ValueError(
            f"--dataset, --validation: {len(train)} windows of --length {settings.length} to train on, "
            f"{len(validation)} to validate on. Give more text, or shorter windows."
        )
    return train, validation.select(range(min(settings.validation_windows, len(validation))))


def load_documents(settings: "Settings", split: str) -> Dataset:
    if settings.dataset == "python" and not is_file(split):
        return Dataset.from_dict({settings.text_column: read_prose()})
    return read_rows(settings.dataset, settings.subset, split)


def without(documents: Dataset, others: Dataset, settings: "Settings") -> Dataset:
    """Returns the documents that are not among others, up to case and white space."""

    def normalized(text: str) -> str:
        return " ".join(text.lower().split())

    seen = set(map(normalized, others[settings.text_column]))
    return documents.filter(
        lambda texts: [normalized(text) not in seen for text in texts],
        input_columns=settings.text_column,
        batched=True,
        num_proc=settings.tokenizing_processes,
    )


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, settings: "Settings") -> Dataset:
    """Closes documents with the end token and cuts them into windows."""
    length = settings.length

    # `datasets` keeps the result on disk for as long as nothing that this function refers to has changed.
    def pack_texts(texts: list[str]) -> dict[str, Any]:
        tokenized = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        stream = [token for document in tokenized for token in [*document, tokenizer.eos_token_id]]
        windows = len(stream) // length  # what does not fill the last is left out
        return {"input_ids": np.array(stream[: windows * length], np.int32).reshape(windows, length)}

    packed = documents.map(
        pack_texts,
        input_columns=settings.text_column,
        remove_columns=documents.column_names,
        batched=True,
        num_proc=settings.tokenizing_processes,
    )
    return packed.with_format("torch")
