"""Rows become questions and expected answers; a turn that calls tools is expected as the template renders it."""

from __future__ import annotations

from typing import Any

import pytest

from runner.common.errors import DataError
from runner.config.schema import DataConfig, KeysConfig, ModelConfig
from runner.data.formats import EncodeOptions
from runner.data.metrics import METRICS
from runner.data.text_encoder import TextEncoder
from runner.models import tiny
from runner.models.load import load_base_model
from runner.training.generate import generate, split_row

CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL_ROW = {"messages": [{"role": "user", "content": "Rain in Oslo?"}, {"role": "assistant", "tool_calls": [CALL]}]}
TEMPLATE_WITH_CALLS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RENDERED = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
OPTIONS = EncodeOptions.from_config(DataConfig(path="builtin:tiny"))


def encoder(template: str | None = None) -> TextEncoder:
    tokenizer = tiny.build_tokenizer()
    if template:
        tokenizer._tokenizer.chat_template = template
    return TextEncoder(tokenizer)


def expected(row: dict[str, Any], template: str | None = None) -> str:
    return split_row(row, encoder(template), OPTIONS).expected


def test_a_tool_call_is_expected_as_the_template_renders_it() -> None:
    question = split_row(TOOL_ROW, encoder(TEMPLATE_WITH_CALLS), OPTIONS)
    assert question.expected == RENDERED
    assert question.turns == TOOL_ROW["messages"][:1]
    thinking = TEMPLATE_WITH_CALLS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert expected(TOOL_ROW, thinking) == RENDERED


def test_arguments_as_a_string_are_expected_as_the_template_renders_an_object() -> None:
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    answer = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": function}]}
    assert expected({"messages": [TOOL_ROW["messages"][0], answer]}, TEMPLATE_WITH_CALLS) == RENDERED


def test_a_call_that_the_template_leaves_out_is_not_expected() -> None:
    with pytest.raises(DataError, match="a tool call that the chat template renders"):
        expected(TOOL_ROW)
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    assert expected({"messages": [*earlier, *TOOL_ROW["messages"]]}) == "Hi."


def test_the_last_text_of_the_assistant_is_expected_also_as_a_list_of_parts() -> None:
    answer = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    rows = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "R"},
    ]
    assert expected({"messages": rows}) == "AB"
    with pytest.raises(DataError, match="needs rows with prompt and completion"):
        expected({"text": "plain"})


def test_the_metric_scores_what_is_expected_of_a_tool_call_and_of_renamed_keys() -> None:
    seen = []

    class Recorder:
        name = "recorder"

        def score(self, row: Any, text: str) -> float:
            seen.append(row["completion"])
            return METRICS["exact_match"].score(row, row["completion"])

    base = load_base_model(ModelConfig(path="builtin:tiny"))
    base.lazy_tokenizer._tokenizer.chat_template = TEMPLATE_WITH_CALLS
    keys = KeysConfig(prompt="q", completion="a")
    options = EncodeOptions.from_config(DataConfig(path="builtin:tiny", keys=keys))
    result = generate(base, [TOOL_ROW, {"q": "one", "a": "two"}], options, Recorder(), max_tokens=2)
    assert seen == [RENDERED, "two"]
    assert result.score == 1.0
    assert [answer.prompt for answer in result.answers] == ["Rain in Oslo?", "one"]


def test_a_row_that_the_template_refuses_is_named() -> None:
    base = load_base_model(ModelConfig(path="builtin:tiny"))
    base.lazy_tokenizer._tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match="row 1 cannot be answered: .*no tools"):
        generate(base, [row], OPTIONS, METRICS["exact_match"], max_tokens=2)
