"""Caches on disk: entries named by a key, complete or absent, removed by least recent use.

An entry is a file with one sealed JSON record (``<key>.json``) or a folder (``<key>``). Its modification time is that
of its last use. Reading and housekeeping never raise: a damaged entry is a missing one. Writing raises CacheWriteError,
after which the caller does without the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common import sealed_json
from runner.common.atomic_io import hold_draft, is_draft, is_stale, write_atomically
from runner.common.errors import StorageError
from runner.common.filesystem import FileSystem, open_regular
from runner.common.storage_errors import os_error_reason

_ENTRY = re.compile(r"[0-9a-f]{32,64}(\.json)?")
_DRAFT_PREFIX = ".draft-"
_MAX_RECORD_BYTES = 1 << 16
_MAX_RECORD_VALUES = 10_000
_BYTES_PER_NUMBER = 32
"""More than a number of a list takes, with its indent and line break."""


class CacheWriteError(Exception):
    """Raised where an entry cannot be written, for example on a full disk or in a read-only folder; says why."""


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return the key (SHA-256, hex) of an entry that depends on `parts`: equal mappings have equal keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class DiskCache:
    """The entries in `folder`, and the limits that they are within after one was added."""

    folder: Path
    max_bytes: float = math.inf
    max_entries: float = math.inf

    def read_record(self, key: str, numbers: int = 0) -> dict[str, Any] | None:
        """Return the record of `key` and note its use; None where there is none, or it is damaged or too large.

        Args:
            numbers: how many numbers it may have in lists, beside the 64 KiB that any record may have.
        """
        path = self._record_path(key)
        try:
            with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                record = sealed_json.unseal(
                    file.read(_MAX_RECORD_BYTES + _BYTES_PER_NUMBER * numbers), max_values=_MAX_RECORD_VALUES + numbers
                )
        except (OSError, ValueError):
            return None
        self.touch(path.name)
        return record

    def write_record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of `key` atomically, and remove the least recently used entries beyond the limits.

        After a power cut it may be damaged, which its checksum tells.

        Raises:
            CacheWriteError: the folder cannot be written.
        """
        path = self._record_path(key)
        with cache_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, sealed_json.seal(record), durable=False)
        self.evict(newest=path.name)

    def draft(self) -> EntryDraft:
        """Return a new folder that `EntryDraft.commit` makes an entry.

        Raises:
            CacheWriteError: the folder cannot be written.
        """
        with cache_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clear_stale_drafts()
            return EntryDraft(self.folder)

    def touch(self, name: str) -> None:
        """Note that the entry `name` was used."""
        with suppress(OSError):
            os.utime(self.folder / name)

    def entries(self) -> list[tuple[str, int, float]]:
        """Return name, size in bytes and time of last use (seconds since 1970) of each entry."""
        return [(p.name, _size(p), _last_use(p)) for p in self._paths() if _ENTRY.fullmatch(p.name)]

    def evict(self, newest: str, newest_bytes: int = 0) -> list[str]:
        """Remove the least recently used entries until the others are within the limits.

        What another process has open or mapped stays readable to it.

        Args:
            newest: the entry that was just added or is about to be: removed last, if it exceeds a limit by itself.
            newest_bytes: its size once it is complete, if it is not yet.

        Returns:
            The names of the removed entries.
        """
        self.clear_stale_drafts()
        entries = {name: (used, size) for name, size, used in self.entries()}
        _, size = entries.pop(newest, (0.0, 0))
        by_use = [*sorted(entries, key=lambda name: (entries[name], name)), newest]
        sizes = {name: size for name, (_, size) in entries.items()} | {newest: max(size, newest_bytes)}
        total, removed = sum(sizes.values()), []
        for position, name in enumerate(by_use):
            if total <= self.max_bytes and len(by_use) - position <= self.max_entries:
                break
            self.remove(name)
            removed.append(name)
            total -= sizes[name]
        return removed

    def remove(self, name: str) -> None:
        """Remove the entry `name` so that no part of it can be found; does what it can."""
        path = self.folder / name
        with suppress(OSError):
            if not path.is_dir() or path.is_symlink():
                path.unlink()
                return
            aside = Path(tempfile.mkdtemp(prefix=_DRAFT_PREFIX, dir=self.folder))
            with suppress(OSError):
                os.rename(path, aside / "entry")
            shutil.rmtree(aside, ignore_errors=True)

    def stale_drafts(self) -> list[tuple[str, int]]:
        """Return name and size in bytes of each draft that a killed process left."""
        drafts = [p for p in self._paths() if is_draft(p.name) or p.name.startswith(_DRAFT_PREFIX)]
        return [(path.name, _size(path)) for path in drafts if is_stale(path)]

    def clear_stale_drafts(self) -> None:
        """Remove the drafts that killed processes left."""
        for name, _ in self.stale_drafts():
            path = self.folder / name
            with suppress(OSError):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)  # macOS removes some names with others
                else:
                    path.unlink()

    def _record_path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _paths(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except OSError:
            return []


class EntryDraft:
    """A folder that is being filled. A context manager: what was not committed is removed at its end."""

    def __init__(self, cache_folder: Path) -> None:
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix=_DRAFT_PREFIX, dir=cache_folder))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            self._stack.enter_context(hold_draft(self.folder))
        except OSError:
            self._stack.close()
            raise

    def __enter__(self) -> EntryDraft:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def commit(self, key: str) -> None:
        """Sync the folder to the disk and rename it to `key`. Where another process has committed that entry first, its
        entry stays: it has the same content.

        Raises:
            CacheWriteError: the folder cannot be written.
        """
        target = self.folder.parent / key
        with cache_write_errors(self.folder.parent):
            FileSystem().fsync_tree(self.folder)
            try:
                os.rename(self.folder, target)
            except OSError:
                if not target.exists():
                    raise
            FileSystem().fsync_folder(target.parent)


@contextmanager
def cache_write_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError or StorageError raised in the block into a CacheWriteError that names `folder`."""
    try:
        yield
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = os_error_reason(cause) if isinstance(cause, OSError) else str(error)
        raise CacheWriteError(f"{folder}: {reason}") from error


def _last_use(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    """Return the bytes that an entry occupies on the disk: of a sparse file, those that were written.

    A file system may count blocks only once it allocates them, so an entry written seconds ago may be counted too low.
    """
    size = 0
    with suppress(OSError):
        for file in list(path.iterdir()) if path.is_dir() and not path.is_symlink() else [path]:
            with suppress(FileNotFoundError):
                status = file.lstat()
                size += min(status.st_size, status.st_blocks * 512)
    return size
