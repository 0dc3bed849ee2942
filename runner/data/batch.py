"""A batch as arrays: padded inputs, and the supervised positions picked out for the head and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.data.length_buckets import LengthBuckets
from runner.data.token_set import TokenSet

POSITIONS_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows shifted by one: the token at a position predicts the next one.

    Widths and counts are rounded up so that a compiled step meets few shapes.
    """

    inputs: np.ndarray
    """(batch, length) int32: each row without its last token, 0 after its end."""
    positions: np.ndarray
    """(n,) int32: indices into the flattened (batch * length) positions whose next token is supervised."""
    targets: np.ndarray
    """(n,) int32: that next token."""
    weights: np.ndarray
    """(n,) float32: 1, and 0 for the filling up to a multiple of 64 (its position and target are 0)."""
    supervised: int
    """Supervised tokens: the sum of `weights`."""
    lengths: np.ndarray
    """(batch,) int64: of each row, without padding."""

    @property
    def real_tokens(self) -> int:
        """Input tokens without padding."""
        return int(self.lengths.sum())


def collate(tokens: TokenSet, indices: np.ndarray, widths: LengthBuckets) -> Batch:
    """The batch of the rows `indices`, in their order.

    The length is the least of `widths` that holds the longest row less its last token. Raises ValueError without a
    row.
    """
    indices = np.asarray(indices)
    if indices.size == 0:
        raise ValueError("a batch needs at least one row")
    starts = tokens.offsets[indices]
    counts = tokens.offsets[indices + 1] - starts - 1
    length = widths.fit(int(counts.max()))
    real = int(counts.sum())
    row = np.repeat(np.arange(len(indices)), counts)
    column = np.arange(real) - np.repeat(np.cumsum(counts) - counts, counts)
    source = starts[row] + column

    inputs = np.zeros((len(indices), length), np.int32)
    inputs[row, column] = tokens.tokens[source]
    counted = tokens.supervised[source + 1]
    supervised = int(counted.sum())
    size = max(1, -(-supervised // POSITIONS_MULTIPLE)) * POSITIONS_MULTIPLE
    positions, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
    weights = np.zeros(size, np.float32)
    positions[:supervised] = (row * length + column)[counted]
    targets[:supervised] = tokens.tokens[source + 1][counted]
    weights[:supervised] = 1
    return Batch(inputs, positions, targets, weights, supervised, counts)
