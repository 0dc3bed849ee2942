"""What the engine computes beside matrix products, in NumPy. `runner.backends.cpu.native` has the same in C."""

from __future__ import annotations

import numpy as np

from runner.backends.cpu import attention, kernels
from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.partitions import Partition


class Ops:
    """Elementwise kernels and attention; see `runner.backends.cpu.kernels` and `runner.backends.cpu.attention`."""

    name = f"numpy {np.__version__}"
    """Identity of the results' last digits."""
    build: str = ""
    """Identity of the compiled code, where there is any."""

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        kernels.rms_norm(x, weight, eps, out, scale)

    def rms_norm_backward(
        self, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad_out: np.ndarray, grad_x: np.ndarray
    ) -> None:
        kernels.rms_norm_backward(x, weight, scale, grad_out, grad_x)

    def swiglu(self, gate_up: np.ndarray, out: np.ndarray) -> None:
        kernels.swiglu(gate_up, out)

    def swiglu_backward(self, gate_up: np.ndarray, grad_out: np.ndarray, out: np.ndarray) -> None:
        kernels.swiglu_backward(gate_up, grad_out, out)

    def rope(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, *, inverse: bool = False
    ) -> None:
        kernels.rope(x, cos, sin, positions, inverse=inverse)

    def exp_minus_max(self, x: np.ndarray, maximum: np.ndarray, sums: np.ndarray) -> None:
        kernels.exp_minus_max(x, maximum, sums)

    def row_dots(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """Write `out` (n, heads) = sum over width of `a` times `b` (n, heads, width)."""
        np.einsum("nhw,nhw->nh", a, b, out=out)

    def attention(
        self, qkv: np.ndarray, layout: HeadLayout, partition: Partition, out: np.ndarray, log_sums: np.ndarray
    ) -> None:
        attention.attention(qkv, layout, partition, out, log_sums)

    def attention_backward(
        self,
        qkv: np.ndarray,
        layout: HeadLayout,
        partition: Partition,
        deltas: np.ndarray,
        log_sums: np.ndarray,
        grad_out: np.ndarray,
        grad_qkv: np.ndarray,
    ) -> None:
        attention.attention_backward(qkv, layout, partition, deltas, log_sums, grad_out, grad_qkv)
