"""Batches as the step takes them: token ids, or the hidden states at the cut where the trunk is computed once.

What needs no MLX, building a batch and reading the cache, is done for the next batch while the step runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from runner.data.batch import Batch, collate
from runner.data.length_buckets import LengthBuckets
from runner.data.order import BatchOrder, DataPosition
from runner.data.tokenize import TokenSet
from runner.models.hidden_cache import HiddenStates


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch and its arrays for the model."""

    batch: Batch
    states: np.ndarray | None = None
    """Hidden states (batch, length, width) at the cut, as the cache has them."""
    trunk: HiddenStates | None = None

    def arrays(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Inputs, which are token ids (batch, length) or hidden states; positions, targets and weights (n,)."""
        b = self.batch
        inputs = mx.array(b.inputs) if self.states is None or self.trunk is None else self.trunk.array(self.states)
        return inputs, mx.array(b.positions), mx.array(b.targets), mx.array(b.weights)

    def numbers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same for the engine of the CPU, where all is float32: rows without padding, with their lengths."""
        b = self.batch
        real = np.arange(b.inputs.shape[1]) < b.lengths[:, None]
        places = np.cumsum(real.reshape(-1)) - 1
        inputs = b.inputs if self.states is None else self.states.view(np.float32)
        return inputs[real], b.lengths, places[b.positions], b.targets, b.weights


@dataclass(slots=True)
class _Prepared:
    batch: Batch
    rows: np.ndarray
    states: np.ndarray | None
    missing: list[int]
    """Places in `rows` whose states the cache lacks."""


class BatchBuilder:
    """Makes the batches of one token set."""

    def __init__(self, rows: TokenSet, pad_to: int | None, trunk: HiddenStates | None = None) -> None:
        """`pad_to` as the setting `data.pad_to`."""
        self.rows, self._trunk = rows, trunk
        self.widths = LengthBuckets.of(rows.lengths, pad_to)

    def __call__(self, indices: np.ndarray) -> DeviceBatch:
        """The batch of the rows `indices`, on the thread of training."""
        return self.finish(self.prepare(indices))

    def prepare(self, indices: np.ndarray) -> _Prepared:
        """The part that needs no MLX."""
        batch = collate(self.rows, indices, self.widths)
        if self._trunk is None:
            return _Prepared(batch, indices, None, [])
        trunk, missing = self._trunk, []
        states = np.zeros((*batch.inputs.shape, trunk.width), trunk.raw)
        for place, row in enumerate(indices):
            found = trunk.stored(int(row))
            if found is None:
                missing.append(place)
            else:
                states[place, : len(found)] = found
        return _Prepared(batch, indices, states, missing)

    def finish(self, prepared: _Prepared) -> DeviceBatch:
        """The rest: what the cache lacks is computed."""
        if self._trunk is None or prepared.states is None:
            return DeviceBatch(prepared.batch)
        computed = self._trunk.compute([int(prepared.rows[place]) for place in prepared.missing])
        for place, made in zip(prepared.missing, computed, strict=True):
            prepared.states[place, : len(made)] = made
        return DeviceBatch(prepared.batch, prepared.states, self._trunk)


class FixedBatches:
    """The batches of an evaluation, the same each time; made one by one, while they are asked for."""

    def __init__(self, feed: BatchBuilder, chosen: Sequence[np.ndarray]) -> None:
        """`chosen`: the rows of each batch."""
        self._feed, self._chosen = feed, chosen

    def __iter__(self) -> Iterator[DeviceBatch]:
        return (self._feed(indices) for indices in self._chosen)

    @property
    def rows(self) -> int:
        """Rows in all batches."""
        return sum(map(len, self._chosen))


class PrefetchingLoader:
    """The updates' micro-batches in their order; the next update's are prepared in a thread meanwhile."""

    def __init__(self, feed: BatchBuilder, order: BatchOrder, count: int, prefetch: bool = True) -> None:
        """`count`: micro-batches of an update. Without `prefetch` all is done when it is asked for."""
        self._feed, self._order, self._count = feed, order, count
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._next: tuple[DataPosition, Future[tuple[list[_Prepared], DataPosition]]] | None = None

    def take(self, position: DataPosition) -> tuple[list[DeviceBatch], DataPosition]:
        """The micro-batches of the update that begins at `position`, and the position after them."""
        if self._pool is None:
            prepared, after = self._prepare(position)
            return [self._feed.finish(part) for part in prepared], after
        if self._next is None or self._next[0] != position:
            self._next = position, self._pool.submit(self._prepare, position)
        prepared, after = self._next[1].result()
        self._next = after, self._pool.submit(self._prepare, after)
        return [self._feed.finish(part) for part in prepared], after

    def close(self) -> None:
        """End the thread."""
        self._next = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _prepare(self, position: DataPosition) -> tuple[list[_Prepared], DataPosition]:
        chosen, after = self._order.take(position, self._count)
        return [self._feed.prepare(indices) for indices in chosen], after
