"""`runner data` reports what training would see, with the tokenizer alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runner.data import duplicates
from runner.data.token_set import TokenSet


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(n):
    words = np.random.default_rng(n).integers(0, 100, 30)
    return {"prompt": " ".join(f"w{word}" for word in words), "completion": f"answer {n}"}


def test_the_report_counts_lengths_duplicates_and_leaks(inline, tmp_path, monkeypatch):
    monkeypatch.setattr("runner.models.tiny.build_model", lambda: pytest.fail("the model was built"))
    near = {**row(3), "completion": "answer 33"}
    write(tmp_path / "d/train.jsonl", [row(0), row(1), row(0), row(3), near, {"prompt": "a " * 300, "completion": "b"}])
    write(tmp_path / "d/valid.jsonl", [row(1), row(9)])
    arguments = ("data", "model=tiny", "data=folder", "data.path=d", "data.max_length=200")
    report = json.loads(inline(*arguments, "--json", "--rows", "2"))
    train = report["splits"]["train"]
    assert (train["rows"], train["prompt_too_long"], train["cut"]) == (5, 1, 0)
    assert train["exact_duplicates"] == {"rows": 1, "examples": [["train.jsonl:3", "train.jsonl:1"]]}
    assert train["near_duplicates"] == {"rows": 1, "examples": [["train.jsonl:5", "train.jsonl:4"]]}
    assert report["in_train_and"]["valid"]["exact"]["examples"] == [["valid.jsonl:1", "train.jsonl:2"]]
    assert sum(bin["rows"] for bin in train["histogram"]) == 5
    first, second = report["rows"]
    assert (first["line"], second["line"], len(report["rows"])) == (1, 2, 2)
    ((start, end),) = first["supervised"]
    assert 0 < start < end == len(first["tokens"])
    assert row(0)["prompt"] in first["text"]
    printed = inline(*arguments, "--rows", "1")
    assert "1 row left out: the prompt alone reaches max_length 200" in printed
    assert " 0 #" not in printed and not any(line.endswith(" 0 ") for line in printed.splitlines())
    assert "⟦answer 0" in printed
    assert "valid: 1 row (valid.jsonl:1 = train.jsonl:2) is in train" in printed


def test_rows_of_one_conversation_are_counted_and_are_no_near_duplicates_of_each_other(inline, tmp_path):
    template = "{% for m in messages %}[Q]{{ 'last ' if loop.last }}{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    words = row(0)["prompt"]
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
    write(tmp_path / "d/train.jsonl", [{"messages": [*turns, {"role": "user", "content": "a"}, turns[1]]}])
    arguments = ("data", "model=tiny", "data.path=d", "data.template=t.jinja")
    train = json.loads(inline(*arguments, "--json"))["splits"]["train"]
    assert (train["rows"], train["rendered_turn_by_turn"], train["near_duplicates"]["rows"]) == (2, 1, 0)
    assert "  1 conversation rendered turn by turn, a row for each" in inline(*arguments)
    # One conversation in both splits is one row that leaks.
    write(tmp_path / "d/valid.jsonl", [json.loads((tmp_path / "d/train.jsonl").read_text())])
    leaks = json.loads(inline(*arguments, "--json"))["in_train_and"]["valid"]["exact"]
    assert leaks == {"rows": 1, "examples": [["valid.jsonl:1", "train.jsonl:1"]]}


def test_data_that_cannot_be_used_is_refused_as_in_a_run(inline, tmp_path):
    write(tmp_path / "d/train.jsonl", [{"prompt": "a", "completion": ""}])
    assert "train.jsonl:1: 'completion' is empty" in inline("data", "model=tiny", "data.path=d", expect=2)
    assert "--rows -1 is invalid" in inline("data", "--rows=-1", expect=2)


def token_set(rows):
    offsets = np.cumsum([0, *map(len, rows)])
    tokens = np.concatenate(rows).astype(np.int32)
    return TokenSet(tokens, np.ones(len(tokens), bool), offsets, np.arange(1, len(rows) + 1))


def test_near_duplicates_share_most_of_their_tokens_and_a_shared_prompt_does_not_count():
    random = np.random.default_rng(0)
    system = random.integers(0, 1000, 100)
    rows = [np.concatenate([system, random.integers(0, 1000, 60)]) for _ in range(300)]
    copy = rows[7].copy()
    copy[-3] = 1001
    found = duplicates.find_duplicates({"train": token_set([*rows, copy, rows[9]]), "valid": token_set([rows[20]])})
    assert found.near == [(("train", 300), ("train", 7))]
    assert found.exact == [(("train", 301), ("train", 9)), (("valid", 0), ("train", 20))]
