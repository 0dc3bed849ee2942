"""Files of JSON rows, one object a line: appended to, cut back to a checkpoint, and read past damage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from runner.common import safe_json
from runner.common.errors import StorageError
from runner.common.filesystem import FileSystem, open_regular, write_at
from runner.common.storage_errors import storage_errors
from runner.common.text import shell_path

_MAX_LINE_BYTES = 10_000_000
_MAX_BYTES_AT_ONCE = 50_000_000
"""Larger files are parsed line by line, for which less memory is needed."""


class RowFile:
    """A file of rows that grows line by line and can be cut back to its length at a checkpoint."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open `path` for appending, cut to `offset` bytes: what lies beyond was written after the checkpoint.

        Raises:
            StorageError: the file is shorter than `offset`, or cannot be opened.
        """
        with storage_errors(path, "written"):
            self._file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            size = os.fstat(self._file).st_size
            if size < offset:
                os.close(self._file)
                raise StorageError(
                    f"{path} has {size} bytes, fewer than the {offset} at the checkpoint: it was cut or replaced. "
                    "An earlier checkpoint may still fit. To list them: "
                    f"python -m runner show {shell_path(path.parent)}"
                )
            os.ftruncate(self._file, offset)
        self.path = path
        self.offset = offset
        self._name_synced = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write `row` as one line."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with storage_errors(self.path, "written", needed=len(line)):
            write_at(self._file, line, self.offset)
        self.offset += len(line)

    def sync(self) -> None:
        """Return once all rows are on the disk."""
        with storage_errors(self.path, "written"):
            os.fsync(self._file)
        if not self._name_synced:
            FileSystem().fsync_folder(self.path.parent)
            self._name_synced = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class RowLine(NamedTuple):
    """One line of a file of rows, counted from 1; `row` is None where the line is not a JSON object."""

    number: int
    row: dict[str, Any] | None
    torn: bool
    """Whether it is a last line without its end: its writer was killed, or is still writing."""


def scan_rows(path: Path, size: int | None = None) -> Iterator[RowLine]:
    """Yield every line of the file `path`, or of its first `size` bytes.

    Raises:
        OSError: it is missing, a link or not a regular file, or cannot be read.
    """
    with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        number = 0
        while (size is None or file.tell() < size) and (line := file.readline(_MAX_LINE_BYTES)):
            number += 1
            if line.endswith(b"\n"):
                yield RowLine(number, _parse(line), torn=False)
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE_BYTES)
            yield RowLine(number, None, torn=not line)


def read_rows(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """Return the rows that have a step; damaged and torn lines are left out, and a file that cannot be read has none.

    Args:
        size: bytes of the file that are read; None reads all of it.
    """
    rows: list[dict[str, Any]] = []
    with suppress(OSError):
        found = _parse_at_once(path, size)
        if found is None:
            found = [line.row for line in scan_rows(path, size) if line.row is not None]
        rows = [row for row in found if safe_json.is_count(row.get("step"))]
    return rows


def count_or_none(value: Any) -> int | None:
    """Return `value` where it is a whole number from 0 of a sensible size, else None."""
    return value if safe_json.is_count(value) else None


def _parse_at_once(path: Path, size: int | None) -> list[dict[str, Any]] | None:
    """Return the rows of an undamaged file, several times as fast as line by line; None where it may be damaged.

    Raises:
        OSError: it cannot be read.
    """
    with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_BYTES_AT_ONCE:
            return None
        data = file.read(-1 if size is None else size)
    lines = data.split(b"\n")
    if lines.pop() and size is not None:  # a line that begins before `size` counts; without its end none does
        return None
    try:
        rows = json.loads(b"[" + b",\n".join(lines) + b"]")
    except (ValueError, RecursionError):
        return None
    is_whole = len(rows) == len(lines) and all(isinstance(row, dict) for row in rows)
    return rows if is_whole and max(map(len, lines), default=0) < _MAX_LINE_BYTES else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
