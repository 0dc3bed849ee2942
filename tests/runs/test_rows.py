"""Files of rows: cut back to a checkpoint, read past damage, and the same lines for a display and for an audit."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.common.errors import StorageError
from runner.runs.rows import RowFile, read_rows, scan_rows


def test_rows_are_cut_back_to_where_a_checkpoint_saw_them_and_a_torn_line_is_left_out(tmp_path):
    rows = RowFile(tmp_path / "m.jsonl")
    rows.append({"step": 1})
    seen = rows.offset
    rows.append({"step": 2})
    rows.close()
    with (tmp_path / "m.jsonl").open("ab") as out:
        out.write(b'{"step": 3, "lo')
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1, 2]
    again = RowFile(tmp_path / "m.jsonl", seen)
    again.append({"step": 2, "again": True})
    again.close()
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "again": True},
    ]


def test_rows_shorter_than_the_checkpoint_saw_are_refused(tmp_path):
    with pytest.raises(StorageError, match="cut or replaced"):
        RowFile(tmp_path / "m.jsonl", 10)


def test_a_link_in_the_place_of_a_row_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError):
        RowFile(tmp_path / "m.jsonl")
    assert (tmp_path / "victim").read_text() == "precious"


def test_every_line_is_scanned_and_those_that_are_no_rows_are_told_apart(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n\xff\n{"step": -1}\n{"step": 2}\n{"step"')
    scanned = [(line.number, line.row, line.torn) for line in scan_rows(path)]
    assert scanned == [
        (1, {"step": 1}, False),
        (2, None, False),
        (3, None, False),
        (4, {"step": -1}, False),
        (5, {"step": 2}, False),
        (6, None, True),
    ]
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert [row["step"] for row in read_rows(path, size=12)] == [1]


def test_a_line_that_is_too_long_is_damage_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'"' + b"x" * 20_000_000 + b'"\n{"step": 2}\n')
    assert [(line.number, line.row, line.torn) for line in scan_rows(path)] == [
        (1, None, False),
        (2, {"step": 2}, False),
    ]


def test_a_file_that_is_missing_or_a_fifo_has_no_rows(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "missing"):
        assert read_rows(tmp_path / name) == []
        with pytest.raises(OSError):
            list(scan_rows(tmp_path / name))


LINES = (
    b'{"step": 1, "loss": NaN}',
    b'{"step": 2, "text": "\\u00e9\\n"}',
    b'{"step": 3, "a": [1, {"b": 2}]}',
    b'{"step": 4},{"step": 5}',
    b'{"step": 6, "a": [{}',
    b'{"step": 7, "text": "x',
    b'y"}',
    b'"step"',
    b"null",
    b"",
    b" \r",
    b"\xef\xbb\xbf{}",
    b"\xff",
    b"[" * 2000,
)


@given(st.lists(st.sampled_from(LINES), max_size=6), st.sampled_from([b"", b'{"step": 8', b'{"step": 9}']), st.data())
def test_rows_read_at_once_are_those_read_line_by_line(tmp_path_factory, lines, end, data):
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + end)
    size = data.draw(st.none() | st.integers(0, path.stat().st_size + 1))
    by_line = [line.row for line in scan_rows(path, size) if line.row is not None and "step" in line.row]
    assert repr(read_rows(path, size)) == repr(by_line)
