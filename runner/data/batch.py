"""Collating rows into a batch: padded inputs, and the supervised positions for the LM head and the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """(n,) float32: what each target counts, 1 unless a method weighs them; 0 for the padding of n to a multiple of 64
    (its position and target are 0)."""
    supervised: int
    """Number of supervised tokens: the first of `targets`."""
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
        return np.bincount(self.target_rows, minlength=len(self.rows))

    def sums_by_row(self, values: np.ndarray) -> np.ndarray:
        """Return the sum for each row, (batch,) float64, of a value for each supervised token, (supervised,)."""
        return np.bincount(self.target_rows, weights=values, minlength=len(self.rows))

    def weighted(self, weights: np.ndarray) -> Batch:
        """Return the batch with `weights`, (supervised,), for its supervised tokens."""
        padded = np.zeros_like(self.weights)
        padded[: self.supervised] = weights
        return replace(self, weights=padded)

    def select_rows(self, rows: np.ndarray) -> Batch:
        """Return the batch of `rows`, ascending indices into this one's, with the same length."""
        new_row = np.full(len(self.rows), -1)
        new_row[rows] = np.arange(len(rows))
        kept = np.flatnonzero(new_row[self.target_rows] >= 0)
        length = self.inputs.shape[1]
        positions = (new_row[self.target_rows[kept]] * length + self.positions[kept] % length).astype(np.int32)
        size = padded_size(len(kept))
        return Batch(
            self.inputs[rows],
            _padded(positions, size),
            _padded(self.targets[kept], size),
            _padded(self.weights[kept], size),
            len(kept),
            self.input_lengths[rows],
            self.rows[rows],
        )

    @property
    def target_rows(self) -> np.ndarray:
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
    size = padded_size(supervised)
    positions = _padded((row * length + column)[is_target].astype(np.int32), size)
    targets = _padded(tokens.tokens[source + 1][is_target], size)
    weights = _padded(np.ones(supervised, np.float32), size)
    return Batch(inputs, positions, targets, weights, supervised, counts, indices)


def padded_size(targets: int) -> int:
    """Return the number of positions of a batch with so many targets."""
    return max(1, -(-targets // POSITIONS_MULTIPLE)) * POSITIONS_MULTIPLE


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    padded = np.zeros(size, values.dtype)
    padded[: len(values)] = values
    return padded
