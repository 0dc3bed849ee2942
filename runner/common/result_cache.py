"""Small results in the cache folder, so that a later run does not compute them again.

Whatever happens to the folder, a run is not harmed: a result that cannot be read is computed again, and one that
cannot be written is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runner.common.cache_dir import cache_dir
from runner.common.disk_cache import CacheWriteError, DiskCache, cache_key

_MAX_RESULTS = 1000  # of one kind


@dataclass(frozen=True)
class CachedResult:
    """A mapping of JSON values that depends on the parts of its key alone."""

    kind: str
    key: str

    @classmethod
    def of(cls, kind: str, parts: Mapping[str, Any]) -> CachedResult:
        """Return the result of a `kind` (the name of its folder) that depends on `parts`."""
        return cls(kind, cache_key(parts))

    def load(self, numbers: int = 0) -> dict[str, Any] | None:
        """Return the stored values, or None; `numbers` bounds their size as for `DiskCache.read_record`."""
        record = self._cache().read_record(self.key, numbers)
        values = record.get("values") if record else None
        return values if isinstance(values, dict) else None

    def store(self, values: Mapping[str, Any]) -> None:
        """Store `values`, if the folder can be written."""
        with suppress(CacheWriteError):
            self._cache().write_record(self.key, {"values": dict(values)})

    def _cache(self) -> DiskCache:
        return DiskCache(cache_dir() / self.kind, max_entries=_MAX_RESULTS)
