"""Causal attention in tiles, forward and backward: what lies above the diagonal is not computed, and no matrix of
(length, length) is kept. The backward pass makes a tile's weights again from the logarithms of their sums (Dao et
al., "FlashAttention", 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from runner.backends.cpu.gemm import gemm
from runner.backends.cpu.partitions import Partition

_STACK, _LEAST_TILE, _TILE = 256, 32, 128
"""Queries of a tile: as many as make 256 with the heads that share keys, within the two bounds."""
_AT_ONCE = 262144
"""Scores that are made at once: those of several heads while that many, since each call of NumPy costs."""


class HeadLayout:
    """Of the heads in `qkv` (n, (heads + 2 kv_heads) * width): queries, keys, values beside each other."""

    def __init__(self, heads: int, kv_heads: int, width: int, scale: float) -> None:
        self.heads, self.kv_heads, self.width, self.scale = heads, kv_heads, width, scale
        self.columns = (heads + 2 * kv_heads) * width

    @property
    def group(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.heads // self.kv_heads

    def queries(self, x: np.ndarray, heads: range) -> np.ndarray:
        """(heads, group, length, width) of `x`, laid out as qkv or as queries alone; `heads` are those of keys."""
        columns = slice(heads.start * self.group * self.width, heads.stop * self.group * self.width)
        return x[:, columns].reshape(len(x), len(heads), self.group, self.width).transpose(1, 2, 0, 3)

    def by_query(self, x: np.ndarray, heads: range) -> np.ndarray:
        """(heads, group, length) of `x` (length, all heads): a number for each query."""
        columns = slice(heads.start * self.group, heads.stop * self.group)
        return x[:, columns].reshape(len(x), len(heads), self.group).transpose(1, 2, 0)

    def key(self, x: np.ndarray, head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv."""
        return self._column(x, self.heads + head)

    def value(self, x: np.ndarray, head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv."""
        return self._column(x, self.heads + self.kv_heads + head)

    def _column(self, x: np.ndarray, head: int) -> np.ndarray:
        return x[:, head * self.width : (head + 1) * self.width]

    @property
    def tile(self) -> int:
        """Queries of a tile."""
        return min(max(_LEAST_TILE, _STACK // self.group), _TILE)

    def tiles(self, length: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each tile of a row's queries."""
        return ((start, min(start + self.tile, length)) for start in range(0, length, self.tile))

    def work(self, lane: Partition) -> Iterator[tuple[int, int, int, range]]:
        """This lane's share of the rows and the heads of keys, as many heads at once as a core's cache takes: first
        position of a row, start and stop of a tile of its queries, heads."""
        for row, length, mine in lane.share(self.kv_heads):
            for start, stop in self.tiles(length):
                size = max(1, _AT_ONCE // ((stop - start) * self.group * stop))
                for first in range(mine.start, mine.stop, size):
                    yield row, start, stop, range(first, min(first + size, mine.stop))


def attend(qkv: np.ndarray, shape: HeadLayout, lane: Partition, out: np.ndarray, log_sums: np.ndarray) -> None:
    """This lane's share of `out` (n, heads * width) = softmax(q kᵀ scale) v, for each row by itself.

    `log_sums` (n, heads): logarithms of the sums of exponentials, for the way back.
    """
    for row, start, stop, heads in shape.work(lane):
        seen, here = qkv[row : row + stop], slice(row + start, row + stop)
        queries = _stacked(shape.queries(qkv[here], heads), lane, "queries")
        scores = lane.own.get("scores", *queries.shape[:2], stop)
        for number, head in enumerate(heads):
            gemm(queries[number], shape.key(seen, head).T, scores[number], alpha=shape.scale)
        _hide_the_future(scores, stop - start)
        largest = scores.max(axis=2, keepdims=True)
        scores -= largest
        np.exp(scores, out=scores)
        total = scores.sum(axis=2, keepdims=True)
        for number, head in enumerate(heads):
            gemm(scores[number], shape.value(seen, head), queries[number])  # which are needed no more
        queries /= total
        to = shape.queries(out[here], heads)
        to[:] = queries.reshape(to.shape)
        sums = shape.by_query(log_sums[here], heads)
        sums[:] = (np.log(total) + largest).reshape(sums.shape)


def attend_back(
    qkv: np.ndarray,
    shape: HeadLayout,
    lane: Partition,
    deltas: np.ndarray,
    log_sums: np.ndarray,
    by_out: np.ndarray,
    by_qkv: np.ndarray,
) -> None:
    """This lane's share of the gradients by queries, keys and values into `by_qkv`, laid out as `qkv`.

    `by_out` (n, heads * width); `deltas` (n, heads): products of the output and the gradient by it, summed by head.
    """
    for row, start, stop, heads in shape.work(lane):
        seen, made, here = qkv[row : row + stop], by_qkv[row : row + stop], slice(row + start, row + stop)
        queries = _stacked(shape.queries(qkv[here], heads), lane, "queries")
        given = _stacked(shape.queries(by_out[here], heads), lane, "given")
        weights, slopes = (lane.own.get(name, *queries.shape[:2], stop) for name in ("scores", "slopes"))
        for number, head in enumerate(heads):
            gemm(queries[number], shape.key(seen, head).T, weights[number], alpha=shape.scale)
            gemm(given[number], shape.value(seen, head).T, slopes[number])
        _hide_the_future(weights, stop - start)
        weights -= shape.by_query(log_sums[here], heads).reshape(*queries.shape[:2], 1)
        np.exp(weights, out=weights)
        slopes -= shape.by_query(deltas[here], heads).reshape(*queries.shape[:2], 1)
        slopes *= weights
        for number, head in enumerate(heads):
            by_key, by_value = shape.key(made, head), shape.value(made, head)
            # What lies before the tile has been written by the tiles before it.
            for by, left, right, factor in (
                (by_value, weights[number], given[number], 1.0),
                (by_key, slopes[number], queries[number], shape.scale),
            ):
                if start:
                    gemm(left[:, :start].T, right, by[:start], alpha=factor, add=True)
                gemm(left[:, start:].T, right, by[start:], alpha=factor)
            gemm(slopes[number], shape.key(seen, head), given[number], alpha=shape.scale)
        to = shape.queries(by_qkv[here], heads)
        to[:] = given.reshape(to.shape)


def _stacked(queries: np.ndarray, lane: Partition, name: str) -> np.ndarray:
    """(heads, group * length, width) of `queries` (heads, group, length, width), in the lane's own memory: one product
    for the queries that share keys."""
    out = lane.own.get(name, *queries.shape)
    out[:] = queries
    return out.reshape(len(queries), -1, queries.shape[3])


def _hide_the_future(scores: np.ndarray, queries: int) -> None:
    """The last columns are those of the queries' own positions: no one sees what comes after it."""
    last = scores.reshape(-1, queries, scores.shape[2])[:, :, -queries:]
    np.copyto(last, -np.inf, where=_future(queries))


@cache
def _future(queries: int) -> np.ndarray:
    """(queries, queries): what each may not see. There are no more than `_TILE` of these."""
    return np.triu(np.ones((queries, queries), np.bool_), 1)
