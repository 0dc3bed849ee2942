"""Element-wise work on the CPU, in NumPy: MLX's own loops there are scalar on x86 and single-threaded everywhere.

NumPy's vectorised exp is many times faster, and lets go of the interpreter's lock, so rows are divided among
threads. Each row is computed by itself: neither the number of threads nor its neighbours change its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import mlx.core as mx
import numpy as np

from runner.models.loading import on_cpu

_ROWS = 4
"""Of logits at a time: 4 of 49,000 fit into a core's own cache."""
_pool: ThreadPoolExecutor | None = None
_threads = 1
_on = True


def configure(*, on: bool, threads: int) -> None:
    """Whether to use this, and how many threads share the work: as many as the BLAS has."""
    global _pool, _threads, _on
    _on = on
    if threads != _threads:
        if _pool is not None:
            _pool.shutdown()
        _pool, _threads = (ThreadPoolExecutor(threads, thread_name_prefix="rows") if threads > 1 else None), threads


def usable() -> bool:
    """Whether MLX computes on the CPU here, and this is wanted."""
    return _on and on_cpu()


def cross_entropy(
    logits: mx.array, targets: mx.array, weights: mx.array, *, gradient: bool = True
) -> tuple[mx.array, mx.array]:
    """The weighted sum of -log softmax(logits)[target], and its gradient by the logits.

    `logits` (n, vocabulary) float32 are written over: with the gradient, or with nothing of use. No one else may
    hold them. `targets` and `weights`: (n,).
    """
    mx.eval(logits, targets, weights)
    x, t, w = (np.array(a, copy=False) for a in (logits, targets, weights))
    losses = softmax_loss(x, t, w, gradient=gradient)
    return mx.array(losses.sum(dtype=np.float32)), logits


def softmax_loss(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, gradient: bool) -> np.ndarray:
    """Weighted losses (n,) as in `cross_entropy`; `logits` (n, vocabulary) are written over."""
    losses = np.empty(len(logits), np.float32)

    def work(start: int, stop: int) -> None:
        with np.errstate(all="ignore"):  # what is not finite shows in the loss
            for at in range(start, stop, _ROWS):
                part = slice(at, min(at + _ROWS, stop))
                rows, index = logits[part], np.arange(len(logits[part]))
                rows -= rows.max(axis=1, keepdims=True)
                own = rows[index, targets[part]]
                np.exp(rows, out=rows)
                total = rows.sum(axis=1)
                losses[part] = (np.log(total) - own) * weights[part]
                if gradient:
                    rows *= (weights[part] / total)[:, None]
                    rows[index, targets[part]] -= weights[part]

    divided(work, len(logits))
    return losses


def divided(work: Callable[[int, int], None], count: int) -> None:
    """Run `work(start, stop)` over parts of `count` rows, one a thread; this thread takes the first."""
    if _pool is None or count < 2 * _threads:
        work(0, count)
        return
    edges = [count * i // _threads for i in range(_threads + 1)]
    others = [_pool.submit(work, a, b) for a, b in pairwise(edges[1:])]
    work(edges[0], edges[1])
    for other in others:
        other.result()
