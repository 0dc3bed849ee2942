"""The lengths that batches are padded to: few, as a compiled step is traced anew for each."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

_MOST = 32
"""Widths that are chosen: of rows of 60 tokens in the middle and 500 at the ninetieth percentile, in batches of near
lengths, 95 % of the positions are then real, and 94 % with 24."""
_BEYOND = 32
"""What a row longer than all of these is padded to a multiple of."""
_FINE = 512
"""Different lengths that are told apart at most: the time to choose grows with their square."""


class LengthBuckets:
    """The widths of one set of rows."""

    def __init__(self, multiple: int, chosen: tuple[int, ...] = ()) -> None:
        """`chosen`, rising; multiples of `multiple` beyond the last of them."""
        self.chosen, self._multiple = chosen, multiple

    @classmethod
    def of(cls, lengths: np.ndarray, pad_to: int | None) -> LengthBuckets:
        """Multiples of `pad_to`; where it is None those that pad rows of `lengths` (rows,), in tokens, least."""
        return cls(pad_to) if pad_to is not None else cls(_BEYOND, minimize_padding(np.asarray(lengths) - 1, _MOST))

    def fit(self, count: int) -> int:
        """The least width that holds `count` positions."""
        found = bisect_left(self.chosen, count)
        return self.chosen[found] if found < len(self.chosen) else max(1, -(-count // self._multiple)) * self._multiple


def minimize_padding(counts: np.ndarray, most: int) -> tuple[int, ...]:
    """`most` widths or fewer for which the positions of rows of `counts` (rows,), each padded to the next width, are
    fewest; rising, the last one the largest count. Empty without rows.

    Exact where the counts have at most 512 different values, else of these rounded up: the best division of a line
    into stretches, by the length of the line and the number of stretches (Bellman, 1957).
    """
    if len(counts) == 0:
        return ()
    top = max(1, int(counts.max()))
    step = -(-top // _FINE)
    # From the largest down, so that rounding up does not make it larger.
    values, numbers = np.unique(top - (top - np.maximum(counts, 1)) // step * step, return_counts=True)
    total = np.concatenate([[0.0], np.cumsum(numbers)])
    # (i, j): positions of the values from i up to j, padded to the largest of them.
    stretch = np.full((len(total), len(total)), np.inf)
    stretch[:, 1:] = np.where(np.tri(len(total), len(values), -1), np.inf, values * (total[1:] - total[:, None]))
    stretch[0, 0] = 0
    least, before = stretch[0], [np.zeros(len(total), np.int64)]
    for _ in range(1, min(most, len(values))):
        ways = least[:, None] + stretch
        before.append(ways.argmin(axis=0))
        least = ways.min(axis=0)
    chosen, j = [], len(values)
    for last in reversed(before):
        if j:
            chosen.append(int(values[j - 1]))
            j = int(last[j])
    return tuple(reversed(chosen))
