"""Storage for the hidden states of rows: memory and one file a token set, each up to its limit. Imports no MLX.

A file belongs to one key (base model, numeric environment, tokens, frozen blocks: see `runner.models.hidden_cache`) and
has a fixed place for every row, so processes that write the same rows at once write the same bytes. A row counts only
with its checksum, which is written after it: a row that a kill, a full disk or a bad one left incomplete is recomputed.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from runner.common.disk_cache import DiskCache
from runner.common.filesystem import write_at

GB = 10**9
FREE_DISK_RESERVE = 2 * GB
"""Free space in bytes that a cache leaves on the disk."""
_STATES, _CHECKSUMS = "states.bin", "sums.bin"
_PRESENT = 1 << 32  # set in the entry of a row that was written, above the 32 bits of its checksum


class Budget:
    """Bytes of memory that several stores share."""

    def __init__(self, size: int) -> None:
        self.left = size

    def reserve(self, size: int) -> bool:
        """Reserve `size` bytes; return False where fewer are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class HiddenStateStore:
    """Rows of bytes by number. `fetch` may be called from another thread than `put`."""

    def __init__(
        self,
        offsets: np.ndarray,
        *,
        memory: Budget,
        disk_bytes: int,
        folder: Path | None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`offsets`: (rows + 1,) int64, in bytes: row i is `offsets[i]` to `offsets[i + 1]` of the file.

        `folder` is the key's own folder, or None to cache in memory only, which is also what happens where the folder
        cannot be used; `log` is told so once.
        """
        self._offsets = offsets
        self._memory = memory
        self._rows: dict[int, np.ndarray] = {}
        self._log = log
        self._files: tuple[int, int] | None = None
        self._checksums = np.zeros(len(offsets) - 1, np.uint64)
        self._disk_end = 0
        if folder is not None and disk_bytes > 0:
            try:
                self._open(folder, disk_bytes)
            except OSError as error:
                self._give_up_disk(error)

    def fetch(self, row: int) -> np.ndarray | None:
        """Return the bytes (uint8) of a row, or None where it is not cached or damaged."""
        in_memory = self._rows.get(row)
        if in_memory is not None or self._files is None or not self._checksums[row]:
            return in_memory
        start, size = int(self._offsets[row]), int(self._offsets[row + 1] - self._offsets[row])
        try:
            data = os.pread(self._files[0], size, start)
        except OSError:
            return None
        intact = len(data) == size and int(self._checksums[row]) == _PRESENT | zlib.crc32(data)
        return np.frombuffer(data, np.uint8) if intact else None

    def complete(self) -> bool:
        """Return whether every row is on disk."""
        return self._files is not None and bool(self._checksums.all())

    def put(self, row: int, array: np.ndarray) -> None:
        """Cache the bytes of a row where there is room."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self._memory.reserve(flat.nbytes):
            self._rows[row] = flat.copy()
        if self._files is not None and self._offsets[row + 1] <= self._disk_end:
            entry = _PRESENT | zlib.crc32(flat.data)
            try:
                write_at(self._files[0], flat.data, int(self._offsets[row]))
                write_at(self._files[1], memoryview(np.uint64(entry).tobytes()), 8 * row)
                self._checksums[row] = entry
            except OSError as error:
                self._give_up_disk(error)

    def close(self) -> None:
        """Free memory and close the files, which stay for later runs."""
        self._memory.left += sum(data.nbytes for data in self._rows.values())
        self._rows.clear()
        self._close_files()

    def _close_files(self) -> None:
        files, self._files = self._files, None
        for file in files or ():
            with suppress(OSError):
                os.close(file)

    def _open(self, folder: Path, disk_bytes: int) -> None:
        cache = DiskCache(folder.parent, max_bytes=disk_bytes)
        cache.evict(newest=folder.name, newest_bytes=min(int(self._offsets[-1]), disk_bytes))
        folder.mkdir(parents=True, exist_ok=True)
        cache.touch(folder.name)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        states = os.open(folder / _STATES, flags, 0o600)
        try:
            checksums = os.open(folder / _CHECKSUMS, flags, 0o600)
        except OSError:
            os.close(states)
            raise
        self._files = states, checksums
        stored = os.pread(checksums, self._checksums.nbytes, 0)
        self._checksums[: len(stored) // 8] = np.frombuffer(stored[: len(stored) // 8 * 8], np.uint64)
        used = os.fstat(states).st_blocks * 512
        self._disk_end = min(disk_bytes, used + max(0, shutil.disk_usage(folder).free - FREE_DISK_RESERVE))

    def _give_up_disk(self, error: OSError) -> None:
        self._log(f"hidden-state cache: memory only, the disk is not used ({error.strerror or error})")
        self._checksums[:] = 0
        self._close_files()
