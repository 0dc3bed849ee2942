"""A split as flat arrays of tokens: what training reads, and what its identity is taken from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runner.data.bad_rows import BadRow, BadRows
from runner.data.formats import Format, Reading, choose_format
from runner.data.rows import LazyRows, Row, read_rows
from runner.data.source import EXPECTED, SPLITS, find_files, listing, resolve
from runner.data.turns import Encoder
from runner.errors import DataError


@dataclass(frozen=True)
class TokenSet:
    """The tokens of all rows, one after the other; the arrays are read-only."""

    tokens: np.ndarray
    """(total,) int32."""
    supervised: np.ndarray
    """(total,) bool: whether the token counts as a target. A row's first never does: nothing predicts it."""
    offsets: np.ndarray
    """(rows + 1,) int64: row i is ``tokens[offsets[i]:offsets[i + 1]]``."""
    lines: np.ndarray
    """(rows,) int64: the line of the file that each row came from."""

    def __post_init__(self) -> None:
        for array in (self.tokens, self.supervised, self.offsets, self.lines):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and supervision of one row, both (length,). Raises IndexError outside 0 to rows - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.supervised[part]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) int64, in tokens."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over offsets, tokens and supervision: equal for two sets that train alike."""
        digest = hashlib.sha256(f"tokens {len(self.tokens)} rows {len(self)}\n".encode())
        for array, stored in ((self.offsets, "<i8"), (self.tokens, "<i4"), (self.supervised, "u1")):
            digest.update(np.ascontiguousarray(array, dtype=stored).data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows of a split."""

    rows: int = 0
    """Rows kept."""
    tokens: int = 0
    """Tokens kept, padding not being any."""
    supervised: int = 0
    """Tokens kept that count in the loss."""
    truncated: int = 0
    """Kept rows that were cut at max_length."""
    dropped: int = 0
    """Rows left out for being too long."""
    nothing_to_learn: int = 0
    """Rows left out without a supervised token (after the cut), or shorter than 2 tokens."""
    longest: int = 0
    """Tokens of the longest row before any cut."""


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set as tokens; a split that there is no file for is empty."""

    train: TokenSet
    valid: TokenSet
    test: TokenSet
    rows: dict[str, LazyRows]
    """The raw rows of each split's file, all of them, read at the first access."""
    counts: dict[str, Counts]
    where: Path
    """The folder the files were found for."""


def tokenise(
    rows: Iterable[Row], tokenizer: Any, reading: Reading, bad: BadRows | None = None
) -> tuple[TokenSet, Counts]:
    """The rows as tokens, in their order, and what became of them. Memory grows with tokens, 5 bytes each.

    `tokenizer` is mlx-lm's TokenizerWrapper or a transformers tokenizer. Rows that cannot be used go to
    `bad`; without it, they raise once all rows are read.

    Raises:
        DataError: bad rows where `bad` is None, or no format for the first row.
    """
    collected = BadRows() if bad is None else bad
    encoder = Encoder(tokenizer)
    builder = _Builder(reading)
    chosen: Format | None = None
    for row in rows:
        if chosen is None:
            chosen = choose_format(row, encoder, reading)
        try:
            chosen.check(row.value, reading.keys)
            tokens, spans = chosen.encode(row.value, encoder, reading)
            builder.add(row.line, tokens, spans)
        except BadRow as reason:
            collected.add(row.file, row.line, str(reason))
    if bad is None:
        collected.raise_if_any()
    return builder.finish()


def load_splits(path: str, tokenizer: Any, reading: Reading, splits: Sequence[str] = SPLITS) -> DataSet:
    """Resolve, read and tokenise a data set. Of `splits`, train has to be there, valid and test need not.

    Raises:
        DataError: with all bad rows of all files, or when a split that is there has no row to learn from.
    """
    where = resolve(path)
    files = find_files(where)
    if "train" in splits and "train" not in files:
        raise DataError(f"{where} has no train.jsonl. {EXPECTED} {listing(where)}")
    files = {split: file for split, file in files.items() if split in splits}
    bad = BadRows()
    read = {split: tokenise(read_rows(file, bad), tokenizer, reading, bad) for split, file in files.items()}
    bad.raise_if_any()
    for split, (_, counts) in read.items():
        if counts.rows == 0:
            raise DataError(
                f"{files[split]} has no row to learn from: {counts.dropped} longer than max_length "
                f"{reading.max_length}, {counts.nothing_to_learn} without a supervised token."
            )
    nothing = _Builder(reading).finish()
    sets = {split: read.get(split, nothing) for split in SPLITS}
    return DataSet(
        **{split: tokens for split, (tokens, _) in sets.items()},
        rows={split: LazyRows(files.get(split)) for split in SPLITS},
        counts={split: counts for split, (_, counts) in sets.items()},
        where=where,
    )


class _Builder:
    """Appends rows to byte buffers that the arrays then share."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.tokens, self.supervised = bytearray(), bytearray()
        self.ends, self.lines = bytearray(np.int64(0).tobytes()), bytearray()
        self.total = self.rows = self.supervised_count = 0
        self.truncated = self.dropped = self.nothing_to_learn = self.longest = 0

    def add(self, line: int, tokens: list[int], spans: list[tuple[int, int]]) -> None:
        """Raises BadRow for a row that is too long where that is an error."""
        limit = self.reading.max_length
        self.longest = max(self.longest, len(tokens))
        cut = len(tokens) > limit
        if cut and self.reading.on_too_long == "error":
            raise BadRow(
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
        self.ends += np.int64(self.total).tobytes()
        self.lines += np.int64(line).tobytes()
        self.rows += 1
        self.truncated += cut
        self.supervised_count += supervised

    def finish(self) -> tuple[TokenSet, Counts]:
        tokens = TokenSet(
            np.frombuffer(self.tokens, np.int32),
            np.frombuffer(self.supervised, np.bool_),
            np.frombuffer(self.ends, np.int64),
            np.frombuffer(self.lines, np.int64),
        )
        counts = Counts(
            rows=self.rows,
            tokens=self.total,
            supervised=self.supervised_count,
            truncated=self.truncated,
            dropped=self.dropped,
            nothing_to_learn=self.nothing_to_learn,
            longest=self.longest,
        )
        return tokens, counts
