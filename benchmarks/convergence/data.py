"""What the tasks train on and validate on: texts of the running Python, the same for every seed and method."""

import random
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from datasets import load_dataset
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerBase

from recipes.offline_data import (
    MODULES,
    SHORTEST_ANSWER,
    Function,
    read_docstrings,
    read_functions,
    read_prose,
)

Batch = dict[str, Tensor]

SPLIT_SEED = 0
"""Every run is validated on the same rows, whatever its seed."""

VALIDATION_SHARE = 0.05
"""Of the characters of documents."""

VALIDATION_TEXTS = 512
INSTRUCTION = "Write the docstring of this Python function."

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""

OPEN_ROWS = 8
"""Rows that wait for a conversation that fits: the more, the less padding."""


class Encoded(NamedTuple):
    """A conversation as tokens, with labels for the answer and the token that ends it."""

    tokens: list[int]
    labels: list[int]


def shuffled_batches(rows: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Returns the row numbers of each step: all rows in a random order, then all in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch_size // rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])
    batches: list[list[int]] = order[: steps * batch_size].view(steps, batch_size).tolist()
    return batches


def load_windows(tokenizer: PreTrainedTokenizerBase, length: int, wikitext: bool) -> tuple[Tensor, Tensor]:
    """Returns windows to train on and to validate on, of Python's manual and docstrings or of WikiText-103."""
    if wikitext:
        rows = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="train")
        documents = [text for text in rows["text"] if text.strip()]
    else:
        documents = read_prose()
    random.Random(SPLIT_SEED).shuffle(documents)
    wanted = VALIDATION_SHARE * sum(map(len, documents))
    validation: list[str] = []
    while wanted > 0:
        validation.append(documents.pop())
        wanted -= len(validation[-1])
    return _windows(documents, tokenizer, length), _windows(validation, tokenizer, length)


def load_texts() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Returns docstrings with the number of their module, each once: to train on, and to validate on."""
    unique: dict[str, tuple[str, int]] = {}
    for text, module in read_docstrings():
        unique.setdefault(_normalized(text), (text, MODULES.index(module)))
    shuffled = random.Random(SPLIT_SEED).sample(list(unique.values()), len(unique))
    return shuffled[VALIDATION_TEXTS:], shuffled[:VALIDATION_TEXTS]


def load_functions(validation_size: int) -> tuple[list[Function], list[Function]]:
    """Returns functions to train on and to validate on, with neither sources nor docstrings in common."""
    functions = read_functions()
    order = random.Random(SPLIT_SEED).sample(functions, len(functions))
    validation, rest = order[:validation_size], order[validation_size:]
    seen = {text for function in validation for text in _texts(function)}
    return [function for function in rest if seen.isdisjoint(_texts(function))], validation


def training_rows(
    functions: list[Function], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> Iterator[Batch]:
    """Yields rows without end: all functions as the seed shuffles them, then all in another order, and so on."""
    generator = random.Random(seed)

    def encoded() -> Iterator[Encoded]:
        while True:
            for function in generator.sample(functions, len(functions)):
                yield encode(function, tokenizer, length)

    return (_row(each, length) for each in pack(encoded(), length))


def validation_batches(
    functions: list[Function], tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int
) -> list[Batch]:
    """Returns all functions in batches of rows; the last is filled up with rows that have no labels."""
    rows = list(pack((encode(function, tokenizer, length) for function in functions), length))
    rows += [[] for _ in range(-len(rows) % batch_size)]
    tensors = [_row(row, length) for row in rows]
    return [default_collate(tensors[start : start + batch_size]) for start in range(0, len(tensors), batch_size)]


@cache
def encode(function: Function, tokenizer: PreTrainedTokenizerBase, length: int) -> Encoded:
    """Returns a function's source and docstring as a conversation of at most so many tokens."""
    messages = [
        {"role": "user", "content": f"{INSTRUCTION}\n\n{function.source}"},
        {"role": "assistant", "content": function.docstring},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    tokens = tokenizer.apply_chat_template(messages)["input_ids"]
    # The template closes the answer with its end token and a line break, which no model has to write.
    labels = [IGNORED] * len(prompt) + tokens[len(prompt) : -1] + [IGNORED]
    return Encoded(tokens[:length], labels[:length])


def pack(conversations: Iterable[Encoded], length: int) -> Iterator[list[Encoded]]:
    """Puts each conversation where it leaves the least room, among the rows that are open; yields the closed.

    Conversations whose answers begin after their last token are dropped.
    """

    def room(row: list[Encoded]) -> int:
        return length - sum(len(each.tokens) for each in row)

    waiting: list[list[Encoded]] = []
    for conversation in conversations:
        if all(label == IGNORED for label in conversation.labels):
            continue
        fitting = [index for index, row in enumerate(waiting) if room(row) >= len(conversation.tokens)]
        if fitting:
            index = min(fitting, key=lambda index: room(waiting[index]))
        else:
            if len(waiting) == OPEN_ROWS:
                yield waiting.pop(min(range(OPEN_ROWS), key=lambda index: room(waiting[index])))
            waiting.append([])
            index = len(waiting) - 1
        waiting[index].append(conversation)
        if not room(waiting[index]):
            yield waiting.pop(index)
    yield from waiting


def _row(conversations: list[Encoded], length: int) -> Batch:
    """Positions count from zero in each conversation, by which attention tells them apart, and in the padding."""
    padding = length - sum(len(each.tokens) for each in conversations)
    parts = [*conversations, Encoded([0] * padding, [IGNORED] * padding)]
    return {
        "input_ids": torch.tensor([token for part in parts for token in part.tokens]),
        "labels": torch.tensor([label for part in parts for label in part.labels]),
        "position_ids": torch.cat([torch.arange(len(part.tokens)) for part in parts]),
    }


def _windows(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """All documents, each closed by the end token, cut into windows; what does not fill the last is left out."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    windows = len(stream) // length
    return torch.tensor(stream[: windows * length], dtype=torch.int32).view(windows, length)


def _texts(function: Function) -> set[str]:
    """The source, and the docstring unless it is so short that it may recur by chance."""
    docstring = _normalized(function.docstring)
    return {_normalized(function.source), *([docstring] if len(docstring) >= SHORTEST_ANSWER else [])}


def _normalized(text: str) -> str:
    """Texts that differ in case or white space only count as one."""
    return " ".join(text.lower().split())
