"""A conversation as tokens, of which only the answers are learnt."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from recipes.inputs import InputError
from recipes.supervised_fine_tuning.conversations import Conversation, Message

IGNORED = -100
"""The label of a token that is not learnt."""

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What begins an answer in templates that say who wrote what."""

Span = tuple[int, int]
"""Characters of the text, the second left out."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: The tokens.
        labels: Of each: itself where it is learnt, else ``IGNORED``.
        rewritten: For each answer that cannot be learnt since the chat template rewrites it, how it does.
    """

    input_ids: list[int]
    labels: list[int]
    rewritten: tuple[str, ...] = ()

    @property
    def targets(self) -> int:
        """Tokens that are learnt: not the first, which nothing foretells."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenizes a conversation by the chat template, with labels for the answers and the token that ends each.

    An answer begins where the prompt for it ends, and ends where the conversation up to it does. Some templates mark
    what the assistant writes, by ``{% generation %}``: of an answer that is learnt their marks say what is. All are
    places in the text; a token that reaches over one, as the white space before an answer may, is learnt, since a part
    of it is the answer's.

    Args:
        conversation: Messages.
        tokenizer: With a chat template.
        max_length: Tokens after which it is cut.

    Raises:
        InputError: If the template refuses the conversation, or makes no use of something in it.
    """
    template = _Template(tokenizer, conversation)
    if GENERATION_MARK.search(tokenizer.get_chat_template(tools=conversation.tools)):
        text, marks = template.render_with_marks()
        answers, rewritten = _answers(template, text)
        spans = [(start, end) for start, end in marks if any(start < last and first < end for first, last in answers)]
    else:
        text = template.render(conversation.messages)
        spans, rewritten = _answers(template, text)
    _check_all_is_used(template, text)
    tokens, learnt = _tokenize(text, [span for span in spans if span[0] < span[1]], tokenizer)
    labels = [IGNORED] * len(tokens)
    for start, end in learnt:
        labels[start:end] = tokens[start:end]
    return Encoded(tokens[:max_length], labels[:max_length], tuple(rewritten))


