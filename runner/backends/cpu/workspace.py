"""Memory that each step uses again: fresh pages would have to be cleared by the system every time."""

from __future__ import annotations

import math
import mmap
from threading import Lock

import numpy as np

_LARGE = 1 << 16
"""Bytes from which an array has pages of its own: one that was outgrown goes back to the system whole, where in the
heap it would leave a hole that the next, larger one does not fit into."""


class Workspace:
    """Float32 arrays by name; an array is what was left there, and holds until its name is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def get(self, name: str, *shape: int) -> np.ndarray:
        """An array of `shape` whose numbers are to be written first. Threads that ask for the same get the same."""
        size = math.prod(shape)
        with self._lock:
            held = self._held.get(name)
            if held is None or held.size < size:
                self._held[name] = held = _empty(size)
        return held[:size].reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self._held.values())


def _empty(size: int) -> np.ndarray:
    if 4 * size < _LARGE:
        return np.empty(size, np.float32)
    return np.frombuffer(mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON), np.float32)
