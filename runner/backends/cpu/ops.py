"""What the engine computes beside products, in NumPy. `runner.backends.cpu.native` has the same in C."""

from __future__ import annotations

import numpy as np

from runner.backends.cpu import attention, kernels
from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.partitions import Partition


class Ops:
    """Element-wise parts and attention; `runner.backends.cpu.kernels` and `runner.backends.cpu.attention` tell what each computes."""

    name = f"numpy {np.__version__}"
    """Of the numbers: others give other last digits."""
    build: str = ""
    """Of the code, where a compiler made it here."""

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        kernels.rms_norm(x, weight, eps, out, scale)

    def rms_norm_back(
        self, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, by_out: np.ndarray, add_to: np.ndarray
    ) -> None:
        kernels.rms_norm_back(x, weight, scale, by_out, add_to)

    def swiglu(self, gate_up: np.ndarray, out: np.ndarray) -> None:
        kernels.swiglu(gate_up, out)

    def swiglu_back(self, gate_up: np.ndarray, by_out: np.ndarray, out: np.ndarray) -> None:
        kernels.swiglu_back(gate_up, by_out, out)

    def rotate(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, places: np.ndarray, *, back: bool = False
    ) -> None:
        kernels.rotate(x, cos, sin, places, back=back)

    def exponentials(self, x: np.ndarray, top: np.ndarray, sums: np.ndarray) -> None:
        kernels.exponentials(x, top, sums)

    def dots(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """`out` (n, h) = the products of `a` and `b` (n, h, width), summed."""
        np.einsum("nhw,nhw->nh", a, b, out=out)

    def attend(
        self, qkv: np.ndarray, shape: HeadLayout, lane: Partition, out: np.ndarray, log_sums: np.ndarray
    ) -> None:
        attention.attend(qkv, shape, lane, out, log_sums)

    def attend_back(
        self,
        qkv: np.ndarray,
        shape: HeadLayout,
        lane: Partition,
        deltas: np.ndarray,
        log_sums: np.ndarray,
        by_out: np.ndarray,
        by_qkv: np.ndarray,
    ) -> None:
        attention.attend_back(qkv, shape, lane, deltas, log_sums, by_out, by_qkv)
