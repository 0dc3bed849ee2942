"""Causal attention in tiles, forward and backward: what lies above the diagonal is not computed, and no matrix of
(length, length) is kept. The backward pass makes a tile's weights again from the logarithms of their sums (Dao et
al., "FlashAttention", 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from runner.cpu.gemm import gemm
from runner.cpu.lanes import Lane

_STACK, _LEAST_TILE, _TILE = 256, 32, 128
"""Queries of a tile: as many as make 256 with the heads that share keys, within the two bounds."""


class Shape:
    """Of the heads in `qkv` (n, (heads + 2 kv_heads) * width): queries, keys, values beside each other."""

    def __init__(self, heads: int, kv_heads: int, width: int, scale: float) -> None:
        self.heads, self.kv_heads, self.width, self.scale = heads, kv_heads, width, scale
        self.columns = (heads + 2 * kv_heads) * width

    @property
    def group(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.heads // self.kv_heads

    def queries(self, x: np.ndarray, kv_head: int) -> np.ndarray:
        """(group, length, width) of `x`, laid out as qkv or as queries alone."""
        columns = slice(kv_head * self.group * self.width, (kv_head + 1) * self.group * self.width)
        return x[:, columns].reshape(len(x), self.group, self.width).transpose(1, 0, 2)

    def key(self, x: np.ndarray, kv_head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv."""
        return self._column(x, self.heads + kv_head)

    def value(self, x: np.ndarray, kv_head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv."""
        return self._column(x, self.heads + self.kv_heads + kv_head)

    def _column(self, x: np.ndarray, head: int) -> np.ndarray:
        return x[:, head * self.width : (head + 1) * self.width]

    def tiles(self, length: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each tile of a row's queries."""
        size = min(max(_LEAST_TILE, _STACK // self.group), _TILE)
        return ((start, min(start + size, length)) for start in range(0, length, size))


def attend(qkv: np.ndarray, shape: Shape, lane: Lane, out: np.ndarray, log_sums: np.ndarray) -> None:
    """This lane's share of `out` (n, heads * width) = softmax(q kᵀ scale) v, for each row by itself.

    `log_sums` (n, heads): logarithms of the sums of exponentials, for the way back.
    """
    for row, length, kv_head in lane.share(shape.kv_heads):
        x, heads = qkv[row : row + length], _heads(shape, kv_head)
        keys, values = shape.key(x, kv_head), shape.value(x, kv_head)
        for start, stop in shape.tiles(length):
            here = slice(row + start, row + stop)
            queries = _stacked(shape.queries(qkv[here], kv_head), lane, "queries")
            scores = lane.own.get("scores", len(queries), stop)
            gemm(queries, keys[:stop].T, scores, alpha=shape.scale)
            _hide_the_future(scores, shape.group)
            largest = scores.max(axis=1, keepdims=True)
            scores -= largest
            np.exp(scores, out=scores)
            total = scores.sum(axis=1, keepdims=True)
            made = gemm(scores, values[:stop], queries)  # which are needed no more
            made /= total
            shape.queries(out[here], kv_head)[:] = made.reshape(shape.group, stop - start, shape.width)
            log_sums[here, heads] = (np.log(total) + largest).reshape(shape.group, -1).T


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
        x, made, heads = qkv[row : row + length], by_qkv[row : row + length], _heads(shape, kv_head)
        keys, values = shape.key(x, kv_head), shape.value(x, kv_head)
        by_keys, by_values = shape.key(made, kv_head), shape.value(made, kv_head)
        by_keys[:], by_values[:] = 0, 0
        for start, stop in shape.tiles(length):
            here = slice(row + start, row + stop)
            queries = _stacked(shape.queries(qkv[here], kv_head), lane, "queries")
            given = _stacked(shape.queries(by_out[here], kv_head), lane, "given")
            weights, slopes = (lane.own.get(name, len(queries), stop) for name in ("scores", "slopes"))
            gemm(queries, keys[:stop].T, weights, alpha=shape.scale)
            _hide_the_future(weights, shape.group)
            weights -= log_sums[here, heads].T.reshape(-1, 1)
            np.exp(weights, out=weights)
            gemm(weights.T, given, by_values[:stop], add=True)
            gemm(given, values[:stop].T, slopes)
            slopes -= deltas[here, heads].T.reshape(-1, 1)
            slopes *= weights
            gemm(slopes.T, queries, by_keys[:stop], alpha=shape.scale, add=True)
            gemm(slopes, keys[:stop], given, alpha=shape.scale)
            shape.queries(by_qkv[here], kv_head)[:] = given.reshape(shape.group, stop - start, shape.width)


def _heads(shape: Shape, kv_head: int) -> slice:
    """The query heads that share keys and values."""
    return slice(kv_head * shape.group, (kv_head + 1) * shape.group)


def _stacked(heads: np.ndarray, lane: Lane, name: str) -> np.ndarray:
    """Heads (group, length, width) below each other: one product for all."""
    out = lane.own.get(name, *heads.shape)
    out[:] = heads
    return out.reshape(-1, heads.shape[2])


def _hide_the_future(scores: np.ndarray, group: int) -> None:
    """The last columns are those of the queries' own positions: no one sees what comes after it."""
    queries = len(scores) // group
    np.copyto(scores.reshape(group, queries, -1)[:, :, -queries:], -np.inf, where=_future(queries))


@cache
def _future(queries: int) -> np.ndarray:
    """(queries, queries): what each may not see. There are no more than `_TILE` of these."""
    return np.triu(np.ones((queries, queries), np.bool_), 1)
