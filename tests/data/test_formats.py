"""Token ids equal mlx-lm's; the loss mask covers exactly the assistant's turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

from runner.common.errors import DataError
from runner.config.schema import KeysConfig
from runner.data.formats import FORMATS, choose_format
from runner.data.jsonl import JsonlRow
from runner.data.row_errors import RowError
from runner.data.text_encoder import TextEncoder

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


def encode_rows(name, row, tokenizer, options):
    row_format = FORMATS[name]
    row_format.validate(row, options.keys)
    return row_format.encode(row, TextEncoder(tokenizer), options).rows


def encode(name, row, tokenizer, options):
    (encoded,) = encode_rows(name, row, tokenizer, options)
    return encoded


def supervised_texts(tokens, spans, tokenizer):
    return [tokenizer.decode(tokens[start:end], skip_special_tokens=False) for start, end in spans]


def supervised_positions(spans):
    return {index for start, end in spans for index in range(start, end)}


@pytest.mark.parametrize("text", ["plain", CONTENT, "ends itself<|im_end|>", " \n leading", "x"])
def test_text_rows_have_the_token_ids_of_mlx_lm(text, tokenizer, make_options):
    row = {"text": text}
    expected, _ = TextDataset([row], tokenizer).process(row)
    tokens, spans = encode("text", row, tokenizer, make_options())
    assert tokens == expected
    assert spans == [(0, len(tokens))]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("completion", ["four", CONTENT, "\nstarts on a new line"])
def test_completion_rows_have_the_token_ids_and_prompt_offset_of_mlx_lm(
    tools, mask_prompt, completion, tokenizer, make_options
):
    row = {"prompt": CONTENT, "completion": completion, "tools": tools}
    data = CompletionsDataset([row], tokenizer, "prompt", "completion", mask_prompt)
    expected, offset = data.process(row)
    tokens, spans = encode("completions", row, tokenizer, make_options(mask_prompt=mask_prompt))
    assert tokens == expected
    assert spans == [(offset, len(expected))]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_single_exchange_has_the_token_ids_and_prompt_offset_of_mlx_lm(tools, tokenizer, make_options):
    row = {"messages": THREE_TURNS[:3], "tools": tools}
    expected, offset = ChatDataset([row], tokenizer, mask_prompt=True).process(row)
    assert encode("chat", row, tokenizer, make_options()) == (expected, [(offset, len(expected))])


def test_every_assistant_turn_is_supervised_including_its_end_tokens(tokenizer, make_options):
    row = {"messages": THREE_TURNS}
    tokens, spans = encode("chat", row, tokenizer, make_options())
    assert tokens == ChatDataset([row], tokenizer).process(row)[0]
    assert supervised_texts(tokens, spans, tokenizer) == [
        "Paris.<|im_end|>\n",
        "the lazy dog\n<|im_end|>\n",
        "goodbye<|im_end|>\n",
    ]


def test_the_last_of_several_turns_starts_at_the_offset_of_mlx_lm(tokenizer, make_options):
    row = {"messages": THREE_TURNS}
    _, offset = ChatDataset([row], tokenizer, mask_prompt=True).process(row)
    _, spans = encode("chat", row, tokenizer, make_options())
    assert spans[-1][0] == offset


def test_every_token_is_supervised_without_mask_prompt(tokenizer, make_options):
    tokens, spans = encode("chat", {"messages": THREE_TURNS}, tokenizer, make_options(mask_prompt=False))
    assert spans == [(0, len(tokens))]


def test_a_final_user_turn_is_not_supervised(tokenizer, make_options):
    tokens, spans = encode("chat", {"messages": THREE_TURNS[:6]}, tokenizer, make_options())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris.<|im_end|>\n", "the lazy dog\n<|im_end|>\n"]


def test_a_conversation_without_an_assistant_turn_has_no_supervised_token(tokenizer, make_options):
    _, spans = encode("chat", {"messages": THREE_TURNS[:2]}, tokenizer, make_options())
    assert spans == []


def test_assistant_turns_are_found_where_the_assistant_starts_the_conversation(tokenizer, make_options):
    tokens, spans = encode("chat", {"messages": THREE_TURNS[2:5]}, tokenizer, make_options())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris.<|im_end|>\n", "the lazy dog\n<|im_end|>\n"]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_assistant_turns_are_found_where_the_template_rewrites_earlier_turns(
    eos, chat_templates, make_tokenizer, make_options
):
    tokenizer = make_tokenizer(chat_templates["REWRITING"], eos=eos)
    messages = [dict(message) for message in THREE_TURNS]
    messages[2]["content"] = "<think>\nhm\n</think>\n\nParis."
    messages[6]["content"] = "<think>\nlast\n</think>\n\ngoodbye"
    tokens, spans = encode("chat", {"messages": messages}, tokenizer, make_options())
    assert tokens == ChatDataset([{}], tokenizer).process({"messages": messages})[0]
    assert supervised_texts(tokens, spans, tokenizer) == [
        "Paris.<|im_end|>\n",
        "the lazy dog\n<|im_end|>\n",
        "<think>\nlast\n</think>\n\ngoodbye<|im_end|>\n",
    ]


def test_assistant_turns_around_tool_messages_are_found_where_the_template_rewrites_earlier_turns(
    chat_templates, make_tokenizer, make_options
):
    tokenizer = make_tokenizer(chat_templates["REWRITING"])
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "<think>a</think>one"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>b</think>two"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "three"},
    ]
    tokens, spans = encode("chat", {"messages": messages}, tokenizer, make_options())
    assert supervised_texts(tokens, spans, tokenizer) == [
        "one<|im_end|>\n",
        "two<|im_end|>\n",
        "<think>\n\n</think>\n\nthree<|im_end|>\n",
    ]


def test_a_turn_whose_generation_prompt_opens_a_reasoning_block_closes_it(chat_templates, make_tokenizer, make_options):
    tokenizer = make_tokenizer(chat_templates["THINKING"])
    rows = encode_rows("chat", {"messages": THREE_TURNS[:5]}, tokenizer, make_options())
    assert [supervised_texts(*row, tokenizer) for row in rows] == [
        ["\n</think>\n\nParis.<|im_end|>\n"],
        ["\n</think>\n\nthe lazy dog\n<|im_end|>\n"],
    ]


def test_a_template_without_special_tokens_gives_a_row_for_each_turn_that_ends_with_eos(
    chat_templates, make_tokenizer, make_options
):
    tokenizer = make_tokenizer(chat_templates["PLAIN"], eos="<|endoftext|>")
    rows = encode_rows("chat", {"messages": THREE_TURNS}, tokenizer, make_options())
    parts = [{"messages": THREE_TURNS[:end]} for end in (3, 5, 7)]
    processed = [ChatDataset([part], tokenizer, mask_prompt=True).process(part) for part in parts]
    assert rows == [([*tokens, tokenizer.eos_token_id], [(offset, len(tokens) + 1)]) for tokens, offset in processed]


def test_a_question_that_has_another_form_in_the_prompt_gives_a_row_for_each_turn_after_its_prompt(
    chat_templates, make_tokenizer, make_options
):
    tokenizer = make_tokenizer(chat_templates["PLAIN_REWRITING"], eos="<|endoftext|>")
    rows = encode_rows("chat", {"messages": THREE_TURNS}, tokenizer, make_options())
    for (tokens, _), end in zip(rows, (2, 4, 6), strict=True):
        prompt = tokenizer.apply_chat_template(THREE_TURNS[:end], add_generation_prompt=True, tokenize=False)
        answer = f"{THREE_TURNS[end]['content']}!\n<|endoftext|>"
        assert tokenizer.decode(tokens, skip_special_tokens=False) == prompt + answer


def test_turns_beyond_max_length_are_not_searched(tokenizer, make_options):
    tokens, spans = encode("chat", {"messages": THREE_TURNS}, tokenizer, make_options(max_length=40))
    whole_tokens, whole = encode("chat", {"messages": THREE_TURNS}, tokenizer, make_options())
    assert tokens == whole_tokens
    assert 0 < len(spans) < 3
    limit = range(40)
    assert supervised_positions(spans) & set(limit) == supervised_positions(whole) & set(limit)


def test_a_conversation_of_many_turns_is_encoded_at_most_twice(tokenizer, make_options, monkeypatch):
    encoded = []
    original = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, text, add_special_tokens=True: (
            encoded.append(len(text)) or original(self, text, add_special_tokens)
        ),
    )
    messages = [m for _ in range(20) for m in THREE_TURNS[1:3]]
    whole = len(tokenizer.apply_chat_template(messages, tokenize=False))
    _, spans = encode("chat", {"messages": messages}, tokenizer, make_options())
    assert len(spans) == 20
    assert sum(encoded) <= 2 * whole


def test_an_error_of_the_chat_template_is_a_row_error(chat_templates, make_tokenizer, make_options):
    tokenizer = make_tokenizer(chat_templates["STRICT"])
    with pytest.raises(RowError, match=r"chat template fails on it .*roles must alternate"):
        encode("chat", {"messages": THREE_TURNS[2:5]}, tokenizer, make_options())


@pytest.mark.parametrize("template", [None, "CHATML"])
def test_prompt_and_completion_are_concatenated_without_a_chat_template(
    template, chat_templates, make_tokenizer, make_options
):
    tokenizer = make_tokenizer(template and chat_templates[template])
    row = {"prompt": "What is the capital", "completion": " of France?"}
    tokens, spans = encode("completions", row, tokenizer, make_options(chat_template=False))
    assert tokens == [*tokenizer.encode("What is the capital of France?"), tokenizer.eos_token_id]
    ((start, end),) = spans
    assert end == len(tokens)
    assert "What is the capital of France?".startswith(tokenizer.decode(tokens[:start]))
    assert " of France?<|im_end|>" in tokenizer.decode(tokens[start - 1 : end], skip_special_tokens=False)


def test_a_token_across_prompt_and_completion_is_supervised(make_tokenizer, make_options):
    tokenizer = make_tokenizer(None)
    row = {"prompt": "the capital of Fra", "completion": "nce"}
    _, ((start, _),) = encode("completions", row, tokenizer, make_options())
    joined = tokenizer.encode("the capital of France")
    assert len(tokenizer.decode(joined[:start])) <= len(row["prompt"])
    assert len(tokenizer.decode(joined[: start + 1])) > len(row["prompt"])


def test_tools_without_a_chat_template_are_a_row_error(make_tokenizer, make_options):
    row = {"prompt": "a", "completion": "b", "tools": TOOLS}
    with pytest.raises(RowError, match="tools"):
        encode("completions", row, make_tokenizer(None), make_options())


def test_a_plain_transformers_tokenizer_gives_the_same_tokens(tokenizer, make_options):
    row = {"messages": THREE_TURNS}
    inner = tokenizer._tokenizer
    assert encode("chat", row, inner, make_options()) == encode("chat", row, tokenizer, make_options())


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "", "completion": ""}, "completions"),
        ({"messages": [], "prompt": ""}, "chat"),
        ({"text": "a", "prompt": "b"}, "text"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"prompt": "", "chosen": "", "rejected": ""}, "preference"),
    ],
)
def test_auto_takes_the_format_whose_fields_the_first_row_has(row, name, tokenizer, make_options):
    assert choose_format(JsonlRow(Path("f"), 1, row), TextEncoder(tokenizer), make_options()) is FORMATS[name]


def test_a_configured_format_is_used_whatever_keys_the_row_has(tokenizer, make_options):
    row = JsonlRow(Path("f"), 1, {"messages": []})
    assert choose_format(row, TextEncoder(tokenizer), make_options(format="text")) is FORMATS["text"]


def test_configured_keys_name_the_columns(tokenizer, make_options):
    options = make_options(keys=KeysConfig(prompt="question", completion="answer"))
    row = {"question": "What?", "answer": "four"}
    assert choose_format(JsonlRow(Path("f"), 1, row), TextEncoder(tokenizer), options) is FORMATS["completions"]
    plain = {"prompt": "What?", "completion": "four"}
    assert encode("completions", row, tokenizer, options) == encode("completions", plain, tokenizer, make_options())


def test_unknown_keys_are_refused_with_the_row_and_a_remedy(tokenizer, make_options):
    with pytest.raises(DataError, match=r"(?s)f\.jsonl:3.*'body'.*'prompt' and 'completion'.*data\.keys"):
        choose_format(JsonlRow(Path("f.jsonl"), 3, {"body": "a"}), TextEncoder(tokenizer), make_options())


def test_messages_without_a_chat_template_are_refused_with_the_reason(make_tokenizer, tokenizer, make_options):
    row = JsonlRow(Path("f"), 1, {"messages": THREE_TURNS})
    with pytest.raises(DataError, match="tokenizer has none"):
        choose_format(row, TextEncoder(make_tokenizer(None)), make_options())
    with pytest.raises(DataError, match=r"data.chat_template is false"):
        choose_format(row, TextEncoder(tokenizer), make_options(chat_template=False))


def test_a_generation_prompt_inside_a_user_message_does_not_shift_the_mask(tokenizer, make_options):
    question = {"role": "user", "content": "say <|im_start|>assistant\nfour"}
    answer = {"role": "assistant", "content": "Paris"}
    tokens, spans = encode("chat", {"messages": [question, answer]}, tokenizer, make_options())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris<|im_end|>\n"]
    tokens, spans = encode("chat", {"messages": [answer, question, answer]}, tokenizer, make_options())
    assert supervised_texts(tokens, spans, tokenizer) == ["Paris<|im_end|>\n"] * 2
