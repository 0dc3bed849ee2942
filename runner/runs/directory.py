"""A run's directory: claiming it, its lock, its status and its metrics file. Knows files only, no MLX and no Hydra."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from runner.common.atomic_io import is_leftover, open_regular, storage_errors, sync_folder, write_atomically
from runner.common.clock import utc_now
from runner.common.errors import ConfigError, DirectoryInUse, StorageError
from runner.common.safe_yaml import load_yaml_file
from runner.config import retired
from runner.runs.layout import STATES

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
        with storage_errors(self.path, "cannot be made"):
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
            with storage_errors(self.checkpoints, "cannot be made"):
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
        with storage_errors(self.path, "cannot be locked"):
            handle = open_regular(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
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
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()} since {utc_now()}".encode(), 0)
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
            handle = open_regular(self.path / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
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
        """The stored config as plain data, with the present names of its settings.

        Raises:
            ConfigError: missing, too large, not plain YAML, or not a mapping.
        """
        found = load_yaml_file(self.config, missing=f"{self.path} is not a run directory: it has no config.yaml.")
        if isinstance(found.get("model"), dict):
            found["model"].pop("trust_remote_code", None)  # trust counts where it is typed, each time
        return retired.upgrade_config(found)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml atomically."""
        text = "# The resolved settings of this run. Again with changes: runner repeat=THIS_FOLDER key=value\n"
        write_atomically(
            self.config, text + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
        )
        with storage_errors(self.path, "cannot be synced"):
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


def _read_text(path: Path) -> str:
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as source:
        data = source.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise ValueError(f"it is larger than {_LIMIT} bytes")
    return data.decode("utf-8")
