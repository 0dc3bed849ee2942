"""Instruments for tests of storage: a tape of system calls that can stop or fail, and a simulated power cut.

`Tape` replaces ``os`` inside ``runner.common.filesystem``; `read_tape` reads what the preloaded library of
tests/faults recorded of a whole program. `PowerCut` replays either on a model of a disk that keeps only what was
synced, or anything between that and all of it, after LevelDB's fault_injection_test.
"""

from __future__ import annotations

import fcntl
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common import filesystem


class Killed(BaseException):
    """Raised where the process is killed."""


class Unsynced:
    """The module ``os``, with an fsync that returns at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, handle: int) -> None:
        os.fstat(handle)


class Tape(Unsynced):
    """Counts and records the system calls that change the disk.

    Args:
        stop_at: this call (from 0) and all later ones raise `Killed`; a write is cut in half first.
        fail_at: this call fails with the errno `error`; with `for_good` all later ones too.
        piece: the most bytes that one write writes.
    """

    def __init__(
        self,
        *,
        stop_at: int = -1,
        fail_at: int = -1,
        error: int = 0,
        for_good: bool = False,
        piece: int = 1 << 30,
    ) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.calls: list[str] = []
        self.was_hit = False
        self._stop_at, self._fail_at, self._error, self._for_good = stop_at, fail_at, error, for_good
        self._piece = piece
        self._paths: dict[int, str] = {}

    def __enter__(self) -> Tape:
        self._before, filesystem.os = filesystem.os, self
        return self

    def __exit__(self, *_: object) -> None:
        filesystem.os = self._before

    def _change(self, name: str) -> None:
        at = len(self.calls)
        if 0 <= self._stop_at <= at:
            self.was_hit = True
            raise Killed
        self.calls.append(name)
        if at == self._fail_at or (self._for_good and 0 <= self._fail_at <= at):
            self.was_hit = True
            raise OSError(self._error, os.strerror(self._error))

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._change("create")
            self.events.append(("create", str(path)))
        handle = os.open(path, flags, mode)
        self._paths[handle] = str(path)
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        part = bytes(data[: self._piece])
        if len(self.calls) == self._stop_at:
            os.write(handle, part[: len(part) // 2])
        self._change("write")
        self.events.append(("write", self._paths[handle], part, os.lseek(handle, 0, os.SEEK_CUR)))
        return os.write(handle, part)

    def fsync(self, handle: int) -> None:
        self._change("fsync")
        self.events.append(("sync", self._paths[handle]))

    def close(self, handle: int) -> None:
        os.close(handle)
        if self._fail_at >= 0:
            self._change("close")

    def mkdir(self, path: Path) -> None:
        self._change("mkdir")
        self.events.append(("mkdir", str(path)))
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._change("rename")
        self.events.append(("rename", str(source), str(target)))
        os.rename(source, target)

    def unlink(self, path: Path | str, *, dir_fd: int | None = None) -> None:
        self._change("unlink")
        self.events.append(("remove", _absolute(path, dir_fd)))
        os.unlink(path, dir_fd=dir_fd)

    def rmdir(self, path: Path | str, *, dir_fd: int | None = None) -> None:
        self._change("rmdir")
        self.events.append(("remove", _absolute(path, dir_fd)))
        os.rmdir(path, dir_fd=dir_fd)


def _absolute(path: Path | str, dir_fd: int | None) -> str:
    if dir_fd is None:
        return str(path)
    if sys.platform == "darwin":
        folder = fcntl.fcntl(dir_fd, fcntl.F_GETPATH, b"\0" * 1024).rstrip(b"\0").decode()
    else:
        folder = os.readlink(f"/proc/self/fd/{dir_fd}")
    return f"{folder}/{path}"


@dataclass(eq=False)
class _File:
    data: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)

    def do(self, change: Callable[[dict[str, Any]], None]) -> None:
        change(self.names)
        self.pending.append(change)


class PowerCut:
    """A model of a disk that holds the present content of `root`, all of it synced, and then what `apply` does."""

    def __init__(self, root: Path) -> None:
        self._base = str(root)
        self._root = self._read(root)

    def _read(self, folder: Path) -> _Folder:
        found = _Folder()
        for path in sorted(folder.iterdir()):
            found.names[path.name] = self._read(path) if path.is_dir() else _File(*[path.read_bytes()] * 2)
        found.synced = dict(found.names)
        return found

    def _find(self, path: str) -> tuple[_Folder, str]:
        *way, name = path.removeprefix(self._base).strip("/").split("/")
        folder = self._root
        for part in way:
            folder = folder.names[part]
        return folder, name

    def apply(self, event: tuple[Any, ...]) -> None:
        kind, path, *rest = event
        folder, name = self._find(path)
        node = folder.names.get(name) if name else self._root
        if kind in ("create", "mkdir"):
            new = _File() if kind == "create" else _Folder()
            folder.do(lambda names: names.__setitem__(name, new))
        elif kind == "write":
            data, at = rest
            node.data = node.data[:at].ljust(at, b"\0") + data + node.data[at + len(data) :]
        elif kind == "cut":
            node.data = node.data[: rest[0]].ljust(rest[0], b"\0")
        elif kind == "sync" and isinstance(node, _File):
            node.synced = node.data
        elif kind == "sync":
            node.synced, node.pending = dict(node.names), []
        elif kind == "rename":
            _, target = self._find(rest[0])

            def move(names: dict[str, Any]) -> None:
                if names.get(name) is node:
                    del names[name]
                names[target] = node

            folder.do(move)
        else:
            folder.do(lambda names: names.pop(name, None))

    def leave(self, folder: Path, rng: random.Random | None = None) -> None:
        """Write to `folder` what survives a power cut: what was synced, and with `rng` a random part of the rest."""
        self._leave(self._root, folder, rng)

    def _leave(self, node: _Folder, folder: Path, rng: random.Random | None) -> None:
        folder.mkdir()
        names = dict(node.synced)
        if rng:
            share = rng.choice([0.5, 0.9, 1.0])
            for change in node.pending:
                if rng.random() < share:
                    change(names)
        for name, child in names.items():
            if isinstance(child, _Folder):
                self._leave(child, folder / name, rng)
            elif rng and child.data != child.synced:
                # What was synced and not overwritten since is safe.
                pairs = enumerate(zip(child.data, child.synced, strict=False))
                safe = next((i for i, (a, b) in pairs if a != b), min(len(child.data), len(child.synced)))
                cut = rng.randint(safe, len(child.data))
                zeros = child.data[:safe] + bytes(len(child.data) - safe)
                (folder / name).write_bytes(rng.choice([child.synced, child.data, child.data[:cut], zeros]))
            else:
                (folder / name).write_bytes(child.synced)


def read_tape(file: Path) -> list[tuple[Any, ...]]:
    """Return the events that shim.c recorded: a line "call, path, other path, offset, size" each, then its bytes."""
    events: list[tuple[Any, ...]] = []
    with file.open("rb") as tape:
        while line := tape.readline():
            call, path, other, at, size = line.decode().rstrip("\n").split("\t")
            rest: dict[str, tuple[Any, ...]] = {
                "write": (tape.read(int(size)), int(at)),
                "cut": (int(at),),
                "rename": (other,),
            }
            events.append((call, path, *rest.get(call, ())))
    return events
