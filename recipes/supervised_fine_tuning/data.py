"""Conversations, from the hub, from files or from Python itself, as tokens of which only the answers are learnt."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase

from recipes.inputs import InputError
from recipes.python_texts import SHORTEST_ANSWER, read_functions
from recipes.supervised_fine_tuning.settings import FILES, OFFLINE_DATASET, Settings
from recipes.tables import place_of_held_out, read_table

INSTRUCTION = "Write the docstring of this Python function."
IGNORED = -100
"""The label of a token that is not learnt."""

SPLIT_SEED = 0
"""Every run is measured on the same conversations, whatever its seed."""

OPEN_ROWS = 8
"""Rows that wait for a conversation that fits: the more, the less padding."""

Conversation = list[dict[str, str]]
"""Messages, each a role and its content."""

logger = logging.getLogger("recipes")


class Encoded(NamedTuple):
    """A conversation as tokens, and the label of each: itself where the assistant wrote it, else ``IGNORED``."""

    input_ids: list[int]
    labels: list[int]


def load_conversations(settings: Settings) -> tuple[list[Conversation], list[Conversation]]:
    """Reads the data and returns what to train on and what is held out, which have no text in common.

    Prompts are compared, and all longer texts. The held-out conversations do not depend on the seed.

    Raises:
        InputError: If the data cannot be read, lacks a column or an answer, or does not suffice.
    """
    place = None
    if settings.held_out is not None:
        place = place_of_held_out(
            settings.held_out, settings.dataset, files=FILES, offline=OFFLINE_DATASET, instead="--held_out_size"
        )
    train = _load(settings, settings.dataset, settings.train_split)
    if place is None:
        order = random.Random(SPLIT_SEED).sample(train, len(train))
        held_out, train = order[: settings.held_out_size], order[settings.held_out_size :]
    else:
        held_out = _load(settings, *place)
    seen = {text for conversation in held_out for text in _texts(conversation)}
    others = [conversation for conversation in train if seen.isdisjoint(_texts(conversation))]
    if not held_out or not others:
        raise InputError(
            f"--dataset, --held_out, --held_out_size: {len(held_out)} conversations are held out and {len(others)} are "
            "left to train on that share no text with them. Give more data, or hold out less."
        )
    logger.info(
        "%d conversations to train on, %d held out; %d left out that share a text with these",
        len(others),
        len(held_out),
        len(train) - len(others),
    )
    return others, held_out


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenizes a conversation by the chat template, with labels for the answers and the token that ends each.

    A template does not say who wrote which token. Where an answer begins and ends is found by tokenizing the
    conversation up to there.

    Args:
        conversation: Messages.
        tokenizer: With a chat template.
        max_length: Tokens after which it is cut.

    Raises:
        InputError: If the template refuses the conversation, or treats what comes before an answer in two ways.
    """
    tokens = _tokens(conversation, tokenizer)
    labels = [IGNORED] * len(tokens)
    for turn, message in enumerate(conversation):
        if message["role"] == "assistant":
            before = _tokens(conversation[:turn], tokenizer, add_generation_prompt=True)
            through = _tokens(conversation[: turn + 1], tokenizer)
            if tokens[: len(before)] != before or tokens[: len(through)] != through:
                raise InputError(
                    f"--model: its chat template changes earlier turns of a conversation of {len(conversation)} "
                    f"messages as it goes on, so that the tokens of answer {message['content'][:40]!r} cannot be told. "
                    "Choose a model with another template, or data with one answer in each conversation."
                )
            end = len(through)
            while end > len(before) and not tokenizer.decode(tokens[end - 1]).strip():
                end -= 1  # white space after the end token, where no model ever writes
            labels[len(before) : end] = tokens[len(before) : end]
    return Encoded(tokens[:max_length], labels[:max_length])


@dataclass(frozen=True)
class Data:
    """The rows of a run, and what each of its steps reads on all ranks together.

    Attributes:
        train: All rows of the run, in its order. A step takes the next ones, however ranks share them.
        held_out: What to measure on; ranks and their batches divide the rows.
        targets: Tokens of each step that are learnt.
        tokens: Tokens of each step, padding left out.
    """

    train: "PackedConversations"
    held_out: "PackedConversations"
    targets: list[int]
    tokens: list[int]


