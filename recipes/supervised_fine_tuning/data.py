"""Conversations: read, divided into training and validation, and packed as TRL's SFTTrainer packs them."""

import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, pack_dataset

from recipes.offline_data import SHORTEST_ANSWER, as_messages, read_conversations
from recipes.rows import is_file, read_rows
from recipes.supervised_fine_tuning.model import IGNORED


@dataclass
class DataSettings:
    """Conversations, and the rows that they are packed into.

    Attributes:
        dataset: "functions" of Python's library, a name on the hub, or a file, of messages, or prompt and completion.
        config: Configuration of a hub dataset that has several.
        train_split: Split to train on, such as train[:5%].
        validation_split: Split or file to validate on, such as train[-500:]; by default 32 rows of the training split.
        chat_template: File in the place of the tokenizer's template, such as smollm2_training.jinja for messages.
        max_length: Tokens of a row; longer conversations are cut.
        seed: Of the order of the rows.
    """

    dataset: str = "functions"
    config: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    chat_template: Path | None = None
    max_length: int = 256
    seed: int = 42


def load_conversations(settings: DataSettings) -> tuple[Dataset, Dataset]:
    """Return conversations to train on and others for validation, which share neither prompts nor answers."""
    train = _read(settings, settings.train_split)
    if settings.validation_split is not None:
        validation = _read(settings, settings.validation_split)
    else:
        train, validation = train.train_test_split(32, seed=0).values()  # the same whatever the seed
    seen = set(chain.from_iterable(map(_texts, validation)))
    train = train.filter(lambda row: seen.isdisjoint(_texts(row)))
    if not train:
        raise ValueError("dataset: every row to train on shares a text with the validation rows")
    return train, validation


def load_rows(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> list[Dataset]:
    """Return both as tokens, packed: the rows that SFTTrainer makes with ``packing`` and ``shuffle_dataset``."""
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template.read_text()
    packed = []
    for each in load_conversations(settings):  # packing sorts by length
        rows = each.map(_tokenize, fn_kwargs={"tokenizer": tokenizer}, remove_columns=each.column_names)
        packed.append(pack_dataset(rows.shuffle(seed=settings.seed), settings.max_length).shuffle(seed=settings.seed))
    return packed


def _read(settings: DataSettings, split: str) -> Dataset:
    if settings.dataset == "functions" and not is_file(split):
        return Dataset.from_generator(read_conversations, gen_kwargs={"python": sys.version})
    rows = read_rows(settings.dataset, settings.config, split)
    for columns in (["messages"], ["prompt", "completion"]):
        if set(columns) <= set(rows.column_names):
            rows = rows.select_columns([*columns, *({"tools"} & set(rows.column_names))])
            is_text = isinstance(rows[0][columns[0]], str)
            return rows.map(lambda row: as_messages(row["prompt"], row["completion"])) if is_text else rows
    raise ValueError(f"rows of {split} need messages, or prompt and completion, got {rows.column_names}")


def _texts(row: dict[str, Any]) -> set[str]:
    """The prompt, and what is too long to recur by chance; case and white space make no difference."""
    messages = chain.from_iterable(row[name] for name in ("messages", "prompt", "completion") if name in row)
    texts = [" ".join((each["content"] or "").lower().split()) for each in messages if each["role"] != "system"]
    return {texts[0], *(text for text in texts if len(text) >= SHORTEST_ANSWER)}


def _tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens, and as labels those of the answers and what ends them."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    encode = partial(tokenizer.apply_chat_template, tools=tools, return_dict=True)
    if "messages" in row:
        template = None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)
        encoded = encode(row["messages"], chat_template=template, return_assistant_tokens_mask=True)
        tokens, answer = encoded["input_ids"], encoded["assistant_masks"]
    else:
        prompt = encode(row["prompt"], add_generation_prompt=True)["input_ids"]
        tokens = encode(row["prompt"] + row["completion"])["input_ids"]
        answer = chain([0] * common_prefix_length(prompt, tokens), repeat(1))
    return {"input_ids": tokens, "labels": [t if a else IGNORED for t, a in zip(tokens, answer, strict=False)]}
