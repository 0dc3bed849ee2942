"""Bad data: reported with file and line before training, or left out and counted where that is intended."""

from __future__ import annotations

import codecs
import json
import re

import pytest

pytestmark = [pytest.mark.fault(16), pytest.mark.slow]

WORDS = ("model=tiny", "data.path=rows", "train.iters=2", "hydra.run.dir=run")
GOOD = b'{"prompt": "a", "completion": "b"}\n'
LONG = json.dumps({"prompt": "a", "completion": "b" * 100}).encode() + b"\n"
# The prompt alone exceeds max_length, so the truncated row has no completion.
ALL_PROMPT = json.dumps({"prompt": "a" * 100, "completion": "b"}).encode() + b"\n"
# Lines that are refused, and the reason in the message.
BAD_LINES = {
    b'{"prompt": "a", "completion": "b"\n': "not JSON (column 34",
    b'["a", "b"]\n': "a list, not an object",
    b"null\n": "null, not an object",
    b'{"prompt": "a", "completion": 3}\n': "'completion' is a number, not a string",
    b'{"prompt": ["a"], "completion": "b"}\n': "'prompt' is a list, not a string",
    b'{"prompt": "a", "answer": "b"}\n': "no key 'completion'; the row has: 'prompt', 'answer'",
    b'{"prompt": "a", "completion": " "}\n': "'completion' is empty",
    b'{"prompt": "caf\xe9", "completion": "b"}\n': "not UTF-8 (byte 16: 0xe9)",
    b'{"prompt": "a", "completion": "\\ud83d"}\n': "half of a surrogate pair",
    b"[" * 5000 + b"\n": "nested too deeply",
}
# Files that are refused, and the reason in the message.
BAD_FILES = {
    b"": "is empty",
    b"\n \n\n": "is empty",
    GOOD.decode().encode("utf-16"): "is UTF-16, not UTF-8",
    b'{"question": "a", "answer": "b"}\n': ":1: no known format has these keys: 'question', 'answer'",
    b"prompt,completion\na,b\n": ":1: not JSON (column 1",
}


@pytest.fixture
def rows(cli):
    """`rows(train=…, valid=…)`: the files of a data folder, as bytes."""

    def write(**splits: bytes) -> None:
        (cli.folder / "rows").mkdir(exist_ok=True)
        for split, data in splits.items():
            (cli.folder / f"rows/{split}.jsonl").write_bytes(data)

    return write


def assert_refused(cli, *overrides: str) -> str:
    out = cli(*WORDS, *overrides, expect=2)
    assert "Traceback" not in out and "valid loss" not in out and "train loss" not in out
    assert json.loads((cli.folder / "run/status.json").read_text())["state"] == "failed"
    assert (cli.folder / "run/metrics.jsonl").read_bytes() == b""
    assert not list((cli.folder / "run/checkpoints").iterdir())
    return out


def test_every_bad_line_of_every_split_is_reported_at_once_with_its_reason(cli, rows):
    # Every other line from the third on is bad; blank lines count.
    for split, half in (("train", list(BAD_LINES)[::2]), ("valid", list(BAD_LINES)[1::2])):
        rows(**{split: GOOD + b"\n" + b"".join(bad + GOOD for bad in half)})
    out = assert_refused(cli)
    for split, half in (("train", list(BAD_LINES)[::2]), ("valid", list(BAD_LINES)[1::2])):
        for number, bad in enumerate(half):
            named = [line for line in out.splitlines() if f"rows/{split}.jsonl:{3 + 2 * number}:" in line]
            assert len(named) == 1 and BAD_LINES[bad] in named[0], out


def test_every_bad_line_alone_is_reported(cli, rows, cases):
    for number, bad in enumerate(cases.some(list(BAD_LINES), quick=1)):
        rows(train=GOOD * 5 + bad + GOOD, valid=GOOD * 2)
        out = assert_refused(cli)
        assert "rows/train.jsonl:6: " in out and BAD_LINES[bad] in out
        (cli.folder / "run").rename(cli.folder / f"refused{number}")
        cases.done()


def test_a_file_without_usable_rows_is_reported(cli, rows, cases):
    for number, data in enumerate(cases.some(list(BAD_FILES), quick=2)):
        rows(train=data, valid=GOOD)
        out = assert_refused(cli)
        assert "rows/train.jsonl" in out and BAD_FILES[data] in out
        (cli.folder / "run").rename(cli.folder / f"refused{number}")
        cases.done()


def test_a_row_over_max_length_is_reported_with_file_and_line_where_on_too_long_is_error(cli, rows):
    rows(train=GOOD * 3 + LONG + GOOD, valid=GOOD)
    out = assert_refused(cli, "data.max_length=64", "data.on_too_long=error")
    assert "rows/train.jsonl:4: " in out and "over max_length 64" in out


def test_a_split_whose_rows_are_all_left_out_is_refused_with_the_counts(cli, rows):
    rows(train=LONG * 3, valid=GOOD)
    out = assert_refused(cli, "data.max_length=64", "data.on_too_long=drop")
    assert "rows/train.jsonl has no row to train on: 3 longer than max_length 64" in out


CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
UNANSWERED = json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
COUNTED = {
    "over the length, cut": (GOOD * 8 + LONG, "truncate", r"9 rows, .* longest 122; 1 cut at 64"),
    "over the length, dropped": (GOOD * 8 + LONG, "drop", r"8 rows, .* longest 122; 1 dropped as too long"),
    "all prompt after the cut": (GOOD * 8 + ALL_PROMPT * 2, "truncate", r"8 rows, .*; 2 without a supervised token"),
    "all prompt": ((CHAT * 8 + UNANSWERED * 3).encode(), "error", r"8 rows, .*; 3 without a supervised token"),
    "byte order mark": (codecs.BOM_UTF8 + GOOD * 8, "error", r"8 rows, 184 tokens, 24 supervised, longest 23"),
}


def test_rows_that_are_cut_or_left_out_are_counted_in_the_log_and_the_run_trains(cli, rows, cases):
    for case in cases.some(list(COUNTED), quick=2):
        train, rule, counted = COUNTED[case]
        rows(train=train, valid=CHAT.encode() if case == "all prompt" else GOOD)
        out = cli(*WORDS, "data.max_length=64", f"data.on_too_long={rule}")
        line = next(line for line in out.splitlines() if line.startswith("data   train: "))
        assert re.fullmatch(f"data   train: {counted}", line), line
        run = (cli.folder / "run").rename(cli.folder / case)
        assert json.loads((run / "status.json").read_text())["state"] == "finished"
        assert line in (run / "run.log").read_text()
        cases.done()
