"""How the threads divide a batch: each has a lane, which is a stretch of its positions.

All that a position needs from others is in attention: there the lanes wait for each other, divide rows and heads
instead, wait again, and go on with their own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Barrier
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from runner.backends.cpu.threads import ThreadTeam
from runner.backends.cpu.workspace import Workspace

if TYPE_CHECKING:
    from runner.backends.cpu.ops import Ops

T = TypeVar("T")


class PackedRows:
    """Rows of a batch one after the other, without padding."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = [int(length) for length in lengths]
        self.starts = [0, *accumulate(self.lengths)][:-1]
        self.places = np.concatenate([np.arange(length) for length in self.lengths])
        """(n,): of each position in its row."""

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Partition:
    """One thread's part."""

    number: int
    count: int
    rows: PackedRows
    """Of all lanes."""
    own: Workspace
    common: Workspace
    """The same for all lanes: to be read and written where they have waited for each other."""
    barrier: Barrier
    ops: Ops
    _shares: dict[int, list[tuple[int, int, range]]] = field(default_factory=dict)

    @property
    def span(self) -> slice:
        """Its positions."""
        return slice(len(self.rows) * self.number // self.count, len(self.rows) * (self.number + 1) // self.count)

    def wait(self) -> None:
        """Until all lanes have come this far."""
        if self.count > 1:
            self.barrier.wait()

    def share(self, parts: int) -> list[tuple[int, int, range]]:
        """Its share of `parts` pieces of work a row, which cost the square of its length.

        Each is (first position, length, pieces). All pieces lie in one line, of which each lane has a stretch of equal
        cost: at most one row is divided between a lane and the next.
        """
        if parts not in self._shares:
            lengths = np.array(self.rows.lengths, np.float64)
            ends = np.cumsum(np.repeat(lengths * lengths, parts)).reshape(-1, parts)
            middles = ends - (lengths * lengths)[:, None] / 2
            lanes = np.minimum((middles * (self.count / ends[-1, -1])).astype(int), self.count - 1)
            mine = []
            for row, owners in enumerate(lanes):
                own = np.flatnonzero(owners == self.number)
                if len(own):
                    pieces = range(int(own[0]), int(own[-1]) + 1)
                    mine.append((self.rows.starts[row], self.rows.lengths[row], pieces))
            self._shares[parts] = mine
        return self._shares[parts]


class Partitions:
    """The lanes of one engine, with the memory that they use again in each step."""

    def __init__(self, ops: Ops, threads: int) -> None:
        self.ops = ops
        self.team = ThreadTeam(threads)
        self.least = 16
        """Positions of a lane: products of fewer are slower by position."""
        self._common, self._own = Workspace(), [Workspace()]

    def run(self, work: Callable[[Partition], T], rows: PackedRows) -> list[T]:
        """What `work` returns in each lane, in the order of their positions."""
        count = self.team.size_for(len(rows), self.least)
        while len(self._own) < count:
            self._own.append(Workspace())
        return self.team.run(
            lambda number, barrier: work(
                Partition(number, count, rows, self._own[number], self._common, barrier, self.ops)
            ),
            count,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(space.nbytes for space in (self._common, *self._own))
