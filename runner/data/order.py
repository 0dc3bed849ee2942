"""The batches of training as a pure function of (lengths, batch size, seed, epoch), and those of evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from runner.data.mixture import Mixture


@dataclass(frozen=True, slots=True, order=True)
class DataPosition:
    """A position between two batches: `batch` batches of epoch `epoch` are done. Both count from 0."""

    epoch: int = 0
    batch: int = 0


class BatchOrder:
    """Assigns rows to batches in every epoch.

    The rows are permuted by (seed, epoch) alone. The last ``rows % batch_size`` rows of the permutation form the
    epoch's last, smaller batch. The others are split into windows of `window_batches` batches (at most a quarter of
    the epoch, so that a small set does not see the same batches in every epoch), sorted by length within each window
    (equal lengths stay in the permuted order), split into batches, and the batches shuffled. No row is dropped.

    Random numbers are the raw 64-bit outputs of Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011), keyed by BLAKE2b of seed, epoch and purpose, and used as sort keys: NumPy guarantees the streams
    of its bit generators, but not those of ``Generator.permutation``.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        window_batches: int,
        mixture: Mixture | None = None,
    ) -> None:
        """`lengths`: (rows,), at least one, in tokens. A `mixture` chooses an epoch's rows; else it is each once."""
        assert len(lengths) > 0 and batch_size > 0 and window_batches > 0
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.window_batches = window_batches
        self.mixture = mixture
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one epoch, including the smaller last one."""
        return -(-len(self.lengths) // self.batch_size)

    def next_batches(self, position: DataPosition, count: int) -> tuple[list[np.ndarray], DataPosition]:
        """Return `count` batches from `position` on, across epochs, and the position after them.

        Raises:
            ValueError: `position` is outside an epoch.
        """
        if position.epoch < 0 or not 0 <= position.batch < self.batches_per_epoch:
            raise ValueError(f"{position} is outside an epoch of {self.batches_per_epoch} batches")
        batches = []
        epoch, batch = position.epoch, position.batch
        for _ in range(count):
            batches.append(self._batch(epoch, batch))
            batch += 1
            if batch == self.batches_per_epoch:
                epoch, batch = epoch + 1, 0
        return batches, DataPosition(epoch, batch)

    def _batch(self, epoch: int, index: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, *self._arrange_epoch(epoch))
        _, full, last = self._cached
        return full[index] if index < len(full) else last

    def _arrange_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the full batches, (batches, batch_size), and the rows of the smaller last one, (remainder,)."""
        rows = np.argsort(random_keys(self.seed, epoch, "rows", len(self.lengths)), kind="stable")
        if self.mixture is not None:
            rows = self.mixture.rows(self.seed, epoch, random_keys)[rows]
        full_rows = len(rows) - len(rows) % self.batch_size
        rows, last = rows[:full_rows], rows[full_rows:]
        window_batches = min(self.window_batches, max(1, full_rows // self.batch_size // 4))
        window = np.arange(full_rows) // (window_batches * self.batch_size)
        rows = rows[np.lexsort((self.lengths[rows], window))]
        full = rows.reshape(-1, self.batch_size)
        full = full[np.argsort(random_keys(self.seed, epoch, "batches", len(full)), kind="stable")]
        full.flags.writeable = last.flags.writeable = False
        return full, last


def evaluation_batches(lengths: np.ndarray, batch_size: int, limit: int = -1) -> list[np.ndarray]:
    """Return the row indices of the evaluation batches, sorted by length; the same in every call.

    With a `limit` below the number of batches n, only the batches ``(2 i + 1) n // (2 limit)`` for i below `limit`:
    the middles of `limit` equal parts, so that short and long rows are both among them. A negative limit means all.
    """
    rows = np.argsort(np.asarray(lengths), kind="stable")
    count = -(-len(rows) // batch_size)
    unlimited = limit < 0 or limit >= count
    selected = range(count) if unlimited else [(2 * i + 1) * count // (2 * limit) for i in range(limit)]
    return [rows[index * batch_size : (index + 1) * batch_size] for index in selected]


def random_keys(seed: int, epoch: int, purpose: str, count: int) -> np.ndarray:
    """Return (count,) uint64, a function of the arguments alone."""
    stream = f"{seed}/{epoch}/{purpose}".encode()
    key = int.from_bytes(hashlib.blake2b(stream, digest_size=16).digest(), "little")
    return np.random.Philox(key=key).random_raw(count)
