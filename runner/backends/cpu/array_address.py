"""The address of an array's data, for calls into BLAS and native code.

An engine step needs thousands of addresses. NumPy's documented ways, `x.ctypes.data` and `x.__array_interface__`, build
Python objects each time: a step of the tiny model took 15 % longer, one of SmolLM2 1 %. So on CPython the pointer is
read from the C structure of the array, whose first field after the object header it is (`PyArrayObject_fields.data`
in numpy/ndarraytypes.h, unchanged since NumPy 1.0). The reading is compared with the documented way at import; where
they differ, the documented one is used.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import numpy as np


def documented_address(x: np.ndarray) -> int:
    """Return the address of the first element of `x`."""
    return x.__array_interface__["data"][0]


def fast_address(x: np.ndarray) -> int:
    """Return the same from the array's C structure; valid on CPython where the layout is as expected."""
    return ctypes.c_void_p.from_address(id(x) + object.__basicsize__).value or 0


def _choose() -> Callable[[np.ndarray], int]:
    if sys.implementation.name != "cpython":
        return documented_address
    base = np.zeros((4, 4), np.float32)
    samples = (base, base[1:, 2:], base.T, base[0])
    layout_as_expected = all(fast_address(x) == documented_address(x) for x in samples)
    return fast_address if layout_as_expected else documented_address


address = _choose()
