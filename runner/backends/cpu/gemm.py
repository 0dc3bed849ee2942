"""Float32 matrix products by the BLAS that is loaded for the whole process, into existing memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np

from runner.backends.cpu.array_address import address

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112


@cache
def _sgemm() -> Callable[..., None] | None:
    """Return `cblas_sgemm` of the global scope, where `runner.backends.blas` loads the fast one; None without."""
    try:
        function = ctypes.CDLL(None).cblas_sgemm
    except (AttributeError, OSError):
        return None
    integer, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer, integer]
    function.restype = None
    return function


def available() -> bool:
    """Return whether there is a BLAS to call."""
    return _sgemm() is not None


def sgemm_address() -> int | None:
    """Return the address of `cblas_sgemm`, for native code; None where there is none."""
    function = _sgemm()
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


def gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray, *, alpha: float = 1.0, add: bool = False) -> np.ndarray:
    """Write alpha * a (m, k) @ b (k, n) to `out` (m, n), or add it, and return `out`.

    All float32; views and transposes are not copied.
    """
    m, k = a.shape
    n = b.shape[1]
    if not (m and n and k):  # such as of a partition without supervised positions
        if not add:
            out[:] = 0
        return out
    flag_a, stride_a = _layout(a)
    flag_b, stride_b = _layout(b)
    call = _sgemm()
    assert call is not None and b.shape[0] == k and out.shape == (m, n) and out.strides[1] == 4
    call(
        *(_ROW_MAJOR, flag_a, flag_b, m, n, k, alpha),
        *(address(a), stride_a, address(b), stride_b, float(add), address(out), max(out.strides[0] // 4, n)),
    )
    return out


def _layout(x: np.ndarray) -> tuple[int, int]:
    """Return how BLAS has to read a matrix, as it is or transposed, and its leading dimension in elements."""
    rows, columns = x.strides
    if columns == 4 and (rows >= 4 * x.shape[1] or x.shape[0] == 1):
        return _NO_TRANS, max(rows // 4, x.shape[1])
    assert rows == 4, "neither rows nor columns are contiguous"
    return _TRANS, max(columns // 4, x.shape[0])
