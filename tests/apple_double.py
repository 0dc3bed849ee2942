"""A file system that keeps ``._NAME`` beside NAME, simulated: what macOS does on exFAT and SMB.

The functions of `os` that create, rename and remove are wrapped, in this process, for paths below a folder: each also
creates, renames or removes the second file. What is simulated is the names; macOS's own timing is not.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest


def keep_apple_doubles(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Behave like macOS below `root` until `patch` is undone."""
    own = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")}

    def double_of(path: Any, dir_fd: int | None) -> str | None:
        """The second file of `path`, None where it has none: outside `root`, or it is such a file itself."""
        folder, name = os.path.split(os.fspath(path))
        inside = dir_fd is not None or os.path.abspath(folder).startswith(str(root))
        return os.path.join(folder, f"._{name}") if inside and not name.startswith("._") else None

    def create(path: Any, dir_fd: int | None) -> None:
        if (double := double_of(path, dir_fd)) is not None:
            with contextlib.suppress(OSError):
                os.close(own["open"](double, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=dir_fd))

    def open_file(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        handle = own["open"](path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            create(path, dir_fd)
        return handle

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        own["mkdir"](path, mode, dir_fd=dir_fd)
        create(path, dir_fd)

    def rename(name: str) -> Any:
        def do(source: Any, target: Any, **options: Any) -> None:
            own[name](source, target, **options)
            before, after = double_of(source, None), double_of(target, None)
            if before and after:
                with contextlib.suppress(FileNotFoundError):
                    own["replace"](before, after)

        return do

    def remove(name: str) -> Any:
        def do(path: Any, *, dir_fd: int | None = None) -> None:
            own[name](path, dir_fd=dir_fd)
            if (double := double_of(path, dir_fd)) is not None:
                with contextlib.suppress(FileNotFoundError):
                    own["unlink"](double, dir_fd=dir_fd)

        return do

    wrapped = {"open": open_file, "mkdir": mkdir}
    wrapped |= {name: rename(name) for name in ("rename", "replace")}
    wrapped |= {name: remove(name) for name in ("unlink", "remove", "rmdir")}
    for name, function in wrapped.items():
        if own[name] in os.supports_dir_fd:
            patch.setattr(os, "supports_dir_fd", {*os.supports_dir_fd, function})
        patch.setattr(os, name, function)
