"""Collating rows into a batch: padded inputs, and the supervised positions for the LM head and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.data.length_buckets import LengthBuckets
from runner.data.token_set import TokenSet

POSITIONS_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows shifted by one: the token at a position predicts the next one.

    Lengths and numbers of positions are rounded up so that a compiled step sees few shapes.
    """

    inputs: np.ndarray
    """(batch, length) int32: each row without its last token, padded with 0."""
    positions: np.ndarray
    """(n,) int32: indices into the flattened (batch * length) positions whose next token is supervised."""
    targets: np.ndarray
    """(n,) int32: that next token."""
    weights: np.ndarray
    """(n,) float32: 1, and 0 for the padding of n to a multiple of 64 (its position and target are 0)."""
    supervised: int
    """Number of supervised tokens: the sum of `weights`."""
    input_lengths: np.ndarray
    """(batch,) int64: inputs of each row without padding."""
    rows: np.ndarray
    """(batch,) int64: index of each row in its split."""

    @property
    def real_tokens(self) -> int:
        """Number of input tokens without padding."""
        return int(self.input_lengths.sum())

    @property
    def supervised_by_row(self) -> np.ndarray:
        """(batch,) int64: supervised tokens of each row."""
        return np.bincount(self._target_rows, minlength=len(self.rows))

    def sums_by_row(self, values: np.ndarray) -> np.ndarray:
        """Return the sum for each row, (batch,) float64, of a value for each supervised token, (supervised,)."""
        return np.bincount(self._target_rows, weights=values, minlength=len(self.rows))

    @property
    def _target_rows(self) -> np.ndarray:
        """(supervised,): the row, in this batch, of each supervised token."""
        return self.positions[: self.supervised] // self.inputs.shape[1]


def collate(tokens: TokenSet, indices: np.ndarray, buckets: LengthBuckets) -> Batch:
    """Return the batch of the rows `indices`, in their order, padded to the smallest of `buckets` that holds them.

    Raises:
        ValueError: `indices` is empty.
    """
    indices = np.asarray(indices)
    if indices.size == 0:
        raise ValueError("a batch needs at least one row")
    starts = tokens.offsets[indices]
    counts = tokens.offsets[indices + 1] - starts - 1
    length = buckets.padded_length(int(counts.max()))
    real_tokens = int(counts.sum())
    row = np.repeat(np.arange(len(indices)), counts)
    column = np.arange(real_tokens) - np.repeat(np.cumsum(counts) - counts, counts)
    source = starts[row] + column

    inputs = np.zeros((len(indices), length), np.int32)
    inputs[row, column] = tokens.tokens[source]
    is_target = tokens.supervised[source + 1]
    supervised = int(is_target.sum())
    size = max(1, -(-supervised // POSITIONS_MULTIPLE)) * POSITIONS_MULTIPLE
    positions, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
    weights = np.zeros(size, np.float32)
    positions[:supervised] = (row * length + column)[is_target]
    targets[:supervised] = tokens.tokens[source + 1][is_target]
    weights[:supervised] = 1
    return Batch(inputs, positions, targets, weights, supervised, counts, indices)
