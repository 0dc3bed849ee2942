"""Cross-entropy on the CPU, in NumPy: MLX's own loops there are scalar on x86 and single-threaded everywhere.

NumPy's vectorised exp is many times faster, and lets go of the interpreter's lock, so rows are divided among
threads. Each row is computed by itself: neither the number of threads nor its neighbours change its bits.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from runner.backends.cpu import kernels, threads
from runner.models.device import on_cpu

_on = True


def configure(*, on: bool) -> None:
    """Whether to use this."""
    global _on
    _on = on


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
    losses, count = np.empty(len(x), np.float32), threads.count_for(len(x), 2)

    def work(number: int, _: object) -> None:
        part = slice(len(x) * number // count, len(x) * (number + 1) // count)
        losses[part] = kernels.softmax_loss(x[part], t[part], w[part], gradient=gradient)

    threads.side_by_side(work, count)
    return mx.array(losses.sum(dtype=np.float32)), logits
