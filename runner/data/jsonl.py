"""Reading JSON Lines: one object a line, every bad line named."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from runner.common.errors import DataError
from runner.data.row_errors import RowError, RowErrors

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LONGEST_LINE = 4 << 20
"""Bytes of a row. Tokenising takes about 70 times as much memory, and training sees max_length tokens of it."""


@dataclass(frozen=True, slots=True)
class JsonlRow:
    """One object of a JSONL file and where it stands; `line` counts from 1, blank lines included."""

    file: Path
    line: int
    value: dict[str, Any]


def read_jsonl(path: Path, bad: RowErrors | None = None) -> Iterator[JsonlRow]:
    """The rows of a UTF-8 JSONL file in its order, one at a time.

    A byte order mark at the start and blank lines are passed over. A line that is no JSON object goes to
    `bad` and is left out; without `bad`, the end of the file raises.

    Raises:
        DataError: the file is empty, is no regular file, cannot be read or has an endless line; bad lines where `bad`
            is None.
    """
    collected = RowErrors() if bad is None else bad
    empty = True
    with open_data_file(path) as lines:
        before = collected.count
        for row in parse_lines(lines, path, collected):
            empty = False
            yield row
    if empty and collected.count == before:
        raise empty_file(path)
    if bad is None:
        collected.raise_if_any()


def empty_file(path: Path) -> DataError:
    """What a file without a line is refused with."""
    return DataError(f"{path} is empty. One JSON object a line is expected, such as " + '{"text": "..."}.')


@contextmanager
def open_data_file(path: Path) -> Iterator[BufferedReader]:
    """The regular file `path` for reading; what goes wrong while it is read is raised as DataError, with its path."""
    if not path.is_file():
        raise DataError(f"{path} is not a regular file. Data is read from JSONL files, one object a line.")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_lines(lines: BinaryIO, path: Path, bad: RowErrors, first: int = 1) -> Iterator[JsonlRow]:
    """The rows of `lines`, which are those of the file `path` from line `first` on; other lines go to `bad`.

    Raises:
        DataError: the file is UTF-16 or has an endless line.
    """
    for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), start=first):
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MB. One JSON object a line is "
                "expected; split long texts into rows."
            )
        if number == 1:
            if line.startswith(UTF16_MARKS):
                raise DataError(f"{path} is UTF-16, not UTF-8. Save it again as UTF-8.")
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            yield JsonlRow(path, number, _object(line))
        except RowError as reason:
            bad.add(path, number, str(reason))


class LazyRows(Sequence[JsonlRow]):
    """The rows of one file, read at the first access; a file that is None has none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[JsonlRow] | None = [] if path is None else None

    def _read(self) -> list[JsonlRow]:
        if self._rows is None:
            assert self._path is not None
            self._rows = list(read_jsonl(self._path))
        return self._rows

    def first(self, count: int) -> list[JsonlRow]:
        """The first `count` rows, without reading those after them; all, for a negative `count`."""
        if self._rows is not None or count < 0:
            return list(self._read()[: count if count >= 0 else None])
        assert self._path is not None
        return list(islice(read_jsonl(self._path), count))

    def __len__(self) -> int:
        return len(self._read())

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises BadRow with the reason where there is none."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1}: 0x{line[error.start]:02x})") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise RowError("not usable JSON (nested too deeply)") from None
    except ValueError as error:
        raise RowError(f"not usable JSON ({error})") from None
    if not isinstance(value, dict):
        raise RowError(f"not an object but {json_type(value)}; one JSON object a line is expected")
    return value


def json_type(value: Any) -> str:
    """The JSON type of a value, in words with an article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
