"""A tokenized split as flat arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from runner.common.text import count


@dataclass(frozen=True)
class TokenSet:
    """The tokens of all rows of a split, concatenated; the arrays are read-only."""

    tokens: np.ndarray
    """(total,) int32."""
    supervised: np.ndarray
    """(total,) bool: whether the token is a target of the loss. A row's first never is: nothing predicts it."""
    offsets: np.ndarray
    """(rows + 1,) int64: row i is ``tokens[offsets[i]:offsets[i + 1]]``."""
    lines: np.ndarray
    """(rows,) int64: the file and the line that each row comes from, see `row_location`."""
    unwanted: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(rows,) bool: whether the row is an answer that the model should not give; all false where it is left out."""
    rows_per_example: int = 1
    """Consecutive rows that are always in the same batch, such as the two answers of a pair."""

    def __post_init__(self) -> None:
        if not len(self.unwanted):
            object.__setattr__(self, "unwanted", np.zeros(len(self.lines), bool))
        for array in (self.tokens, self.supervised, self.offsets, self.lines, self.unwanted):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and mask of one row, both (length,). Raises IndexError outside 0 to rows - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        positions = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[positions], self.supervised[positions]

    def rows_of(self, examples: np.ndarray) -> np.ndarray:
        """Return the indices of the rows of `examples`, in their order."""
        size = self.rows_per_example
        return examples if size == 1 else (examples[:, None] * size + np.arange(size)).reshape(-1)

    @property
    def example_count(self) -> int:
        """Number of examples."""
        return len(self) // self.rows_per_example

    @property
    def example_lengths(self) -> np.ndarray:
        """(examples,) int64: tokens of the longest row of each."""
        size = self.rows_per_example
        return self.lengths if size == 1 else self.lengths.reshape(-1, size).max(axis=1)

    def subset(self, indices: np.ndarray) -> TokenSet:
        """Return the set of the rows `indices`, in their order, each an example of its own."""
        rows = [self.row(int(index)) for index in indices]
        tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in rows)])
        supervised = np.concatenate([np.zeros(0, bool), *(mask for _, mask in rows)])
        offsets = np.cumsum([0, *(len(tokens) for tokens, _ in rows)]).astype(np.int64)
        return TokenSet(tokens, supervised, offsets, self.lines[indices], self.unwanted[indices])

    def grouped(self, rows_per_example: int) -> TokenSet:
        """Return the set with its rows as examples of so many."""
        grouped = replace(self, rows_per_example=rows_per_example)
        if "fingerprint" in vars(self):
            vars(grouped)["fingerprint"] = self.fingerprint
        return grouped

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) int64, in tokens."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of offsets, tokens, mask and what is unwanted: equal for two splits that train identically."""
        digest = hashlib.sha256(fingerprint_header(len(self.tokens), len(self)))
        for array, dtype in ((self.offsets, "<i8"), (self.tokens, "<i4"), (self.supervised, "u1")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
        if self.unwanted.any():  # else the fingerprint is that of versions without it
            digest.update(np.ascontiguousarray(self.unwanted, dtype="u1").data)
        return digest.hexdigest()


_LINE_BITS = 40


def row_location(part: int, line: int) -> int:
    """Return the location of a row as one number: the number of its file in the split, and the line there."""
    return part << _LINE_BITS | line


def split_location(location: int) -> tuple[int, int]:
    """Return the number of the file and the line of a `row_location`."""
    return location >> _LINE_BITS, location & ((1 << _LINE_BITS) - 1)


def part_numbers(locations: np.ndarray) -> np.ndarray:
    """Return the number of the file of each of `locations`, (rows,) int64."""
    return locations >> _LINE_BITS


def fingerprint_header(tokens: int, rows: int) -> bytes:
    """Return the first bytes that a fingerprint hashes; the bytes of the arrays follow."""
    return f"tokens {tokens} rows {rows}\n".encode()


@dataclass(frozen=True, slots=True)
class SplitStats:
    """Row and token counts of tokenizing a split."""

    rows: int = 0
    """Rows in the split."""
    tokens: int = 0
    """Their tokens, without padding."""
    supervised: int = 0
    """Their tokens that count in the loss."""
    truncated: int = 0
    """Rows in the split that were cut at max_length."""
    dropped: int = 0
    """Rows left out because they are too long."""
    unsupervised: int = 0
    """Rows left out because no token is supervised or there are fewer than 2 tokens."""
    prompt_too_long: int = 0
    """Rows left out because the cut leaves nothing that is supervised: their prompt alone reaches max_length."""
    longest: int = 0
    """Tokens of the longest row before any cut."""
    split: int = 0
    """Conversations of the data that became one row for each turn."""
    unwanted: int = 0
    """Rows in the split that are answers that the model should not give."""
    lost_reasoning: int = 0
    """Turns of the assistant whose reasoning the chat template leaves out."""
    lost_reasoning_line: int = 0
    """The line of the first; 0 where there is none."""
    lost_context: int = 0
    """Messages that are not supervised, and tools, that the chat template leaves out."""
    lost_context_line: int = 0
    """The line of the first; 0 where there is none."""

    def template_notes(self, split: str) -> list[str]:
        """Return what the log says about what the chat template leaves out of the rows of `split`."""
        notes = []
        if self.lost_reasoning:
            notes.append(
                f"{split}: the chat template leaves out the reasoning of {count(self.lost_reasoning, 'turn')}, "
                f"first in line {self.lost_reasoning_line}"
            )
        if self.lost_context:
            notes.append(
                f"{split}: the chat template leaves out {count(self.lost_context, 'message')} or tools of the context, "
                f"first in line {self.lost_context_line}"
            )
        return notes

    def __add__(self, other: SplitStats) -> SplitStats:
        """Return the stats of this part of a split and the one that follows it together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        first = {name: getattr(self, name) or getattr(other, name) for name in sums if name.endswith("_line")}
        return SplitStats(**sums | first | {"longest": max(self.longest, other.longest)})
