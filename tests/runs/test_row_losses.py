"""The losses of rows are stored per evaluation, cut back to a checkpoint, and read past damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runner.common.errors import StorageError
from runner.runs import row_losses
from runner.runs.row_losses import RowLossWriter, has_too_many_rows, read_row_losses

ROWS, OTHER_ROWS = "0123456789abcdef" * 4, "f" * 64
LOSSES, TOKENS = np.array([1.23456789, 1e-9, 1234567.0]), np.array([3, 1, 7])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "row_losses.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_was_written_is_read_with_six_digits_and_tokens_once(path: Path) -> None:
    writer = RowLossWriter(path, 0)
    writer.append(0, "valid", ROWS, LOSSES, TOKENS)
    writer.append(5, "valid", ROWS, LOSSES / 2, TOKENS)
    writer.append(5, "test", OTHER_ROWS, LOSSES[:2], TOKENS[:2])
    assert ["tokens" in line for line in lines(path)] == [True, False, True]
    assert lines(path)[0]["losses"] == [1.23457, 1e-9, 1234570.0]
    for last in (read_row_losses(path, "valid"), read_row_losses(path, "valid", 5)):
        assert last is not None and (last.step, last.rows) == (5, ROWS[:32])
        assert last.losses.tolist() == [0.617284, 5e-10, 617284.0] and last.tokens.tolist() == [3, 1, 7]
    first, test = read_row_losses(path, "valid", 0), read_row_losses(path, "test")
    assert first is not None and first.losses.tolist() == [1.23457, 1e-9, 1234570.0]
    assert test is not None and test.rows == "f" * 32
    assert read_row_losses(path, "valid", 3) is None and read_row_losses(path, "train") is None


def test_a_file_that_is_cut_back_before_the_tokens_gets_them_again(path: Path) -> None:
    writer = RowLossWriter(path, 0)
    writer.append(0, "valid", ROWS, LOSSES, TOKENS)
    middle = writer.file.offset
    writer.append(5, "valid", ROWS, LOSSES, TOKENS)
    writer.append(5, "test", OTHER_ROWS, LOSSES, TOKENS)
    whole = path.read_bytes()
    for offset in (0, middle):
        writer.file.close()
        writer = RowLossWriter(path, offset)
        for step, split, rows in ((0, "valid", ROWS), (5, "valid", ROWS), (5, "test", OTHER_ROWS))[offset > 0 :]:
            writer.append(step, split, rows, LOSSES, TOKENS)
        assert path.read_bytes() == whole


def test_a_file_without_what_the_checkpoint_saw_is_begun_anew(path: Path, tmp_path: Path) -> None:
    writer = RowLossWriter(path, 0)
    writer.append(0, "valid", ROWS, LOSSES, TOKENS)
    whole, offset = path.read_bytes(), writer.file.offset
    assert not writer.lost and not RowLossWriter(path, offset).lost
    for content in (whole[:-1], whole + whole, b"x" * 3 * offset, b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        writer = RowLossWriter(path, offset)
        assert writer.lost == (content != whole + whole)
        writer.append(5, "valid", ROWS, LOSSES, TOKENS)
        assert [line["step"] for line in lines(path)] == ([5] if writer.lost else [0, 5])
        assert ("tokens" in lines(path)[-1]) == writer.lost
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(StorageError):
        RowLossWriter(tmp_path / "link", offset)


def test_no_line_is_written_without_rows_and_one_without_losses_for_too_many(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_losses, "MAX_ROWS", 2)
    writer = RowLossWriter(path, 0)
    writer.append(0, "valid", ROWS, LOSSES, TOKENS)
    writer.append(5, "valid", ROWS, LOSSES[:0], TOKENS[:0])
    assert [line["losses"] for line in lines(path)] == [[]]
    assert read_row_losses(path, "valid", 0) is None and has_too_many_rows(path, "valid", 0)
    assert not has_too_many_rows(path, "valid", 5) and not has_too_many_rows(path, "test")
    writer.append(9, "valid", OTHER_ROWS, LOSSES[:2], TOKENS[:2])
    assert read_row_losses(path, "valid") is not None and not has_too_many_rows(path, "valid", 9)
    assert not has_too_many_rows(path.with_name("missing"), "valid")


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 9, "split": "valid", "rows": "0123456789abcdef0123456789abcdef", "losses": [1, 2',
        b'{"step": 9, "split": "valid", "rows": "0123456789abcdef0123456789abcdef", "losses": [1, 2]}\n',
        b'{"step": 9, "split": "valid", "rows": "0123456789abcdef0123456789abcdef", "losses": [1, NaN, 3]}\n',
        b'{"step": 9, "split": "valid", "rows": "0123456789abcdef0123456789abcdef", "losses": [1, 2, 1e999]}\n',
        b'{"step": 9, "split": "valid", "rows": "abc", "losses": [1, 2, 3]}\n',
        b'{"step": 9, "split": "valid", "rows": "abc", "losses": [1, 2, 3], "tokens": [0, 0, 0]}\n',
        b'{"step": 9, "split": "valid", "rows": "abc", "losses": [1, 2, 3], "tokens": [1, 1, -1]}\n',
        b'{"step": 9, "split": "valid", "rows": "abc", "losses": [[1], [2], [3]], "tokens": [1, 1, 1]}\n',
        b'{"step": 9, "split": "valid", "rows": "abc", "losses": [1, 2, 3], "tokens": 3}\n',
        b'{"step": 9, "split": "valid", "rows": "abc", "losses": [' + b"[" * 9000 + b"}\n",
        b"\xff\x00\n[]\n{}\n",
    ],
)
def test_a_damaged_line_has_no_losses_and_the_others_are_read(path: Path, damage: bytes) -> None:
    writer = RowLossWriter(path, 0)
    writer.append(0, "valid", ROWS, LOSSES, TOKENS)
    with path.open("ab") as file:
        file.write(damage)
    assert read_row_losses(path, "valid", 9) is None
    assert read_row_losses(path, "valid", 0) is not None


def test_a_missing_file_a_link_and_a_folder_have_no_losses(tmp_path: Path, path: Path) -> None:
    assert read_row_losses(path, "valid") is None
    (tmp_path / "folder").mkdir()
    assert read_row_losses(tmp_path / "folder", "valid") is None
    RowLossWriter(tmp_path / "other", 0).append(0, "valid", ROWS, LOSSES, TOKENS)
    path.symlink_to(tmp_path / "other")
    assert read_row_losses(path, "valid") is None
