"""Rows as tokens, a part of a file at a time: the parts of all, in their order, are the split."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from runner.data.chat_spans import TextEncoder
from runner.data.formats import EncodeOptions, RowFormat
from runner.data.jsonl import LONGEST_LINE, JsonlRow, parse_lines
from runner.data.row_errors import RowError, RowErrors
from runner.data.token_set import SplitStats, TokenSet

PIECE = 1 << 20
"""Bytes of JSONL that are made tokens at a time. They take up to ten times as much memory."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a file."""

    lines: bytes
    first: int
    """The number of the first line, from 1."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """The tokens of some rows."""

    tokens: bytes
    """int32."""
    supervised: bytes
    """uint8, 0 or 1 a token."""
    ends: np.ndarray
    """(rows,) int64: where each row ends, counted from the first token of the part."""
    lines: np.ndarray
    """(rows,) int64."""
    counts: SplitStats


class Columns(Protocol):
    """Where the parts of a split go, one after the other."""

    def append(self, part: EncodedChunk) -> None:
        """Put `part` behind the others."""


Fill = Callable[[Columns, RowErrors], str]
"""Tokenises a file into columns, its bad rows into the other; returns the SHA-256 (hex) of what was read."""


class InMemoryColumns:
    """Parts in memory, which the arrays then share: 5 bytes a token, 16 a row."""

    def __init__(self) -> None:
        self.counts = SplitStats()
        self._tokens, self._supervised = bytearray(), bytearray()
        self._offsets, self._lines = bytearray(np.int64(0).tobytes()), bytearray()

    def append(self, part: EncodedChunk) -> None:
        """Put `part` behind the others."""
        self._tokens += part.tokens
        self._supervised += part.supervised
        self._offsets += (part.ends + self.counts.tokens).tobytes()
        self._lines += part.lines.tobytes()
        self.counts += part.counts

    def tokens(self) -> TokenSet:
        """All parts as one; nothing can be appended after this."""
        return TokenSet(
            np.frombuffer(self._tokens, np.int32),
            np.frombuffer(self._supervised, np.bool_),
            np.frombuffer(self._offsets, np.int64),
            np.frombuffer(self._lines, np.int64),
        )


def encode_in_memory(fill: Fill, bad: RowErrors) -> tuple[TokenSet, SplitStats]:
    """What `fill` makes, in memory."""
    into = InMemoryColumns()
    fill(into, bad)
    return into.tokens(), into.counts


def read_chunks(file: BinaryIO, seen: Callable[[bytes], None]) -> Iterator[Chunk]:
    """`file` in pieces of about `PIECE` bytes, cut between lines; `seen` is called with the bytes of each.

    A line too long to be a row is cut off, which whoever reads the piece refuses.
    """
    first = 1
    while lines := file.read(PIECE):
        if not lines.endswith(b"\n"):
            lines += file.readline(LONGEST_LINE + 1)
        seen(lines)
        yield Chunk(lines, first)
        first += lines.count(b"\n")


def encode_chunk(
    piece: Chunk, path: Path, chosen: RowFormat | None, encoder: TextEncoder, reading: EncodeOptions, bad: RowErrors
) -> EncodedChunk:
    """The tokens of a piece of the file `path`; `chosen` may be None where the file has no row at all.

    Raises:
        DataError: what ends the reading of a whole file, such as an endless line.
    """
    rows = parse_lines(io.BytesIO(piece.lines), path, bad, piece.first)
    return encode_rows(rows, chosen, encoder, reading, bad) if chosen else _nothing(rows)


def encode_rows(
    rows: Iterable[JsonlRow], chosen: RowFormat, encoder: TextEncoder, reading: EncodeOptions, bad: RowErrors
) -> EncodedChunk:
    """The tokens of `rows`; those that cannot be used go to `bad`."""
    builder = _Builder(reading)
    for row in rows:
        try:
            chosen.check(row.value, reading.keys)
            tokens, spans = chosen.encode(row.value, encoder, reading)
            builder.add(row.line, tokens, spans)
        except RowError as reason:
            bad.add(row.file, row.line, str(reason))
    return builder.finish()


def _nothing(rows: Iterable[JsonlRow]) -> EncodedChunk:
    """What is left of a piece without a row; reading it collects its bad lines."""
    for _ in rows:
        pass
    none = np.zeros(0, np.int64)
    return EncodedChunk(b"", b"", none, none, SplitStats())


class _Builder:
    """Appends rows to byte buffers."""

    def __init__(self, reading: EncodeOptions) -> None:
        self.reading = reading
        self.tokens, self.supervised = bytearray(), bytearray()
        self.ends: list[int] = []
        self.lines: list[int] = []
        self.total = self.supervised_count = 0
        self.truncated = self.dropped = self.nothing_to_learn = self.longest = 0

    def add(self, line: int, tokens: list[int], spans: list[tuple[int, int]]) -> None:
        """Raises BadRow for a row that is too long where that is an error."""
        limit = self.reading.max_length
        self.longest = max(self.longest, len(tokens))
        cut = len(tokens) > limit
        if cut and self.reading.on_too_long == "error":
            raise RowError(
                f"{len(tokens)} tokens, over max_length {limit} "
                "(data.on_too_long=truncate cuts such rows, drop leaves them out)"
            )
        if cut and self.reading.on_too_long == "drop":
            self.dropped += 1
            return
        row = np.asarray(tokens[:limit], dtype=np.int32)
        mask = np.zeros(len(row), dtype=np.uint8)
        for start, end in spans:
            mask[start:end] = 1
        mask[:1] = 0
        supervised = int(mask.sum())
        if supervised == 0:
            self.nothing_to_learn += 1
            return
        self.tokens += row.tobytes()
        self.supervised += mask.tobytes()
        self.total += len(row)
        self.ends.append(self.total)
        self.lines.append(line)
        self.truncated += cut
        self.supervised_count += supervised

    def finish(self) -> EncodedChunk:
        counts = SplitStats(
            rows=len(self.lines),
            tokens=self.total,
            supervised=self.supervised_count,
            truncated=self.truncated,
            dropped=self.dropped,
            nothing_to_learn=self.nothing_to_learn,
            longest=self.longest,
        )
        return EncodedChunk(
            bytes(self.tokens),
            bytes(self.supervised),
            np.array(self.ends, np.int64),
            np.array(self.lines, np.int64),
            counts,
        )
