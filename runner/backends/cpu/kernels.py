"""Element-wise parts of a model, forward and backward, some rows at a time. All arrays are float32.

A row's numbers come from that row alone: its neighbours do not change a bit of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_PART = 98304
"""Numbers at a time, as what a part touches is to stay in a core's cache, and each call of NumPy costs time as well."""
_WIDE = 32768
"""The same for logits, whose rows are long."""


def _parts(count: int, columns: int, numbers: int = _PART) -> Iterator[slice]:
    size = max(1, numbers // max(1, columns))
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
    """`out` (n, d) = x * scale * weight with `scale` (n, 1) = 1 / sqrt(mean(x²) + eps) (Zhang and Sennrich, 2019)."""
    for part in _parts(len(x), x.shape[1]):
        rows = x[part]
        scale[part, 0] = 1.0 / np.sqrt(np.einsum("nd,nd->n", rows, rows) / np.float32(x.shape[1]) + np.float32(eps))
        np.multiply(rows, scale[part], out=out[part])
        out[part] *= weight


def rms_norm_back(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, by_out: np.ndarray, add_to: np.ndarray) -> None:
    """Add the gradient by x to `add_to` (n, d); `by_out` (n, d), the gradient by the output, is written over."""
    for part in _parts(len(x), x.shape[1]):
        rows, r, d = x[part], scale[part], by_out[part]
        d *= weight
        shared = np.einsum("nd,nd->n", d, rows)[:, None] * (r * r * r / np.float32(x.shape[1]))
        d *= r
        d -= rows * shared
        add_to[part] += d


def swiglu(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`out` (n, d) = silu(gate) * up, for `gate_up` (n, 2 d) (Shazeer, 2020, without its biases)."""
    d = out.shape[1]
    with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate: silu is then zero
        for part in _parts(len(out), d):
            gate, up, made = gate_up[part, :d], gate_up[part, d:], out[part]
            np.negative(gate, out=made)
            np.exp(made, out=made)
            made += 1
            np.divide(gate, made, out=made)
            made *= up


def swiglu_back(gate_up: np.ndarray, by_out: np.ndarray, out: np.ndarray) -> None:
    """Gradients by gate and up, written over `gate_up`, and the output once more in `out`; `by_out` (n, d)."""
    d = out.shape[1]
    with np.errstate(over="ignore"):
        for part in _parts(len(out), d):
            gate, up, made, given = gate_up[part, :d], gate_up[part, d:], out[part], by_out[part]
            sigmoid = np.exp(-gate)
            sigmoid += 1
            np.reciprocal(sigmoid, out=sigmoid)
            silu = gate * sigmoid
            np.multiply(silu, up, out=made)
            # silu' = sigmoid + silu (1 - sigmoid)
            slope = silu - silu * sigmoid
            slope += sigmoid
            slope *= up
            np.multiply(slope, given, out=gate)
            np.multiply(silu, given, out=up)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, places: np.ndarray, *, back: bool = False) -> None:
    """Rotary positions (Su et al., 2021) in place, halves against each other: `x` (n, heads, 2 half).

    `cos`, `sin`: (length, half); `places` (n,): of each position in its row. `back` undoes it, which is its gradient.
    """
    half = cos.shape[1]
    for part in _parts(len(x), x.shape[1] * x.shape[2]):
        c, s = cos[places[part]][:, None], sin[places[part]][:, None]
        s = -s if back else s
        first, second = x[part, :, :half], x[part, :, half : 2 * half]
        turned = first * s
        first *= c
        first -= second * s
        second *= c
        second += turned


def exponentials(x: np.ndarray, top: np.ndarray, sums: np.ndarray) -> None:
    """Write exp(x - top) over `x` (n, d), `top` (n,), and the sum of each line to `sums` (n,)."""
    with np.errstate(all="ignore"):  # what is not finite shows in the loss
        for part in _parts(len(x), x.shape[1], _WIDE):
            rows = x[part]
            rows -= top[part, None]
            np.exp(rows, out=rows)
            np.sum(rows, axis=1, out=sums[part])
