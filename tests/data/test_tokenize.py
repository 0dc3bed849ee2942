"""The flat arrays contain the rows as they are; rows that were cut or left out are counted."""

from __future__ import annotations

import numpy as np
import pytest

from runner.common.errors import DataError
from runner.data.encode import TokenBuffer
from runner.data.row_errors import RowErrors
from runner.data.token_set import TokenSet
from runner.data.tokenize import load_dataset, tokenize_file

LONG, SHORT = {"text": "the quick brown fox " * 20}, {"text": "Paris"}
ANSWER = [{"role": "assistant", "content": "the"}]


def test_every_row_has_its_tokens_and_line(tokenizer, make_options, write_rows):
    texts = ["the quick brown fox", "Paris", "What is two plus two?"]
    path = write_rows("train.jsonl", *({"text": text} for text in texts))
    path.write_text("\n" + path.read_text())
    buffer = TokenBuffer()
    tokenize_file(path, tokenizer, make_options(), RowErrors(), buffer, lambda: None)
    tokens, stats = buffer.to_token_set(), buffer.stats
    expected = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    assert len(tokens) == 3
    assert [tokens.row(i)[0].tolist() for i in range(3)] == expected
    assert tokens.lines.tolist() == [2, 3, 4]
    assert tokens.lengths.tolist() == [len(row) for row in expected]
    assert (tokens.tokens.dtype, tokens.supervised.dtype) == (np.int32, np.bool_)
    assert (tokens.offsets.dtype, tokens.lines.dtype) == (np.int64, np.int64)
    assert stats.rows == 3
    assert stats.tokens == sum(map(len, expected))
    assert stats.supervised == stats.tokens - 3
    assert stats.longest == max(map(len, expected))


def test_only_the_completion_is_supervised(tokenizer, tokenize):
    tokens, stats = tokenize({"prompt": "What is two plus two?", "completion": "four"})
    ids, supervised = tokens.row(0)
    assert tokenizer.decode(ids[supervised].tolist()) == "four<|im_end|>\n"
    assert stats.supervised == supervised.sum()


def test_the_first_token_of_a_row_is_never_supervised(tokenize):
    tokens, _ = tokenize({"text": "Paris is"}, {"text": "the"})
    for index in range(2):
        supervised = tokens.row(index)[1]
        assert not supervised[0]
        assert supervised[1:].all()


def test_the_arrays_are_read_only(tokenize):
    tokens, _ = tokenize({"text": "Paris"})
    for array in (tokens.tokens, tokens.supervised, tokens.offsets, tokens.lines):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_row_index_out_of_range_is_an_index_error(tokenize):
    tokens, _ = tokenize({"text": "Paris"})
    for index in (1, -1):
        with pytest.raises(IndexError):
            tokens.row(index)


def test_truncate_cuts_and_counts_long_rows(tokenizer, tokenize):
    tokens, stats = tokenize(LONG, SHORT, max_length=8)
    assert tokens.row(0)[0].tolist() == tokenizer.encode(LONG["text"])[:8]
    assert (stats.rows, stats.truncated, stats.dropped) == (2, 1, 0)
    assert stats.longest == len(tokenizer.encode(LONG["text"])) + 1


@pytest.mark.parametrize("on_too_long", ["truncate", "drop", "error"])
def test_a_row_of_exactly_max_length_is_whole(on_too_long, tokenizer, tokenize):
    length = len(tokenizer.encode(LONG["text"])) + 1
    tokens, stats = tokenize(LONG, max_length=length, on_too_long=on_too_long)
    assert (tokens.lengths.tolist(), stats.truncated) == ([length], 0)


def test_drop_leaves_out_and_counts_long_rows(tokenize):
    tokens, stats = tokenize(LONG, SHORT, max_length=20, on_too_long="drop")
    assert tokens.lines.tolist() == [2]
    assert (stats.rows, stats.truncated, stats.dropped) == (1, 0, 1)


def test_error_reports_file_line_and_length_of_long_rows(tokenize):
    with pytest.raises(DataError, match=r"train\.jsonl:2: \d+ tokens, over max_length 20"):
        tokenize(SHORT, LONG, max_length=20, on_too_long="error")


def test_rows_without_a_supervised_token_are_left_out_and_counted(tokenize):
    all_prompt = {"messages": [{"role": "user", "content": "the quick brown fox " * 9}, *ANSWER]}
    no_answer = {"messages": [{"role": "user", "content": "Paris?"}]}
    good = {"messages": [{"role": "user", "content": "Paris?"}, *ANSWER]}
    tokens, stats = tokenize(all_prompt, no_answer, good, max_length=20)
    assert tokens.lines.tolist() == [3]
    assert (stats.rows, stats.unsupervised, stats.prompt_too_long, stats.truncated) == (1, 1, 1, 0)


def test_a_row_of_one_token_is_left_out(tokenize):
    tokens, stats = tokenize({"text": "<|im_end|>"})
    assert (len(tokens), stats.unsupervised) == (0, 1)


def test_no_chunks_give_an_empty_set():
    buffer = TokenBuffer()
    tokens = buffer.to_token_set()
    assert (len(tokens), len(tokens.lengths), buffer.stats.rows) == (0, 0, 0)
    assert len(tokens.fingerprint) == 64


