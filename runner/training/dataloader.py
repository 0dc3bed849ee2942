"""Batches for the training step and for evaluation: token ids, or cached hidden states after the frozen blocks.

Collating a batch and reading the cache need no MLX: a thread does both for the next update while this one runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from runner.backends.protocol import BackendBatch
from runner.config.schema import Config
from runner.data.batch import Batch, collate
from runner.data.length_buckets import LengthBuckets
from runner.data.order import BatchOrder, DataPosition, evaluation_batches
from runner.data.token_set import TokenSet
from runner.models.hidden_cache import HiddenStateCaches, HiddenStates
from runner.training.world import ALONE, World


@dataclass(slots=True)
class _PreparedBatch:
    batch: Batch
    indices: np.ndarray
    hidden: np.ndarray | None
    missing: list[int]
    """Positions in `indices` of the rows whose hidden states are not cached."""


class BatchBuilder:
    """Builds batches of the examples of one token set."""

    def __init__(self, token_set: TokenSet, pad_to: int | None, hidden: HiddenStates | None = None) -> None:
        """`pad_to` as the setting `data.pad_to`."""
        self.token_set, self._hidden = token_set, hidden
        self.buckets = LengthBuckets.from_lengths(token_set.lengths, pad_to)

    def __call__(self, examples: np.ndarray) -> BackendBatch:
        """Return the batch of the rows of `examples`. For the training thread."""
        return self.finish(self.prepare(examples))

    def prepare(self, examples: np.ndarray) -> _PreparedBatch:
        """Collate the rows and read the cache. Any thread may call it."""
        indices = self.token_set.rows_of(examples)
        batch = collate(self.token_set, indices, self.buckets)
        if self._hidden is None:
            return _PreparedBatch(batch, indices, None, [])
        missing = []
        hidden = np.zeros((*batch.inputs.shape, self._hidden.hidden_size), self._hidden.dtype)
        for position, row in enumerate(indices):
            cached = self._hidden.cached(int(row))
            if cached is None:
                missing.append(position)
            else:
                hidden[position, : len(cached)] = cached
        return _PreparedBatch(batch, indices, hidden, missing)

    def finish(self, prepared: _PreparedBatch) -> BackendBatch:
        """Compute the hidden states that are not cached. For the training thread."""
        if self._hidden is not None and prepared.hidden is not None:
            computed = self._hidden.compute([int(prepared.indices[position]) for position in prepared.missing])
            for position, states in zip(prepared.missing, computed, strict=True):
                prepared.hidden[position, : len(states)] = states
        return BackendBatch(prepared.batch, prepared.hidden)


class EvaluationLoader:
    """The batches of an evaluation, the same in each pass, built one at a time; with several ranks this one's share."""

    def __init__(self, builder: BatchBuilder, batches: Sequence[np.ndarray], world: World = ALONE) -> None:
        """`batches`: the indices of the examples of each, for all ranks."""
        self._builder, self._batches = builder, batches
        self._own = batches[world.share()]

    def __iter__(self) -> Iterator[BackendBatch]:
        return (self._builder(indices) for indices in self._own)

    @property
    def row_count(self) -> int:
        """Number of examples in a pass: rows of the data."""
        return sum(map(len, self._own))

    @cached_property
    def fingerprint(self) -> str:
        """That of the rows of a pass in the order of the data: tokens and mask (see `TokenSet.fingerprint`)."""
        token_set = self._builder.token_set
        indices = token_set.rows_of(np.sort(np.concatenate([*self._batches, np.zeros(0, np.int64)])))
        return (token_set if len(indices) == len(token_set) else token_set.subset(indices)).fingerprint