def load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase, ranks: int) -> Data:
    """Reads and packs all that a run needs, the same on every rank.

    Args:
        settings: Of the run.
        tokenizer: With a chat template.
        ranks: Processes that read different rows.

    Raises:
        InputError: If the data cannot be read or does not suffice.
    """
    conversations, held_out = load_conversations(settings)
    rows = settings.batch_size * settings.accumulation * ranks
    train = pack_training_rows(conversations, tokenizer, settings, settings.steps * rows)
    steps = range(0, len(train), rows)
    return Data(
        train,
        pack_held_out_rows(held_out, tokenizer, settings, ranks),
        [sum(train.targets[start : start + rows]) for start in steps],
        [sum(train.tokens[start : start + rows]) for start in steps],
    )


class PackedConversations(Dataset[dict[str, Tensor]]):
    """Conversations packed into rows of equal length, as inputs of a causal language model.

    Each conversation lies in one row, as a whole. Positions count from zero in each, by which transformers' attention
    tells them apart: none sees another. What is left of a row is padding, with positions of its own and no labels.

    That holds for the attention backends of :class:`Settings`, where the model gets no attention mask and has no cache
    (``use_cache`` off); the flash kinds also want one row at a time, see :func:`collate_for`.

    Args:
        conversations: Those without any label are dropped, and counted.
        length: Tokens of a row; no conversation is longer.
        rows: How many are wanted: conversations are read until so many are full (default: None, all are read).

    Attributes:
        tokens: Of each row, padding left out.
        targets: Tokens of each row that are learnt.
        packed: Conversations in the rows.
        dropped: Conversations dropped because no answer begins within ``length`` tokens.
    """

    def __init__(self, conversations: Iterable[Encoded], length: int, rows: int | None = None) -> None:
        self.length = length
        self.packed = 0
        self.dropped = 0
        self._rows: list[list[Encoded]] = []
        self._pack(conversations, rows)
        self.tokens = [sum(len(each.input_ids) for each in row) for row in self._rows]
        self.targets = [sum(_targets(each) for each in row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index]
        padding = self.length - self.tokens[index]
        parts = [*row, Encoded([0] * padding, [IGNORED] * padding)]
        return {
            "input_ids": torch.tensor([token for part in parts for token in part.input_ids]),
            # A conversation's first token follows on another conversation, which does not foretell it.
            "labels": torch.tensor(
                [label for part in parts for label in [IGNORED, *part.labels[1:]][: len(part.labels)]]
            ),
            "position_ids": torch.cat([torch.arange(len(part.input_ids)) for part in parts]),
        }

    def pad_rows(self, multiple: int) -> None:
        """Adds rows of padding until their number is a multiple, for ranks that have to read equally many."""
        missing = -len(self) % multiple
        self._rows += [[] for _ in range(missing)]
        self.tokens += [0] * missing
        self.targets += [0] * missing

    def _pack(self, conversations: Iterable[Encoded], rows: int | None) -> None:
        """Puts each conversation where it leaves the least room, among the rows that are open."""
        waiting: list[_OpenRow] = []
        for conversation in conversations:
            if not _targets(conversation):
                self.dropped += 1
                continue
            size = len(conversation.input_ids)
            fitting = [row for row in waiting if row.room >= size]
            if fitting:
                row = min(fitting, key=lambda row: row.room)
            else:
                if len(waiting) == OPEN_ROWS:
                    fullest = min(waiting, key=lambda row: row.room)
                    waiting.remove(fullest)
                    self._close(fullest)
                row = _OpenRow(self.length)
                waiting.append(row)
            row.add(conversation)
            if row.room == 0:
                waiting.remove(row)
                self._close(row)
            if rows is not None and len(self._rows) >= rows:
                return
        for row in waiting:
            self._close(row)

    def _close(self, row: "_OpenRow") -> None:
        self._rows.append(row.conversations)
        self.packed += len(row.conversations)


class _OpenRow:
    """A row that is being filled. Compared by identity: two rows may hold the same."""

    def __init__(self, length: int) -> None:
        self.room = length
        self.conversations: list[Encoded] = []

    def add(self, conversation: Encoded) -> None:
        self.conversations.append(conversation)
        self.room -= len(conversation.input_ids)


def pack_training_rows(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, settings: Settings, rows: int
) -> PackedConversations:
    """Packs as many rows as a run needs, in its order: all conversations as the seed shuffles them, then again.

    Only what is needed is tokenized. The first rows are the same however many are asked for.

    Raises:
        InputError: If no answer begins within ``length`` tokens.
    """
    generator = random.Random(settings.seed)
    encoded: dict[int, Encoded] = {}

    def passes() -> Iterator[Encoded]:
        while True:
            for index in generator.sample(range(len(conversations)), len(conversations)):
                if index not in encoded:
                    encoded[index] = encode(conversations[index], tokenizer, settings.length)
                if _targets(encoded[index]):
                    yield encoded[index]
            if not any(map(_targets, encoded.values())):
                raise InputError(f"--length {settings.length}: no answer begins within so many tokens. Give more.")

    packed = PackedConversations(passes(), settings.length, rows)
    packed.dropped = sum(not _targets(each) for each in encoded.values())  # each once, however many passes
    _tell("train", packed, settings)
    return packed


def pack_held_out_rows(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, settings: Settings, ranks: int = 1
) -> PackedConversations:
    """Packs all that is held out, into a number of rows that the ranks and their batches divide.

    Raises:
        InputError: If no answer begins within ``length`` tokens.
    """
    encoded = (encode(conversation, tokenizer, settings.length) for conversation in conversations)
    packed = PackedConversations(encoded, settings.length)
    if not len(packed):
        raise InputError(f"--length {settings.length}: no held-out answer begins within so many tokens. Give more.")
    _tell("held out", packed, settings)
    packed.pad_rows(ranks * settings.batch_size)
    return packed


def collate_for(attention: str) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Returns the function that makes a batch of rows: one long row for flash attention, which asks for it."""
    return _one_long_row if attention.startswith("flash") else default_collate


def _one_long_row(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}


def _tell(which: str, packed: PackedConversations, settings: Settings) -> None:
    logger.info(
        "%s: %d conversations in %d rows of %d tokens, %.0f%% full, %.0f%% to be learnt; %d dropped that no answer "
        "begins in",
        which,
        packed.packed,
        len(packed),
        settings.length,
        100 * sum(packed.tokens) / (len(packed) * settings.length),
        100 * sum(packed.targets) / (len(packed) * settings.length),
        packed.dropped,
    )


def _targets(conversation: Encoded) -> int:
    return sum(label != IGNORED for label in conversation.labels[1:])


def _tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    try:
        tokens: list[int] = tokenizer.apply_chat_template(conversation, return_dict=False, **options)
    except TemplateError as error:
        roles = [message["role"] for message in conversation]
        raise InputError(f"--model: its chat template does not take a conversation of {roles}: {error}.") from error
    return tokens


def _texts(conversation: Conversation) -> set[str]:
    """What must not be on both sides: the prompt, and all that is long enough to be no coincidence."""
    contents = [_plain(message["content"]) for message in conversation if message["role"] != "system"]
    return {contents[0], *(content for content in contents if len(content) >= SHORTEST_ANSWER)}


def _plain(text: str) -> str:
    """Texts that differ in case or white space only count as one."""
    return " ".join(text.lower().split())


def _load(settings: Settings, source: str, split: str) -> list[Conversation]:
    if source == OFFLINE_DATASET:
        return [
            _question_and_answer(f"{INSTRUCTION}\n\n{function.source}", function.docstring)
            for function in read_functions()
        ]
    table = read_table(source, split, subset=settings.subset, files=FILES, offline=OFFLINE_DATASET)
    if settings.messages_column in table.column_names:
        conversations = list(table[settings.messages_column])
    elif {settings.prompt_column, settings.completion_column} <= set(table.column_names):
        pairs = zip(table[settings.prompt_column], table[settings.completion_column], strict=True)
        conversations = [_question_and_answer(*pair) for pair in pairs]
    else:
        raise InputError(
            "--messages_column, --prompt_column, --completion_column: there is neither a column "
            f"{settings.messages_column!r} nor both of {settings.prompt_column!r} and {settings.completion_column!r}. "
            f"Choose from {', '.join(table.column_names)}."
        )
    return [_checked(conversation, number, source) for number, conversation in enumerate(conversations)]


def _question_and_answer(prompt: Any, completion: Any) -> Conversation:
    """Both may be text or messages."""
    question = [{"role": "user", "content": prompt}] if not isinstance(prompt, list) else prompt
    answer = [{"role": "assistant", "content": completion}] if not isinstance(completion, list) else completion
    return [*question, *answer]


def _checked(conversation: Any, number: int, source: str) -> Conversation:
    """A conversation with role and content alone; an error where it is none, or has nothing to learn."""
    problem = None
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        problem = "it is no list of messages"
    elif not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in conversation):
        problem = "a message has no role or no content in text"
    elif next((m["role"] for m in conversation if m["role"] != "system"), None) != "user":
        problem = "it does not begin with the user"
    elif not any(m["role"] == "assistant" and m["content"].strip() for m in conversation):
        problem = "the assistant says nothing"
    if problem is not None:
        raise InputError(
            f"--dataset, --held_out: row {number} of {source} is no conversation: {problem}. It should be like "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]; repair or remove it.'
        )
    return [{"role": message["role"], "content": message["content"]} for message in conversation]
