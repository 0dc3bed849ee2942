"""Causal attention in tiles, forward and backward: what lies above the diagonal is not computed, and no matrix of
(length, length) is kept. The backward pass makes a tile's weights again from the logarithms of their sums (Dao et
al., "FlashAttention", 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import accumulate

import numpy as np

from runner.cpu.gemm import gemm
from runner.cpu.workspace import Workspace
from runner.models.cpu_ops import divided

_TILE = 128


class Rows:
    """Rows of a batch one after the other, without padding."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = [int(length) for length in lengths]
        self.starts = [0, *accumulate(self.lengths)][:-1]
        self.places = np.concatenate([np.arange(length) for length in self.lengths])
        """(n,): of each position in its row."""

    def __len__(self) -> int:
        return len(self.places)


class Shape:
    """Of the heads in `qkv` (n, (heads + 2 kv_heads) * width): queries, keys, values beside each other."""

    def __init__(self, heads: int, kv_heads: int, width: int, scale: float) -> None:
        self.heads, self.kv_heads, self.width, self.scale = heads, kv_heads, width, scale
        self.columns = (heads + 2 * kv_heads) * width

    def query(self, x: np.ndarray, head: int) -> np.ndarray:
        """(length, width) of `x`, laid out as qkv or as queries alone."""
        return x[:, head * self.width : (head + 1) * self.width]

    def key(self, x: np.ndarray, head: int) -> np.ndarray:
        """Of the query head `head`."""
        return self.query(x, self.heads + head * self.kv_heads // self.heads)

    def value(self, x: np.ndarray, head: int) -> np.ndarray:
        """Of the query head `head`."""
        return self.query(x, self.heads + self.kv_heads + head * self.kv_heads // self.heads)


def attend(qkv: np.ndarray, shape: Shape, rows: Rows, out: np.ndarray, log_sums: np.ndarray, work: Workspace) -> None:
    """`out` (n, heads * width) = softmax(q kᵀ scale) v for each row by itself.

    `log_sums` (n, heads): logarithms of the sums of exponentials, for the way back.
    """
    for row, length, start, stop in _tiles(rows):
        x = qkv[row : row + length]
        scores = work.get("scores", shape.heads, stop - start, stop)
        for head in range(shape.heads):
            gemm(shape.query(x, head)[start:stop], shape.key(x, head)[:stop].T, scores[head], alpha=shape.scale)

        divided(partial(_softmax, scores, log_sums[row + start : row + stop]), shape.heads)
        for head in range(shape.heads):
            gemm(scores[head], shape.value(x, head)[:stop], shape.query(out[row + start : row + stop], head))


def attend_back(
    qkv: np.ndarray,
    shape: Shape,
    rows: Rows,
    out: np.ndarray,
    log_sums: np.ndarray,
    by_out: np.ndarray,
    by_qkv: np.ndarray,
    work: Workspace,
) -> None:
    """The gradients by queries, keys and values into `by_qkv`, laid out as `qkv`; out, by_out (n, heads * width)."""
    by_qkv[:, shape.heads * shape.width :] = 0
    for row, length, start, stop in _tiles(rows):
        x, made = qkv[row : row + length], by_qkv[row : row + length]
        here = slice(row + start, row + stop)
        weights = work.get("scores", shape.heads, stop - start, stop)
        slopes = work.get("slopes", shape.heads, stop - start, stop)
        for head in range(shape.heads):
            query, given = shape.query(x, head)[start:stop], shape.query(by_out[here], head)
            gemm(query, shape.key(x, head)[:stop].T, weights[head], alpha=shape.scale)
            gemm(given, shape.value(x, head)[:stop].T, slopes[head])

        divided(
            partial(_softmax_back, shape.width, weights, slopes, out[here], log_sums[here], by_out[here]), shape.heads
        )
        for head in range(shape.heads):
            query, given = shape.query(x, head)[start:stop], shape.query(by_out[here], head)
            gemm(weights[head].T, given, shape.value(made, head)[:stop], add=True)
            gemm(slopes[head].T, query, shape.key(made, head)[:stop], alpha=shape.scale, add=True)
            gemm(slopes[head], shape.key(x, head)[:stop], shape.query(made, head)[start:stop], alpha=shape.scale)


def _softmax(scores: np.ndarray, log_sums: np.ndarray, first: int, last: int) -> None:
    """Of the heads `first` to `last` of `scores` (heads, queries, keys), in place; `log_sums` (queries, heads)."""
    part = scores[first:last]
    _hide_the_future(part)
    largest = part.max(axis=2, keepdims=True)
    part -= largest
    np.exp(part, out=part)
    total = part.sum(axis=2, keepdims=True)
    part /= total
    log_sums[:, first:last] = (np.log(total) + largest)[:, :, 0].T


def _softmax_back(
    width: int,
    weights: np.ndarray,
    slopes: np.ndarray,
    out: np.ndarray,
    log_sums: np.ndarray,
    by_out: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Scores in `weights` become weights, and gradients by weights in `slopes` become gradients by scores."""
    part, slope = weights[first:last], slopes[first:last]
    _hide_the_future(part)
    part -= log_sums[:, first:last].T[:, :, None]
    np.exp(part, out=part)
    columns, heads = slice(first * width, last * width), (len(out), last - first, width)
    slope -= np.einsum("nhd,nhd->hn", out[:, columns].reshape(heads), by_out[:, columns].reshape(heads))[:, :, None]
    slope *= part


def _tiles(rows: Rows) -> Iterator[tuple[int, int, int, int]]:
    """Each row's first position and length, with each tile of its queries: start and stop within the row."""
    for row, length in zip(rows.starts, rows.lengths, strict=True):
        for start in range(0, length, _TILE):
            yield row, length, start, min(start + _TILE, length)


def _hide_the_future(scores: np.ndarray) -> None:
    """The last columns are those of the queries' own positions: no one sees what comes after it."""
    queries = scores.shape[1]
    np.copyto(scores[:, :, -queries:], -np.inf, where=_future(queries))


@cache
def _future(queries: int) -> np.ndarray:
    """(queries, queries): what each may not see. There are no more than `_TILE` of these."""
    return np.triu(np.ones((queries, queries), np.bool_), 1)
