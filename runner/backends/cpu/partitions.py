"""How the threads divide a batch: each computes one partition, a contiguous range of the batch's positions.

Positions depend on each other in attention alone. There the threads wait for each other, divide rows and heads instead,
wait again, and continue with their own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Barrier
from typing import TypeVar

import numpy as np

from runner.backends.cpu.threads import ThreadTeam
from runner.backends.cpu.workspace import Workspace

T = TypeVar("T")


class PackedRows:
    """The rows of a batch one after the other, without padding."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = [int(length) for length in lengths]
        self.starts = [0, *accumulate(self.lengths)][:-1]
        self.row_positions = np.concatenate([np.arange(length) for length in self.lengths])
        """(n,): each position's index within its row."""

    def __len__(self) -> int:
        return len(self.row_positions)


@dataclass(frozen=True)
class PackedBatch:
    """A batch without padding: n positions, of which k are supervised."""

    inputs: np.ndarray
    """Token ids (n,) int32, or hidden states (n, d) after the frozen blocks."""
    rows: PackedRows
    positions: np.ndarray
    """(k,): the supervised positions, counted along the batch."""
    targets: np.ndarray
    """(k,) int32: the token to predict at each."""
    weights: np.ndarray
    """(k,) float32: the weight of each in the loss; 0 for padding, which comes last."""

    def select_rows(self, rows: slice) -> PackedBatch:
        """Return the batch of some neighbouring rows."""
        lengths, start = self.rows.lengths[rows], self.rows.starts[rows.start]
        stop = start + sum(lengths)
        inside = np.flatnonzero((self.positions >= start) & (self.positions < stop))
        return PackedBatch(
            self.inputs[start:stop],
            PackedRows(lengths),
            self.positions[inside] - np.int32(start),
            self.targets[inside],
            self.weights[inside],
        )


@dataclass(frozen=True)
class AttentionShare:
    """Heads of one row that a partition computes attention for."""

    start: int
    """First position of the row in the batch."""
    length: int
    heads: range
    """Heads of keys and values."""


@dataclass(frozen=True)
class Partition:
    """The part of a batch that one thread computes."""

    index: int
    count: int
    rows: PackedRows
    """All rows of the batch."""
    local: Workspace
    """Buffers of this partition."""
    shared: Workspace
    """Buffers of all partitions; what one writes the others may read after `synchronize`."""
    barrier: Barrier
    _shares: dict[int, list[AttentionShare]] = field(default_factory=dict)

    @property
    def span(self) -> slice:
        """Its positions in the batch."""
        n = len(self.rows)
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    def synchronize(self) -> None:
        """Wait until all partitions have reached this point."""
        if self.count > 1:
            self.barrier.wait()

    def attention_shares(self, heads: int) -> list[AttentionShare]:
        """Return this partition's share of the (row, head) pairs, whose cost is the square of the row's length.

        All pairs lie in one sequence, of which each partition has a range of about equal cost: at most one row is
        divided between two neighbouring partitions.
        """
        if heads not in self._shares:
            lengths = np.array(self.rows.lengths, np.float64)
            costs = lengths * lengths
            ends = np.cumsum(np.repeat(costs, heads)).reshape(-1, heads)
            middles = ends - costs[:, None] / 2
            owners = np.minimum((middles * (self.count / ends[-1, -1])).astype(int), self.count - 1)
            shares = []
            for row, row_owners in enumerate(owners):
                owned = np.flatnonzero(row_owners == self.index)
                if len(owned):
                    head_range = range(int(owned[0]), int(owned[-1]) + 1)
                    shares.append(AttentionShare(self.rows.starts[row], self.rows.lengths[row], head_range))
            self._shares[heads] = shares
        return self._shares[heads]


class Partitioner:
    """Divides batches among the threads of one engine, and owns their buffers."""

    def __init__(self, threads: int) -> None:
        self.threads, self._team = threads, ThreadTeam(threads)
        self.min_positions = 16
        """Fewest positions of a partition; smaller matrix products take more time per position."""
        self._shared, self._local = Workspace(), [Workspace() for _ in range(threads)]

    def run(self, work: Callable[[Partition], T], rows: PackedRows) -> list[T]:
        """Return what `work` returns for each partition of `rows`, in the order of their positions."""
        count = max(1, min(self._team.count, len(rows) // self.min_positions))
        return self._team.run(
            lambda index, barrier: work(Partition(index, count, rows, self._local[index], self._shared, barrier)), count
        )
