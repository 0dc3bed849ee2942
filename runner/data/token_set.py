"""A split as flat arrays of tokens: what training reads, and what its identity is taken from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


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
        digest = hashlib.sha256(fingerprint_head(len(self.tokens), len(self)))
        for array, stored in ((self.offsets, "<i8"), (self.tokens, "<i4"), (self.supervised, "u1")):
            digest.update(np.ascontiguousarray(array, dtype=stored).data)
        return digest.hexdigest()


def fingerprint_head(tokens: int, rows: int) -> bytes:
    """What the fingerprint of so many tokens in so many rows begins with; the bytes of the arrays follow."""
    return f"tokens {tokens} rows {rows}\n".encode()


@dataclass(frozen=True, slots=True)
class SplitStats:
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

    def __add__(self, other: SplitStats) -> SplitStats:
        """The counts of both parts of a split together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        return SplitStats(**sums | {"longest": max(self.longest, other.longest)})
