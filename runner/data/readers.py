"""Reading the rows of a data file, whatever its kind: JSON Lines, a JSON array, CSV or Parquet.

JSON Lines are tokenized from their bytes; the rows of the other kinds are written as JSON Lines on the way, row n as
line n, so that everything after the reader sees one kind of chunk. Files are streamed.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from runner.common.errors import DataError
from runner.data.encode import CHUNK_BYTES, Chunk, read_chunks
from runner.data.jsonl import MAX_LINE_BYTES, JsonlRow, object_of_pairs, open_data_file, read_jsonl, repeated_key
from runner.data.row_errors import RowErrors

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""Kinds of files."""
_ARRAY_START = re.compile(rb"\s*\[\s*(\{|\]|$)")
_OBJECT_OVER_LINES = re.compile(rb"\s*\{\s*(?:\"[^\"\n]*\"\s*:\s*[\[{]\s*)?[\r\n]")
_SPACE = re.compile(r"[ \t\r\n]*")
_READ_CHARACTERS = 1 << 20
_PARQUET_ROWS = 256


def read_rows(file: Path, errors: RowErrors | None = None) -> Iterator[JsonlRow]:
    """Yield the rows of `file` in order; `line` is the number of the row, in JSON Lines that of its line.

    A row that cannot be read is added to `errors` and skipped; without `errors`, such rows raise at the end.

    Raises:
        DataError: the file cannot be read, or (without `errors`) rows cannot be used.
    """
    if not _is_converted(file):
        yield from read_jsonl(file, errors)
        return
    collected = RowErrors() if errors is None else errors
    empty = True
    for number, value in enumerate(_values(file, collected), start=1):
        empty = False
        if isinstance(value, dict):
            yield JsonlRow(file, number, value)
        elif value is not None:
            collected.add(file, number, "it is not an object")
    if empty:
        raise DataError(f"{file} is empty: it has no row.")
    if errors is None:
        collected.raise_if_any()


def first_rows(file: Path, count: int) -> list[JsonlRow]:
    """Return the first `count` rows without reading those after them; all where `count` is negative."""
    return list(islice(read_rows(file), count if count >= 0 else None))


class ChunkReader:
    """Reads a file as chunks of JSON Lines, and knows the hash of what it read."""

    def __init__(self, file: Path, part: int, errors: RowErrors) -> None:
        """`part` is the number of the file in its split; rows that cannot be read are added to `errors`."""
        self._file, self._part, self._errors = file, part, errors
        self._digest = hashlib.sha256()
        self._converted = _is_converted(file)

    def __iter__(self) -> Iterator[Chunk]:
        if not self._converted:
            with open_data_file(self._file) as lines:
                for chunk in read_chunks(lines, self._digest.update):
                    yield Chunk(chunk.lines, chunk.first_line, self._part)
            return
        text, first = bytearray(), 1
        for number, value in enumerate(_values(self._file, self._errors), start=1):
            if value is not None:
                text += json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
            text += b"\n"
            if len(text) >= CHUNK_BYTES:
                yield Chunk(bytes(text), first, self._part)
                text, first = bytearray(), number + 1
        if text:
            yield Chunk(bytes(text), first, self._part)

    def content(self) -> str:
        """Return the SHA-256 (hex) of the file as it was read; call it after the last chunk."""
        if not self._converted:
            return self._digest.hexdigest()
        with open_data_file(self._file) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _is_converted(file: Path) -> bool:
    if file.suffix in (".csv", ".parquet"):
        return True
    with open_data_file(file) as opened:
        start = opened.read(1000).removeprefix(codecs.BOM_UTF8)
    if _OBJECT_OVER_LINES.match(start):
        raise DataError(
            f"{file} begins with an object over several lines. Expected a JSON array of rows, or one row a line: "
            f"if the rows are a list in the object, `jq -c '.NAME[]' {file.name} > train.jsonl` writes them so."
        )
    match = _ARRAY_START.match(start)
    return match is not None and (match[1] != b"]" or file.suffix == ".json")


