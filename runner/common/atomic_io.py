"""Writing a file so that a reader, or a crash, sees the old content or the new, never a part."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from runner.common.errors import StorageError

_LEFTOVER = re.compile(r"\.[a-z]+\.(yaml|json|jsonl|csv|svg)\.[0-9a-f]{8}\.tmp")


def open_text(path: Path, *, append: bool) -> TextIO:
    """The run's own text file `path`, to be written from its end or anew; a link is not followed.

    Raises:
        StorageError: it cannot be written, or is not a regular file.
    """
    with storage_errors(path, "cannot be written"):
        handle = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if append else 0))
        if not append:
            os.ftruncate(handle, 0)
        return open(handle, "w", encoding="utf-8", newline="")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: a reader, or a crash, sees the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path, "cannot be written", needed=len(data)):
        try:
            with temporary.open("xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_leftover(name: str) -> bool:
    """Whether a file of this name was on its way to replace another: see `write_atomically`."""
    return _LEFTOVER.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the disk, where its file system can tell."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


class storage_errors:
    """Turn an OSError in the block into a StorageError that names the path."""

    def __init__(self, path: Path, what: str, needed: int | None = None) -> None:
        """`needed`: the bytes that are to be written, told where there is no room for them."""
        self.path, self.what, self.needed = path, what, needed

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno == errno.ELOOP:
                reason = "it is a symbolic link, which is not followed"
            raise StorageError(f"{self.path} {self.what}: {reason}{self._room(error)}.") from error

    def _room(self, error: OSError) -> str:
        if self.needed is None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return ""
        there = "an unknown amount"
        with suppress(OSError):
            found = os.statvfs(self.path.parent)
            there = f"{found.f_bavail * found.f_frsize:,} bytes"
        return f"; needs {self.needed:,} bytes, has {there}. Make room there, then resume the run"


def open_regular(path: Path, flags: int) -> int:
    """A handle of `path`. Raises OSError, also where it is a FIFO, a socket or a device."""
    # O_NONBLOCK: opening a FIFO must not wait for its other end.
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError("it is not a regular file")
