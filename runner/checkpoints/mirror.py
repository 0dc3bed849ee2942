"""A mirror of what matters of a run on a second disk: written in the background, caught up later, never in the way.

A backup is laid out as a run's directory, with a ``backup.json`` that says of which run it is::

    BACKUP/<date>-<time>-<run id>/   backup.json  config.yaml  status.json  metrics.jsonl  checkpoints/  adapters/

Whatever fails here is told, once, and tried again at the next save. `restore` makes a run's directory of it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from runner.checkpoints import verify
from runner.checkpoints.store import CheckpointStore, step_name
from runner.common.atomic_io import repair_replaced_folder, replace_folder, write_atomically
from runner.common.errors import CheckpointError, ConfigError, RunnerError, StorageError
from runner.common.filesystem import FileSystem
from runner.runs.directory import RunDirectory

NAME = "backup.json"
_SCHEMA = 1
_LARGEST = 1 << 40  # bytes of a file that is copied whole


class BackupMirror:
    """Mirrors the run in `directory` below `root`, in a thread of its own."""

    def __init__(
        self,
        root: Path,
        directory: RunDirectory,
        store: CheckpointStore,
        matter: Callable[[], Collection[int]],
        disk: FileSystem | None = None,
    ) -> None:
        """`matter` gives the steps that are to be in the backup, those of the run that it keeps itself."""
        self.root = root
        self.folder: Path | None = None
        """Where this run's backup lies, once it is known."""
        self._directory, self._store, self._matter = directory, store, matter
        self._disk = disk or FileSystem()
        self._place: RunDirectory | None = None
        self._verified: set[int] = set()
        self._news: list[str] = []
        self._problem: str | None = None
        self._again = threading.Event()
        self._idle = threading.Event()
        self._end = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something new to mirror."""
        self._idle.clear()
        self._again.set()
        if self._thread is None:
            # A disk that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
            self._thread.start()

    def news(self) -> list[str]:
        """What a person should know, each once: what went wrong, and that it is mended."""
        told, self._news = self._news, []
        return told

    @property
    def problem(self) -> str | None:
        """Why the backup is behind; None where it is not."""
        return self._problem

    def finish(self, waiting: Callable[[], bool]) -> bool:
        """Mirror what is new and end; waits for it as long as `waiting` says so. Returns whether all is mirrored."""
        if self._end:
            return self._problem is None
        self.wake()
        done = False
        while not done and waiting():
            done = self._idle.wait(0.2)
        self._end = True
        self._again.set()
        if done and self._thread is not None:
            self._thread.join()
        return done and self._problem is None

    def _work(self) -> None:
        while True:
            self._again.wait()
            self._again.clear()
            if not self._end:
                self._tell(self._pass())
            if not self._again.is_set():
                self._idle.set()
            if self._end:
                if self._place:
                    self._place.unlock()
                return

    def _pass(self) -> str | None:
        """Mirror all that matters and is not there yet; returns what is in the way."""
        try:
            place = self._open()
            mirror = CheckpointStore(place.checkpoints, self._store.run_id, self._disk)
            wanted = set(self._matter())
            self._copy_texts(place)
            for step in sorted(wanted):
                self._copy_step(mirror, step)
            mirror.remove({c.step for c in mirror.checkpoints()} - wanted if wanted else set())
            self._verified &= wanted
            self._copy_result(place)
        except Exception as error:  # whatever it is: the run must not wait for a thread that has died
            self._verified.clear()  # another medium may be there next time
            if self._place:
                self._place.unlock()
                self._place = None
            return str(error) if isinstance(error, RunnerError) else f"{self.root}: {type(error).__name__}: {error}."
        return None

    def _open(self) -> RunDirectory:
        if self._place is not None and self._disk.lstat(self._place.path / NAME):
            return self._place
        # Only below a folder that is there: a disk that is not mounted must not be replaced by a folder of its name.
        if not self.root.is_dir():
            raise StorageError(f"{self.root}: there is no such folder; is its disk mounted?")
        folder = _find(self.root, self._store.run_id) or self.root / _name(self._directory.path, self._store.run_id)
        if folder.resolve() == self._directory.path.resolve():
            raise StorageError(f"{folder}: the run's own directory cannot be its backup.")
        if self._disk.lstat(folder) is None:
            self._disk.mkdir(folder)
            self._disk.fsync_folder(self.root)
        place = RunDirectory(folder, self._store.folder.name)
        place.lock()
        about = {
            "schema": _SCHEMA,
            "run_id": self._store.run_id,
            "run": str(self._directory.path),
            "host": socket.gethostname(),
        }
        self.folder, self._place = folder, place
        write_atomically(folder / NAME, json.dumps(about, indent=1) + "\n")
        return place

    def _copy_texts(self, place: RunDirectory) -> None:
        """The files that a resume reads besides the checkpoints; before these, which count on the rows."""
        pairs = [(getattr(self._directory, name), getattr(place, name)) for name in _TEXTS]
        for source, target in pairs:
            if not source.is_file():
                continue
            data = self._disk.read_file(source, _LARGEST)
            if not target.exists() or self._disk.read_file(target, _LARGEST) != data:
                write_atomically(target, data)

    def _copy_step(self, mirror: CheckpointStore, step: int) -> None:
        source, target = self._store.folder / step_name(step), mirror.folder / step_name(step)
        try:
            record = verify.read_manifest(source, self._disk)
        except CheckpointError:
            return  # rotated meanwhile, or damaged: the run's own affair
        with suppress(CheckpointError):
            if verify.read_manifest(target, self._disk) == record and (
                step in self._verified or verify.is_whole(target, self._disk)
            ):
                self._verified.add(step)
                return
        try:
            loaded = self._store.load(source)
        except CheckpointError:
            return
        mirror.copy(loaded)
        self._verified.add(step)

    def _copy_result(self, place: RunDirectory) -> None:
        """The result, where it has a manifest that vouches for it and the backup has another."""
        with suppress(CheckpointError):
            loaded = verify.load_checkpoint(self._directory.result, self._disk)
            with suppress(CheckpointError):
                if verify.load_checkpoint(place.result, self._disk).files == loaded.files:
                    return
            replace_folder(place.result, _contents(self._directory.result, loaded, self._disk), self._disk)

    def _tell(self, problem: str | None) -> None:
        if problem is not None and self._problem is None:
            self._news.append(f"backup: {problem} Training goes on; it is tried again at each save.")
        elif problem is None and self._problem is not None:
            self._news.append(f"backup: caught up in {self.folder}")
        self._problem = problem


_TEXTS = ("config", "status", "metrics", "samples")


def is_backup(path: Path) -> bool:
    """Whether `path` is the backup of a run."""
    return (path / NAME).is_file()


def find_backup(root: Path, run_id: str) -> Path | None:
    """The backup of the run `run_id` below `root`."""
    return _find(root, run_id) if root.is_dir() else None


def restore(backup: Path, directory: RunDirectory) -> list[str]:
    """Fill the new, claimed `directory` with what the backup holds, so that the run goes on there as the same run.

    Returns a sentence for each checkpoint that is damaged and left out.

    Raises:
        CheckpointError: no checkpoint of the backup is whole; nothing was written.
        DirectoryInUse: the run that is mirrored here is still at work.
        StorageError: the new directory cannot be written.
    """
    disk = FileSystem()
    about = _about(backup)
    source = RunDirectory(backup, directory.checkpoints.name)
    source.lock()
    try:
        store = CheckpointStore(source.checkpoints, about["run_id"], disk)
        store.repair()
        repair_replaced_folder(source.result, disk)
        own = [found for found in store.checkpoints() if found.run_id == store.run_id]
        wrong = [f"{path}: damaged, left out" for path in _unlisted(source.checkpoints, {c.path for c in own})]
        target = CheckpointStore(directory.checkpoints, store.run_id, disk)
        whole = 0
        for found in reversed(own):
            try:
                target.copy(store.load(found.path))
                whole += 1
            except CheckpointError as error:
                wrong.append(f"damaged, left out: {error}")
        if not whole:
            raise CheckpointError("\n".join([*wrong, f"{backup}: it holds no checkpoint to go on from."]))
        with suppress(CheckpointError):
            loaded = verify.load_checkpoint(source.result, disk)
            replace_folder(directory.result, _contents(source.result, loaded, disk), disk)
        for name in ("metrics", "samples", "status", "config"):  # with its config.yaml it is a run
            if (kept := getattr(source, name)).is_file():
                write_atomically(getattr(directory, name), disk.read_file(kept, _LARGEST))
        return wrong
    finally:
        source.unlock()


def _contents(folder: Path, loaded: verify.LoadedCheckpoint, disk: FileSystem) -> dict[str, bytes]:
    name = "manifest.json"
    return {**loaded.files, name: disk.read_file(folder / name, 1 << 20)}


def _unlisted(folder: Path, listed: Collection[Path]) -> list[Path]:
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / n for n in sorted(names) if verify.STEP_NAME.fullmatch(n) and folder / n not in listed]


def _about(backup: Path) -> dict[str, str]:
    try:
        about = json.loads(FileSystem().read_file(backup / NAME, 100_000))
        if about["schema"] != _SCHEMA or not isinstance(about["run_id"], str):
            raise ValueError(f"schema {about['schema']}, this version reads {_SCHEMA}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{backup / NAME} cannot be understood: {error}.") from None
    return about


def _find(root: Path, run_id: str) -> Path | None:
    """The folder of this run below `root`; its name may be that of a directory where the run was before."""
    for name in FileSystem().listdir(root):
        if not name.endswith(f"-{run_id[:8]}"):
            continue
        with suppress(RunnerError):
            if is_backup(root / name) and _about(root / name)["run_id"] == run_id:
                return root / name
    return None


def _name(run: Path, run_id: str) -> str:
    """``2026-11-24-10-00-00-0123abcd``: the run's folder, the one above it, and the run's own identity."""
    return f"{run.parent.name}-{run.name}-{run_id[:8]}"
