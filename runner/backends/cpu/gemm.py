"""Float32 matrix products by the BLAS that is loaded for the whole process, into memory that is already there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import numpy as np

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112


@cache
def _sgemm() -> Callable[..., None] | None:
    """`cblas_sgemm` in the global scope, where `runner.backends.cpu.blas` puts the fast one; None where there is none."""
    try:
        found = ctypes.CDLL(None).cblas_sgemm
    except (AttributeError, OSError):
        return None
    number, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    found.argtypes = [number] * 6 + [real, pointer, number, pointer, number, real, pointer, number]
    found.restype = None
    return found


def available() -> bool:
    """Whether there is a BLAS to call."""
    return _sgemm() is not None


def entry() -> int | None:
    """The address of `cblas_sgemm`, for code in C; None where there is none."""
    found = _sgemm()
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value  # type: ignore[arg-type]


def gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray, *, alpha: float = 1.0, add: bool = False) -> np.ndarray:
    """`out` (m, n) = alpha * a (m, k) @ b (k, n), or that added to it. Float32; views and transposes cost no copy."""
    m, k = a.shape
    n = b.shape[1]
    if not (m and n and k):  # such as of a thread that has nothing to predict
        if not add:
            out[:] = 0
        return out
    flag_a, step_a = _layout(a)
    flag_b, step_b = _layout(b)
    call = _sgemm()
    assert call is not None and b.shape[0] == k and out.shape == (m, n) and out.strides[1] == 4
    call(
        *(_ROW_MAJOR, flag_a, flag_b, m, n, k, alpha),
        *(address(a), step_a, address(b), step_b, float(add), address(out), max(out.strides[0] // 4, n)),
    )
    return out


def _layout(x: np.ndarray) -> tuple[int, int]:
    """How BLAS is to read a matrix: as it lies or transposed, and the floats from one line to the next."""
    rows, columns = x.strides
    if columns == 4 and (rows >= 4 * x.shape[1] or x.shape[0] == 1):
        return _PLAIN, max(rows // 4, x.shape[1])
    assert rows == 4, "neither lines nor columns lie together"
    return _TRANSPOSED, max(columns // 4, x.shape[0])


def _slow_at(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def _fast_at(x: np.ndarray) -> int:
    """The same in a fifth of the time, thousands of times a step: in NumPy's C structure the pointer to the data comes
    right after what every object of CPython begins with."""
    return ctypes.c_void_p.from_address(id(x) + object.__basicsize__).value or 0


_PROBE = np.zeros((4, 4), np.float32)[1:, 2:]
address = _fast_at if sys.implementation.name == "cpython" and _fast_at(_PROBE) == _slow_at(_PROBE) else _slow_at
"""Where an array's first number lies."""
