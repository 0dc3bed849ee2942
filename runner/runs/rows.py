"""JSONL row files: appended to line by line, cut back to a checkpoint, and read past damage."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.common.atomic_io import open_regular, storage_errors, sync_folder
from runner.common.errors import StorageError

_LONGEST_LINE = 1 << 20  # bytes
_LARGEST_STEP = 10**15


class RowFile:
    """A JSONL file that grows line by line and can be cut back to where a checkpoint saw it."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open `path` for appending, cut to `offset` bytes: what lies beyond was written after the checkpoint."""
        with storage_errors(path, "cannot be written"):
            self._file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            size = os.fstat(self._file).st_size
            if size < offset:
                os.close(self._file)
                raise StorageError(
                    f"{path} has {size} bytes, but the checkpoint saw {offset}: it was cut or "
                    "replaced. An earlier checkpoint may still fit: resume=RUN/checkpoints/step-…"
                )
            os.ftruncate(self._file, offset)
        self.path = path
        self.offset = offset
        self._is_named = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row as one line, in one call."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with storage_errors(self.path, "cannot be written", needed=len(line)):
            done = 0
            while done < len(line):
                done += os.pwrite(self._file, line[done:], self.offset + done)
        self.offset += len(line)

    def sync(self) -> None:
        """Bring what was written to the disk itself."""
        with storage_errors(self.path, "cannot be written"):
            os.fsync(self._file)
            if not self._is_named:
                sync_folder(self.path.parent)
                self._is_named = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that have a step; a torn or damaged line is left out, a missing file has none."""
    rows = []
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as lines:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return []
            while line := lines.readline(_LONGEST_LINE):
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict) and _count(row.get("step")) is not None:
                    rows.append(row)
    except OSError:
        pass
    return rows


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST_STEP else None
