"""Conversations, read from the hub, from files or from Python itself: what to train on, and what is held out."""

import json
import logging
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from recipes.inputs import InputError
from recipes.offline_data import SHORTEST_ANSWER, read_functions
from recipes.supervised_fine_tuning.settings import COLUMNS, FILES, OFFLINE_DATASET, Settings
from recipes.tables import place_of_held_out, read_table

INSTRUCTION = "Write the docstring of this Python function."

SPLIT_SEED = 0
"""Every run is measured on the same conversations, whatever its seed."""

Message = dict[str, Any]
"""A role, its content, and what else the model's chat template knows: `tool_calls`, `reasoning_content`, ..."""

logger = logging.getLogger("recipes")


@dataclass(frozen=True)
class Conversation:
    """Messages, and how they are to be read.

    Attributes:
        messages: In their order.
        prompt: How many of them, at the beginning, are not to be learnt.
        tools: What the assistant may call, as JSON schemas.
        place: Where it comes from, for errors.
    """

    messages: list[Message]
    prompt: int = 0
    tools: list[dict[str, Any]] | None = None
    place: str = "a conversation"


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


def _texts(conversation: Conversation) -> set[str]:
    """What must not be on both sides: the prompt, and all that is long enough to be no coincidence."""
    contents = [_plain(m.get("content", "")) for m in conversation.messages if m["role"] != "system"]
    return {contents[0], *(content for content in contents if len(content) >= SHORTEST_ANSWER)}


def _plain(text: str) -> str:
    """Texts that differ in case or white space only count as one."""
    return " ".join(text.lower().split())


def _load(settings: Settings, source: str, split: str) -> list[Conversation]:
    if source == OFFLINE_DATASET:
        functions = (
            _prompt_and_completion(f"{INSTRUCTION}\n\n{function.source}", function.docstring)
            for function in read_functions()
        )
        return [Conversation(messages, prompt, place=OFFLINE_DATASET) for messages, prompt in functions]
    table = read_table(source, split, subset=settings.subset, files=FILES, offline=OFFLINE_DATASET)
    read = _arguments_that_are_read(settings, source, table.column_names)
    if "messages_column" in read:
        rows: Any = ((messages, 0) for messages in table[settings.messages_column])
    else:
        pairs = zip(table[settings.prompt_column], table[settings.completion_column], strict=True)
        rows = (_prompt_and_completion(*pair) for pair in pairs)
    tools = table[settings.tools_column] if "tools_column" in read else [None] * len(table)
    return [
        _checked(messages, prompt, _tools(each, number, settings), f"row {number} of {source}")
        for number, ((messages, prompt), each) in enumerate(zip(rows, tools, strict=True))
    ]


def _arguments_that_are_read(settings: Settings, source: str, columns: list[str]) -> set[str]:
    """Returns the arguments whose columns hold the conversations and tools: among them all that were given.

    Raises:
        InputError: If there are no conversations, or an argument was given that is not among them.
    """
    given = {name for name in COLUMNS if getattr(settings, name) != getattr(Settings, name)}
    present = {name for name in COLUMNS if getattr(settings, name) in columns}
    tools = present & {"tools_column"}
    ways = [way | tools for way in ({"messages_column"}, {"prompt_column", "completion_column"}) if way <= present]
    if not ways:
        raise InputError(
            "--messages_column, --prompt_column, --completion_column: there is neither a column "
            f"{settings.messages_column!r} nor both of {settings.prompt_column!r} and {settings.completion_column!r}. "
            f"Choose from {', '.join(columns)}."
        )
    read = next((way for way in ways if given <= way), ways[0])
    for name in sorted(given - read):
        instead = ", ".join(getattr(settings, each) for each in COLUMNS if each in read)
        raise InputError(
            f"--{name} {getattr(settings, name)} would have no effect: what is read of {source} is {instead}. Choose "
            f"from {', '.join(columns)}, or leave it out."
        )
    return read


def _prompt_and_completion(prompt: Any, completion: Any) -> tuple[list[Any], int]:
    """Returns the messages of both, which may be text or messages, and how many are the prompt's."""
    question = [{"role": "user", "content": prompt}] if not isinstance(prompt, list) else prompt
    answer = [{"role": "assistant", "content": completion}] if not isinstance(completion, list) else completion
    return [*question, *answer], len(question)


def _tools(tools: Any, number: int, settings: Settings) -> list[dict[str, Any]] | None:
    """Schemas, which tables often hold as text since each has fields of its own; None where there are none."""
    with suppress(json.JSONDecodeError):
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(
            f"--tools_column {settings.tools_column}: row {number} holds {str(tools)[:60]!r}. It should be a list of "
            "JSON schemas, or such a list as JSON text; rename a column that is something else."
        )
    return _without_nulls(tools) or None


def _checked(messages: Any, prompt: int, tools: list[dict[str, Any]] | None, place: str) -> Conversation:
    """The conversation of a row; an error where it is none, or has nothing to learn."""
    problem = None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        problem = "it is no list of messages"
    else:
        messages = [_with_calls_as_objects(message) for message in _without_nulls(messages)]
        if not all(isinstance(m.get("role"), str) and _has_content(m) for m in messages):
            problem = "a message has no role or no content in text"
        elif next((m["role"] for m in messages if m["role"] != "system"), None) != "user":
            problem = "it does not begin with the user"
        elif not any(m["role"] == "assistant" and _says_something(m) for m in messages[prompt:]):
            problem = "the assistant says nothing"
    if problem is not None:
        raise InputError(
            f"--dataset, --held_out: {place} is no conversation: {problem}. It should be like "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]; repair or remove it.'
        )
    return Conversation(messages, prompt, tools, place)


def _has_content(message: Message) -> bool:
    return isinstance(message.get("content"), str) or ("content" not in message and "tool_calls" in message)


def _says_something(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


def _with_calls_as_objects(message: Message) -> Message:
    """The message with the arguments of its calls as objects, and without an empty list of calls.

    The OpenAI API gives arguments as JSON text, which many templates refuse or write in quotes; some write the list.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    others = {field: value for field, value in message.items() if field != "tool_calls"}
    return {**others, "tool_calls": [_with_arguments_as_object(call) for call in calls]} if calls else others


def _with_arguments_as_object(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _with_arguments_as_object(call["function"])}
    arguments = call.get("arguments")
    with suppress(json.JSONDecodeError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _without_nulls(value: Any) -> Any:
    """Tables give every message and tool the fields that any has: null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
