"""A run's directory: claiming it, its lock, its status and its metrics file. Knows files only, no MLX and no Hydra."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shlex
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from runner import plain_yaml
from runner.errors import ConfigError, DirectoryInUse, StorageError

ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
METRIC = "valid_loss"
"""What "best" compares, lower being better."""
STATES = ("running", "finished", "stopped", "failed", "diverged", "interrupted")
_LEFTOVER = re.compile(r"\.[a-z]+\.(yaml|json|jsonl|csv|svg)\.[0-9a-f]{8}\.tmp")
_LIMIT = 1_000_000  # bytes of a config.yaml or status.json; a real one has about 3,000


class RunDirectory:
    """The layout of one run's directory; see docs/run-directory.md."""

    def __init__(self, path: Path, checkpoints: str = "checkpoints") -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.log = path / "run.log"
        self.checkpoints = path / checkpoints
        self.result = path / "adapters"
        self._lock: int | None = None

    def claim(self) -> None:
        """Take the directory for a new run, and hold it: the lock is what only one process can have.

        A start that was cut off before it wrote its config leaves nothing worth keeping: its directory is taken over.

        Raises:
            ConfigError: the directory already belongs to a run, holds other things, or cannot be made.
            DirectoryInUse: another process has just taken it.
        """
        with explained(self.path, "cannot be made"):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in (self.path / ".hydra", self.log, self.checkpoints):
                if path.is_symlink():
                    raise ConfigError(
                        f"{path} is a symbolic link, where a run needs its own: choose another hydra.run.dir."
                    )
            others = {p.name for p in self.path.iterdir() if not is_leftover(p.name)}
            if others - {".lock", ".hydra", "run.log", self.checkpoints.name} and not self.config.exists():
                raise ConfigError(f"{self.path} is not empty and not a run: choose another hydra.run.dir.")
            self.lock()
            kept = list(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []
            if self.config.exists() or kept:
                self.unlock()
                raise ConfigError(
                    f"{self.path} already belongs to a run. To go on with it: resume={shlex.quote(str(self.path))}. "
                    "For a new run choose another hydra.run.dir."
                )
            with explained(self.checkpoints, "cannot be made"):
                self.checkpoints.mkdir(exist_ok=True)
            # A power cut must not take the run away: which folders above it are new is not known, so all are synced.
            for folder in (self.path, *self.path.parents):
                with suppress(OSError):
                    sync_folder(folder)

    def abandon(self) -> None:
        """Give back a directory that was claimed and in which nothing was kept; what else is in it stays."""
        self.unlock()
        with suppress(OSError):
            (self.path / ".lock").unlink()
            self.checkpoints.rmdir()
            self.path.rmdir()

    def lock(self) -> None:
        """Hold the directory until this process ends, however it ends (an OS lock); nothing to do where it is held.

        Raises:
            DirectoryInUse: another process holds it; names its pid, host and since when.
        """
        if self._lock is not None:
            return
        with explained(self.path, "cannot be locked"):
            handle = _open_regular(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(f"{self.path} cannot be locked: {os.strerror(error.errno or 0)}.") from error
            raise DirectoryInUse(
                f"{self.path} is in use by {holder or 'another process'}. Wait for it, or stop it."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()} since {now()}".encode(), 0)
        self._lock = handle
        with suppress(OSError):  # a killed writer leaves what it had begun; nobody else writes here now
            for path in self.path.iterdir():
                if is_leftover(path.name):
                    path.unlink()

    def unlock(self) -> None:
        """Let go of the directory; harmless where it is not held."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def held(self) -> bool:
        """Whether a process holds the directory now."""
        try:
            handle = _open_regular(self.path / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(handle)

    def read_config(self) -> dict[str, Any]:
        """The stored config as plain data.

        Raises:
            ConfigError: missing, too large, not plain YAML, or not a mapping.
        """
        found = read_yaml(self.config, missing=f"{self.path} is not a run directory: it has no config.yaml.")
        if isinstance(found.get("model"), dict):
            found["model"].pop("trust_remote_code", None)  # trust counts where it is typed, each time
        return found

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml atomically."""
        text = "# The resolved settings of this run. Again with changes: runner repeat=THIS_FOLDER key=value\n"
        write_atomically(
            self.config, text + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
        )
        with explained(self.path, "cannot be synced"):
            sync_folder(self.path)  # what comes after it in time must not be there without it

    def read_status(self) -> dict[str, Any]:
        """The status as it is now: `running` without a process that holds the lock reads as `interrupted`."""
        try:
            status = json.loads(_read_text(self.status))
        except (OSError, ValueError, RecursionError):
            return {"state": "interrupted" if self.config.exists() else "unknown"}
        if not isinstance(status, dict) or status.get("state") not in STATES:
            return {"state": "unknown"}
        if status["state"] == "running" and not self.held():
            status["state"] = "interrupted"
        return status

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Write status.json atomically."""
        write_atomically(self.status, json.dumps(status, indent=1) + "\n")


class Rows:
    """A JSONL file that grows line by line and can be cut back to where a checkpoint saw it."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open `path` for appending, cut to `offset` bytes: what lies beyond was written after the checkpoint."""
        with explained(path, "cannot be written"):
            self._file = _open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            size = os.fstat(self._file).st_size
            if size < offset:
                os.close(self._file)
                raise StorageError(
                    f"{path} has {size} bytes, but the checkpoint saw {offset}: it was cut or "
                    "replaced. An earlier checkpoint may still fit: resume=RUN/checkpoints/step-…"
                )
            os.ftruncate(self._file, offset)
        self.path = path
        self.offset = offset
        self._is_named = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row as one line, in one call."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with explained(self.path, "cannot be written", needed=len(line)):
            done = 0
            while done < len(line):
                done += os.pwrite(self._file, line[done:], self.offset + done)
        self.offset += len(line)

    def sync(self) -> None:
        """Bring what was written to the disk itself."""
        with explained(self.path, "cannot be written"):
            os.fsync(self._file)
            if not self._is_named:
                sync_folder(self.path.parent)
                self._is_named = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSONL file that we wrote; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def open_text(path: Path, *, append: bool) -> TextIO:
    """The run's own text file `path`, to be written from its end or anew; a link is not followed.

    Raises:
        StorageError: it cannot be written, or is not a regular file.
    """
    with explained(path, "cannot be written"):
        handle = _open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if append else 0))
        if not append:
            os.ftruncate(handle, 0)
        return open(handle, "w", encoding="utf-8", newline="")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: a reader, or a crash, sees the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with explained(path, "cannot be written", needed=len(data)):
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


def read_yaml(path: Path, missing: str) -> dict[str, Any]:
    """Plain data from a small YAML file that a stranger may have written; see `plain_yaml`.

    Raises:
        ConfigError: names the file and the reason.
    """
    try:
        return plain_yaml.read_mapping(path)
    except FileNotFoundError:
        raise ConfigError(missing) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None


def now() -> str:
    """The time as text, UTC, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class explained:
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


def _open_regular(path: Path, flags: int) -> int:
    """A handle of `path`. Raises OSError, also where it is a FIFO, a socket or a device."""
    # O_NONBLOCK: opening a FIFO must not wait for its other end.
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError("it is not a regular file")


def _read_text(path: Path) -> str:
    with os.fdopen(_open_regular(path, os.O_RDONLY), "rb") as source:
        data = source.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise ValueError(f"it is larger than {_LIMIT} bytes")
    return data.decode("utf-8")
