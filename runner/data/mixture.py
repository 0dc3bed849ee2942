"""How many rows of each source an epoch has, and which ones: a pure function of the seed and the epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

RandomKeys = Callable[[int, int, str, int], np.ndarray]
"""Returns `count` sort keys as a function of (seed, pass, purpose, count); see `order.random_keys`."""


@dataclass(frozen=True)
class Mixture:
    """The sources of a training split, whose rows follow each other, and the number of rows of each in an epoch.

    An epoch has as many rows as all sources together. A source whose share is not all of its rows walks through
    permutations of its rows, one after the other across epochs: nothing is drawn with replacement.
    """

    sizes: tuple[int, ...]
    """Rows of each source."""
    counts: tuple[int, ...]
    """Rows of each source in an epoch."""

    @classmethod
    def from_weights(cls, sizes: Sequence[int], weights: Sequence[float | None]) -> Mixture:
        """Share an epoch out by `weights`, rounded by largest remainders; by the number of rows if they are None."""
        if any(weight is None for weight in weights):
            return cls(tuple(sizes), tuple(sizes))
        shares = [Fraction(str(weight)) for weight in weights]
        exact = [sum(sizes) * share / sum(shares) for share in shares]
        counts = [int(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for index in by_remainder[: sum(sizes) - sum(counts)]:
            counts[index] += 1
        return cls(tuple(sizes), tuple(counts))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the sizes and the counts."""
        return hashlib.sha256(json.dumps([self.sizes, self.counts]).encode()).hexdigest()

    def rows(self, seed: int, epoch: int, random_keys: RandomKeys) -> np.ndarray:
        """Return the rows of an epoch, (rows,) int64, source by source; the caller shuffles them."""
        parts, first = [], 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size == count:
                parts.append(np.arange(first, first + size))
            elif size:
                parts.append(first + self._walk(source, size, epoch * count, count, seed, random_keys))
            first += size
        return np.concatenate(parts)

    @staticmethod
    def _walk(source: int, size: int, start: int, count: int, seed: int, random_keys: RandomKeys) -> np.ndarray:
        """Return `count` rows from position `start` of the endless sequence of permutations of a source."""
        passes = [
            np.argsort(random_keys(seed, number, f"source {source}", size), kind="stable")
            for number in range(start // size, (start + count - 1) // size + 1)
        ]
        walk = np.concatenate(passes) if passes else np.zeros(0, np.int64)
        return walk[start % size : start % size + count]
