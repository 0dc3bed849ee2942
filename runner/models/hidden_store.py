"""Hidden states of rows, kept in memory and in a file of their own, each up to its limit. Knows no MLX.

A file belongs to one key (base, numbers, tokens, cut: see `runner.models.trunk`) and has room for every row at its
place, so processes that write the same rows at once write the same bytes. A row counts only with its checksum, which
is written after it: what a kill, a full disk or a bad one left half done is computed again.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

GB = 10**9
RESERVE = 2 * GB
"""Free space that a cache leaves on the disk."""
_STATES, _SUMS = "states.bin", "sums.bin"
_PRESENT = 1 << 32  # in an entry of the sums, above the 32 bits of the checksum


class Budget:
    """Bytes of memory that several stores share."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether `size` bytes were left; they are taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


class HiddenStateStore:
    """Rows of bytes by number. `fetch` may be called from another thread than `keep`."""

    def __init__(
        self,
        offsets: np.ndarray,
        *,
        memory: Budget,
        disk: int,
        folder: Path | None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`offsets`: (rows + 1,) int64, in bytes: row i is `offsets[i]` to `offsets[i + 1]` of the file.

        `disk` is a limit in bytes. `folder` is the key's own folder; None, or one that cannot be used,
        keeps rows in memory only, which `say` tells.
        """
        self._offsets = offsets
        self._memory = memory
        self._held: dict[int, np.ndarray] = {}
        self._say = say
        self._files: tuple[int, int] | None = None
        self._sums = np.zeros(len(offsets) - 1, np.uint64)
        self._disk_end = 0
        if folder is not None and disk > 0:
            try:
                self._open(folder, disk)
            except OSError as error:
                self._without_disk(error)

    def fetch(self, row: int) -> np.ndarray | None:
        """The bytes (uint8) of a row as they were kept, or None."""
        held = self._held.get(row)
        if held is not None or self._files is None or not self._sums[row]:
            return held
        start, size = int(self._offsets[row]), int(self._offsets[row + 1] - self._offsets[row])
        try:
            data = os.pread(self._files[0], size, start)
        except OSError:
            return None
        sound = len(data) == size and int(self._sums[row]) == _PRESENT | zlib.crc32(data)
        return np.frombuffer(data, np.uint8) if sound else None

    def complete(self) -> bool:
        """Whether every row was kept on disk."""
        return self._files is not None and bool(self._sums.all())

    def keep(self, row: int, data: np.ndarray) -> None:
        """Keep the bytes of a row, where there is room."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if self._memory.take(flat.nbytes):
            self._held[row] = flat.copy()
        if self._files is not None and self._offsets[row + 1] <= self._disk_end:
            entry = _PRESENT | zlib.crc32(flat.data)
            try:
                _write(self._files[0], flat.data, int(self._offsets[row]))
                _write(self._files[1], memoryview(np.uint64(entry).tobytes()), 8 * row)
                self._sums[row] = entry
            except OSError as error:
                self._without_disk(error)

    def close(self) -> None:
        """Let go of memory and files; what is on disk stays for the next."""
        self._memory.left += sum(data.nbytes for data in self._held.values())
        self._held.clear()
        files, self._files = self._files, None
        for file in files or ():
            with suppress(OSError):
                os.close(file)

    def _open(self, folder: Path, disk: int) -> None:
        _make_room(folder, min(int(self._offsets[-1]), disk), disk)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # the age by which folders are removed
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        states = os.open(folder / _STATES, flags, 0o600)
        try:
            sums = os.open(folder / _SUMS, flags, 0o600)
        except OSError:
            os.close(states)
            raise
        self._files = states, sums
        there = os.pread(sums, self._sums.nbytes, 0)
        self._sums[: len(there) // 8] = np.frombuffer(there[: len(there) // 8 * 8], np.uint64)
        used = os.fstat(states).st_blocks * 512
        self._disk_end = min(disk, used + max(0, shutil.disk_usage(folder).free - RESERVE))

    def _without_disk(self, error: OSError) -> None:
        self._say(f"trunk cache: memory only, the disk is not used ({error.strerror or error})")
        files, self._files = self._files, None
        self._sums[:] = 0
        for file in files or ():
            with suppress(OSError):
                os.close(file)


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


def _make_room(folder: Path, wanted: int, limit: int) -> None:
    """Remove the caches that were not used for longest, until `wanted` bytes more stay within `limit`."""
    others = []
    with suppress(OSError):
        for other in folder.parent.iterdir():
            if other.name != folder.name and (other / _SUMS).is_file() and not other.is_symlink():
                others.append((other.stat().st_mtime, other, (other / _STATES).stat().st_blocks * 512))
    total = sum(size for _, _, size in others)
    for _, other, size in sorted(others):
        if total + wanted <= limit:
            break
        for name in (_STATES, _SUMS):  # nothing else is ours there
            with suppress(OSError):
                (other / name).unlink()
        with suppress(OSError):
            other.rmdir()
        total -= size
