"""Rows of other programs' formats give the tokens and the mask of the messages that they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.common.errors import DataError
from runner.data.formats import FORMATS, choose_format, format_note, with_system_prompt
from runner.data.jsonl import JsonlRow
from runner.data.preferences import encode_answers
from runner.data.row_errors import RowError
from runner.data.text_encoder import TextEncoder

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}


def encode(row, tokenizer, options, name=None):
    encoder = TextEncoder(tokenizer)
    row_format = FORMATS[name] if name else choose_format(JsonlRow(Path("a.jsonl"), 1, row), encoder, options)
    row_format.validate(row, options.keys)
    return encode_answers(row, row_format, encoder, options)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [HUMAN, GPT]}, [USER, ANSWER]),
        ({"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, GPT]}, [USER, {**ANSWER, "weight": 0}, USER, ANSWER]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]}, [SYSTEM, USER, ANSWER]),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, [("user", "Add\n\n2 2"), ("assistant", "4")]),
        ({"instruction": "hi", "input": "", "output": "yo"}, [USER, ANSWER]),
        ({"instruction": "hi", "output": "yo", "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
        (
            {"instruction": "hi", "output": "yo", "history": [["a", "b"]]},
            [("user", "a"), {"role": "assistant", "content": "b", "train": False}, USER, ANSWER],
        ),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            [USER, {**ANSWER, "train": False}, USER, ANSWER],
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]}, [USER, ANSWER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": []}, [USER, ANSWER]),
        ({"prompt": "hi", "chosen": [ANSWER], "rejected": []}, [USER, ANSWER]),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": []}, [USER, ANSWER]),
        ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, [USER, ANSWER]),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": []}, [USER, ANSWER]),
        ({"prompt": "hi", "chosen": [ANSWER, USER, ANSWER], "rejected": []}, [USER, ANSWER, USER, ANSWER]),
        (
            {"messages": [USER, {**ANSWER, "training": False}, USER, {**ANSWER, "training": True}]},
            [USER, {**ANSWER, "train": False}, USER, ANSWER],
        ),
        (
            {"prompt": [USER, {**ANSWER, "training": True}, USER], "completion": [ANSWER]},
            [USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        ),
    ],
)
def test_a_row_is_encoded_as_the_messages_that_it_means(row, messages, tokenizer, make_options):
    expected = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    found = encode(row, tokenizer, make_options())
    assert found == encode({"messages": expected}, tokenizer, make_options())
    assert found.rows[0][1]


def test_a_function_call_and_tools_as_json_text_become_those_of_messages(tokenizer, make_options):
    row = {
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        ],
        "tools": '[{"type": "function", "function": {"name": "weather"}}]',
    }
    standard = FORMATS["sharegpt"].standardize(row, make_options().keys, True)
    assert standard == {"messages": [USER, CALL], "tools": [{"type": "function", "function": {"name": "weather"}}]}


def test_without_a_chat_template_an_alpaca_row_gets_alpacas_prompt(make_tokenizer, make_options):
    tokenizer = make_tokenizer(None, eos="<|endoftext|>")
    ((tokens, [(start, _)]),) = encode(
        {"instruction": "Add", "input": "2 2", "output": "4"}, tokenizer, make_options()
    ).rows
    assert tokenizer.decode(tokens[:start]).endswith("### Instruction:\nAdd\n\n### Input:\n2 2\n\n### Response:\n")
    assert tokenizer.decode(tokens[start:]) == "4<|endoftext|>"


def test_plain_chosen_text_is_trained_as_text(tokenizer, make_options):
    chosen = encode({"chosen": "hi there", "rejected": "no"}, tokenizer, make_options())
    assert chosen == encode({"text": "hi there"}, tokenizer, make_options())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"conversations": [HUMAN, {"from": "gtp", "value": "yo"}]},
            r"turn 2 is from 'gtp'; known: .*Did you mean 'gpt'",
        ),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "turn 2 has no 'value'"),
        ({"conversations": "hi"}, "'conversations' is a string, not a list"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "x"}]}, "no JSON object with 'name'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "message 2 has no text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 has no text"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "", "output": "b"}, "'instruction' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'completion' is empty"),
        ({"chosen": [], "rejected": []}, "'messages' is an empty list"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' is false: an unwanted answer"),
        ({"messages": [USER, {**ANSWER, "train_detail": [{"train": False}]}]}, "'train_detail' of message 2"),
        ({"messages": [USER, {**ANSWER, "train": True, "training": False}]}, "'train' and 'training' of message 2"),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]}, "message 2 has a 'function_call'"),
    ],
)
def test_a_row_that_cannot_be_converted_is_refused_with_the_reason(row, reason, tokenizer, make_options):
    with pytest.raises(RowError, match=reason):
        encode(row, tokenizer, make_options())


def test_a_row_that_fits_several_formats_is_refused_with_the_setting(tokenizer, make_options):
    row = {"messages": [USER, ANSWER], "prompt": "hi", "completion": "yo"}
    with pytest.raises(DataError, match="data.format=completions or data.format=chat"):
        encode(row, tokenizer, make_options())
    assert encode(row, tokenizer, make_options(format="chat")).rows


def test_fields_that_are_not_used_are_told(make_options):
    row = JsonlRow(Path("a.jsonl"), 1, {"messages": [], "prompt": "a", "chosen": 1, "rejected": 2})
    assert format_note(row, "chat", make_options()) == "trains on 'messages'; 'prompt' beside it is not used"
    for name, fields in (("chat", {"messages": []}), ("completions", {"prompt": "a", "completion": "b"})):
        row_with_system = JsonlRow(Path("a.jsonl"), 1, {**fields, "system": "Be brief."})
        assert "'system' is not used" in str(format_note(row_with_system, name, make_options()))
    assert "'rejected' is not used" in str(format_note(row, "preference", make_options()))
    assert format_note(row, "preference", make_options(method="dpo")) is None


def test_a_system_prompt_is_added_where_a_row_has_none(tokenizer, make_options, make_tokenizer):
    options = make_options(system_prompt="Be brief.")
    expected = encode({"messages": [SYSTEM, USER, ANSWER]}, tokenizer, make_options())
    for row in (
        {"messages": [USER, ANSWER]},
        {"prompt": "hi", "completion": "yo"},
        {"messages": [SYSTEM, USER, ANSWER]},
    ):
        assert encode(row, tokenizer, options) == expected
    assert with_system_prompt([USER], None) == [USER]
    with pytest.raises(RowError, match="data.system_prompt needs a chat template"):
        encode({"prompt": "hi", "completion": "yo"}, make_tokenizer(None), options)


def test_a_text_that_begins_with_bos_gets_no_second_one(make_tokenizer, make_options):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    inner = tokenizer._tokenizer
    backend = inner.backend_tokenizer.from_str(inner.backend_tokenizer.to_str())
    bos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    with_bos = type(inner)(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    ((tokens, _),) = encode({"text": "<|endoftext|>the fox"}, with_bos, make_options()).rows
    ((plain, _),) = encode({"text": "the fox"}, with_bos, make_options()).rows
    assert tokens == plain
    assert tokens.count(bos) == 1
