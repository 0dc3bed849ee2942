"""Causal attention in tiles, forward and backward: what lies above the diagonal is not computed, and no matrix of
(length, length) is stored. The backward pass recomputes a tile's weights from the logarithms of their sums (Dao et al.,
"FlashAttention", 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from runner.backends.cpu.gemm import gemm
from runner.backends.cpu.partitions import Partition

_STACKED_QUERIES, _MIN_TILE, _MAX_TILE = 256, 32, 128
"""Queries of a tile: as many as make 256 with the heads that share keys, within the two bounds."""
_SCORES_AT_ONCE = 262144
"""Scores computed at once: several heads where they fit, since each call of NumPy has a cost."""


class HeadLayout:
    """The columns of `qkv` (n, (heads + 2 kv_heads) * width): queries, keys and values beside each other."""

    def __init__(self, heads: int, kv_heads: int, width: int, scale: float) -> None:
        self.heads, self.kv_heads, self.width, self.scale = heads, kv_heads, width, scale
        self.columns = (heads + 2 * kv_heads) * width

    @property
    def group_size(self) -> int:
        """Query heads that share one head of keys and values (Ainslie et al., "GQA", 2023)."""
        return self.heads // self.kv_heads

    @property
    def tile(self) -> int:
        """Queries of a tile."""
        return min(max(_MIN_TILE, _STACKED_QUERIES // self.group_size), _MAX_TILE)

    def queries(self, x: np.ndarray, kv_heads: range) -> np.ndarray:
        """Return a view (kv_heads, group_size, length, width) of `x`, which has the columns of qkv or queries alone."""
        group = self.group_size
        columns = slice(kv_heads.start * group * self.width, kv_heads.stop * group * self.width)
        return x[:, columns].reshape(len(x), len(kv_heads), group, self.width).transpose(1, 2, 0, 3)

    def per_query(self, x: np.ndarray, kv_heads: range) -> np.ndarray:
        """Return a view (kv_heads, group_size, length) of `x` (length, heads), one number for each query."""
        columns = slice(kv_heads.start * self.group_size, kv_heads.stop * self.group_size)
        return x[:, columns].reshape(len(x), len(kv_heads), self.group_size).transpose(1, 2, 0)

    def key(self, qkv: np.ndarray, head: int) -> np.ndarray:
        """Return the keys (length, width) of a head."""
        return self._column(qkv, self.heads + head)

    def value(self, qkv: np.ndarray, head: int) -> np.ndarray:
        """Return the values (length, width) of a head."""
        return self._column(qkv, self.heads + self.kv_heads + head)

    def _column(self, x: np.ndarray, head: int) -> np.ndarray:
        return x[:, head * self.width : (head + 1) * self.width]

    def tiles(self, partition: Partition) -> Iterator[tuple[int, int, int, range]]:
        """Yield the tiles of a partition's attention: first position of the row, start and stop of the queries in it,
        and as many heads of keys as fit a core's cache."""
        for share in partition.attention_shares(self.kv_heads):
            for start in range(0, share.length, self.tile):
                stop = min(start + self.tile, share.length)
                size = max(1, _SCORES_AT_ONCE // ((stop - start) * self.group_size * stop))
                for first in range(share.heads.start, share.heads.stop, size):
                    yield share.start, start, stop, range(first, min(first + size, share.heads.stop))


def attention(qkv: np.ndarray, layout: HeadLayout, partition: Partition, out: np.ndarray, log_sums: np.ndarray) -> None:
    """Write the partition's share of `out` (n, heads * width) = softmax(q kᵀ scale) v, for each row by itself.

    `log_sums` (n, heads): logarithms of the sums of exponentials, for the backward pass.
    """
    for row, start, stop, heads in layout.tiles(partition):
        visible, tile = qkv[row : row + stop], slice(row + start, row + stop)
        queries = _stack(layout.queries(qkv[tile], heads), partition, "queries")
        scores = partition.local.buffer("scores", *queries.shape[:2], stop)
        for i, head in enumerate(heads):
            gemm(queries[i], layout.key(visible, head).T, scores[i], alpha=layout.scale)
        _mask_future(scores, stop - start)
        maximum = scores.max(axis=2, keepdims=True)
        scores -= maximum
        np.exp(scores, out=scores)
        sums = scores.sum(axis=2, keepdims=True)
        for i, head in enumerate(heads):
            gemm(scores[i], layout.value(visible, head), queries[i])  # the queries are not needed any more
        queries /= sums
        out_view = layout.queries(out[tile], heads)
        out_view[:] = queries.reshape(out_view.shape)
        log_sums_view = layout.per_query(log_sums[tile], heads)
        log_sums_view[:] = (np.log(sums) + maximum).reshape(log_sums_view.shape)


def attention_backward(
    qkv: np.ndarray,
    layout: HeadLayout,
    partition: Partition,
    deltas: np.ndarray,
    log_sums: np.ndarray,
    grad_out: np.ndarray,
    grad_qkv: np.ndarray,
) -> None:
    """Write the partition's share of `grad_qkv`, the gradients by queries, keys and values in the layout of `qkv`.

    `grad_out` (n, heads * width); `deltas` (n, heads): sums over each head of output times `grad_out`.
    """
    for row, start, stop, heads in layout.tiles(partition):
        visible, grad_visible, tile = qkv[row : row + stop], grad_qkv[row : row + stop], slice(row + start, row + stop)
        queries = _stack(layout.queries(qkv[tile], heads), partition, "queries")
        grads = _stack(layout.queries(grad_out[tile], heads), partition, "grads")
        weights, grad_scores = (
            partition.local.buffer(name, *queries.shape[:2], stop) for name in ("scores", "grad_scores")
        )
        for i, head in enumerate(heads):
            gemm(queries[i], layout.key(visible, head).T, weights[i], alpha=layout.scale)
            gemm(grads[i], layout.value(visible, head).T, grad_scores[i])
        _mask_future(weights, stop - start)
        weights -= layout.per_query(log_sums[tile], heads).reshape(*queries.shape[:2], 1)
        np.exp(weights, out=weights)
        grad_scores -= layout.per_query(deltas[tile], heads).reshape(*queries.shape[:2], 1)
        grad_scores *= weights
        for i, head in enumerate(heads):
            grad_key, grad_value = layout.key(grad_visible, head), layout.value(grad_visible, head)
            # Earlier tiles of the row have written the gradients of the positions before this one.
            for grad, left, right, factor in (
                (grad_value, weights[i], grads[i], 1.0),
                (grad_key, grad_scores[i], queries[i], layout.scale),
            ):
                if start:
                    gemm(left[:, :start].T, right, grad[:start], alpha=factor, add=True)
                gemm(left[:, start:].T, right, grad[start:], alpha=factor)
            gemm(grad_scores[i], layout.key(visible, head), grads[i], alpha=layout.scale)
        grad_queries = layout.queries(grad_qkv[tile], heads)
        grad_queries[:] = grads.reshape(grad_queries.shape)


def _stack(queries: np.ndarray, partition: Partition, name: str) -> np.ndarray:
    """Copy `queries` (heads, group, length, width) to a buffer (heads, group * length, width): one product for all
    queries that share keys."""
    out = partition.local.buffer(name, *queries.shape)
    out[:] = queries
    return out.reshape(len(queries), -1, queries.shape[3])


def _mask_future(scores: np.ndarray, queries: int) -> None:
    """Set the scores of later positions to -inf; the last columns of `scores` belong to the queries themselves."""
    last = scores.reshape(-1, queries, scores.shape[2])[:, :, -queries:]
    np.copyto(last, -np.inf, where=_future(queries))


@cache
def _future(queries: int) -> np.ndarray:
    """Return the mask (queries, queries) of later positions; there are at most `_MAX_TILE` of these."""
    return np.triu(np.ones((queries, queries), np.bool_), 1)
