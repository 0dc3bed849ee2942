"""Scratch buffers that every step reuses: fresh pages would have to be cleared by the operating system each time."""

from __future__ import annotations

import math
import mmap
from threading import Lock

import numpy as np

_MMAP_BYTES = 1 << 16
"""Size from which a buffer has pages of its own. When it is replaced by a larger one these go back to the system whole;
in the heap they would leave a hole that is too small for the larger buffer."""


class Workspace:
    """Named float32 buffers. A buffer keeps its contents until its name is asked for with another shape."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def buffer(self, name: str, *shape: int) -> np.ndarray:
        """Return the buffer `name` with `shape`; its contents are undefined at first. All threads get the same one."""
        size = math.prod(shape)
        with self._lock:
            flat = self._buffers.get(name)
            if flat is None or flat.size < size:
                self._buffers[name] = flat = _allocate(size)
        return flat[:size].reshape(shape)


def _allocate(size: int) -> np.ndarray:
    if 4 * size < _MMAP_BYTES:
        return np.empty(size, np.float32)
    return np.frombuffer(mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON), np.float32)
