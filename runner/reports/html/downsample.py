"""Thinning out of long curves for a chart, so that every peak stays visible."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DIGITS = 6


def thinned(values: Sequence[float | None], limit: int) -> list[int]:
    """Return the indexes of at most `limit` values to draw: the first, the last, and the lowest and highest of groups.

    None counts as no value: it is kept only where all are.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    groups = max(1, (limit - 2) // 2)
    keep = {0, len(values) - 1}
    for group in range(groups):
        start, end = group * len(values) // groups, (group + 1) * len(values) // groups
        present = [i for i in range(start, end) if values[i] is not None]
        if present:
            keep.add(min(present, key=lambda i: values[i] or 0.0))
            keep.add(max(present, key=lambda i: values[i] or 0.0))
    return sorted(keep)


def rounded(value: float | None) -> float | None:
    """Return a number with six significant digits, which no screen shows more of; whole ones stay whole."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
