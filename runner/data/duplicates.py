"""Equal and nearly equal rows of a tokenized data set, in bounded time.

Near duplicates are found by MinHash (Broder, "On the resemblance and containment of documents", 1997) over sequences of
`_SHINGLE` tokens. Sequences that many rows share, such as a system prompt, do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runner.data.token_set import TokenSet

MAX_ROWS = 20_000
"""Rows of a split that are compared with each other; of a larger split, the first."""
SIMILARITY = 0.8
"""Share of the sequences that two rows have in common from which on they are near duplicates (Jaccard)."""
_SHINGLE = 5
_MAX_TOKENS = 512
"""Tokens of a row that are compared."""
_HASHES, _BANDS = 64, 16
_MAX_SHARED = 0.1
"""A sequence that occurs more often than in this share of the rows is left out."""
_MIN_SHARED_ROWS = 20
_MIN_SHINGLES = 4
_MAX_BUCKET = 50

RowId = tuple[str, int]
"""A split and the index of a row in it."""


@dataclass(frozen=True)
class Duplicates:
    """Pairs of a row and an earlier one that it repeats; splits are in the order in which they were given."""

    exact: list[tuple[RowId, RowId]]
    near: list[tuple[RowId, RowId]]
    compared: dict[str, int]
    """The number of rows of each split that were compared."""

    def between(self, pairs: list[tuple[RowId, RowId]], split: str, earlier: str) -> list[tuple[RowId, RowId]]:
        """Return the pairs of a row of `split` and a row of `earlier`."""
        return [pair for pair in pairs if pair[0][0] == split and pair[1][0] == earlier]


def find_duplicates(splits: Mapping[str, TokenSet]) -> Duplicates:
    """Return the rows that repeat an earlier row, in the same or in an earlier split."""
    compared = {name: min(len(token_set), MAX_ROWS) for name, token_set in splits.items()}
    ids: list[RowId] = [(name, row) for name, count in compared.items() for row in range(count)]
    rows = [splits[name].row(row)[0] for name, row in ids]
    exact: list[tuple[RowId, RowId]] = []
    # A row of one split may repeat rows of several splits: the first of each counts.
    first_of: dict[bytes, dict[str, int]] = {}
    unique = []
    for number, row in enumerate(rows):
        known = first_of.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), {})
        exact += [(ids[number], ids[first]) for first in known.values()]
        if not known:
            unique.append(number)
        known.setdefault(ids[number][0], number)
    near = [(ids[unique[later]], ids[unique[first]]) for later, first in _near_pairs([rows[i] for i in unique])]
    return Duplicates(exact, near, compared)


def _near_pairs(rows: list[np.ndarray]) -> list[tuple[int, int]]:
    """Return a pair (row, earlier row) for each row that nearly repeats an earlier one."""
    signatures, numbers = _signatures(rows)
    candidates: dict[int, set[int]] = {}
    width = _HASHES // _BANDS
    for band in range(_BANDS):
        keys = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        buckets: dict[bytes, list[int]] = {}
        for index, key in enumerate(keys):
            bucket = buckets.setdefault(key.tobytes(), [])
            if bucket:
                candidates.setdefault(index, set()).update(bucket)
            if len(bucket) < _MAX_BUCKET:
                bucket.append(index)
    pairs = []
    for index, earlier in sorted(candidates.items()):
        others = np.array(sorted(earlier))
        similarity = (signatures[others] == signatures[index]).mean(axis=1)
        if similarity.max() >= SIMILARITY:
            pairs.append((int(numbers[index]), int(numbers[others[int(similarity.argmax())]])))
    return pairs


def _signatures(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the MinHash signatures, (n, hashes) uint64, of the rows that have enough sequences, and their numbers."""
    empty = np.zeros((0, _HASHES), np.uint64), np.zeros(0, np.int64)
    cut = [row[:_MAX_TOKENS] for row in rows]
    lengths = np.array([len(row) for row in cut], np.int64)
    if not len(lengths) or lengths.max() < _SHINGLE:
        return empty
    tokens = np.concatenate(cut).astype(np.uint64)
    row_of = np.repeat(np.arange(len(cut)), lengths)
    count = len(tokens) - _SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(_SHINGLE):
        hashes = (hashes + tokens[offset : offset + count] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    within = row_of[:count] == row_of[_SHINGLE - 1 :]
    hashes, row_of = hashes[within], row_of[:count][within]
    _, inverse, often = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = often[inverse] <= max(_MIN_SHARED_ROWS, _MAX_SHARED * len(cut))
    hashes, row_of = hashes[rare], row_of[rare]
    numbers, starts, sizes = np.unique(row_of, return_index=True, return_counts=True)
    if not len(numbers):
        return empty
    random = np.random.Philox(key=1).random_raw(2 * _HASHES) | np.uint64(1)
    signatures = np.empty((len(numbers), _HASHES), np.uint64)
    for number in range(_HASHES):
        mixed = hashes * random[2 * number] + random[2 * number + 1]
        signatures[:, number] = np.minimum.reduceat(mixed ^ (mixed >> np.uint64(32)), starts)
    enough = sizes >= _MIN_SHINGLES
    return signatures[enough], numbers[enough]
