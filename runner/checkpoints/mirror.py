"""A backup of a run on a second disk: written in the background, caught up later, never in the way of training.

A backup is laid out as a run's directory, with a ``backup.json`` that names its run::

    BACKUP/<date>-<time>-<run id>/   backup.json  config.yaml  status.json  metrics.jsonl  checkpoints/  adapters/

A failure is reported once, and the next save tries again. `restore` makes a run's directory of a backup.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from runner.checkpoints import manifest, verify
from runner.checkpoints.store import CheckpointStore, step_name
from runner.common.atomic_io import repair_replaced_folder, replace_folder, write_atomically
from runner.common.errors import CheckpointError, ConfigError, RunnerError, StorageError
from runner.common.filesystem import FileSystem
from runner.common.layout import BACKUP, STEP_NAME
from runner.runs.directory import RunDirectory

_SCHEMA = 1
_MAX_ROWS_BYTES = 1 << 40
_MAX_BACKUP_JSON_BYTES = 100_000
_RUN_FILES = ("config", "status", "metrics", "samples", "row_losses", "labels")  # attributes of RunDirectory


class BackupMirror:
    """Mirrors the run in `directory` below `root`, in a thread of its own."""

    def __init__(
        self,
        root: Path,
        directory: RunDirectory,
        store: CheckpointStore,
        mirrored_steps: Callable[[], Collection[int]],
        filesystem: FileSystem | None = None,
    ) -> None:
        """`mirrored_steps` returns the steps, of those that the run retains, whose checkpoints the backup holds."""
        self.root = root
        self.folder: Path | None = None
        """The folder of this run's backup, once it is known."""
        self.problem: str | None = None
        """Why the backup is behind; None if it is not."""
        self._directory, self._store, self._mirrored_steps = directory, store, mirrored_steps
        self._filesystem = filesystem or FileSystem()
        self._backup: RunDirectory | None = None
        self._verified: set[int] = set()
        self._messages: list[str] = []
        self._work_pending = threading.Event()
        self._idle = threading.Event()
        self._ending = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Mirror what is new, in the background."""
        self._idle.clear()
        self._work_pending.set()
        if self._thread is None:
            # A daemon: a disk that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="backup", daemon=True)
            self._thread.start()

    def new_messages(self) -> list[str]:
        """Return the messages since the last call: a failure, or that the backup has caught up."""
        messages, self._messages = self._messages, []
        return messages

    def finish(self, keep_waiting: Callable[[], bool]) -> bool:
        """Mirror what is new and end the thread; return whether everything is mirrored.

        Args:
            keep_waiting: called repeatedly; once it returns False, the backup is left behind.
        """
        if self._ending:
            return self.problem is None
        self.wake()
        done = False
        while not done and keep_waiting():
            done = self._idle.wait(0.2)
        self._ending = True
        self._work_pending.set()
        if done and self._thread is not None:
            self._thread.join()
        return done and self.problem is None

    def _run(self) -> None:
        while True:
            self._work_pending.wait()
            self._work_pending.clear()
            if not self._ending:
                self._report(self._mirror())
            if not self._work_pending.is_set():
                self._idle.set()
            if self._ending:
                if self._backup:
                    self._backup.unlock()
                return

    def _mirror(self) -> str | None:
        """Copy everything that is not in the backup yet; return the problem that prevented it, or None."""
        try:
            backup = self._open()
            store = CheckpointStore(backup.checkpoints, self._store.run_id, self._filesystem)
            steps = set(self._mirrored_steps())
            self._copy_files(backup)
            for step in sorted(steps):
                self._copy_checkpoint(store, step)
            store.remove({c.step for c in store.checkpoints()} - steps if steps else set())
            self._verified &= steps
            self._copy_result(backup)
        except Exception as error:  # whatever it is: the run must not wait for a thread that has died
            self._verified.clear()  # there may be another disk next time
            if self._backup:
                self._backup.unlock()
                self._backup = None
            return str(error) if isinstance(error, RunnerError) else f"{self.root}: {type(error).__name__}: {error}."
        return None

    def _open(self) -> RunDirectory:
        if self._backup is not None and self._filesystem.lstat(self._backup.path / BACKUP):
            return self._backup
        # Only below an existing folder: a disk that is not mounted must not be replaced by a folder of its name.
        if not self.root.is_dir():
            raise StorageError(f"{self.root}: there is no such folder; is its disk mounted?")
        run_id = self._store.run_id
        run = self._directory.path
        folder = find_backup(self.root, run_id) or self.root / f"{run.parent.name}-{run.name}-{run_id[:8]}"
        if folder.resolve() == run.resolve():
            raise StorageError(f"{folder}: the run's own directory cannot be its backup.")
        if self._filesystem.lstat(folder) is None:
            self._filesystem.mkdir(folder)
            self._filesystem.fsync_folder(self.root)
        backup = RunDirectory(folder, self._store.folder.name)
        backup.lock()
        self.folder, self._backup = folder, backup
        record = {"schema": _SCHEMA, "run_id": run_id, "run": str(run), "host": socket.gethostname()}
        write_atomically(folder / BACKUP, json.dumps(record, indent=1) + "\n")
        return backup

    def _copy_files(self, backup: RunDirectory) -> None:
        """Copy the files that a resume reads besides the checkpoints; before these, which count on the rows."""
        for name in _RUN_FILES:
            source, target = getattr(self._directory, name), getattr(backup, name)
            if not source.is_file():
                continue
            data = self._filesystem.read_file(source, _MAX_ROWS_BYTES)
            if not target.exists() or self._filesystem.read_file(target, _MAX_ROWS_BYTES) != data:
                write_atomically(target, data)

    def _copy_checkpoint(self, store: CheckpointStore, step: int) -> None:
        source, target = self._store.folder / step_name(step), store.folder / step_name(step)
        try:
            record = verify.read_manifest(source, self._filesystem)
        except CheckpointError:
            return  # removed meanwhile, or damaged, which is the run's to report
        with suppress(CheckpointError):
            if verify.read_manifest(target, self._filesystem) == record and (
                step in self._verified or verify.is_whole(target, self._filesystem)
            ):
                self._verified.add(step)
                return
        try:
            loaded = self._store.load(source)
        except CheckpointError:
            return
        store.copy(loaded)
        self._verified.add(step)

    def _copy_result(self, backup: RunDirectory) -> None:
        """Copy the result if it verifies and is not that of the backup."""
        with suppress(CheckpointError):
            loaded = verify.load_checkpoint(self._directory.result, self._filesystem)
            with suppress(CheckpointError):
                if verify.load_checkpoint(backup.result, self._filesystem).files == loaded.files:
                    return
            _copy_folder(self._directory.result, backup.result, loaded, self._filesystem)

    def _report(self, problem: str | None) -> None:
        if problem is not None and self.problem is None:
            self._messages.append(f"backup: {problem} Training continues; each save tries again.")
        elif problem is None and self.problem is not None:
            self._messages.append(f"backup: caught up in {self.folder}")
        self.problem = problem


def is_backup(path: Path) -> bool:
    """Return whether `path` is the backup of a run."""
    return (path / BACKUP).is_file()


def find_backup(root: Path, run_id: str) -> Path | None:
    """Return the backup of the run `run_id` below `root`, whatever the run's directory was called; None if there is
    none."""
    if not root.is_dir():
        return None
    for name in FileSystem().listdir(root):
        with suppress(RunnerError):
            if name.endswith(f"-{run_id[:8]}") and is_backup(root / name) and _read_run_id(root / name) == run_id:
                return root / name
    return None


def restore(backup: Path, directory: RunDirectory) -> list[str]:
    """Fill the new, claimed `directory` with what the backup holds, so that it is resumed as the same run.

    Returns:
        A message for each checkpoint that is damaged and left out.

    Raises:
        CheckpointError: no checkpoint of the backup is whole; nothing was written.
        DirectoryInUse: the run that is mirrored here is still training.
        StorageError: the new directory cannot be written.
    """
    filesystem = FileSystem()
    run_id = _read_run_id(backup)
    source = RunDirectory(backup, directory.checkpoints.name)
    source.lock()
    try:
        store = CheckpointStore(source.checkpoints, run_id, filesystem)
        store.repair()
        repair_replaced_folder(source.result, filesystem)
        messages = _restore_checkpoints(store, CheckpointStore(directory.checkpoints, run_id, filesystem), backup)
        with suppress(CheckpointError):
            loaded = verify.load_checkpoint(source.result, filesystem)
            _copy_folder(source.result, directory.result, loaded, filesystem)
        for name in reversed(_RUN_FILES):  # config.yaml last: with it the directory is a run
            path = getattr(source, name)
            if path.is_file():
                write_atomically(getattr(directory, name), filesystem.read_file(path, _MAX_ROWS_BYTES))
        return messages
    finally:
        source.unlock()


def _restore_checkpoints(source: CheckpointStore, target: CheckpointStore, backup: Path) -> list[str]:
    """Copy the valid checkpoints; return a message for each that is left out. Raises CheckpointError if all are."""
    records = [record for record in source.checkpoints() if record.manifest.run_id == source.run_id]
    readable = {record.path.name for record in records}
    names = FileSystem().listdir(source.folder) if source.folder.is_dir() else []
    messages = [
        f"{source.folder / name}: damaged, left out"
        for name in names
        if STEP_NAME.fullmatch(name) and name not in readable
    ]
    copied = 0
    for record in reversed(records):
        try:
            target.copy(source.load(record.path))
            copied += 1
        except CheckpointError as error:
            messages.append(f"damaged, left out: {error}")
    if not copied:
        raise CheckpointError("\n".join([*messages, f"{backup}: it holds no valid checkpoint to resume from."]))
    return messages


def _copy_folder(source: Path, target: Path, loaded: verify.LoadedCheckpoint, filesystem: FileSystem) -> None:
    """Replace the folder `target` by the verified files of `source` and its manifest."""
    sealed = filesystem.read_file(source / manifest.NAME, manifest.MAX_BYTES)
    replace_folder(target, {**loaded.files, manifest.NAME: sealed}, filesystem)


def _read_run_id(backup: Path) -> str:
    try:
        record = json.loads(FileSystem().read_file(backup / BACKUP, _MAX_BACKUP_JSON_BYTES))
        run_id = record["run_id"]
        if record["schema"] != _SCHEMA or not isinstance(run_id, str):
            raise ValueError(f"schema {record['schema']}; this version reads {_SCHEMA}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{backup / BACKUP} cannot be understood: {error}.") from None
    return run_id