def test_every_row_must_have_the_format_of_the_first(tokenize):
    with pytest.raises(DataError, match=r"train\.jsonl:2: no key 'text'"):
        tokenize({"text": "a b"}, {"prompt": "a", "completion": "b"})


def test_the_first_usable_line_decides_the_format(tokenizer, make_options, tmp_path):
    (tmp_path / "train.jsonl").write_text('x\n{"text": "a b"}\n')
    errors, buffer = RowErrors(), TokenBuffer()
    tokenize_file(tmp_path / "train.jsonl", tokenizer, make_options(), errors, buffer, lambda: None)
    assert (errors.count, buffer.stats.rows) == (1, 1)


def test_a_file_of_bad_lines_alone_reports_them_all(tokenizer, make_options, tmp_path):
    (tmp_path / "train.jsonl").write_text("x\n\n[]\n")
    errors, buffer = RowErrors(), TokenBuffer()
    assert tokenize_file(tmp_path / "train.jsonl", tokenizer, make_options(), errors, buffer, lambda: None) is None
    assert [line.split(":")[1] for line in errors.listed] == ["1", "3"]


def token_set(tokens, supervised, offsets, lines=None):
    lines = np.arange(len(offsets) - 1) if lines is None else np.array(lines)
    return TokenSet(np.array(tokens, np.int32), np.array(supervised, bool), np.array(offsets, np.int64), lines)


def test_the_fingerprint_depends_on_tokens_mask_and_row_boundaries():
    sets = [
        token_set([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4]),
        token_set([1, 2, 3, 5], [0, 1, 0, 1], [0, 2, 4]),
        token_set([1, 2, 3, 4], [0, 1, 1, 1], [0, 2, 4]),
        token_set([1, 2, 3, 4], [0, 1, 0, 1], [0, 3, 4]),
        token_set([1, 2, 3, 4], [0, 1, 0, 1], [0, 4]),
    ]
    assert len({tokens.fingerprint for tokens in sets}) == len(sets)


def test_the_fingerprint_does_not_depend_on_line_numbers():
    tokens = token_set([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4])
    other_lines = token_set([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4], lines=[7, 9])
    assert tokens.fingerprint == other_lines.fingerprint
    assert tokens.fingerprint == "06f9dfed9118787f32f29edc742082e5b6658d1d16bcf4926f182bdb47f39844"


def test_row_errors_of_all_files_are_raised_together(tokenizer, make_options, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n{"text": 1}\nx\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "a b"}\n{"txt": "a"}\n')
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path), tokenizer, make_options())
    message = str(caught.value)
    assert message.startswith("3 rows")
    for part in (
        "train.jsonl:2: 'text' is a number",
        "train.jsonl:3: not JSON",
        "valid.jsonl:2: no key 'text'",
    ):
        assert part in message


def test_splits_are_loaded_with_stats_and_raw_rows(tokenizer, make_options, write_rows, tmp_path):
    write_rows("train.jsonl", {"text": "a b"}, {"text": "c d"})
    write_rows("test.jsonl", {"text": "e f"})
    data = load_dataset(str(tmp_path), tokenizer, make_options())
    assert [len(data.train), len(data.valid), len(data.test)] == [2, 0, 1]
    assert {split: stats.rows for split, stats in data.stats.items()} == {"train": 2, "valid": 0, "test": 1}
    assert [row["text"] for row in data.first_rows("test", -1)] == ["e f"]
    assert data.first_rows("valid", -1) == []
    files = {split: [part.file for part in parts] for split, parts in data.parts.items()}
    assert files == {"train": [tmp_path / "train.jsonl"], "test": [tmp_path / "test.jsonl"]}


def test_a_split_without_a_row_to_train_on_is_refused(tokenizer, make_options, write_rows, tmp_path):
    write_rows("train.jsonl", LONG)
    with pytest.raises(DataError, match=r"train\.jsonl has no row to train on: 1 longer than max_length 4"):
        load_dataset(str(tmp_path), tokenizer, make_options(max_length=4, on_too_long="drop"))


def test_the_rows_of_a_conversation_have_its_line_and_what_is_left_out_is_counted(
    chat_templates, make_tokenizer, make_options, write_rows
):
    thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    question = {"role": "user", "content": "well?"}
    rows = [{"messages": [question, thinking][:2] * count} for count in (1, 2, 3)]
    for template, lines, stats in (
        ("REWRITING", [1, 2, 3], {"split": 0, "lost_reasoning": 3, "lost_reasoning_line": 2}),
        ("PLAIN", [1, 2, 2, 3, 3, 3], {"split": 2, "lost_reasoning": 0, "lost_reasoning_line": 0}),
    ):
        errors, buffer = RowErrors(), TokenBuffer()
        file = write_rows(f"{template}.jsonl", *rows)
        tokenizer = make_tokenizer(chat_templates[template])
        tokenize_file(file, tokenizer, make_options(), errors, buffer, lambda: None)
        errors.raise_if_any()
        assert buffer.to_token_set().lines.tolist() == lines
        assert {name: getattr(buffer.stats, name) for name in stats} == stats
