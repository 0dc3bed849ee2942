"""Tokens equal mlx-lm's; masks cover what the assistant wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

from runner.common.errors import ConfigError, DataError
from runner.data.chat_spans import TextEncoder
from runner.data.formats import FORMATS, ColumnNames, EncodeOptions, choose_format
from runner.data.jsonl import JsonlRow
from runner.data.row_errors import RowError

CONTENT = "What is two plus two? <b>äöü 漢字</b> 🦊 the quick brown fox "
THREE_TURNS = [
    {"role": "system", "content": "you are a helpful assistant"},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And 🦊?"},
    {"role": "assistant", "content": "the lazy dog\n"},
    {"role": "user", "content": "Thank you"},
    {"role": "assistant", "content": "goodbye"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def encode(name, row, tokenizer, reading):
    format_ = FORMATS[name]
    format_.check(row, reading.keys)
    tokens, spans = format_.encode(row, TextEncoder(tokenizer), reading)
    return tokens, spans


def supervised_texts(tokens, spans, tokenizer):
    return [tokenizer.decode(tokens[start:end], skip_special_tokens=False) for start, end in spans]


def supervised_set(spans):
    return {index for start, end in spans for index in range(start, end)}


@pytest.mark.parametrize("text", ["plain", CONTENT, "ends itself<|im_end|>", " \n leading", "x"])
def test_text_gives_mlx_lms_ids(text, tokenizer, reading):
    row = {"text": text}
    expected, _ = TextDataset([row], tokenizer).process(row)
    tokens, spans = encode("text", row, tokenizer, reading())
    assert tokens == expected
    assert spans == [(0, len(tokens))]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("completion", ["four", CONTENT, "\nstarts on a new line"])
def test_completions_give_mlx_lms_ids_and_offset(tools, mask_prompt, completion, tokenizer, reading):
    row = {"prompt": CONTENT, "completion": completion, "tools": tools}
    data = CompletionsDataset([row], tokenizer, "prompt", "completion", mask_prompt)
    expected, offset = data.process(row)
    tokens, spans = encode("completions", row, tokenizer, reading(mask_prompt=mask_prompt))
    assert tokens == expected
    assert spans == [(offset, len(expected))]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_single_exchange_gives_mlx_lms_ids_and_offset(tools, tokenizer, reading):
    row = {"messages": THREE_TURNS[:3], "tools": tools}
    expected, offset = ChatDataset([row], tokenizer, mask_prompt=True).process(row)
    assert encode("chat", row, tokenizer, reading()) == (expected, [(offset, len(expected))])


def test_every_assistant_turn_is_supervised_with_its_end(tokenizer, reading):
    row = {"messages": THREE_TURNS}
    tokens, spans = encode("chat", row, tokenizer, reading())
    assert tokens == ChatDataset([row], tokenizer).process(row)[0]
    assert supervised_texts(tokens, spans, tokenizer) == [
        "Paris.<|im_end|>\n",
        "the lazy dog\n<|im_end|>\n",
        "goodbye<|im_end|>\n",
    ]


def test_the_last_turn_of_many_has_mlx_lms_offset(tokenizer, reading):
    row = {"messages": THREE_TURNS}
    _, offset = ChatDataset([row], tokenizer, mask_prompt=True).process(row)
    _, spans = encode("chat", row, tokenizer, reading())
    assert spans[-1][0] == offset


def test_without_masking_the_prompt_all_is_supervised(tokenizer, reading):
    tokens, spans = encode("chat", {"messages": THREE_TURNS}, tokenizer, reading(mask_prompt=False))
    assert spans == [(0, len(tokens))]


def test_a_last_user_turn_is_not_supervised(tokenizer, reading):
    tokens, spans = encode("chat", {"messages": THREE_TURNS[:6]}, tokenizer, reading())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris.<|im_end|>\n", "the lazy dog\n<|im_end|>\n"]


def test_a_conversation_without_an_assistant_supervises_nothing(tokenizer, reading):
    _, spans = encode("chat", {"messages": THREE_TURNS[:2]}, tokenizer, reading())
    assert spans == []


def test_a_conversation_that_the_assistant_begins(tokenizer, reading):
    tokens, spans = encode("chat", {"messages": THREE_TURNS[2:5]}, tokenizer, reading())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris.<|im_end|>\n", "the lazy dog\n<|im_end|>\n"]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_a_template_that_rewrites_earlier_turns(eos, chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(chat_templates["REWRITING"], eos=eos)
    messages = [dict(message) for message in THREE_TURNS]
    messages[2]["content"] = "<think>\nhm\n</think>\n\nParis."
    messages[6]["content"] = "<think>\nlast\n</think>\n\ngoodbye"
    tokens, spans = encode("chat", {"messages": messages}, tokenizer, reading())
    assert tokens == ChatDataset([{}], tokenizer).process({"messages": messages})[0]
    assert supervised_texts(tokens, spans, tokenizer) == [
        "Paris.<|im_end|>\n",
        "the lazy dog\n<|im_end|>\n",
        "<think>\nlast\n</think>\n\ngoodbye<|im_end|>\n",
    ]


def test_consecutive_assistant_turns_of_a_rewriting_template(chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(chat_templates["REWRITING"])
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "<think>a</think>one"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>b</think>two"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "three"},
    ]
    tokens, spans = encode("chat", {"messages": messages}, tokenizer, reading())
    assert supervised_texts(tokens, spans, tokenizer) == [
        "one<|im_end|>\n",
        "two<|im_end|>\n",
        "<think>\n\n</think>\n\nthree<|im_end|>\n",
    ]


def test_a_prompt_that_opens_a_thought_the_turn_lacks(chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(chat_templates["THINKING"])
    tokens, spans = encode("chat", {"messages": THREE_TURNS[:5]}, tokenizer, reading())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris.<|im_end|>\n", "the lazy dog\n<|im_end|>\n"]


def test_a_template_without_special_tokens(chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(chat_templates["PLAIN"])
    row = {"messages": THREE_TURNS}
    tokens, spans = encode("chat", row, tokenizer, reading())
    assert tokens == ChatDataset([row], tokenizer).process(row)[0]
    parts = [{"messages": THREE_TURNS[:end]} for end in (3, 5, 7)]
    processed = [ChatDataset([part], tokenizer, mask_prompt=True).process(part) for part in parts]
    assert spans == [(offset, len(part_tokens)) for part_tokens, offset in processed]


def test_a_turn_whose_end_cannot_be_found_is_a_bad_row(chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(chat_templates["PLAIN_REWRITING"], eos="<|endoftext|>")
    with pytest.raises(RowError, match=r"message 3.*rewrites earlier turns"):
        encode("chat", {"messages": THREE_TURNS}, tokenizer, reading())


def test_turns_past_the_cut_are_not_looked_for(tokenizer, reading):
    tokens, spans = encode("chat", {"messages": THREE_TURNS}, tokenizer, reading(max_length=40))
    whole_tokens, whole = encode("chat", {"messages": THREE_TURNS}, tokenizer, reading())
    assert tokens == whole_tokens
    assert 0 < len(spans) < 3
    limit = range(40)
    assert supervised_set(spans) & set(limit) == supervised_set(whole) & set(limit)


def test_a_conversation_of_many_turns_is_encoded_about_twice(tokenizer, reading, monkeypatch):
    encoded = []
    original = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, text, special=True: encoded.append(len(text)) or original(self, text, special),
    )
    messages = [m for _ in range(20) for m in THREE_TURNS[1:3]]
    whole = len(tokenizer.apply_chat_template(messages, tokenize=False))
    _, spans = encode("chat", {"messages": messages}, tokenizer, reading())
    assert len(spans) == 20
    assert sum(encoded) <= 2 * whole


def test_what_the_template_refuses_is_a_bad_row(chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(chat_templates["STRICT"])
    with pytest.raises(RowError, match=r"chat template refuses it .*roles must alternate"):
        encode("chat", {"messages": THREE_TURNS[2:5]}, tokenizer, reading())


@pytest.mark.parametrize("template", [None, "CHATML"])
def test_without_a_template_prompt_and_completion_are_joined(template, chat_templates, make_tokenizer, reading):
    tokenizer = make_tokenizer(template and chat_templates[template])
    row = {"prompt": "What is the capital", "completion": " of France?"}
    tokens, spans = encode("completions", row, tokenizer, reading(chat_template=False))
    assert tokens == [*tokenizer.encode("What is the capital of France?"), tokenizer.eos_token_id]
    ((start, end),) = spans
    assert end == len(tokens)
    assert "What is the capital of France?".startswith(tokenizer.decode(tokens[:start]))
    assert " of France?<|im_end|>" in tokenizer.decode(tokens[start - 1 : end], skip_special_tokens=False)


def test_a_token_over_the_border_of_prompt_and_completion_is_supervised(make_tokenizer, reading):
    tokenizer = make_tokenizer(None)
    row = {"prompt": "the capital of Fra", "completion": "nce"}
    _, ((start, _),) = encode("completions", row, tokenizer, reading())
    joined = tokenizer.encode("the capital of France")
    assert len(tokenizer.decode(joined[:start])) <= len(row["prompt"])
    assert len(tokenizer.decode(joined[: start + 1])) > len(row["prompt"])


def test_tools_without_a_template_are_a_bad_row(make_tokenizer, reading):
    row = {"prompt": "a", "completion": "b", "tools": TOOLS}
    with pytest.raises(RowError, match="tools"):
        encode("completions", row, make_tokenizer(None), reading())


def test_a_plain_transformers_tokenizer_gives_the_same(tokenizer, reading):
    row = {"messages": THREE_TURNS}
    inner = tokenizer._tokenizer
    assert encode("chat", row, inner, reading()) == encode("chat", row, tokenizer, reading())


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "a", "messages": [], "prompt": "", "completion": ""}, "completions"),
        ({"text": "a", "messages": []}, "chat"),
        ({"text": "a", "prompt": "b"}, "text"),
    ],
)
def test_auto_tries_the_formats_in_mlx_lms_order(row, name, tokenizer, reading):
    assert choose_format(JsonlRow(Path("f"), 1, row), TextEncoder(tokenizer), reading()) is FORMATS[name]


def test_a_named_format_is_taken_whatever_the_keys(tokenizer, reading):
    row = JsonlRow(Path("f"), 1, {"messages": []})
    assert choose_format(row, TextEncoder(tokenizer), reading(format="text")) is FORMATS["text"]


def test_the_users_own_keys(tokenizer, reading):
    own = reading(keys=ColumnNames(prompt="question", completion="answer"))
    row = {"question": "What?", "answer": "four"}
    assert choose_format(JsonlRow(Path("f"), 1, row), TextEncoder(tokenizer), own) is FORMATS["completions"]
    plain = {"prompt": "What?", "completion": "four"}
    assert encode("completions", row, tokenizer, own) == encode("completions", plain, tokenizer, reading())


def test_unknown_keys_name_the_row_and_the_way_out(tokenizer, reading):
    with pytest.raises(DataError, match=r"(?s)f\.jsonl:3.*'body'.*'prompt' and 'completion'.*data\.keys"):
        choose_format(JsonlRow(Path("f.jsonl"), 3, {"body": "a"}), TextEncoder(tokenizer), reading())


def test_messages_without_a_template_say_so(make_tokenizer, tokenizer, reading):
    row = JsonlRow(Path("f"), 1, {"messages": THREE_TURNS})
    with pytest.raises(DataError, match="tokenizer has none"):
        choose_format(row, TextEncoder(make_tokenizer(None)), reading())
    with pytest.raises(DataError, match=r"data.chat_template is false"):
        choose_format(row, TextEncoder(tokenizer), reading(chat_template=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "chats"}, "Did you mean 'chat'"),
        ({"on_too_long": "cut"}, "truncate, drop, error"),
        ({"max_length": 1}, "at least 2"),
    ],
)
def test_unusable_settings_are_refused(changes, words):
    usual = {"format": "auto", "mask_prompt": True, "max_length": 9, "on_too_long": "drop"}
    with pytest.raises(ConfigError, match=words):
        EncodeOptions(**{**usual, **changes})


def test_an_opening_in_the_users_words_does_not_shift_the_mask(tokenizer, reading):
    question = {"role": "user", "content": "say <|im_start|>assistant\nfour"}
    answer = {"role": "assistant", "content": "Paris"}
    tokens, spans = encode("chat", {"messages": [question, answer]}, tokenizer, reading())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris<|im_end|>\n"]
    with pytest.raises(RowError, match="the start of message 1 cannot be found"):
        encode("chat", {"messages": [answer, question, answer]}, tokenizer, reading())
