"""row_losses.jsonl: the loss of each row at each evaluation of a run, so that runs can be compared row by row.

One line an evaluation:

    {"step": 0, "split": "valid", "rows": "3f2a…", "losses": [12.3456, …], "tokens": [9, …]}
    {"step": 20, "split": "valid", "rows": "3f2a…", "losses": [10.2034, …]}

`losses` are sums over the supervised tokens of a row, of which it has `tokens`; both are in the order of the data.
`rows` identifies the rows, with their order, tokens and targets; the first line of each has the tokens.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runner.common.filesystem import open_regular
from runner.runs.rows import RowFile

MAX_ROWS = 200_000
"""Of evaluations of more rows no losses are recorded: their lines have an empty list."""
_DIGITS = 6
"""Significant digits of a row's loss."""
_FINGERPRINT_LENGTH = 32
_MAX_LINE_BYTES = 10_000_000
_NO_LOSSES = b'"losses": []}\n'
_HEAD = re.compile(rb'\{"step": (\d{1,15}), "split": "(\w{1,20})", "rows": "([0-9a-f]{1,64})", "losses": \[')


@dataclass(frozen=True)
class RecordedLosses:
    """One evaluation as the file has it."""

    step: int
    rows: str
    """Fingerprint of the rows: two evaluations with the same one saw the same rows, in the same order."""
    losses: np.ndarray
    """(rows,) float64: sum over the supervised tokens of each row."""
    tokens: np.ndarray
    """(rows,) float64: supervised tokens of each row."""


class _Head(NamedTuple):
    step: int
    split: str
    rows: str


class RowLossWriter:
    """Appends evaluations to a run's row_losses.jsonl."""

    def __init__(self, path: Path, offset: int) -> None:
        """Open `path` cut to `offset` bytes; a file that does not have these is begun anew: no resume needs it.

        Raises:
            StorageError: it is a link or not a regular file, or cannot be opened.
        """
        self.lost = not _reaches(path, offset)
        """Whether evaluations that the checkpoint counts on are gone."""
        offset = 0 if self.lost else offset
        self.file = RowFile(path, offset)
        self._known = {head.rows for head, _ in _lines(path)} if offset else set()

    def append(self, step: int, split: str, fingerprint: str, losses: np.ndarray, tokens: np.ndarray) -> None:
        """Write a line; `losses` and `tokens` are (rows,), and `fingerprint` is that of the rows."""
        if not len(losses):
            return
        rows = fingerprint[:_FINGERPRINT_LENGTH]
        line: dict[str, Any] = {"step": step, "split": split, "rows": rows, "losses": []}
        if len(losses) > MAX_ROWS:
            self.file.append(line)
            return
        line["losses"] = rounded_losses(losses)
        if rows not in self._known:
            line["tokens"] = tokens.tolist()
            self._known.add(rows)
        self.file.append(line)


def rounded_losses(losses: np.ndarray) -> list[float]:
    """Return the losses with six significant digits, the precision in which they are stored."""
    return [float(f"{loss:.{_DIGITS}g}") for loss in losses.tolist()]


def read_row_losses(path: Path, split: str, step: int | None = None) -> RecordedLosses | None:
    """Return the last evaluation of `split` that the file has (at `step`, where it is given); None where it has none.

    A file that is missing or cannot be read has none, and neither has a damaged line.
    """
    wanted: tuple[_Head, bytes] | None = None
    first: dict[str, bytes] = {}
    with suppress(OSError):
        for head, line in _lines(path):
            first.setdefault(head.rows, line)
            if head.split == split and step in (None, head.step):
                wanted = head, line
    if wanted is None:
        return None
    head, line = wanted
    try:
        losses = np.array(json.loads(line)["losses"], np.float64)
        tokens = np.array(json.loads(first[head.rows])["tokens"], np.float64)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    is_whole = losses.ndim == 1 and losses.shape == tokens.shape and np.isfinite(losses).all()
    if not is_whole or not np.isfinite(tokens).all() or tokens.min() < 0 or tokens.sum() == 0:
        return None
    return RecordedLosses(head.step, head.rows, losses, tokens)


def has_too_many_rows(path: Path, split: str, step: int | None = None) -> bool:
    """Return whether an evaluation of `split` (at `step`, where it is given) had more rows than are recorded."""
    with suppress(OSError):
        return any(
            head.split == split and step in (None, head.step) and line.endswith(_NO_LOSSES)
            for head, line in _lines(path)
        )
    return False


def _reaches(path: Path, offset: int) -> bool:
    """Return whether a line of the file ends at `offset`; True where it cannot be read, which `RowFile` reports."""
    if offset == 0:
        return True
    try:
        with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            file.seek(offset - 1)
            return file.read(1) == b"\n"
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _lines(path: Path) -> Iterator[tuple[_Head, bytes]]:
    """Yield the complete lines of the file; their numbers are parsed only where they are needed."""
    with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            if line.endswith(b"}\n") and (match := _HEAD.match(line)):
                yield _Head(int(match[1]), match[2].decode(), match[3].decode()), line
