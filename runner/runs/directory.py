"""A run's directory: claim, lock, config and status. Reads and writes files only; imports neither MLX nor Hydra."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from runner.common import layout
from runner.common.atomic_io import is_draft, write_atomically
from runner.common.clock import utc_now
from runner.common.commands import resume_command
from runner.common.errors import ConfigError, DirectoryInUse, StorageError
from runner.common.filesystem import FileSystem, is_apple_double, open_regular, read_bounded
from runner.common.layout import STATES
from runner.common.safe_yaml import load_yaml_file
from runner.common.storage_errors import storage_error, storage_errors
from runner.config import retired

_MAX_STATUS_BYTES = 1_000_000  # a real status.json has about 500
_CONFIG_HEADER = (
    "# The resolved settings of this run. A new run with changes: python -m runner repeat=THIS_FOLDER key=value\n"
)
_CHOOSE_ANOTHER = "choose another hydra.run.dir"
_DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}


class RunDirectory:
    """The files of one run; see docs/run-directory.md."""

    def __init__(self, path: Path, checkpoint_dir_name: str = layout.CHECKPOINTS) -> None:
        """`checkpoint_dir_name`: name of the folder of its checkpoints, the setting checkpoint.dir."""
        self.path = path
        self.config = path / layout.CONFIG
        self.status = path / layout.STATUS
        self.metrics = path / layout.METRICS
        self.samples = path / layout.SAMPLES
        self.row_losses = path / layout.ROW_LOSSES
        self.labels = path / layout.LABELS
        self.log = path / layout.LOG
        self.checkpoints = path / checkpoint_dir_name
        self.result = path / layout.RESULT
        self._lock: int | None = None

    def claim(self, written: Collection[str] = ()) -> None:
        """Create the directory for a new run and lock it: only one process can hold the lock.

        A directory left by a start that was killed before it wrote its config is taken over. It may hold the names
        that a start has `written` into it.

        Raises:
            ConfigError: the directory belongs to a run, holds other files, or cannot be created.
            DirectoryInUse: another process has just claimed it.
        """
        with storage_errors(self.path, "created"):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in (self.path / layout.HYDRA, self.log, self.checkpoints):
                if path.is_symlink():
                    raise ConfigError(f"{path} is a symbolic link, which a run does not follow: {_CHOOSE_ANOTHER}.")
            expected = {layout.LOCK, layout.HYDRA, layout.LOG, layout.LABELS, layout.STATUS, self.checkpoints.name}
            expected |= {*written}
            if not self.config.exists() and unexpected_names(self.path, expected):
                raise ConfigError(f"{self.path} is not empty and not a run: {_CHOOSE_ANOTHER}.")
            self.lock()
            if self.config.exists() or (self.checkpoints.is_dir() and unexpected_names(self.checkpoints, ())):
                self.unlock()
                raise ConfigError(
                    f"{self.path} already belongs to a run. For a new run {_CHOOSE_ANOTHER}. "
                    f"To resume this one: {resume_command(self.path)}"
                )
            self.status.unlink(missing_ok=True)  # of such a start
            with storage_errors(self.checkpoints, "created"):
                self.checkpoints.mkdir(exist_ok=True)
        # The directory must survive a power cut. Which of its parents are new is not known, so all are synced.
        for folder in (self.path, *self.path.parents):
            with suppress(StorageError):
                FileSystem().fsync_folder(folder)

    def abandon(self) -> None:
        """Remove a claimed directory, unless something was stored in it, and unlock it."""
        with suppress(OSError):
            self.checkpoints.rmdir()
            (self.path / layout.LOCK).unlink()  # under the lock: nobody else can have begun to use the directory
            self.path.rmdir()
        self.unlock()

    def lock(self) -> None:
        """Lock the directory until this process ends, however it ends; does nothing where it is locked already.

        Raises:
            DirectoryInUse: another process holds the lock; names its pid and host, and since when.
        """
        if self._lock is not None:
            return
        with storage_errors(self.path, "locked"):
            handle = open_regular(self.path / layout.LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise storage_error(self.path, "locked", error) from error
            raise DirectoryInUse(
                f"{self.path} is in use by {holder or 'another process'}. Wait for it, or stop it."
            ) from None
        if not _is_file_at(handle, self.path / layout.LOCK):
            os.close(handle)
            raise DirectoryInUse(f"{self.path} was removed by another process at this moment. Try again.")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()} since {utc_now()}".encode(), 0)
        self._lock = handle
        with suppress(OSError):  # only the holder of the lock writes here, so these are of killed processes
            for path in self.path.iterdir():
                if is_draft(path.name):
                    path.unlink()

    def unlock(self) -> None:
        """Release the lock; does nothing where it is not held."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_locked(self) -> bool:
        """Return whether a process holds the lock."""
        try:
            handle = open_regular(self.path / layout.LOCK, os.O_RDONLY | os.O_NOFOLLOW)
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
        """Return the stored config as plain data, with the present names of its settings.

        Raises:
            ConfigError: it is missing, too large, not plain YAML, or not a mapping.
        """
        config = load_yaml_file(self.config, missing=f"{self.path} is not a run directory: it has no config.yaml.")
        if isinstance(config.get("model"), dict):
            config["model"].pop("trust_remote_code", None)  # has to be given anew for each invocation
        return retired.upgrade_config(config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml atomically and durably: no later file of the run survives a power cut without it."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
        write_atomically(self.config, _CONFIG_HEADER + text)

    def read_status(self) -> dict[str, Any]:
        """Return the status; the state `running` of a run that no process holds reads as `interrupted`."""
        try:
            status = json.loads(read_bounded(self.status, _MAX_STATUS_BYTES).decode())
        except (OSError, ValueError, RecursionError):
            return {"state": "interrupted" if self.config.exists() else "unknown"}
        if not isinstance(status, dict) or status.get("state") not in STATES:
            return {"state": "unknown"}
        if status["state"] == "running" and not self.is_locked():
            status["state"] = "interrupted"
        return status

    def write_status(self, status: Mapping[str, Any], *, durable: bool = False) -> None:
        """Write status.json atomically; `durable`: it survives a power cut."""
        write_atomically(self.status, json.dumps(status, indent=1) + "\n", durable=durable)


def unexpected_names(folder: Path, expected: Collection[str]) -> list[str]:
    """Return the names in `folder` that are not `expected`, sorted. Drafts of killed processes do not count, nor what a
    file manager of a desktop leaves in every folder that it shows."""
    names = sorted({path.name for path in folder.iterdir()} - {*expected} - _DESKTOP_FILES)
    return [name for name in names if not is_draft(name) and not is_apple_double(name)]


def _is_file_at(handle: int, path: Path) -> bool:
    """Return whether the open file is the one at `path`, and not one that was removed there."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