def _values(file: Path, errors: RowErrors) -> Iterator[Any]:
    """Yield the value of each row; None for a row that was added to `errors`."""
    if file.suffix == ".csv":
        return _csv_values(file, errors)
    return _parquet_values(file) if file.suffix == ".parquet" else _array_values(file, errors)


def _array_values(file: Path, errors: RowErrors) -> Iterator[Any]:
    """Yield the items of a JSON array, which is never in memory as a whole."""
    repeated: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=partial(object_of_pairs, on_repeated=repeated.append))
    number = 0

    def broken(position: int, reason: str) -> DataError:
        line = lines_before + buffer.count("\n", 0, position)
        return DataError(f"{file}:{line}: the JSON array is broken ({reason}).")

    with open_data_file(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig") as text:
        lines_before, buffer, at_end = 1, "", False
        position, started, separated = 0, False, True
        try:
            while True:
                if not at_end and len(buffer) - position < _READ_CHARACTERS:
                    lines_before += buffer.count("\n", 0, position)
                    more = text.read(_READ_CHARACTERS)
                    buffer, position, at_end = buffer[position:] + more, 0, not more
                position = _skip(buffer, position)
                if not started:
                    started, position = True, _skip(buffer, position + 1)
                if buffer[position : position + 1] == "]" and not (separated and number):
                    if (buffer[position + 1 :] + text.read(1000)).strip():
                        raise DataError(f"{file} has more after the end of its JSON array.")
                    return
                if not separated:
                    if buffer[position : position + 1] != ",":
                        raise broken(position, "Expecting ',' or ']' after a row")
                    separated, position = True, _skip(buffer, position + 1)
                repeated.clear()
                try:
                    value, position = decoder.raw_decode(buffer, position)
                except json.JSONDecodeError as error:
                    if not at_end and len(buffer) - position <= MAX_LINE_BYTES:
                        lines_before += buffer.count("\n", 0, position)
                        more = text.read(_READ_CHARACTERS)
                        buffer, position, at_end = buffer[position:] + more, 0, not more
                        continue
                    raise broken(error.pos, error.msg) from None
                number, separated = number + 1, False
                if repeated:
                    errors.add(file, number, repeated_key(repeated[0]))
                yield None if repeated else value
        except UnicodeDecodeError:
            raise DataError(f"{file} is not UTF-8. Save it as UTF-8.") from None
        except RecursionError:
            raise DataError(f"{file}: a row of the JSON array is nested too deeply.") from None


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _csv_values(file: Path, errors: RowErrors) -> Iterator[Any]:
    """Yield the rows of a CSV file with a header; every value is text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_data_file(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                raise DataError(f"{file} is empty. Expected a header with the names of the columns, then the rows.")
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{file} has several columns named '{twice[0]}'. Rename them in its header.")
            for number, row in enumerate((row for row in rows if row), start=1):
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                else:
                    errors.add(file, number, f"{len(row)} values, but the header has {len(header)} columns")
                    yield None
        except UnicodeDecodeError:
            raise DataError(f"{file} is not UTF-8. Save it as UTF-8.") from None
        except csv.Error as error:
            raise DataError(f"{file}:{rows.line_num}: the CSV cannot be read ({error}).") from None


def _parquet_values(file: Path) -> Iterator[Any]:
    """Yield the rows of a Parquet file, a row group at a time. Its nulls are fields that the row does not have."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{file} is Parquet, which needs pyarrow: pip install 'mlx-runner[parquet]'") from None
    with open_data_file(file) as opened:
        try:
            for batch in parquet.ParquetFile(opened).iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield _plain(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from None


def _plain(value: Any) -> Any:
    """Return an Arrow value as JSON has it: without null fields, dates as text; bytes are no text, so they are null.

    Arrow gives every object the fields that any of them has. The content of a message stays, also where it is null.
    """
    if isinstance(value, dict):
        keep = ("content",) if "role" in value else ()
        return {key: _plain(item) for key, item in value.items() if item is not None or key in keep}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return None if isinstance(value, bytes) else str(value)