class _Template:
    """The chat template, and the conversation that it is applied to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
        self.tokenizer = tokenizer
        self.conversation = conversation

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, self.conversation.tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may fail like any program
            raise self._refusal(error) from error
        return text

    def render_with_marks(self) -> tuple[str, list[Span]]:
        """Returns the text, and the characters that the template says are the assistant's.

        transformers' own mask of tokens leaves out all answers after one whose first character no token claims, as a
        space that the tokenizer trims.
        """
        tools = self.conversation.tools
        try:
            texts, spans = render_jinja_template(
                [self.conversation.messages],
                tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise self._refusal(error) from error
        return texts[0], spans[0]

    def _refusal(self, error: Exception) -> InputError:
        roles = [message["role"] for message in self.conversation.messages]
        return InputError(
            f"--model: its chat template does not take a conversation of {roles}: {error}. It is "
            f"{self.conversation.place}: change or remove it, or choose another model."
        )


def _answers(template: _Template, text: str) -> tuple[list[Span], list[str]]:
    """Finds the answers in the text of a conversation, each through the token that ends it.

    A template may write an answer otherwise when the conversation goes on, as those that drop thoughts do. No model
    will write what then stands there, so it is not learnt, and told instead: how the two differ.
    """
    messages = template.conversation.messages
    spans: list[Span] = []
    rewritten: list[str] = []
    closing = None
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < template.conversation.prompt:
            continue
        before = template.render(messages[:turn], add_generation_prompt=True)
        start = _common(text, before)
        if closing is None or start < len(before):
            closed = template.render(messages[:turn])
            closing = _closing(template.tokenizer, closed, before)
            closed = closed.removesuffix(closing)
            if start < min(len(before), len(closed)):
                rewritten.append(_difference(text, closed))
                continue
            if start < len(before):
                start = _start_after_dropped_prompt(text, message, len(closed), start)
        through = (text if turn == len(messages) - 1 else template.render(messages[: turn + 1])).removesuffix(closing)
        if text.startswith(through):
            spans.append((start, len(through.rstrip())))  # no model writes the white space after the end token
        else:
            rewritten.append(_difference(text, through))
    return spans, rewritten


def _closing(tokenizer: PreTrainedTokenizerBase, closed: str, before: str) -> str:
    """Returns the token that a template writes after a conversation, unless it asks for an answer."""
    end = tokenizer.eos_token
    return end if end and closed.endswith(end) and not before.startswith(closed) else ""


def _start_after_dropped_prompt(text: str, message: Message, earliest: int, parted: int) -> int:
    """Returns where an answer begins if its prompt holds more than the conversation keeps, as a "<think>".

    That is where the two part, or earlier if the answer begins like what was dropped.
    """
    content = message.get("content", "").strip()
    found = text.rfind(content, earliest, parted + len(content))
    return min(parted, found) if found >= 0 else parted


def _check_all_is_used(template: _Template, text: str) -> None:
    """Refuses what the template would leave out without a word."""
    conversation = template.conversation
    if conversation.tools:
        without = _Template(template.tokenizer, replace(conversation, tools=None))
        if _render_or_none(without, conversation.messages) == text:
            raise InputError(
                f"--tools_column: {conversation.place} has tools, which the chat template of --model makes no use of. "
                "Choose a model that calls tools, or rename the column."
            )
    for turn, field, other in _doubtful_fields(template):
        if _makes_no_difference(template, text, turn, other):
            role = conversation.messages[turn]["role"]
            raise InputError(
                f"--dataset, --held_out: message {turn} of {conversation.place} has a field {field!r}, which the chat "
                f"template of --model makes no use of (its role is {role!r}). Remove it, or choose another model."
            )


def _doubtful_fields(template: _Template) -> Iterator[tuple[int, str, Message]]:
    """Yields what the text may not hold: the place of a message, a field, and the message with that changed.

    The contents are changed all at once, into what no text holds by chance: those found again are in use.
    """
    messages = template.conversation.messages
    others = [
        {**message, "content": f"content{turn}content"} if message.get("content", "").strip() else message
        for turn, message in enumerate(messages)
    ]
    shown = _render_or_none(template, others) or ""
    for turn, message in enumerate(messages):
        if others[turn] != message and others[turn]["content"] not in shown:
            yield turn, "content", others[turn]
        for field, value in message.items():
            if field not in ("role", "content") and value not in ("", [], {}):
                yield turn, field, {key: each for key, each in message.items() if key != field}


def _makes_no_difference(template: _Template, text: str, turn: int, other: Message) -> bool:
    """Whether the text stays the same with another message in the place of one."""
    messages = template.conversation.messages
    through = [*messages[:turn], other]
    if _render_or_none(template, [*through, *messages[turn + 1 :]]) != text:
        return False
    # A template may use a field only as long as the message is the last, as it does thoughts.
    return _render_or_none(template, through) == _render_or_none(template, messages[: turn + 1])


def _render_or_none(template: _Template, messages: list[Message]) -> str | None:
    try:
        return template.render(messages)
    except InputError:
        return None


def _tokenize(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Returns the tokens of a text, and the spans counted in tokens."""
    if not tokenizer.is_fast:
        return _tokenize_slowly(text, spans, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = zip(*encoding["offset_mapping"], strict=True)
    return encoding["input_ids"], [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]


def _tokenize_slowly(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """The same with a tokenizer in Python, which does not say where its tokens lie: their text is counted instead."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(tokens, clean_up_tokenization_spaces=False) != text:
        raise InputError(
            f"--model: its tokenizer {type(tokenizer).__name__} neither says where tokens lie in the text nor restores "
            "it, so answers cannot be told. Choose a model with a fast tokenizer."
        )

    def characters(count: int) -> int:
        return len(tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False))

    def before(place: int) -> int:
        return bisect_right(range(len(tokens) + 1), place, key=characters) - 1

    ends = [before(end) for _, end in spans]
    ends = [count + (characters(count) < end) for count, (_, end) in zip(ends, spans, strict=True)]
    return tokens, [(before(start), end) for (start, _), end in zip(spans, ends, strict=True)]


def _common(one: Any, other: Any) -> int:
    """Returns how long the beginning is that two texts or lists have in common."""
    if one[: len(other)] == other:
        return len(other)
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def _difference(text: str, part: str) -> str:
    """Tells where the text of a part leaves that of the whole conversation."""
    start = _common(text, part)
    return f"{text[start : start + 40]!r} in the whole conversation, {part[start : start + 40]!r} up to the answer"
