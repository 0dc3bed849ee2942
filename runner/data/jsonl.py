"""Reading JSON Lines: one object per line, every bad line reported with its number."""

from __future__ import annotations

import codecs
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from runner.common.errors import DataError
from runner.common.text import shorten
from runner.data.row_errors import RowError, RowErrors, locate

MAX_LINE_BYTES = 4 << 20
"""Longest row. Tokenizing takes about 70 times as much memory, and training uses max_length tokens of it."""
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_JSON_TYPES = {
    type(None): "null",
    bool: "a boolean",
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
}


@dataclass(frozen=True, slots=True)
class JsonlRow:
    """One object of a JSONL file with its location; `line` counts from 1 and includes blank lines."""

    file: Path
    line: int
    value: dict[str, Any]

    @property
    def location(self) -> str:
        """File and line, for a message."""
        return locate(self.file, self.line)


def read_jsonl(path: Path, errors: RowErrors | None = None) -> Iterator[JsonlRow]:
    """Yield the rows of a UTF-8 JSONL file in order.

    Skips blank lines and a byte order mark at the start. A line that is not a JSON object is added to `errors` and
    skipped; without `errors`, such lines raise once the whole file has been read.

    Raises:
        DataError: the file is empty, not a regular file or unreadable, a line is too long, or (without `errors`)
            lines are bad.
    """
    collected = RowErrors() if errors is None else errors
    errors_before, empty = collected.count, True
    with open_data_file(path) as file:
        for row in parse_lines(file, path, collected):
            empty = False
            yield row
    if empty and collected.count == errors_before:
        raise DataError(f'{path} is empty. Expected one JSON object per line, such as {{"text": "..."}}.')
    if errors is None:
        collected.raise_if_any()


@contextmanager
def open_data_file(path: Path) -> Iterator[BufferedReader]:
    """Open the regular file `path` for reading; an OSError inside the block becomes a DataError with the path."""
    if not path.is_file():
        raise DataError(f"{path} is not a regular file. Data is read from JSONL files, one object per line.")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_lines(lines: BinaryIO, path: Path, errors: RowErrors, first_line: int = 1) -> Iterator[JsonlRow]:
    """Yield the rows of `lines`, which start at line `first_line` of the file `path`; add bad lines to `errors`.

    Raises:
        DataError: the file is UTF-16, or a line is longer than `MAX_LINE_BYTES`.
    """
    for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), start=first_line):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MB. Expected one JSON object per "
                "line; split long texts into rows."
            )
        if number == 1:
            if line.startswith(_UTF16_MARKS):
                raise DataError(f"{path} is UTF-16, not UTF-8. Save it as UTF-8.")
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            yield JsonlRow(path, number, _parse_object(line))
        except RowError as error:
            errors.add(path, number, str(error))


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Keep Python from looking for cycles, of which a parsed value has none: it would search a large value again and
    again while it grows, which takes ten times as long as to parse it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object on a line. Raises RowError where there is none."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1}: 0x{line[error.start]:02x})") from None
    try:
        with _garbage_collection_paused():
            value = json.loads(text, object_pairs_hook=object_of_pairs)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise RowError("invalid JSON (nested too deeply)") from None
    except ValueError as error:
        raise RowError(f"invalid JSON ({error})") from None
    if not isinstance(value, dict):
        raise RowError(f"{json_type(value)}, not an object; expected one JSON object per line")
    return value


def object_of_pairs(pairs: list[tuple[str, Any]], on_repeated: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return a JSON object; a key that it has twice is given to `on_repeated`, or raises RowError."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        if on_repeated is None:
            raise RowError(repeated_key(key))
        on_repeated(key)
    return value


def repeated_key(key: str) -> str:
    """Return the reason why a row with a repeated key cannot be used."""
    return f"the key '{shorten(key, 60)}' occurs twice in one object; only one of its values would be used"


def json_type(value: Any) -> str:
    """Return the JSON type of a value, with its article."""
    return _JSON_TYPES.get(type(value), type(value).__name__)
