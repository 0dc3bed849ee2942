"""MLX's memory: the limits that a run sets, and what it uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from runner.models.device import on_cpu

_CACHE_SHARE = 1 / 8
"""Of the memory that a GPU should work in, what its cache of freed buffers may hold by default."""
_CAPACITIES = ("max_recommended_working_set_size", "total_memory", "memory_size")
"""What `mx.device_info` calls that memory, in bytes: the first that it has."""


@dataclass(frozen=True)
class MemoryUsage:
    """MLX's memory in GB (1e9 bytes)."""

    active: float
    """Of arrays that exist."""
    cache: float
    """Of freed buffers that MLX keeps for new arrays."""
    peak: float
    """The most that arrays took since the run, or its resume, began."""

    def __str__(self) -> str:
        if on_cpu():  # which hardly caches, and whose own engine computes outside MLX
            return f"{self.peak:.2f} GB"
        return f"{self.active:.2f} GB, cache {self.cache:.2f}, peak {self.peak:.2f}"


def memory_usage() -> MemoryUsage:
    """Return what MLX uses now."""
    return MemoryUsage(mx.get_active_memory() / 1e9, mx.get_cache_memory() / 1e9, mx.get_peak_memory() / 1e9)


@dataclass(frozen=True)
class BufferCache:
    """MLX's cache of freed buffers, and the most bytes that it may hold (None: what MLX allows)."""

    limit: int | None

    def empty_if_half_full(self) -> None:
        """Return the cached buffers to the system if they take more than half of the limit.

        Batches of another length need buffers of other sizes, and on a GPU those that are not needed stay wired. mlx-lm
        empties the cache after each update; below the half the next update finds its buffers instead.
        """
        if self.limit is not None and mx.get_cache_memory() > self.limit / 2:
            mx.clear_cache()


def default_cache_limit() -> int | None:
    """Return the limit of the cache on this device in bytes; None on the CPU, where MLX's own is 32 MiB."""
    if on_cpu():
        return None
    info = mx.device_info()
    capacity = next((info[name] for name in _CAPACITIES if name in info), None)
    return int(capacity * _CACHE_SHARE) if isinstance(capacity, (int, float)) else None


@contextmanager
def memory_limits(cache_limit_gb: float | None) -> Iterator[BufferCache]:
    """Set MLX's wired and cache limits, reset its peak memory, and at the end empty the cache.

    `cache_limit_gb`: as the setting train.cache_limit_gb.
    """
    mx.reset_peak_memory()
    limit = default_cache_limit() if cache_limit_gb is None else int(cache_limit_gb * 1e9)
    previous = mx.set_cache_limit(limit) if limit is not None else None
    if not on_cpu():
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        maybe_set_recommended_wired_limit()
    try:
        yield BufferCache(limit)
    finally:
        if previous is not None:
            mx.set_cache_limit(previous)
        mx.clear_cache()  # the next job in this process starts with as much memory as this one
