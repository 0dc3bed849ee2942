"""The one conversion of an OSError into an error for a person: path, reason, space needed and free, advice."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.common.errors import CheckpointError, StorageError
from runner.common.text import format_bytes

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MAKE_ROOM = "make room there, then resume the run"
_ADVICE = {
    errno.ENOSPC: f"The disk is full: {_MAKE_ROOM}",
    errno.EDQUOT: f"The disk quota is used up: {_MAKE_ROOM}",
    errno.EFBIG: "This process (ulimit -f) or the file system does not allow a file of that size",
    errno.EIO: "The disk is failing: check it before resuming the run",
    errno.EROFS: "The file system is read-only: mount it writable, or choose another folder",
}
_DAMAGE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.EIO, errno.EBADMSG, errno.ELOOP}
    | {getattr(errno, "EUCLEAN", errno.EIO)}  # how Linux file systems report their own corruption
)


class NotRegularFile(OSError):
    """Raised in place of opening a FIFO, a socket or a device."""

    def __init__(self) -> None:
        super().__init__(errno.EINVAL, "not a regular file")

    def __str__(self) -> str:
        return "not a regular file"


def storage_error(path: Path, action: str, error: OSError, *, needed: int | None = None) -> StorageError:
    """Return the StorageError for an `error` that was raised when `path` was to be `action` ("written", "synced").

    Args:
        needed: bytes that were to be written, reported where there is no space for them.
    """
    message = f"{path}: cannot be {action}: {os_error_reason(error)}"
    if error.errno in _NO_SPACE and needed is not None:
        free = "an unknown amount"
        with suppress(OSError):
            status = os.statvfs(path.parent)
            free = format_bytes(status.f_bavail * status.f_frsize)
        message += f"; needs {format_bytes(needed)}, has {free}"
    advice = _ADVICE.get(error.errno or 0)
    return StorageError(f"{message}. {advice}." if advice else f"{message}.")


def read_error(path: Path, action: str, error: OSError) -> CheckpointError | StorageError:
    """Return the error for a failed read: CheckpointError where what is at `path` is missing, damaged or of the wrong
    kind, so that another checkpoint may be fine, and StorageError where the machine is at fault."""
    failure = storage_error(path, action, error)
    return CheckpointError(str(failure)) if error.errno in _DAMAGE else failure


def insufficient_space(folder: Path, *, needed: int, free: int) -> StorageError:
    """Return the StorageError for `needed` bytes that `folder`, with `free` bytes left, has no space for."""
    return StorageError(f"{folder}: needs {format_bytes(needed)}, has {format_bytes(free)}. {_MAKE_ROOM.capitalize()}.")


@contextmanager
def storage_errors(path: Path, action: str, *, needed: int | None = None) -> Iterator[None]:
    """Convert an OSError raised in the block: see `storage_error`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, action, error, needed=needed) from error


def os_error_reason(error: OSError) -> str:
    """Return the reason of an OSError in words, with its symbolic number: ``No space left on device (ENOSPC)``."""
    if error.errno is None or isinstance(error, NotRegularFile):
        return str(error)
    reason = "a symbolic link, which is not followed" if error.errno == errno.ELOOP else error.strerror
    return f"{reason} ({errno.errorcode.get(error.errno, error.errno)})"
