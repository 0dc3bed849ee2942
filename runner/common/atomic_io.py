"""Files and folders that are replaced as a whole: a reader, or a crash, sees the old content or the new, never a part.

A file is written beside its target as ``.NAME.0123abcd.tmp`` and renamed. A folder is written as ``.NAME.new``; the
old one is moved to ``.NAME.old`` before the new one takes its name, and `repair_replaced_folder` puts it back where a
crash came between the two renames.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from runner.common.errors import ConfigError, RunnerError, StorageError
from runner.common.filesystem import Content, FileSystem, open_regular
from runner.common.storage_errors import storage_errors

_DRAFT_FOLDER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_GRACE = 60.0
"""Seconds before a draft may be found stale: a new folder is held only after it is created, and a file never is."""
_DRAFT = re.compile(r"\.[A-Za-z0-9][\w.-]*\.(yaml|json|jsonl|csv|svg|html)\.[0-9a-f]{8}\.tmp")


def write_atomically(
    path: Path, content: str | Content | Iterable[bytes], *, durable: bool = True, filesystem: FileSystem | None = None
) -> None:
    """Replace the file `path` by `content`.

    Args:
        content: a generator may raise to abandon the write: `path` then stays as it was.
        durable: whether the new content survives a power cut once this returns; without it, what is at `path` after
            a power cut is the old content or the new.

    Raises:
        StorageError: the disk fails or is full; the old content is still there.
    """
    filesystem = filesystem or FileSystem()
    draft = _draft_path(path)
    try:
        with errors_named(draft, path):
            filesystem.write_file(draft, content.encode() if isinstance(content, str) else content, durable=durable)
            filesystem.rename(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        filesystem.fsync_folder(path.parent)


def is_draft(name: str) -> bool:
    """Return whether `name` is that of a file that a killed process was writing with `write_atomically`."""
    return _DRAFT.fullmatch(name) is not None


def open_text(path: Path) -> TextIO:
    """Open the text file `path` for appending; a link is not followed.

    Raises:
        StorageError: it cannot be written, or is not a regular file.
    """
    with storage_errors(path, "written"):
        handle = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND)
    return open(handle, "w", encoding="utf-8", newline="")


@contextmanager
def create_atomically(target: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield the path of a file or folder to write; when the block ends, sync it to the disk and rename it to `target`.

    A file is written in a new folder beside `target`, under its own name; a folder exists already. The block may read
    back what it wrote. If it raises, nothing is left and `target` is not created. What killed processes left of earlier
    attempts at `target` is removed.

    Raises:
        ConfigError: `target` exists by then; nothing is replaced.
        StorageError: the disk fails or is full.
    """
    filesystem, draft = FileSystem(), _draft_path(target)
    with storage_errors(target, "created"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_drafts(target, filesystem)
    written = draft if is_folder else draft / target.name
    with ExitStack() as stack:
        stack.enter_context(errors_named(draft, target))
        filesystem.mkdir(draft)
        with suppress(OSError):  # a file system without locks: clean leaves the drafts there alone
            stack.enter_context(hold_draft(draft))
        try:
            yield written
            filesystem.fsync_tree(draft)
            if filesystem.lstat(target):
                raise ConfigError(f"{target} was created by another process meanwhile; nothing is replaced.")
            filesystem.rename(written, target)
            filesystem.fsync_folder(target.parent)
        finally:
            with suppress(StorageError):
                if filesystem.lstat(draft):
                    filesystem.remove_tree(draft)


def _remove_stale_drafts(target: Path, filesystem: FileSystem) -> None:
    for entry in list(os.scandir(target.parent)):
        is_own = is_draft_folder(entry.name) and entry.name.rsplit(".", 2)[0] == f".{target.name}"
        if is_own and entry.is_dir(follow_symlinks=False) and is_stale(Path(entry.path)):
            with suppress(StorageError):
                filesystem.remove_tree(Path(entry.path))


@contextmanager
def errors_named(draft: Path, target: Path) -> Iterator[None]:
    """Name `target` in the errors that the block raises, in place of the `draft` that is written for it."""
    try:
        yield
    except RunnerError as error:
        text = str(error).replace(str(draft / target.name), str(target)).replace(str(draft), str(target))
        error.args = (text.replace(f"cannot be renamed to {target.name}", "cannot be written"),)
        raise


@contextmanager
def hold_draft(folder: Path) -> Iterator[None]:
    """Hold the lock of a draft folder, which tells other processes that this one is writing it.

    Raises:
        OSError: another process holds it, or the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def is_draft_folder(name: str) -> bool:
    """Return whether `name` is that of a folder in which `create_atomically` writes."""
    return _DRAFT_FOLDER.fullmatch(name) is not None


def is_stale(draft: Path) -> bool:
    """Return whether a draft was left by a killed process: it is not new, and nothing holds it if it is a folder."""
    try:
        status = draft.lstat()
        if time.time() - status.st_mtime <= _GRACE:
            return False
        if stat.S_ISDIR(status.st_mode):
            with hold_draft(draft):
                pass
    except OSError:
        return False
    return True


def replace_folder(target: Path, contents: Mapping[str, Content], filesystem: FileSystem) -> None:
    """Make the folder `target` hold exactly `contents`.

    Raises:
        StorageError: the disk fails or is full; the old folder is then whole, if need be after a repair.
    """
    new, old = _beside(target, "new"), _beside(target, "old")
    if filesystem.lstat(new):
        filesystem.remove_tree(new)
    filesystem.mkdir(new)
    for name, content in contents.items():
        filesystem.write_file(new / name, content)
    filesystem.fsync_folder(new)
    repair_replaced_folder(target, filesystem)
    exists = filesystem.lstat(target) is not None
    if exists:
        filesystem.rename(target, old)
    filesystem.rename(new, target)
    filesystem.fsync_folder(target.parent)
    if exists:
        filesystem.remove_tree(old)


def repair_replaced_folder(target: Path, filesystem: FileSystem) -> None:
    """Put `target` back where a crash came between the two renames of `replace_folder`."""
    old = _beside(target, "old")
    entry = filesystem.lstat(old)
    if entry is None or entry.kind != "folder":
        return
    if filesystem.lstat(target):
        filesystem.remove_tree(old)
    else:
        filesystem.rename(old, target)


def _draft_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")
