"""Causal attention in tiles, forward and backward: what lies above the diagonal is not computed, and no matrix of
(length, length) is kept. The backward pass makes a tile's weights again from the logarithms of their sums (Dao et
al., "FlashAttention", 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from runner.cpu.gemm import gemm
from runner.cpu.lanes import Lane

_TILE = 128


class Shape:
    """Of the heads in `qkv` (n, (heads + 2 kv_heads) * width): queries, keys, values beside each other."""

    def __init__(self, heads: int, kv_heads: int, width: int, scale: float) -> None:
        self.heads, self.kv_heads, self.width, self.scale = heads, kv_heads, width, scale
        self.columns = (heads + 2 * kv_heads) * width

    def query(self, x: np.ndarray, head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv or as queries alone."""
        return x[:, head * self.width : (head + 1) * self.width]

    def key(self, x: np.ndarray, kv_head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv."""
        return self.query(x, self.heads + kv_head)

    def value(self, x: np.ndarray, kv_head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv."""
        return self.query(x, self.heads + self.kv_heads + kv_head)

    def group(self, kv_head: int) -> range:
        """The query heads that share a head of keys and values."""
        size = self.heads // self.kv_heads
        return range(kv_head * size, (kv_head + 1) * size)


def attend(qkv: np.ndarray, shape: Shape, lane: Lane, out: np.ndarray, log_sums: np.ndarray) -> None:
    """This lane's share of `out` (n, heads * width) = softmax(q kᵀ scale) v, for each row by itself.

    `log_sums` (n, heads): logarithms of the sums of exponentials, for the way back.
    """
    for row, length, head in lane.share(shape.heads):
        x, kv_head = qkv[row : row + length], head * shape.kv_heads // shape.heads
        for start, stop in _tiles(length):
            scores = lane.own.get("scores", stop - start, stop)
            gemm(shape.query(x, head)[start:stop], shape.key(x, kv_head)[:stop].T, scores, alpha=shape.scale)
            _hide_the_future(scores)
            largest = scores.max(axis=1, keepdims=True)
            scores -= largest
            np.exp(scores, out=scores)
            total = scores.sum(axis=1, keepdims=True)
            here = slice(row + start, row + stop)
            made = gemm(scores, shape.value(x, kv_head)[:stop], shape.query(out[here], head))
            made /= total
            log_sums[here, head] = (np.log(total) + largest)[:, 0]


def attend_back(
    qkv: np.ndarray,
    shape: Shape,
    lane: Lane,
    deltas: np.ndarray,
    log_sums: np.ndarray,
    by_out: np.ndarray,
    by_qkv: np.ndarray,
) -> None:
    """This lane's share of the gradients by queries, keys and values into `by_qkv`, laid out as `qkv`.

    `by_out` (n, heads * width); `deltas` (n, heads): products of the output and the gradient by it, summed by head.
    """
    for row, length, kv_head in lane.share(shape.kv_heads):
        x, made = qkv[row : row + length], by_qkv[row : row + length]
        keys, values = shape.key(x, kv_head), shape.value(x, kv_head)
        by_keys, by_values = shape.key(made, kv_head), shape.value(made, kv_head)
        by_keys[:], by_values[:] = 0, 0
        for start, stop in _tiles(length):
            here = slice(row + start, row + stop)
            for head in shape.group(kv_head):
                query, given = shape.query(x, head)[start:stop], shape.query(by_out[here], head)
                weights, slopes = (lane.own.get(name, stop - start, stop) for name in ("scores", "slopes"))
                gemm(query, keys[:stop].T, weights, alpha=shape.scale)
                _hide_the_future(weights)
                weights -= log_sums[here, head, None]
                np.exp(weights, out=weights)
                gemm(weights.T, given, by_values[:stop], add=True)
                gemm(given, values[:stop].T, slopes)
                slopes -= deltas[here, head, None]
                slopes *= weights
                gemm(slopes.T, query, by_keys[:stop], alpha=shape.scale, add=True)
                gemm(slopes, keys[:stop], shape.query(made, head)[start:stop], alpha=shape.scale)


def _tiles(length: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each tile of a row's queries."""
    return ((start, min(start + _TILE, length)) for start in range(0, length, _TILE))


def _hide_the_future(scores: np.ndarray) -> None:
    """The last columns are those of the queries' own positions: no one sees what comes after it."""
    queries = len(scores)
    np.copyto(scores[:, -queries:], -np.inf, where=_future(queries))


@cache
def _future(queries: int) -> np.ndarray:
    """(queries, queries): what each may not see. There are no more than `_TILE` of these."""
    return np.triu(np.ones((queries, queries), np.bool_), 1)
