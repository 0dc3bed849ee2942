"""What the engine computes beside matrix products, in NumPy; `runner.backends.cpu.native` has the same in C.

The elementwise kernels, forward and backward, take a few rows at a time. All arrays are float32. Each row is computed
from that row alone, so its neighbours never change a bit of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runner.backends.cpu.attention import attention, attention_backward

_TILE = 98304
"""Elements at a time: few enough for a core's cache, enough to make the overhead of NumPy's calls small."""
_LOGITS_TILE = 32768
"""The same for logits, whose rows are long."""


def _tiles(rows: int, columns: int, elements: int = _TILE) -> Iterator[slice]:
    size = max(1, elements // max(1, columns))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
    """Write `out` (n, d) = x * scale * weight with `scale` (n, 1) = 1 / sqrt(mean(x²) + eps).

    RMSNorm (Zhang and Sennrich, "Root mean square layer normalization", 2019).
    """
    for tile in _tiles(len(x), x.shape[1]):
        rows = x[tile]
        scale[tile, 0] = 1.0 / np.sqrt(np.einsum("nd,nd->n", rows, rows) / np.float32(x.shape[1]) + np.float32(eps))
        np.multiply(rows, scale[tile], out=out[tile])
        out[tile] *= weight


def rms_norm_backward(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad_out: np.ndarray, grad_x: np.ndarray
) -> None:
    """Add the gradient by x to `grad_x` (n, d); `grad_out` (n, d) is overwritten."""
    for tile in _tiles(len(x), x.shape[1]):
        rows, r, grad = x[tile], scale[tile], grad_out[tile]
        grad *= weight
        projection = np.einsum("nd,nd->n", grad, rows)[:, None] * (r * r * r / np.float32(x.shape[1]))
        grad *= r
        grad -= rows * projection
        grad_x[tile] += grad


def swiglu(gate_up: np.ndarray, out: np.ndarray) -> None:
    """Write `out` (n, d) = silu(gate) * up of `gate_up` (n, 2 d).

    SwiGLU without biases (Shazeer, "GLU variants improve Transformer", 2020).
    """
    d = out.shape[1]
    with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate, whose silu is zero
        for tile in _tiles(len(out), d):
            gate, up, result = gate_up[tile, :d], gate_up[tile, d:], out[tile]
            np.negative(gate, out=result)
            np.exp(result, out=result)
            result += 1
            np.divide(gate, result, out=result)
            result *= up


def swiglu_backward(gate_up: np.ndarray, grad_out: np.ndarray, out: np.ndarray) -> None:
    """Overwrite `gate_up` with the gradients by gate and up, and `out` with the output of `swiglu` once more."""
    d = out.shape[1]
    with np.errstate(over="ignore"):
        for tile in _tiles(len(out), d):
            gate, up, result, grad = gate_up[tile, :d], gate_up[tile, d:], out[tile], grad_out[tile]
            sigmoid = np.exp(-gate)
            sigmoid += 1
            np.reciprocal(sigmoid, out=sigmoid)
            silu = gate * sigmoid
            np.multiply(silu, up, out=result)
            # silu' = sigmoid + silu (1 - sigmoid)
            slope = silu - silu * sigmoid
            slope += sigmoid
            slope *= up
            np.multiply(slope, grad, out=gate)
            np.multiply(silu, grad, out=up)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, *, inverse: bool = False) -> None:
    """Rotate `x` (n, heads, 2 half) in place by its `positions` (n,); `cos` and `sin` are (length, half).

    Rotary position embedding, first half against second half (Su et al., "RoFormer", 2021). The gradient of a rotation
    is its inverse.
    """
    half = cos.shape[1]
    for tile in _tiles(len(x), x.shape[1] * x.shape[2]):
        c, s = cos[positions[tile]][:, None], sin[positions[tile]][:, None]
        s = -s if inverse else s
        first, second = x[tile, :, :half], x[tile, :, half : 2 * half]
        rotated = first * s
        first *= c
        first -= second * s
        second *= c
        second += rotated


def exp_minus_max(x: np.ndarray, maximum: np.ndarray, sums: np.ndarray) -> None:
    """Overwrite `x` (n, d) with exp(x - maximum) and write the sum of each row to `sums` (n,); `maximum` is (n,)."""
    with np.errstate(all="ignore"):  # a value that is not finite shows in the loss
        for tile in _tiles(len(x), x.shape[1], _LOGITS_TILE):
            rows = x[tile]
            rows -= maximum[tile, None]
            np.exp(rows, out=rows)
            np.sum(rows, axis=1, out=sums[tile])


def row_dots(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Write `out` (n, heads) = sum over width of `a` times `b` (n, heads, width)."""
    np.einsum("nhw,nhw->nh", a, b, out=out)


class Ops:
    """The set of kernels that an engine uses; this one is NumPy's."""

    name = f"numpy {np.__version__}"
    """Identity of the results' last digits."""
    build: str = ""
    """Identity of the compiled code, where there is any."""

    rms_norm = staticmethod(rms_norm)
    rms_norm_backward = staticmethod(rms_norm_backward)
    swiglu = staticmethod(swiglu)
    swiglu_backward = staticmethod(swiglu_backward)
    rope = staticmethod(rope)
    exp_minus_max = staticmethod(exp_minus_max)
    row_dots = staticmethod(row_dots)
    attention = staticmethod(attention)
    attention_backward = staticmethod(attention_backward)
