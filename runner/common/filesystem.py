"""The file system as checkpoints need it: synced, exclusive, and never through a symbolic link.

Every write of the package goes through a `Disk`, so a test can pass one that fails, records or stops at a
chosen call. An ``OSError`` becomes a sentence: the path, what was needed and there, and what to do next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from runner.common.errors import CheckpointError, StorageError

Content = bytes | Sequence[bytes | memoryview]
"""What a file is to hold, in one or in pieces."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO must not wait for a writer; on a regular file it changes nothing.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE = 1 << 20
# On macOS fsync leaves the data in the drive's own cache. Network volumes do not know F_FULLFSYNC.
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ADVICE = {
    errno.ENOSPC: "The disk is full: make room there, then resume the run",
    errno.EDQUOT: "The disk quota is used up: make room there, then resume the run",
    errno.EFBIG: "This process (ulimit -f) or the file system allows no file of that size",
    errno.EIO: "The disk is failing: check it before resuming the run",
    errno.EROFS: "The file system is read-only: mount it writable, or choose another folder",
}
_DAMAGE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.EIO, errno.EBADMSG}
    | {getattr(errno, "EUCLEAN", errno.EIO)}  # how Linux file systems report their own damage
)
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})
_NO_FULL_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOTTY})


class Entry(NamedTuple):
    """What a name stands for: `kind` is file, folder, link or other (a FIFO, a socket, a device)."""

    kind: str
    size: int


class FileSystem:
    """The operations of a POSIX file system that a checkpoint needs.

    Each raises StorageError; those that only read raise CheckpointError where what is at the path is itself
    wrong (missing, not of the right kind, unreadable sectors), since another checkpoint may then be fine.
    """

    def look(self, path: Path) -> Entry | None:
        """What is at `path` itself (a link is not followed), or None where nothing is."""
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable("looked at", path, error) from error
        if stat.S_ISLNK(found.st_mode):
            return Entry("link", 0)
        if stat.S_ISDIR(found.st_mode):
            return Entry("folder", 0)
        return Entry("file" if stat.S_ISREG(found.st_mode) else "other", found.st_size)

    def listdir(self, folder: Path) -> list[str]:
        """The names in `folder`, sorted."""
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            raise _unreadable("listed", folder, error) from error

    def free_space(self, folder: Path) -> int:
        """Bytes that may still be written below `folder`; `sys.maxsize` where the system does not say."""
        try:
            found = os.statvfs(folder)
        except OSError as error:
            raise _failure("asked for its free space", folder, error) from error
        return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize

    def read_file(self, path: Path, limit: int) -> bytes:
        """The bytes of the regular file `path`; CheckpointError where it is longer than `limit` bytes."""
        with _reading(path) as (file, size):
            if size > limit:
                raise CheckpointError(f"{path}: {size:,} bytes, more than the {limit:,} it may have")
            return file.read(size)

    def sha256(self, path: Path) -> tuple[int, str]:
        """Size in bytes and SHA-256 of the regular file `path`, read in pieces."""
        digest, size = hashlib.sha256(), 0
        with _reading(path) as (file, _):
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
        return size, digest.hexdigest()

    def write_file(self, path: Path, content: Content) -> None:
        """Create `path`, which must not exist, with `content`, and return once it is on the disk."""
        try:
            handle = os.open(path, _CREATE, 0o666)
            try:
                for piece in pieces_of(content):
                    _write(handle, piece)
                _sync(handle)
            except BaseException:
                with suppress(OSError):
                    os.close(handle)
                raise
            os.close(handle)  # network file systems report a failed write here
        except OSError as error:
            raise _failure("written", path, error, needed=size_of(content)) from error

    def mkdir(self, folder: Path) -> None:
        """Create `folder`, which must not exist; its parent must."""
        try:
            os.mkdir(folder)
        except OSError as error:
            raise _failure("created", folder, error) from error

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target` on the same file system, in one step."""
        try:
            os.rename(source, target)
        except OSError as error:
            raise _failure(f"renamed to {target.name}", source, error) from error

    def fsync_folder(self, folder: Path) -> None:
        """Return once the names in `folder` are on the disk."""
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _sync(handle)
            except OSError as error:
                if error.errno not in _NO_FOLDER_SYNC:
                    raise
            finally:
                os.close(handle)
        except OSError as error:
            raise _failure("synced", folder, error) from error

    def remove_tree(self, path: Path) -> None:
        """Remove `path`, which must exist, and what is below it; a link itself, never what it points to."""
        try:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                return
            # fwalk holds each folder open, so no part of the path can be swapped for a link meanwhile.
            for _, folders, files, handle in os.fwalk(path, topdown=False, onerror=_raise):
                for name in files:
                    os.unlink(name, dir_fd=handle)
                for name in folders:
                    if stat.S_ISDIR(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                        os.rmdir(name, dir_fd=handle)
                    else:
                        os.unlink(name, dir_fd=handle)
            os.rmdir(path)
        except RecursionError:
            raise StorageError(f"{path}: cannot be removed: folders nested too deeply; remove it by hand.") from None
        except OSError as error:
            raise _failure("removed", path, error) from error


def pieces_of(content: Content) -> Sequence[bytes | memoryview]:
    """`content` as pieces."""
    return [content] if isinstance(content, bytes) else content


def size_of(content: Content) -> int:
    """Bytes in `content`."""
    return sum(memoryview(piece).nbytes for piece in pieces_of(content))


def sha256_of(content: Content) -> str:
    """SHA-256 of `content`, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces_of(content):
        digest.update(piece)
    return digest.hexdigest()


def format_bytes(size: int) -> str:
    """`size` in bytes for a person: ``16.3 MB`` (powers of 1000, as disks are sold)."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@contextmanager
def _reading(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    try:
        handle = os.open(path, _READ)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            with open(handle, "rb", closefd=False) as file:
                yield file, found.st_size
        finally:
            os.close(handle)
    except MemoryError:
        raise StorageError(f"{path}: it does not fit into this machine's memory") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path}: a symbolic link, which is not followed") from None
        raise _unreadable("read", path, error) from error


def _write(handle: int, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        written = os.write(handle, rest)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = rest[written:]


def _sync(handle: int) -> None:
    if _FULL_SYNC is not None:
        try:
            fcntl.fcntl(handle, _FULL_SYNC)
            return
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:
                raise
    os.fsync(handle)


def _raise(error: OSError) -> None:
    raise error


def _unreadable(done: str, path: Path, error: OSError) -> CheckpointError | StorageError:
    failure = _failure(done, path, error)
    return CheckpointError(str(failure)) if error.errno in _DAMAGE else failure


def _failure(done: str, path: Path, error: OSError, *, needed: int | None = None) -> StorageError:
    number = error.errno or 0
    sentence = f"{path}: cannot be {done}: {error.strerror or error} ({errno.errorcode.get(number, number)})"
    if number in _ROOM and needed is not None:
        there = "an unknown amount"
        with suppress(OSError):
            found = os.statvfs(path.parent)
            there = format_bytes(found.f_bavail * found.f_frsize)
        sentence += f"; needs {format_bytes(needed)}, has {there}"
    advice = _ADVICE.get(number)
    return StorageError(f"{sentence}. {advice}." if advice else f"{sentence}.")
