"""Entries of the cache folder that `runner clean --caches` removes: those not used for long, or beyond a size."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from runner.common.cache_dir import CACHES
from runner.common.disk_cache import DiskCache


@dataclass(frozen=True)
class CacheEntry:
    """One entry of a cache."""

    cache: DiskCache
    name: str
    size_bytes: int
    used: float
    """When it was last used, in seconds since 1970."""


def find_entries(root: Path) -> list[CacheEntry]:
    """Return the entries of this program's caches in the folder `root`, the most recently used first.

    What else is there, such as models that were downloaded or the caches of other programs, is no entry.
    """
    found = [CacheEntry(cache, name, size, used) for cache in _caches(root) for name, size, used in cache.entries()]
    return sorted(found, key=lambda entry: (-entry.used, entry.name))


def find_drafts(root: Path) -> list[CacheEntry]:
    """Return what killed processes left in these caches: no use of any kind is left for it."""
    return [CacheEntry(cache, name, size, 0.0) for cache in _caches(root) for name, size in cache.stale_drafts()]


def _caches(root: Path) -> list[DiskCache]:
    folders = [root / kind for kind in CACHES]
    return [DiskCache(folder) for folder in folders if folder.is_dir() and not folder.is_symlink()]


def select_entries(
    entries: list[CacheEntry], *, unused_days: float | None, max_bytes: float | None, now: float | None = None
) -> list[CacheEntry]:
    """Return the entries to remove: all, or those not used for `unused_days` and those beyond `max_bytes` together.

    Args:
        entries: the most recently used first.
        unused_days: None does not count.
        max_bytes: what all entries that stay may occupy; None does not count.
        now: seconds since 1970; None means the present.
    """
    if unused_days is None and max_bytes is None:
        return list(entries)
    oldest = (time.time() if now is None else now) - (unused_days or 0) * 86_400
    removed, total = [], 0
    for entry in entries:
        is_old = unused_days is not None and entry.used < oldest
        if is_old or (max_bytes is not None and total + entry.size_bytes > max_bytes):
            removed.append(entry)
        else:
            total += entry.size_bytes
    return removed


def remove_entries(entries: list[CacheEntry]) -> int:
    """Remove the entries and return their bytes; a process that uses one keeps what it has open."""
    for entry in entries:
        entry.cache.remove(entry.name)
    return sum(entry.size_bytes for entry in entries)
