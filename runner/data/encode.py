"""Encoding the rows of a file chunk by chunk; the encoded chunks in file order are the split."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from runner.data.chat_template import TemplateOptions
from runner.data.encoded import Encoded, Span
from runner.data.formats import EncodeOptions, RowFormat, refuse_media
from runner.data.holdout import Holdout
from runner.data.jsonl import MAX_LINE_BYTES, parse_lines
from runner.data.preferences import encode_answers
from runner.data.row_errors import RowError, RowErrors
from runner.data.text_encoder import TextEncoder
from runner.data.token_set import SplitStats, TokenSet, row_location

CHUNK_BYTES = 1 << 20
"""Bytes of JSONL that are encoded at a time; encoding takes up to ten times as much memory."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive whole lines of a file."""

    lines: bytes
    first_line: int
    """The number of the first line, from 1."""
    part: int = 0
    """The number of the file in its split."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """The encoded rows of a chunk."""

    tokens: bytes
    """(total,) int32."""
    supervised: bytes
    """(total,) uint8, 0 or 1."""
    ends: np.ndarray
    """(rows,) int64: where each row ends, counted from the first token of the chunk."""
    lines: np.ndarray
    """(rows,) int64: the line of each row."""
    unwanted: np.ndarray
    """(rows,) bool: whether each row is an answer that the model should not give."""
    stats: SplitStats


class ChunkWriter(Protocol):
    """Receives the encoded chunks of a split in order."""

    def append(self, chunk: EncodedChunk) -> None:
        """Append the rows of `chunk`."""


class TokenBuffer:
    """A ChunkWriter in memory: 5 bytes per token and 17 per row, which the resulting arrays share."""

    def __init__(self) -> None:
        self.stats = SplitStats()
        self._tokens, self._supervised = bytearray(), bytearray()
        self._offsets, self._lines = bytearray(np.int64(0).tobytes()), bytearray()
        self._unwanted = bytearray()

    def append(self, chunk: EncodedChunk) -> None:
        """Append the rows of `chunk`."""
        self._tokens += chunk.tokens
        self._supervised += chunk.supervised
        self._offsets += (chunk.ends + self.stats.tokens).tobytes()
        self._lines += chunk.lines.tobytes()
        self._unwanted += chunk.unwanted.tobytes()
        self.stats += chunk.stats

    def to_token_set(self) -> TokenSet:
        """Return all rows; nothing can be appended after this."""
        return TokenSet(
            np.frombuffer(self._tokens, np.int32),
            np.frombuffer(self._supervised, np.bool_),
            np.frombuffer(self._offsets, np.int64),
            np.frombuffer(self._lines, np.int64),
            np.frombuffer(self._unwanted, np.bool_),
        )


TokenizeFile = Callable[[ChunkWriter, RowErrors], str | None]
"""Tokenizes one file into the writer and adds its bad rows to the errors; see `tokenize.tokenize_file`."""


def tokenize_in_memory(tokenize: TokenizeFile, errors: RowErrors) -> tuple[TokenSet, SplitStats]:
    """Return what `tokenize` writes, in memory."""
    buffer = TokenBuffer()
    tokenize(buffer, errors)
    return buffer.to_token_set(), buffer.stats


def read_chunks(file: BinaryIO, on_bytes: Callable[[bytes], None]) -> Iterator[Chunk]:
    """Yield `file` in chunks of about `CHUNK_BYTES`, split between lines; call `on_bytes` with the bytes of each.

    A line that is too long for a row is cut off, which `encode_chunk` then refuses.
    """
    first_line = 1
    while lines := file.read(CHUNK_BYTES):
        if not lines.endswith(b"\n"):
            lines += file.readline(MAX_LINE_BYTES + 1)
        on_bytes(lines)
        yield Chunk(lines, first_line)
        first_line += lines.count(b"\n")


@dataclass(frozen=True)
class EncodePart:
    """One file of a split, and how its rows are encoded."""

    file: Path
    row_format: RowFormat
    options: EncodeOptions
    holdout: Holdout | None = None
    """Which of its rows belong to the split; None for all."""


@dataclass(frozen=True)
class EncodeTask:
    """What all chunks of a split share; it can be pickled if the tokenizer can."""

    parts: tuple[EncodePart, ...]
    tokenizer: Any

    @property
    def template(self) -> TemplateOptions:
        """The chat template of all parts."""
        return self.parts[0].options.template


def encode_chunk(chunk: Chunk, task: EncodeTask, encoder: TextEncoder, errors: RowErrors) -> EncodedChunk:
    """Return the encoded rows of `chunk`; rows that cannot be used are added to `errors`.

    Raises:
        DataError: reading the file cannot continue, for example because a line is too long.
    """
    part = task.parts[chunk.part]
    builder = _ChunkBuilder(part.options, chunk.part)
    for row in parse_lines(io.BytesIO(chunk.lines), part.file, errors, chunk.first_line):
        if part.holdout is not None and not part.holdout.selects(row.value):
            continue
        try:
            refuse_media(row.value, part.options.keys)
            part.row_format.validate(row.value, part.options.keys)
            builder.add_row(row.line, encode_answers(row.value, part.row_format, encoder, part.options))
        except RowError as error:
            errors.add(row.file, row.line, str(error))
    return builder.finish()


@dataclass(frozen=True, slots=True)
class _CutRow:
    """A row within the length limit, or the reason why there is none."""

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    truncated: bool = False
    reason: str = ""
    """Name of the count of SplitStats for rows that are left out for it."""


class _ChunkBuilder:
    """Truncates or drops rows that are too long and appends the others to byte buffers."""

    def __init__(self, options: EncodeOptions, part: int) -> None:
        self.options, self.part = options, part
        self.tokens, self.supervised = bytearray(), bytearray()
        self.total = self.longest = 0
        self.ends: list[int] = []
        self.lines: list[int] = []
        self.unwanted: list[bool] = []
        self.counts = Counter[str]()
        """Counts by the name of a SplitStats field."""
        self.first_lines: dict[str, int] = {}
        """Line numbers by the name of a SplitStats field."""

    def add_row(self, line: int, encoded: Encoded) -> None:
        """Append the token rows of one row; of a pair both or none. Raises RowError for a row that is too long where
        `on_too_long` is ``error``."""
        is_pair = len(set(encoded.unwanted)) == 2
        unwanted = encoded.unwanted or (False,) * len(encoded.rows)
        rows = [
            (self._cut(tokens, spans), unwanted)
            for (tokens, spans), unwanted in zip(encoded.rows, unwanted, strict=True)
        ]
        reasons = [cut.reason for cut, _ in rows if cut.reason]
        if is_pair and reasons:
            self.counts[reasons[0]] += 1
            return
        self.counts.update(reasons)
        for cut, is_unwanted in rows:
            if not cut.reason:
                self._append(line, cut, is_unwanted)
        self.counts["split"] += len(encoded.rows) > 1 and not is_pair
        for name in ("lost_reasoning", "lost_context"):
            if count := getattr(encoded, name):
                self.counts[name] += count
                self.first_lines.setdefault(f"{name}_line", line)

    def _cut(self, tokens: list[int], spans: list[Span]) -> _CutRow:
        """Return the row within `max_length`. Raises RowError where `on_too_long` is ``error``."""
        limit = self.options.max_length
        self.longest = max(self.longest, len(tokens))
        too_long = len(tokens) > limit
        if too_long and self.options.on_too_long == "error":
            raise RowError(
                f"{len(tokens)} tokens, over max_length {limit} "
                "(data.on_too_long=truncate cuts such rows, drop leaves them out)"
            )
        if too_long and self.options.on_too_long == "drop":
            return _CutRow(reason="dropped")
        row = np.asarray(tokens[:limit], dtype=np.int32)
        mask = np.zeros(len(row), dtype=np.uint8)
        for start, end in spans:
            mask[start:end] = 1
        mask[:1] = 0
        if not mask.any():
            return _CutRow(reason="prompt_too_long" if too_long else "unsupervised")
        return _CutRow(row, mask, truncated=too_long)

    def _append(self, line: int, row: _CutRow, unwanted: bool) -> None:
        self.tokens += row.tokens.tobytes()
        self.supervised += row.mask.tobytes()
        self.total += len(row.tokens)
        self.ends.append(self.total)
        self.lines.append(row_location(self.part, line))
        self.unwanted.append(unwanted)
        self.counts["truncated"] += row.truncated
        self.counts["supervised"] += int(row.mask.sum())
        self.counts["unwanted"] += unwanted

    def finish(self) -> EncodedChunk:
        """Return the rows that were added."""
        return EncodedChunk(
            bytes(self.tokens),
            bytes(self.supervised),
            np.array(self.ends, np.int64),
            np.array(self.lines, np.int64),
            np.array(self.unwanted, bool),
            SplitStats(
                rows=len(self.lines), tokens=self.total, longest=self.longest, **self.counts, **self.first_lines
            ),
        )