class PrefetchingLoader:
    """The micro-batches of the updates in their order, with several ranks this one's share of them; a thread prepares
    those of the next update."""

    def __init__(
        self,
        builder: BatchBuilder,
        order: BatchOrder,
        accumulation: int,
        prefetch: bool = True,
        rows_at_once: int | None = None,
        world: World = ALONE,
    ) -> None:
        """`accumulation`: micro-batches an update; `rows_at_once`: as in `split_rows`. Without `prefetch` they are
        prepared when they are asked for."""
        self._builder, self._order, self._accumulation = builder, order, accumulation
        self._rows_at_once, self._world = rows_at_once, world
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._next: tuple[DataPosition, Future[tuple[list[_PreparedBatch], DataPosition]]] | None = None

    def load(self, position: DataPosition) -> tuple[list[BackendBatch], DataPosition]:
        """Return the micro-batches of the update that begins at `position`, and the position after them."""
        if self._pool is None:
            prepared, after = self._prepare(position)
        else:
            if self._next is None or self._next[0] != position:
                self._next = position, self._pool.submit(self._prepare, position)
            prepared, after = self._next[1].result()
            self._next = after, self._pool.submit(self._prepare, after)
        return [self._builder.finish(batch) for batch in prepared], after

    def close(self) -> None:
        """End the thread."""
        self._next = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _prepare(self, position: DataPosition) -> tuple[list[_PreparedBatch], DataPosition]:
        batches, after = self._order.next_batches(position, self._accumulation)
        shares = shares_of_update(batches, self._world)
        parts = [part for rows in shares for part in split_rows(rows, self._rows_at_once)]
        return [self._builder.prepare(part) for part in parts], after


def shares_of_update(batches: Sequence[np.ndarray], world: World) -> list[np.ndarray]:
    """Return a rank's examples of each micro-batch of an update, without empty ones.

    The examples of the whole update are dealt in turn, so that each rank has as many as the others, or one less, also
    where there are fewer in a micro-batch than ranks; neighbours, of similar lengths, go to different ranks.
    """
    starts = np.cumsum([0, *map(len, batches)])
    shares = [rows[world.share(int(start))] for rows, start in zip(batches, starts[:-1], strict=True)]
    return [rows for rows in shares if len(rows)]


def split_rows(rows: np.ndarray, at_once: int | None) -> list[np.ndarray]:
    """Return the examples of a micro-batch in parts of at most `at_once`; in one where it is None."""
    return [rows] if at_once is None else [rows[i : i + at_once] for i in range(0, len(rows), at_once)]


def batch_builder(token_set: TokenSet, config: Config, caches: HiddenStateCaches | None) -> BatchBuilder:
    """Return the builder of batches of `token_set`."""
    return BatchBuilder(
        token_set, config.data.pad_to, caches.for_token_set(token_set) if caches and len(token_set) else None
    )


def evaluation_loader(
    token_set: TokenSet, config: Config, caches: HiddenStateCaches | None, world: World = ALONE
) -> EvaluationLoader:
    """Return the batches of an evaluation: rows chosen in batches of training's size, computed in larger ones."""
    builder = batch_builder(token_set, config, caches)
    return EvaluationLoader(builder, joined_evaluation_batches(token_set, config, builder.buckets), world)


def joined_evaluation_batches(token_set: TokenSet, config: Config, buckets: LengthBuckets) -> list[np.ndarray]:
    """Return the examples of each batch that an evaluation computes."""
    t, lengths = config.train, token_set.example_lengths
    batches = evaluation_batches(lengths, t.batch_size, t.eval_batches)
    return join_batches(batches, lengths, buckets, t.eval_tokens // token_set.rows_per_example)


def join_batches(
    batches: list[np.ndarray], lengths: np.ndarray, buckets: LengthBuckets, max_positions: int
) -> list[np.ndarray]:
    """Return neighbouring `batches` joined while they have at most `max_positions` positions, padding included.

    Rows have to be in the order of their lengths.
    """
    groups: list[list[np.ndarray]] = []
    count = 0
    for rows in batches:
        length = buckets.padded_length(int(lengths[rows].max()) - 1)
        if groups and (count + len(rows)) * length <= max_positions:
            groups[-1].append(rows)
            count += len(rows)
        else:
            groups.append([rows])
            count = len(rows)
    return [np.concatenate(group) for group in groups]
