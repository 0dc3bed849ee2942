"""Element-wise parts of a block, forward and backward, by rows that threads share. All arrays are float32.

A row's numbers come from that row alone, so neither the threads nor the neighbours change a bit of them.
"""

from __future__ import annotations

import numpy as np

from runner.models.cpu_ops import divided

_PART = 64
"""Rows at a time: what a part touches stays in a core's cache."""


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
    """`out` (n, d) = x * scale * weight with `scale` (n, 1) = 1 / sqrt(mean(x²) + eps) (Zhang and Sennrich, 2019)."""

    def work(start: int, stop: int) -> None:
        for at in range(start, stop, _PART):
            part = slice(at, min(at + _PART, stop))
            rows = x[part]
            scale[part, 0] = 1.0 / np.sqrt(np.einsum("nd,nd->n", rows, rows) / np.float32(x.shape[1]) + np.float32(eps))
            np.multiply(rows, scale[part], out=out[part])
            out[part] *= weight

    divided(work, len(x))


def rms_norm_back(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, by_out: np.ndarray, add_to: np.ndarray) -> None:
    """Add the gradient by x to `add_to` (n, d); `by_out` (n, d), the gradient by the output, is written over."""

    def work(start: int, stop: int) -> None:
        for at in range(start, stop, _PART):
            part = slice(at, min(at + _PART, stop))
            rows, r, d = x[part], scale[part], by_out[part]
            d *= weight
            shared = np.einsum("nd,nd->n", d, rows)[:, None] * (r * r * r / np.float32(x.shape[1]))
            d *= r
            d -= rows * shared
            add_to[part] += d

    divided(work, len(x))


def swiglu(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`out` (n, d) = silu(gate) * up, for `gate_up` (n, 2 d) (Shazeer, 2020, without its biases)."""
    d = out.shape[1]

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate: silu is then zero
            for at in range(start, stop, _PART):
                part = slice(at, min(at + _PART, stop))
                gate, up, made = gate_up[part, :d], gate_up[part, d:], out[part]
                np.negative(gate, out=made)
                np.exp(made, out=made)
                made += 1
                np.divide(gate, made, out=made)
                made *= up

    divided(work, len(out))


def swiglu_back(gate_up: np.ndarray, by_out: np.ndarray, out: np.ndarray) -> None:
    """Gradients by gate and up, written over `gate_up`, and the output once more in `out`; `by_out` (n, d)."""
    d = out.shape[1]

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore"):
            for at in range(start, stop, _PART):
                part = slice(at, min(at + _PART, stop))
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

    divided(work, len(out))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, places: np.ndarray, *, back: bool = False) -> None:
    """Rotary positions (Su et al., 2021) in place, halves against each other: `x` (n, heads, 2 half).

    `cos`, `sin`: (length, half); `places` (n,): of each position in its row. `back` undoes it, which is its gradient.
    """
    half = cos.shape[1]

    def work(start: int, stop: int) -> None:
        for at in range(start, stop, _PART):
            part = slice(at, min(at + _PART, stop))
            c, s = cos[places[part]][:, None], sin[places[part]][:, None]
            s = -s if back else s
            first, second = x[part, :, :half], x[part, :, half : 2 * half]
            turned = first * s
            first *= c
            first -= second * s
            second *= c
            second += turned

    divided(work, len(x))
