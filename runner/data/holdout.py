"""Cutting validation rows off the training rows where a data set has none: by a hash of each row and nothing else.

A row keeps its side when others are added, and equal rows are on the same side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Holdout:
    """Selects the rows of one side of the cut."""

    threshold: int
    """Rows with a hash up to this one are validation rows."""
    valid: bool
    """Whether this side is the validation rows."""

    def selects(self, row: Mapping[str, Any]) -> bool:
        """Return whether `row` is on this side."""
        return (row_hash(row) <= self.threshold) == self.valid


def row_hash(row: Mapping[str, Any]) -> int:
    """Return a hash of the content of a row, equal for rows that differ in the order of their fields alone."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest(), "big")


def find_threshold(rows: Iterable[Mapping[str, Any]], fraction: float) -> int:
    """Return the threshold that selects about `fraction` of `rows`, and at least the one with the smallest hash.

    Reads no further than to the first row that is selected.
    """
    threshold = int(fraction * 256**_HASH_BYTES) - 1
    smallest = None
    for row in rows:
        value = row_hash(row)
        if value <= threshold:
            return threshold
        smallest = value if smallest is None else min(smallest, value)
    return threshold if smallest is None else smallest
