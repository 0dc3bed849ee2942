"""The flat arrays hold the rows as they are; what was cut or left out is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.common.errors import DataError
from runner.data.jsonl import JsonlRow, read_jsonl
from runner.data.tokenize import TokenSet, load_dataset, tokenize_rows


def rows(*values):
    return [JsonlRow(Path("train.jsonl"), line, value) for line, value in enumerate(values, start=1)]


def test_each_row_comes_back_with_its_tokens_and_line(tokenizer, reading, write_rows):
    texts = ["the quick brown fox", "Paris", "What is two plus two?"]
    path = write_rows("train.jsonl", *({"text": text} for text in texts))
    path.write_text("\n" + path.read_text())
    tokens, counts = tokenize_rows(read_jsonl(path), tokenizer, reading())
    expected = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    assert len(tokens) == 3
    assert [tokens.row(i)[0].tolist() for i in range(3)] == expected
    assert tokens.lines.tolist() == [2, 3, 4]
    assert tokens.lengths.tolist() == [len(row) for row in expected]
    assert (tokens.tokens.dtype, tokens.supervised.dtype) == (np.int32, np.bool_)
    assert (tokens.offsets.dtype, tokens.lines.dtype) == (np.int64, np.int64)
    assert counts.rows == 3
    assert counts.tokens == sum(map(len, expected))
    assert counts.supervised == counts.tokens - 3
    assert counts.longest == max(map(len, expected))


def test_only_the_completion_is_supervised(tokenizer, reading):
    row = {"prompt": "What is two plus two?", "completion": "four"}
    tokens, counts = tokenize_rows(rows(row), tokenizer, reading())
    ids, supervised = tokens.row(0)
    assert tokenizer.decode(ids[supervised].tolist()) == "four<|im_end|>\n"
    assert counts.supervised == supervised.sum()


def test_the_first_token_is_never_supervised(tokenizer, reading):
    tokens, _ = tokenize_rows(rows({"text": "Paris is"}, {"text": "the"}), tokenizer, reading())
    for index in range(2):
        supervised = tokens.row(index)[1]
        assert not supervised[0]
        assert supervised[1:].all()


def test_the_arrays_cannot_be_written_to(tokenizer, reading):
    tokens, _ = tokenize_rows(rows({"text": "Paris"}), tokenizer, reading())
    for array in (tokens.tokens, tokens.supervised, tokens.offsets, tokens.lines):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_rows_outside_are_an_index_error(tokenizer, reading):
    tokens, _ = tokenize_rows(rows({"text": "Paris"}), tokenizer, reading())
    for index in (1, -1):
        with pytest.raises(IndexError):
            tokens.row(index)


LONG, SHORT = {"text": "the quick brown fox " * 20}, {"text": "Paris"}


def test_truncate_cuts_and_counts(tokenizer, reading):
    tokens, counts = tokenize_rows(rows(LONG, SHORT), tokenizer, reading(max_length=8))
    assert tokens.row(0)[0].tolist() == tokenizer.encode(LONG["text"])[:8]
    assert (counts.rows, counts.truncated, counts.dropped) == (2, 1, 0)
    assert counts.longest == len(tokenizer.encode(LONG["text"])) + 1


def test_a_row_of_exactly_max_length_is_whole(tokenizer, reading):
    length = len(tokenizer.encode(LONG["text"])) + 1
    for rule in ("truncate", "drop", "error"):
        tokens, counts = tokenize_rows(rows(LONG), tokenizer, reading(max_length=length, on_too_long=rule))
        assert (tokens.lengths.tolist(), counts.truncated) == ([length], 0)


def test_drop_leaves_out_and_counts(tokenizer, reading):
    tokens, counts = tokenize_rows(rows(LONG, SHORT), tokenizer, reading(max_length=20, on_too_long="drop"))
    assert tokens.lines.tolist() == [2]
    assert (counts.rows, counts.truncated, counts.dropped) == (1, 0, 1)


def test_error_names_file_line_and_length(tokenizer, reading):
    with pytest.raises(DataError, match=r"train\.jsonl:2: \d+ tokens, over max_length 20"):
        tokenize_rows(rows(SHORT, LONG), tokenizer, reading(max_length=20, on_too_long="error"))


def test_rows_with_nothing_to_learn_are_left_out_and_counted(tokenizer, reading):
    all_prompt = {"messages": [{"role": "user", "content": "the quick brown fox " * 9}, *ANSWER]}
    no_answer = {"messages": [{"role": "user", "content": "Paris?"}]}
    fine = {"messages": [{"role": "user", "content": "Paris?"}, *ANSWER]}
    tokens, counts = tokenize_rows(rows(all_prompt, no_answer, fine), tokenizer, reading(max_length=20))
    assert tokens.lines.tolist() == [3]
    assert (counts.rows, counts.nothing_to_learn, counts.truncated) == (1, 2, 0)


ANSWER = [{"role": "assistant", "content": "the"}]


def test_a_row_of_one_token_has_nothing_to_learn(tokenizer, reading):
    tokens, counts = tokenize_rows(rows({"text": "<|im_end|>"}), tokenizer, reading())
    assert (len(tokens), counts.nothing_to_learn) == (0, 1)


def test_no_rows_give_an_empty_set(tokenizer, reading):
    tokens, counts = tokenize_rows([], tokenizer, reading())
    assert (len(tokens), len(tokens.lengths), counts.rows) == (0, 0, 0)
    assert len(tokens.fingerprint) == 64


def test_all_rows_have_to_fit_the_format_of_the_first(tokenizer, reading):
    with pytest.raises(DataError, match=r"train\.jsonl:2: no key 'text'"):
        tokenize_rows(rows({"text": "a b"}, {"prompt": "a", "completion": "b"}), tokenizer, reading())


def make(tokens, supervised, offsets, lines=None):
    lines = np.arange(len(offsets) - 1) if lines is None else np.array(lines)
    return TokenSet(np.array(tokens, np.int32), np.array(supervised, bool), np.array(offsets, np.int64), lines)


def test_the_fingerprint_tells_tokens_masks_and_borders_apart():
    sets = [
        make([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4]),
        make([1, 2, 3, 5], [0, 1, 0, 1], [0, 2, 4]),
        make([1, 2, 3, 4], [0, 1, 1, 1], [0, 2, 4]),
        make([1, 2, 3, 4], [0, 1, 0, 1], [0, 3, 4]),
        make([1, 2, 3, 4], [0, 1, 0, 1], [0, 4]),
    ]
    assert len({tokens.fingerprint for tokens in sets}) == len(sets)


def test_the_fingerprint_is_that_of_the_content_alone():
    one = make([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4])
    same = make([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4], lines=[7, 9])
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint == "06f9dfed9118787f32f29edc742082e5b6658d1d16bcf4926f182bdb47f39844"


def test_bad_rows_of_all_files_are_raised_together(tokenizer, reading, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n{"text": 1}\nx\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "a b"}\n{"txt": "a"}\n')
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path), tokenizer, reading())
    message = str(caught.value)
    assert message.startswith("3 rows")
    for part in (
        "train.jsonl:2: 'text' is a number",
        "train.jsonl:3: not JSON",
        "valid.jsonl:2: no key 'text'",
    ):
        assert part in message


def test_splits_are_loaded_with_counts_and_raw_rows(tokenizer, reading, write_rows, tmp_path):
    write_rows("train.jsonl", {"text": "a b"}, {"text": "c d"})
    write_rows("test.jsonl", {"text": "e f"})
    data = load_dataset(str(tmp_path), tokenizer, reading())
    assert [len(data.train), len(data.valid), len(data.test)] == [2, 0, 1]
    assert {split: counts.rows for split, counts in data.counts.items()} == {
        "train": 2,
        "valid": 0,
        "test": 1,
    }
    assert [row.value["text"] for row in data.rows["test"]] == ["e f"]
    assert list(data.rows["valid"]) == []
    assert data.where == tmp_path


def test_a_split_without_a_row_to_learn_from_is_refused(tokenizer, reading, write_rows, tmp_path):
    write_rows("train.jsonl", LONG)
    with pytest.raises(DataError, match=r"train\.jsonl has no row to learn from: 1 longer than max_length 4"):
        load_dataset(str(tmp_path), tokenizer, reading(max_length=4, on_too_long="drop"))
