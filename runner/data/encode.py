"""Encoding the rows of a file chunk by chunk; the encoded chunks in file order are the split."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from runner.data.chat_template import TemplateOptions
from runner.data.encoded import Encoded, Span
from runner.data.formats import EncodeOptions, RowFormat, refuse_media
from runner.data.holdout import Holdout
from runner.data.jsonl import MAX_LINE_BYTES, parse_lines
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
    stats: SplitStats


class ChunkWriter(Protocol):
    """Receives the encoded chunks of a split in order."""

    def append(self, chunk: EncodedChunk) -> None:
        """Append the rows of `chunk`."""


class TokenBuffer:
    """A ChunkWriter in memory: 5 bytes per token and 16 per row, which the resulting arrays share."""

    def __init__(self) -> None:
        self.stats = SplitStats()
        self._tokens, self._supervised = bytearray(), bytearray()
        self._offsets, self._lines = bytearray(np.int64(0).tobytes()), bytearray()

    def append(self, chunk: EncodedChunk) -> None:
        """Append the rows of `chunk`."""
        self._tokens += chunk.tokens
        self._supervised += chunk.supervised
        self._offsets += (chunk.ends + self.stats.tokens).tobytes()
        self._lines += chunk.lines.tobytes()
        self.stats += chunk.stats

    def to_token_set(self) -> TokenSet:
        """Return all rows; nothing can be appended after this."""
        return TokenSet(
            np.frombuffer(self._tokens, np.int32),
            np.frombuffer(self._supervised, np.bool_),
            np.frombuffer(self._offsets, np.int64),
            np.frombuffer(self._lines, np.int64),
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
            builder.add_row(row.line, part.row_format.encode(row.value, encoder, part.options))
        except RowError as error:
            errors.add(row.file, row.line, str(error))
    return builder.finish()


class _ChunkBuilder:
    """Truncates or drops rows that are too long and appends the others to byte buffers."""

    def __init__(self, options: EncodeOptions, part: int) -> None:
        self.options, self.part = options, part
        self.tokens, self.supervised = bytearray(), bytearray()
        self.total = self.longest = 0
        self.ends: list[int] = []
        self.lines: list[int] = []
        self.counts = Counter[str]()
        """Counts by the name of a SplitStats field."""
        self.first_lines: dict[str, int] = {}
        """Line numbers by the name of a SplitStats field."""

    def add_row(self, line: int, encoded: Encoded) -> None:
        """Append the token rows of one row. Raises RowError as `add`."""
        for tokens, spans in encoded.rows:
            self.add(line, tokens, spans)
        self.counts["split"] += len(encoded.rows) > 1
        for name in ("lost_reasoning", "lost_context"):
            if count := getattr(encoded, name):
                self.counts[name] += count
                self.first_lines.setdefault(f"{name}_line", line)

    def add(self, line: int, tokens: list[int], spans: list[Span]) -> None:
        """Append a row. Raises RowError for one that is too long where `on_too_long` is ``error``."""
        limit = self.options.max_length
        self.longest = max(self.longest, len(tokens))
        too_long = len(tokens) > limit
        if too_long and self.options.on_too_long == "error":
            raise RowError(
                f"{len(tokens)} tokens, over max_length {limit} "
                "(data.on_too_long=truncate cuts such rows, drop leaves them out)"
            )
        if too_long and self.options.on_too_long == "drop":
            self.counts["dropped"] += 1
            return
        row = np.asarray(tokens[:limit], dtype=np.int32)
        mask = np.zeros(len(row), dtype=np.uint8)
        for start, end in spans:
            mask[start:end] = 1
        mask[:1] = 0
        supervised = int(mask.sum())
        if supervised == 0:
            self.counts["prompt_too_long" if too_long else "unsupervised"] += 1
            return
        self.tokens += row.tobytes()
        self.supervised += mask.tobytes()
        self.total += len(row)
        self.ends.append(self.total)
        self.lines.append(row_location(self.part, line))
        self.counts["truncated"] += too_long
        self.counts["supervised"] += supervised

    def finish(self) -> EncodedChunk:
        """Return the rows that were added."""
        return EncodedChunk(
            bytes(self.tokens),
            bytes(self.supervised),
            np.array(self.ends, np.int64),
            np.array(self.lines, np.int64),
            SplitStats(
                rows=len(self.lines), tokens=self.total, longest=self.longest, **self.counts, **self.first_lines
            ),
        )
