"""What the recipe learns of a conversation, by chat templates of many kinds, and which models may read packed ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import default_collate
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recipes.inputs import InputError
from recipes.offline import SMOLLM2, model_source
from recipes.supervised_fine_tuning.conversations import Conversation, Message, load_conversations
from recipes.supervised_fine_tuning.data import (
    OPEN_ROWS,
    PackedConversations,
    collate_for,
    pack_held_out_rows,
    pack_training_rows,
)
from recipes.supervised_fine_tuning.encoding import IGNORED, Encoded, encode
from recipes.supervised_fine_tuning.model import held_out_loss, load_model
from recipes.supervised_fine_tuning.packing import check_packing
from recipes.supervised_fine_tuning.settings import Settings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # like Llama 3's, which trims
    "<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
CLOSED = (  # like Phi 3's, which closes what is not to be answered
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THOUGHTFUL = (  # like R1's, whose prompt begins a thought that no conversation keeps
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}</s>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
BRACKETS = (  # like Mistral's, without a header of the assistant
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ '\\n' }}")
MARKED_REWRITING = (  # like Qwen 3's, which keeps thoughts only after the last question
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.index > last.question %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = MARKED_REWRITING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CALLING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {
    "ChatML": (CHATML, "<|im_end|>"),
    "headers": (HEADERS, "<|end|>"),
    "closed": (CLOSED, "<|end|>"),
    "thoughtful": (THOUGHTFUL, "</s>"),
    "brackets": (BRACKETS, "</s>"),
    "marked": (MARKED, "<|im_end|>"),
}
"""Templates, and what ends an answer in each."""

ANSWERS = (
    "yes",
    " an answer",
    "    return x",
    "  two",
    "\n\nans",
    "<b>bold</b>",
    "<think>so\n</think>done",
    "a\n",
    "日本 🙂",
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    """The real one, which joins white space with the line end before it, and knows special tokens of many kinds."""
    tokenizer = AutoTokenizer.from_pretrained(**model_source(SMOLLM2))
    roles = ("system", "user", "assistant")
    tokens = ("<s>", "</s>", "<|head|>", "<|/head|>", "<|end|>", "<|im_end|>", "<think>", *(f"<|{r}|>" for r in roles))
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    tokenizer.eos_token = "</s>"
    return tokenizer


@pytest.fixture
def tokenizer(smollm2: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(smollm2, "chat_template", CHATML)
    return smollm2


def talk(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def chat(*contents: str, **options: Any) -> Conversation:
    return Conversation(talk(*contents, **options))


def learnt(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the stretches of tokens that have labels."""
    texts: list[list[int]] = []
    for before, label in zip([IGNORED, *encoded.labels], encoded.labels, strict=False):
        if label != IGNORED:
            if before == IGNORED:
                texts.append([])
            texts[-1].append(label)
    return [tokenizer.decode(text) for text in texts]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestAnswers:
    @pytest.mark.parametrize("kind", ENDS)
    @pytest.mark.parametrize("answer", ANSWERS)
    def test_of_every_kind_of_template(self, kind: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """The answer and the token that ends it; before it at most a line end in one token with its first space."""
        tokenizer.chat_template, end = ENDS[kind]
        written = {"headers": answer.strip(), "thoughtful": answer.split("</think>")[-1], "brackets": f" {answer}"}
        expected = written.get(kind, answer) + end
        if kind == "closed":
            assert encode(chat("one", answer), tokenizer, 100).labels[-1] == IGNORED, "what closes the conversation"
        for turns in (["one", answer], ["one", answer, "two", answer, "three", answer]):
            conversation = chat(*turns)
            encoded = encode(conversation, tokenizer, 1000)
            assert encoded.input_ids == tokenizer.apply_chat_template(conversation.messages, return_dict=False)
            assert all(
                label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
            )
            found = learnt(encoded, tokenizer)
            assert len(found) == len(turns) // 2
            for text in found:
                assert text in (expected, f"\n{expected}", f"\n\n{expected}")
            assert not encoded.rewritten

    def test_a_token_over_the_beginning_is_learnt(self, tokenizer: PreTrainedTokenizerBase) -> None:
        encoded = encode(chat("one", "    return x"), tokenizer, 100)
        assert learnt(encoded, tokenizer) == ["\n    return x<|im_end|>"], "the line end is the header's"
        assert learnt(encode(chat("one", "return x"), tokenizer, 100), tokenizer) == ["return x<|im_end|>"]

    @pytest.mark.parametrize("fast", [True, False])
    def test_a_token_over_the_end_is_learnt(
        self, fast: bool, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer.chat_template = OPEN
        monkeypatch.setattr(type(tokenizer), "is_fast", fast)
        assert learnt(encode(chat("one", "answer\n"), tokenizer, 100), tokenizer) == ["answer\n\n"]
        assert learnt(encode(chat("one", "answer"), tokenizer, 100), tokenizer) == ["answer"]

    def test_of_the_real_template(self, smollm2: PreTrainedTokenizerBase) -> None:
        encoded = encode(chat("one", "first", "two", " second\n answer", system="be brief"), smollm2, 100)
        assert learnt(encoded, smollm2) == ["first<|im_end|>", " second\n answer<|im_end|>"]
        assert not encoded.rewritten

    @pytest.mark.parametrize("answer", ANSWERS)
    @pytest.mark.parametrize("kind", ENDS)
    def test_of_a_slow_tokenizer(
        self, kind: str, answer: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that does not say where its tokens lie finds the same."""
        tokenizer.chat_template, _ = ENDS[kind]
        conversation = chat("one", answer, "two", answer)
        expected = encode(conversation, tokenizer, 1000)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert encode(conversation, tokenizer, 1000) == expected

    def test_long_ones_are_cut(self, tokenizer: PreTrainedTokenizerBase) -> None:
        whole = encode(chat("one", "a long answer of many words"), tokenizer, 100)
        cut = encode(chat("one", "a long answer of many words"), tokenizer, len(whole.input_ids) - 4)
        assert cut.input_ids == whole.input_ids[:-4]
        assert cut.labels == whole.labels[:-4]

    @pytest.mark.parametrize("template", [CHATML, MARKED, CLOSED, THOUGHTFUL], ids=["ChatML", "marked", "closed", "R1"])
    def test_in_prompts_are_not_learnt(self, template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        rows = [{"prompt": talk(f"{n}", "EARLIER", "two"), "completion": talk("", f"answer {n}")[1:]} for n in range(2)]
        data = write_rows(tmp_path / "data.jsonl", rows)
        tokenizer.chat_template = template
        train, held_out = load_conversations(Settings(dataset=data, held_out_size=1))
        for conversation in train + held_out:
            [text] = learnt(encode(conversation, tokenizer, 100), tokenizer)
            assert text.startswith(f"answer {conversation.messages[0]['content']}")

    @pytest.mark.parametrize("template", [CHATML, OPEN], ids=["ChatML", "open"])
    def test_that_are_empty(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Their end is learnt where it is the answer's, and nothing else is."""
        tokenizer.chat_template = template
        end = "<|im_end|>" if template == CHATML else ""
        found = learnt(encode(chat("one", "", "two", "answer"), tokenizer, 100), tokenizer)
        assert found == [text for text in (end, f"answer{end}") if text]

    @pytest.mark.parametrize("template", [REWRITING, MARKED_REWRITING], ids=["plain", "marked"])
    def test_in_prompts_that_are_rewritten_later(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """The next answer follows on a text that the conversation no longer holds; the one after the question does."""
        tokenizer.chat_template = template
        messages = talk("one", "EARLIER", "found", "first", "two", "second")
        messages[1]["reasoning_content"] = "hm"
        messages[2]["role"] = "tool"
        encoded = encode(Conversation(messages, prompt=3), tokenizer, 100)
        assert learnt(encoded, tokenizer) == ["<think></think>second<|im_end|>"]
        assert len(encoded.rewritten) == 1

    @pytest.mark.parametrize("template", [REWRITING, MARKED_REWRITING], ids=["plain", "marked"])
    def test_that_are_rewritten_later_are_not_learnt(
        self, template: str, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer.chat_template = template
        encoded = encode(chat("one", "first", "two", "second"), tokenizer, 100)
        assert learnt(encoded, tokenizer) == ["<think></think>second<|im_end|>"]
        [how] = encoded.rewritten
        assert how.startswith("'first<|im_end|>")
        assert how.endswith("in the whole conversation, '<think></think>first<|im_end|>\\n' up to the answer")
        settings = Settings(length=100)
        pack_held_out_rows([chat("one", "first", "two", "second")] * 2, tokenizer, settings)
        assert "held out: 2 answers are not learnt, since the chat template rewrites them" in caplog.text
        unfinished = [chat("one", "first", "two")] * 2
        with pytest.raises(InputError, match=r"no answer can be learnt. The chat template rewrites 2 .*'first<"):
            pack_training_rows(unfinished, tokenizer, settings, 1)
        with pytest.raises(InputError, match=r"no held-out answer can be learnt. The chat template rewrites 2"):
            pack_held_out_rows(unfinished, tokenizer, settings)

    def test_a_template_that_refuses_a_conversation(self, tokenizer: PreTrainedTokenizerBase) -> None:
        conversation = replace(chat("one", "first", system="be brief"), place="row 3 of talks.jsonl")
        for template in (BRACKETS, BRACKETS.replace("{{ m.content }}</s>", "{% generation %}a{% endgeneration %}")):
            tokenizer.chat_template = template
            with pytest.raises(
                InputError,
                match=r"does not take .* of \['system', 'user', 'assistant'\]: no system. It is row 3 of talks.jsonl",
            ):
                encode(conversation, tokenizer, 100)

    def test_of_a_tokenizer_that_does_not_restore_the_text(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        monkeypatch.setattr(type(tokenizer), "decode", lambda self, tokens, **_: "other")
        with pytest.raises(InputError, match=r"its tokenizer \w+ neither says where tokens lie .* fast tokenizer"):
            encode(chat("one", "first"), tokenizer, 100)

    def test_each_conversation_is_tokenized_once(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        plain = type(tokenizer).__call__

        def count(self: Any, *arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            return plain(self, *arguments, **options)

        monkeypatch.setattr(type(tokenizer), "__call__", count)
        encode(chat("one", "first", "two", "second", "three", "third"), tokenizer, 100)
        assert len(calls) == 1


class TestFields:
    """Whatever a message holds beside role and content is in the text, or refused."""

    def test_calls_of_tools(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        """From a table, which gives each message the fields of all; the tools as text or as they are."""
        call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        messages = [*talk("Rain?"), call, {"role": "tool", "content": "no"}, *talk("", "It is dry.")[1:]]
        tokenizer.chat_template = CALLING
        other_tool = {"type": "function", "function": {"name": "clock"}}
        for name, tools, other in (("text", json.dumps([TOOL]), ""), ("schemas", [TOOL], [other_tool])):
            path = tmp_path / f"{name}.parquet"
            rows = [{"messages": messages, "tools": tools}, {"messages": talk("x", "y"), "tools": other}]
            datasets.Dataset.from_list(rows).to_parquet(path)
            train, held_out = load_conversations(Settings(dataset=str(path), held_out_size=1))
            calling = next(each for each in train + held_out if len(each.messages) > 2)
            plain = next(each for each in train + held_out if len(each.messages) == 2)
            assert plain.messages == talk("x", "y")
            assert plain.tools == ([other_tool] if other else None)
            assert calling.tools == [TOOL]
            encoded = encode(calling, tokenizer, 1000)
            assert tokenizer.decode(encoded.input_ids).startswith("<|im_start|>tools\n[{")
            assert "weather" in tokenizer.decode(encoded.input_ids[:20])
            assert learnt(encoded, tokenizer) == [
                '<call>weather {"city": "Rome"}</call><|im_end|>',
                "It is dry.<|im_end|>",
            ]

    def test_calls_with_arguments_in_text(self, tmp_path: Path) -> None:
        """As objects: most templates write them as JSON, which of text would be a text in quotes."""
        written = {"plain": '{"city": "Rome", "day": null}', "array": "[1]", "broken": "{", "none": ""}
        calls: list[Any] = [{"function": {"name": name, "arguments": text}} for name, text in written.items()]
        calls += [{"name": "flat", "arguments": '{"n": 1}'}]
        rows = [{"messages": [*talk(str(n)), {"role": "assistant", "tool_calls": calls}]} for n in range(2)]
        train, _ = load_conversations(Settings(dataset=write_rows(tmp_path / "data.jsonl", rows), held_out_size=1))
        found = train[0].messages[1]["tool_calls"]
        expected = [{"city": "Rome", "day": None}, "[1]", "{", ""]
        assert [call["function"]["arguments"] for call in found[:4]] == expected
        assert found[4] == {"name": "flat", "arguments": {"n": 1}}

    def test_no_calls(self, tmp_path: Path) -> None:
        """An empty list of them counts as none: LFM2's template would teach a call of nothing after every answer."""
        empty = [{**message, "tool_calls": []} for message in talk("one", "first")]
        data = write_rows(tmp_path / "data.jsonl", [{"messages": empty}, {"messages": talk("two", "second")}])
        train, held_out = load_conversations(Settings(dataset=data, held_out_size=1))
        assert sorted(each.messages[1]["content"] for each in train + held_out) == ["first", "second"]
        assert all(message.keys() == {"role", "content"} for each in train + held_out for message in each.messages)

    @pytest.mark.parametrize(
        ("field", "value", "template"),
        [
            ("weight", 0, CHATML),
            ("reasoning_content", "hm", CHATML),
            ("reasoning_content", "hm", MARKED),
            ("tool_calls", [CALL], CHATML),
            ("name", "Ann", CALLING),  # which knows the names of tools
        ],
    )
    def test_that_the_template_does_not_use(
        self, field: str, value: Any, template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        rows = [{"messages": talk("x", "y")}, {"messages": [*talk("a"), {**talk("", "b")[1], field: value}]}]
        data = write_rows(tmp_path / "data.jsonl", rows)
        train, held_out = load_conversations(Settings(dataset=data, held_out_size=1))
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=rf"message 1 of row 1 of .*data.jsonl has a field '{field}', which"):
            for conversation in train + held_out:
                encode(conversation, tokenizer, 100)

    def test_that_the_template_uses_for_the_last_answer_only(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = REWRITING
        messages = talk("one", "first", "two", "second")
        messages[1]["reasoning_content"] = "hm"
        assert learnt(encode(Conversation(messages), tokenizer, 100), tokenizer) == ["<think></think>second<|im_end|>"]

    @pytest.mark.parametrize(
        ("role", "template"),
        [
            ("tool", CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")),
            ("assistant", CALLING.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")),
            ("user", CALLING.replace("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}")),
        ],
    )
    def test_content_that_the_template_does_not_use(
        self, role: str, template: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """A message left out as a whole, as by templates that know no tools; one's text beside its calls; all text."""
        tokenizer.chat_template = template
        messages = talk("Rain?", "I look it up.", "no", "It is dry.")
        messages[2]["role"] = "tool"
        if "tool_calls" in template:
            messages[1]["tool_calls"] = [CALL]
        turn = next(index for index, message in enumerate(messages) if message["role"] == role)
        with pytest.raises(
            InputError, match=rf"message {turn} of row 7 has a field 'content', .* \(its role is '{role}'\). Remove it"
        ):
            encode(Conversation(messages, place="row 7"), tokenizer, 100)
        messages[turn]["content"] = " "
        assert "It is dry." in learnt(encode(Conversation(messages), tokenizer, 100), tokenizer)[-1]

    def test_content_that_the_template_looks_into(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """It is in use, though none of it is in the text, or the template takes no other."""
        for use in (
            "{{ m.content | length }}",
            "{{ m.content if m.content in ('x', 'y') else raise_exception('no') }}",
            "{{ m.content if loop.last else '' }}",
        ):
            tokenizer.chat_template = CHATML.replace("{{ m.content }}", use)
            encode(chat("x", "y"), tokenizer, 100)

    def test_tools_that_the_template_does_not_use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        conversation = replace(chat("x", "y"), tools=[TOOL], place="row 7 of talks.jsonl")
        with pytest.raises(
            InputError, match=r"--tools_column: row 7 of talks.jsonl has tools, which the chat template"
        ):
            encode(conversation, tokenizer, 100)

    def test_a_column_that_holds_no_tools(self, tmp_path: Path) -> None:
        data = write_rows(tmp_path / "data.jsonl", [{"messages": talk("x", "y"), "tools": "hammer, saw"}])
        with pytest.raises(InputError, match=r"--tools_column tools: row 0 holds 'hammer, saw'"):
            load_conversations(Settings(dataset=data))


class TestColumns:
    """Those that are named are read, or the run ends."""

    def test_that_are_named_go_before_others(self, tmp_path: Path) -> None:
        rows = [
            {"messages": talk("x", str(n)), "question": f"{n}?", "answer": str(n), "functions": [TOOL]}
            for n in range(2)
        ]
        data = write_rows(tmp_path / "data.jsonl", rows)
        held_out = write_rows(tmp_path / "held_out.jsonl", [{**rows[0], "messages": talk("y", "y"), "question": "y"}])
        settings = Settings(dataset=data, held_out=held_out)
        train, _ = load_conversations(settings)
        assert [(each.messages, each.tools) for each in train] == [(talk("x", str(n)), None) for n in range(2)]
        settings = replace(settings, prompt_column="question", completion_column="answer", tools_column="functions")
        train, _ = load_conversations(settings)
        assert [(each.messages, each.tools) for each in train] == [(talk(f"{n}?", str(n)), [TOOL]) for n in range(2)]

    @pytest.mark.parametrize(
        ("names", "columns", "name", "read"),
        [
            ({"tools_column": "funtcions"}, "messages, functions", "tools_column", "messages"),
            ({"messages_column": "talk"}, "prompt, completion, tools", "messages_column", "prompt, completion, tools"),
            ({"prompt_column": "question"}, "messages, question", "prompt_column", "messages"),
            ({"messages_column": "talk", "prompt_column": "a"}, "talk, a, completion", "prompt_column", "talk"),
        ],
    )
    def test_that_would_have_no_effect(
        self, names: dict[str, Any], columns: str, name: str, read: str, tmp_path: Path
    ) -> None:
        data = write_rows(tmp_path / "data.jsonl", [dict.fromkeys(columns.split(", "), talk("x", "y"))])
        message = (
            f"--{name} {names[name]} would have no effect: what is read of {data} is {read}. Choose from {columns}, or"
        )
        with pytest.raises(InputError, match=message):
            load_conversations(Settings(dataset=data, **names))

    def test_of_a_dataset_that_has_none(self) -> None:
        with pytest.raises(InputError, match="--tools_column x would have no effect: functions has no columns"):
            Settings(tools_column="x")
        Settings(held_out="talks.jsonl", messages_column="x")


class TestRows:
    def test_are_as_many_as_are_asked_for(self) -> None:
        """Also where one conversation ends two: it takes the place of a row that waits, and fills its own."""
        waiting = [Encoded([n] * 6, [n] * 6) for n in range(OPEN_ROWS)]
        whole = Encoded([99] * 10, [99] * 10)
        for conversations in (waiting, [*waiting, whole]):
            everything = PackedConversations(conversations, 10)
            assert len(everything) == everything.packed == len(conversations)
            for rows in range(1, len(conversations) + 1):
                some = PackedConversations(conversations, 10, rows)
                assert (len(some), len(some.tokens), some.packed) == (rows, rows, rows)
                assert some._rows == everything._rows[:rows]


CONFIGS: dict[str, PreTrainedConfig] = {
    kind.model_type: kind(
        **dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4),
        **dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        **more,
    )
    for kind, more in (
        (LlamaConfig, {"attention_dropout": 0.5}),
        (GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
        (OPTConfig, {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        (FalconH1Config, {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}),
    )
}
"""One that tells packed conversations apart, two whose attention does not, and one with a state."""


def build(kind: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
    model.config.use_cache = False
    return model


class TestModelsForPacking:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_one_that_tells_conversations_apart(self, attention: str) -> None:
        for training in (True, False):
            model = build("llama", attention).train(training)
            generator = torch.get_rng_state()
            check_packing(model, Settings(attention=attention))
            assert model.training is training
            assert torch.equal(torch.get_rng_state(), generator)

    @pytest.mark.parametrize(
        ("kind", "attention"), [("gpt_oss", "eager"), ("opt", "sdpa"), ("opt", "eager"), ("falcon_h1", "sdpa")]
    )
    def test_one_that_does_not(
        self, kind: str, attention: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        build(kind, attention).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        settings = Settings(model=str(tmp_path), attention=attention, length=64)
        with pytest.raises(
            InputError, match=rf"--attention {attention}: the model does not tell apart .*packing false"
        ):
            load_model(settings)
        model, _ = load_model(replace(settings, packing=False))
        assert model.training

    def test_flex_attention_needs_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On CPUs it computes logits, which pass the test of packing, but no gradients."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(InputError, match="--attention flex_attention has gradients on GPUs only"):
            Settings(attention="flex_attention")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        Settings(attention="flex_attention")

    def test_one_without_positions(self) -> None:
        model = build("llama", "eager")
        forward = model.forward
        model.forward = lambda input_ids: forward(input_ids)
        with pytest.raises(InputError, match="it takes no positions"):
            check_packing(model, Settings(attention="eager"))

    def test_one_whose_weights_are_elsewhere(self) -> None:
        check_packing(build("gpt_oss", "eager").to("meta"), Settings(attention="eager"))

    @pytest.mark.parametrize("kind", ["opt", "falcon_h1"])
    def test_rows_of_one_conversation(self, kind: str) -> None:
        """Without packing, such a model's loss is that of the conversations alone."""
        model = build(kind, "sdpa").eval()
        conversations = [Encoded(list(range(n, 3 * n)), [IGNORED, *range(n + 1, 3 * n)]) for n in (3, 4, 5)]
        rows = PackedConversations(conversations, 24, packing=False)
        assert (len(rows), rows.packed, rows.tokens) == (3, 3, [6, 8, 10])
        rows.pad_rows(2)
        total = sum(
            model(torch.tensor([each.input_ids]), labels=torch.tensor([each.labels])).loss.item() * each.targets
            for each in conversations
        )
        assert collate_for("flash_attention_2")([rows[0], rows[1]])["input_ids"].shape == (2, 24)
        batches = [default_collate([rows[index], rows[index + 1]]) for index in (0, 2)]
        assert held_out_loss(model, batches) == pytest.approx(total / sum(rows.targets), abs=1e-4)
