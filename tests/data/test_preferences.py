"""Rows as the answers that a method compares: pairs, labeled answers, and what they are refused for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runner.common.errors import DataError
from runner.data.formats import FORMATS
from runner.data.preferences import encode_answers, with_mismatched_answers
from runner.data.row_errors import RowError
from runner.data.text_encoder import TextEncoder
from runner.data.token_set import TokenSet
from runner.data.tokenize import load_dataset

USER, GOOD, BAD = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "assistant", "content": "no"},
)
EARLIER = {"role": "assistant", "content": "hm"}


def texts(encoded, tokenizer):
    """The whole text and the supervised text of each row."""
    found = []
    for tokens, spans in encoded.rows:
        supervised = [tokens[i] for start, end in spans for i in range(start, end)]
        found.append((tokenizer.decode(tokens), tokenizer.decode(supervised)))
    return found


def encode(row, name, tokenizer, options):
    FORMATS[name].validate(row, options.keys)
    return encode_answers(row, FORMATS[name], TextEncoder(tokenizer), options)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello there", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": GOOD, "rejected": BAD},
    ],
    ids=["texts", "messages", "prompt repeated", "prompt inside", "one message"],
)
def test_a_pair_becomes_its_better_and_its_worse_answer(row, tokenizer, make_options):
    encoded = encode(row, "preference", tokenizer, make_options(method="dpo"))
    assert encoded.unwanted == (False, True)
    sft = make_options()
    for (whole, supervised), answer in zip(texts(encoded, tokenizer), (GOOD, BAD), strict=True):
        expected = encode({"messages": [USER, answer]}, "chat", tokenizer, sft)
        assert [(whole, supervised)] == texts(expected, tokenizer)


def test_turns_that_both_conversations_begin_with_are_the_prompt(tokenizer, make_options):
    row = {"chosen": [USER, EARLIER, USER, GOOD], "rejected": [USER, EARLIER, USER, BAD]}
    found = texts(encode(row, "preference", tokenizer, make_options(method="dpo")), tokenizer)
    assert all("hm" in whole and "hm" not in supervised for whole, supervised in found)


def test_texts_without_a_prompt_share_what_both_begin_with(make_tokenizer, make_options):
    tokenizer = make_tokenizer(None)
    row = {"chosen": "Human: hi there. Assistant: hello", "rejected": "Human: hi there. Assistant: help"}
    found = texts(encode(row, "preference", tokenizer, make_options(method="dpo")), tokenizer)
    assert [
        supervised.strip().startswith(start) for (_, supervised), start in zip(found, ("hello", "help"), strict=True)
    ]
    assert all("Assistant" not in supervised for _, supervised in found)


@pytest.mark.parametrize(
    ("row", "name", "method", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "completions", "dpo", "no pair of answers: this method needs rows of"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "preference", "orpo", "'chosen' and 'rejected' are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "preference", "dpo", "'completion' is empty .of 'rejected'."),
        ({"prompt": "a", "completion": "b"}, "completions", "kto", "'label' is missing: method=kto needs true"),
        ({"prompt": "a", "completion": "b", "label": 1}, "completions", "kto", "'label' is a number: method=kto"),
        (
            {"prompt": "a", "completion": "b", "label": False},
            "completions",
            "sft",
            "train on both kinds with method=kto",
        ),
    ],
)
def test_rows_that_a_method_cannot_compare_are_refused(row, name, method, reason, tokenizer, make_options):
    with pytest.raises(RowError, match=reason):
        encode(row, name, tokenizer, make_options(method=method))


def test_labels_say_which_answers_are_unwanted(tokenizer, make_options):
    options = make_options(method="kto")
    for label in (True, False):
        row = {"prompt": "hi", "completion": "yo", "label": label}
        encoded = encode(row, "completions", tokenizer, options)
        assert encoded.unwanted == (not label,)
        assert texts(encoded, tokenizer) == texts(
            encode(row | {"label": True}, "completions", tokenizer, options), tokenizer
        )
    pair = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    assert encode(pair, "preference", tokenizer, options).unwanted == (False, True)


def test_mismatched_answers_take_the_answer_of_the_next_row():
    rows = [([1, 2, 3, 4], 2), ([5, 6, 7], 1), ([8, 9, 10, 11, 12], 3)]
    answers = TokenSet(
        np.concatenate([np.array(tokens, np.int32) for tokens, _ in rows]),
        np.concatenate([np.arange(len(tokens)) >= prompt for tokens, prompt in rows]),
        np.cumsum([0, *(len(tokens) for tokens, _ in rows)]),
        np.arange(3),
        unwanted=np.array([False, True, False]),
    )
    found = with_mismatched_answers(answers, max_length=4)
    assert [found.row(index)[0].tolist() for index in range(6)] == [
        [1, 2, 3, 4], [1, 2, 6, 7], [5, 6, 7], [5, 11, 12], [8, 9, 10, 11, 12], [8, 9, 10, 3],
    ]  # fmt: skip
    assert [found.row(index)[1].tolist().count(True) for index in (1, 3, 5)] == [2, 2, 1]
    assert found.unwanted.tolist() == [False, False, True, True, False, False]
    assert found.example_lengths.tolist() == [4, 3, 5]
    assert found.rows_of(np.array([2, 0])).tolist() == [4, 5, 0, 1]
    assert found.fingerprint != answers.fingerprint


def test_a_pair_of_which_one_answer_is_too_long_is_left_out_whole(tmp_path: Path, tokenizer, make_options):
    rows = [
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": "hi", "chosen": "yo " * 50, "rejected": "no"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = make_options(method="dpo", max_length=40, on_too_long="drop")
    data = load_dataset(str(tmp_path), tokenizer, options)
    assert (len(data.train), data.train.example_count, data.stats["train"].dropped) == (2, 1, 1)
    assert data.train.unwanted.tolist() == [False, True] and data.stats["train"].unwanted == 1
    with pytest.raises(DataError, match="method=kto"):
        (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "label": False}) + "\n")
        load_dataset(str(tmp_path), tokenizer, make_options())
