"""The file system as checkpoints need it: synced, exclusive, and never through a symbolic link.

All durable writes go through a `FileSystem`, so a test can pass one that fails, records or stops at a chosen call.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from runner.common.errors import CheckpointError, StorageError
from runner.common.storage_errors import NotRegularFile, read_error, storage_error, storage_errors

Content = bytes | Sequence[bytes | memoryview]
"""The content of a file, in one piece or in several."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_CHUNK = 1 << 20
# On macOS fsync leaves the data in the drive's own cache. Network volumes do not support F_FULLFSYNC.
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})
_NO_FULL_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOTTY})


class Entry(NamedTuple):
    """What a path names: `kind` is "other" for a FIFO, a socket or a device; `size` is in bytes."""

    kind: Literal["file", "folder", "link", "other"]
    size: int


class FileSystem:
    """The operations of a POSIX file system that checkpoints need.

    Each raises StorageError; those that only read raise CheckpointError where what is at the path is itself
    wrong (missing, not of the right kind, unreadable sectors), since another checkpoint may then be fine.
    """

    def lstat(self, path: Path) -> Entry | None:
        """Return what is at `path` itself (a link is not followed), or None where there is nothing."""
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise read_error(path, "examined", error) from error
        if stat.S_ISLNK(status.st_mode):
            return Entry("link", 0)
        if stat.S_ISDIR(status.st_mode):
            return Entry("folder", 0)
        return Entry("file" if stat.S_ISREG(status.st_mode) else "other", status.st_size)

    def listdir(self, folder: Path) -> list[str]:
        """Return the names in `folder`, sorted."""
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            raise read_error(folder, "listed", error) from error

    def free_space(self, folder: Path) -> int:
        """Return the bytes that may still be written below `folder`; `sys.maxsize` where the system does not say."""
        with storage_errors(folder, "queried for its free space"):
            status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize

    def read_file(self, path: Path, limit: int) -> bytes:
        """Return the bytes of the regular file `path`; CheckpointError where it is longer than `limit` bytes."""
        with _open_for_reading(path) as (file, size):
            if size > limit:
                raise CheckpointError(f"{path}: {size:,} bytes, more than the limit of {limit:,}")
            return file.read(size)

    def sha256(self, path: Path) -> tuple[int, str]:
        """Return size in bytes and SHA-256 of the regular file `path`, read in chunks."""
        digest, size = hashlib.sha256(), 0
        with _open_for_reading(path) as (file, _):
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def write_file(self, path: Path, content: Content | Iterable[bytes], *, durable: bool = True) -> None:
        """Create `path`, which must not exist, with `content`, and return once it is on the disk.

        Without `durable` the data may still be in the drive's own cache on macOS, where emptying that takes long.
        """
        pieces = [content] if isinstance(content, bytes) else content
        try:
            handle = os.open(path, _CREATE | os.O_CLOEXEC, 0o666)
            try:
                for piece in pieces:
                    _write(handle, piece)
                _sync(handle, full=durable)
            except BaseException:
                with suppress(OSError):
                    os.close(handle)
                raise
            os.close(handle)  # network file systems report a failed write here
        except OSError as error:
            needed = size_of(pieces) if isinstance(pieces, Sequence) else None
            raise storage_error(path, "written", error, needed=needed) from error

    def mkdir(self, folder: Path) -> None:
        """Create `folder`, which must not exist; its parent must."""
        with storage_errors(folder, "created"):
            os.mkdir(folder)

    def rename(self, source: Path, target: Path) -> None:
        """Rename `source` to `target` on the same file system, atomically; a file at `target` is replaced."""
        with storage_errors(source, f"renamed to {target.name}"):
            os.rename(source, target)

    def fsync_folder(self, folder: Path) -> None:
        """Return once the names in `folder` are on the disk, where its file system supports that."""
        with storage_errors(folder, "synced"):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _sync(handle)
            except OSError as error:
                if error.errno not in _NO_FOLDER_SYNC:
                    raise
            finally:
                os.close(handle)

    def fsync_tree(self, root: Path) -> None:
        """Return once all files and names below `root`, which another library may have written, are on the disk."""
        with storage_errors(root, "synced"):
            for folder, _, files in os.walk(root, onerror=_raise):
                for name in files:
                    if is_apple_double(name):
                        continue
                    handle = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        _sync(handle)
                    finally:
                        os.close(handle)
                self.fsync_folder(Path(folder))

    def remove_tree(self, path: Path) -> None:
        """Remove `path`, which must exist, and everything below it; a link itself, never what it points to.

        A name that is gone when its turn comes is no error: see `is_apple_double`.
        """
        try:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                return
            # fwalk holds each folder open, so no part of the path can be swapped for a link meanwhile.
            for _, folders, files, handle in os.fwalk(path, topdown=False, onerror=_raise_unless_gone):
                for name in files:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=handle)
                for name in folders:
                    with suppress(FileNotFoundError):
                        is_folder = stat.S_ISDIR(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode)
                        (os.rmdir if is_folder else os.unlink)(name, dir_fd=handle)
            os.rmdir(path)
        except RecursionError:
            raise StorageError(f"{path}: cannot be removed: folders nested too deeply; remove it by hand.") from None
        except OSError as error:
            raise storage_error(path, "removed", error) from error


def is_apple_double(name: str) -> bool:
    """Return whether `name` is ``._NAME``: there macOS keeps what a disk of another system (exFAT, SMB) cannot store of
    the file NAME beside it. It renames and removes the one with the other."""
    return name.startswith("._")


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a file descriptor of `path`; does not wait for the other end of a FIFO.

    Raises:
        OSError: it cannot be opened.
        NotRegularFile: it is a FIFO, a socket or a device.
    """
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise NotRegularFile


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of the open file `handle`. Raises OSError."""
    remaining = memoryview(data)
    while remaining:
        written = os.pwrite(handle, remaining, offset)
        remaining, offset = remaining[written:], offset + written


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the bytes of the regular file `path`; a link is followed.

    Raises:
        OSError: as of `open_regular`.
        ValueError: it is longer than `limit` bytes.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return data


def size_of(content: Content) -> int:
    """Return the number of bytes in `content`."""
    return sum(memoryview(piece).nbytes for piece in _pieces(content))


def sha256_of(content: Content) -> str:
    """Return the SHA-256 of `content`, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(content: Content) -> Sequence[bytes | memoryview]:
    return [content] if isinstance(content, bytes) else content


@contextmanager
def _open_for_reading(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    try:
        handle = open_regular(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            with open(handle, "rb", closefd=False) as file:
                yield file, os.fstat(handle).st_size
        finally:
            os.close(handle)
    except MemoryError:
        raise StorageError(f"{path}: does not fit into the memory of this machine") from None
    except NotRegularFile as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise read_error(path, "read", error) from error


def _write(handle: int, data: bytes | memoryview) -> None:
    remaining = memoryview(data).cast("B")
    while remaining:
        written = os.write(handle, remaining)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        remaining = remaining[written:]


def _sync(handle: int, *, full: bool = True) -> None:
    if full and _FULL_SYNC is not None:
        try:
            fcntl.fcntl(handle, _FULL_SYNC)
            return
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:
                raise
    os.fsync(handle)


def _raise(error: OSError) -> None:
    raise error


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
