"""The lengths that batches are padded to: a small set, because a compiled step is traced again for every new length."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

_MAX_BUCKETS = 32
"""With a median of 60 tokens and a 90th percentile of 500, in batches sorted by length, 95 % of the positions then hold
a token; with 24 buckets, 94 %."""
_BEYOND_MULTIPLE = 32
"""A row longer than every bucket is padded to a multiple of this."""
_MAX_DISTINCT_LENGTHS = 512
"""Lengths are rounded up to at most this many values: the time to choose the buckets grows with the square of it."""


class LengthBuckets:
    """The padded lengths for the rows of one split."""

    def __init__(self, multiple: int, lengths: tuple[int, ...] = ()) -> None:
        """Use `lengths`, in ascending order, and multiples of `multiple` beyond the last of them."""
        self.lengths, self._multiple = lengths, multiple

    @classmethod
    def from_lengths(cls, row_lengths: np.ndarray, pad_to: int | None) -> LengthBuckets:
        """Return multiples of `pad_to`; where it is None, the lengths that minimize the padding of the rows.

        `row_lengths`: (rows,), in tokens.
        """
        if pad_to is not None:
            return cls(pad_to)
        return cls(_BEYOND_MULTIPLE, minimize_padding(np.asarray(row_lengths) - 1, _MAX_BUCKETS))

    def padded_length(self, count: int) -> int:
        """Return the smallest length that holds `count` positions."""
        index = bisect_left(self.lengths, count)
        return (
            self.lengths[index] if index < len(self.lengths) else max(1, -(-count // self._multiple)) * self._multiple
        )


def minimize_padding(counts: np.ndarray, max_buckets: int) -> tuple[int, ...]:
    """Return at most `max_buckets` lengths that minimize the total size of rows padded to the next length.

    `counts`: (rows,), positions of each row. The lengths ascend and end with the largest count; empty without rows.
    Exact where there are at most 512 distinct counts, else for counts rounded up to so many. The lengths are the
    optimal partition of the sorted counts into segments, by dynamic programming over the number of segments (Bellman,
    1957).
    """
    if len(counts) == 0:
        return ()
    largest = max(1, int(counts.max()))
    step = -(-largest // _MAX_DISTINCT_LENGTHS)
    # Counting down from the largest, so that rounding up never exceeds it.
    rounded = largest - (largest - np.maximum(counts, 1)) // step * step
    values, occurrences = np.unique(rounded, return_counts=True)
    rows_below = np.concatenate([[0.0], np.cumsum(occurrences)])
    # cost[i, j]: positions of the rows with the values from i up to j, each padded to the largest of them.
    cost = np.full((len(rows_below), len(rows_below)), np.inf)
    cost[:, 1:] = np.where(
        np.tri(len(rows_below), len(values), -1), np.inf, values * (rows_below[1:] - rows_below[:, None])
    )
    cost[0, 0] = 0
    best, previous = cost[0], [np.zeros(len(rows_below), np.int64)]
    for _ in range(1, min(max_buckets, len(values))):
        candidates = best[:, None] + cost
        previous.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    lengths, end = [], len(values)
    for segment_starts in reversed(previous):
        if end:
            lengths.append(int(values[end - 1]))
            end = int(segment_starts[end])
    return tuple(reversed(lengths))
