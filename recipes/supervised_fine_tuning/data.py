"""Conversations packed into rows: what a run trains on and is measured on, the same on every rank."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase

from recipes.inputs import InputError
from recipes.supervised_fine_tuning.conversations import Conversation, load_conversations
from recipes.supervised_fine_tuning.encoding import IGNORED, Encoded, encode
from recipes.supervised_fine_tuning.settings import Settings

OPEN_ROWS = 8
"""Rows that wait for a conversation that fits: the more, the less padding."""

logger = logging.getLogger("recipes")


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

    That holds for models that pass ``check_packing``, which get no attention mask and have no cache (``use_cache``
    off); the flash kinds of attention also want one row at a time, see :func:`collate_for`.

    Args:
        conversations: Those without any label are dropped, and counted.
        length: Tokens of a row; no conversation is longer.
        rows: How many are wanted: conversations are read until so many are full (default: None, all are read).
        packing: Whether a row may hold several. Rows of one have no positions: the padding comes after it, where no
            causal model sees it (default: True).

    Attributes:
        tokens: Of each row, padding left out.
        targets: Tokens of each row that are learnt.
        packed: Conversations in the rows.
        dropped: Conversations dropped because there is nothing to learn within ``length`` tokens.
    """

    def __init__(
        self, conversations: Iterable[Encoded], length: int, rows: int | None = None, packing: bool = True
    ) -> None:
        self.length = length
        self.packing = packing
        self.dropped = 0
        self._rows = list(islice(self._pack(conversations), rows))
        self.packed = sum(len(row) for row in self._rows)
        self.tokens = [sum(len(each.input_ids) for each in row) for row in self._rows]
        self.targets = [sum(each.targets for each in row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index]
        padding = self.length - self.tokens[index]
        parts = [*row, Encoded([0] * padding, [IGNORED] * padding)]
        tensors = {
            "input_ids": torch.tensor([token for part in parts for token in part.input_ids]),
            # A conversation's first token follows on another conversation, which does not foretell it.
            "labels": torch.tensor(
                [label for part in parts for label in [IGNORED, *part.labels[1:]][: len(part.labels)]]
            ),
        }
        if self.packing:
            tensors["position_ids"] = torch.cat([torch.arange(len(part.input_ids)) for part in parts])
        return tensors

    def pad_rows(self, multiple: int) -> None:
        """Adds rows of padding until their number is a multiple, for ranks that have to read equally many."""
        missing = -len(self) % multiple
        self._rows += [[] for _ in range(missing)]
        self.tokens += [0] * missing
        self.targets += [0] * missing

    def _pack(self, conversations: Iterable[Encoded]) -> Iterator[list[Encoded]]:
        """Puts each conversation where it leaves the least room, among the rows that are open; yields the closed."""
        waiting: list[_OpenRow] = []
        for conversation in conversations:
            if not conversation.targets:
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
                    yield fullest.conversations
                row = _OpenRow(self.length)
                waiting.append(row)
            row.add(conversation)
            if row.room == 0 or not self.packing:
                waiting.remove(row)
                yield row.conversations
        for row in waiting:
            yield row.conversations


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
        InputError: If there is nothing to learn.
    """
    generator = random.Random(settings.seed)
    encoded: dict[int, Encoded] = {}

    def passes() -> Iterator[Encoded]:
        while True:
            for index in generator.sample(range(len(conversations)), len(conversations)):
                if index not in encoded:
                    encoded[index] = encode(conversations[index], tokenizer, settings.length)
                if encoded[index].targets:
                    yield encoded[index]
            if not any(each.targets for each in encoded.values()):
                raise _nothing_to_learn("answer", encoded.values(), settings)

    packed = PackedConversations(passes(), settings.length, rows, settings.packing)
    packed.dropped = sum(not each.targets for each in encoded.values())  # each once, however many passes
    _tell("train", packed, encoded.values(), settings)
    return packed


def pack_held_out_rows(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, settings: Settings, ranks: int = 1
) -> PackedConversations:
    """Packs all that is held out, into a number of rows that the ranks and their batches divide.

    Raises:
        InputError: If there is nothing to learn.
    """
    encoded = [encode(conversation, tokenizer, settings.length) for conversation in conversations]
    packed = PackedConversations(encoded, settings.length, packing=settings.packing)
    if not len(packed):
        raise _nothing_to_learn("held-out answer", encoded, settings)
    _tell("held out", packed, encoded, settings)
    packed.pad_rows(ranks * settings.batch_size)
    return packed


def collate_for(attention: str) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Returns the function that makes a batch of rows: one long row of packed ones for flash attention, as it asks."""
    return _one_long_row if attention.startswith("flash") else default_collate


def _one_long_row(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if "position_ids" not in rows[0]:
        batch: dict[str, Tensor] = default_collate(rows)
        return batch
    return {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}


def _nothing_to_learn(answer: str, encoded: Iterable[Encoded], settings: Settings) -> InputError:
    rewritten = [how for each in encoded for how in each.rewritten]
    if not rewritten:
        return InputError(f"--length {settings.length}: no {answer} begins within so many tokens. Give more.")
    return InputError(
        f"--model, --length {settings.length}: no {answer} can be learnt. The chat template rewrites {len(rewritten)} "
        f"when it writes whole conversations: {rewritten[0]}. Others do not begin within so many tokens. Choose a "
        "model with another template, or data that ends in an answer."
    )


def _tell(which: str, packed: PackedConversations, encoded: Iterable[Encoded], settings: Settings) -> None:
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
    rewritten = [how for each in encoded for how in each.rewritten]
    if rewritten:
        logger.warning(
            "%s: %d answers are not learnt, since the chat template rewrites them in whole conversations: %s",
            which,
            len(rewritten),
            rewritten[0],
        )
