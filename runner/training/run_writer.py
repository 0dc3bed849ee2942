"""The files that one member writes: metrics, samples, checkpoints, status and result."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.checkpoints import manifest
from runner.checkpoints.mirror import BackupMirror
from runner.checkpoints.retention import RetentionPolicy, SavedStep, select_mirrored, select_retained
from runner.checkpoints.save_policy import is_end, is_scheduled
from runner.checkpoints.store import CheckpointStore, manifest_of, step_name
from runner.common.atomic_io import replace_folder
from runner.common.clock import utc_now
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import Content, FileSystem
from runner.loggers import Logger
from runner.runs.directory import RunDirectory
from runner.runs.layout import ADAPTER_CONFIG, ADAPTERS, BEST_METRIC
from runner.runs.rows import RowFile, read_rows
from runner.training.async_saver import AsyncSaver

_LAST_MIRROR = 10.0  # seconds that a run that failed waits for its backup


class RunWriter:
    """What a run leaves behind. One writer: the process that holds the directory's lock."""

    def __init__(
        self,
        directory: RunDirectory,
        store: CheckpointStore,
        policy: RetentionPolicy,
        loggers: Sequence[Logger] = (),
        *,
        background: bool = True,
        backup: Path | None = None,
    ) -> None:
        self.directory = directory
        self.store = store
        self.policy = policy
        self.loggers = list(loggers)
        self.metrics: RowFile
        self.samples: RowFile
        self.source_step: int | None = None
        """The checkpoint that this process resumed from: it stays while the process lives."""
        self.backup = BackupMirror(backup, directory, store, self._matter) if backup else None
        self._saver = AsyncSaver(background)
        self._saved: int | None = None
        self._status: dict[str, Any] = {}
        self._seconds_before = 0.0
        self._begun = time.monotonic()

    def open(self, metrics_offset: int = 0, samples_offset: int = 0, seconds: float = 0.0) -> None:
        """Open the row files, cut to their length at the checkpoint, and the loggers with the rows that stay."""
        self.metrics = RowFile(self.directory.metrics, metrics_offset)
        self.samples = RowFile(self.directory.samples, samples_offset)
        self._seconds_before = seconds
        self._begun = time.monotonic()
        rows = read_rows(self.directory.metrics)
        for logger in self.loggers:
            logger.open(self.directory.path, rows)

    def seconds(self) -> float:
        """Wall time of the run so far, over all its resumes."""
        return self._seconds_before + time.monotonic() - self._begun

    def row(self, **fields: Any) -> None:
        """One row of metrics.jsonl, and of every logger."""
        row = {**fields, "time": utc_now()}
        self.metrics.append(row)
        for logger in self.loggers:
            logger.log(row)

    def status(self, **fields: Any) -> None:
        """Update status.json by `fields`; None takes a field away."""
        self._status.update(pid=os.getpid(), host=socket.gethostname(), updated=utc_now(), **fields)
        self._status = {key: value for key, value in self._status.items() if value is not None}
        self.directory.write_status(self._status)

    def save(
        self,
        step: int,
        files: Mapping[str, Content | Callable[[], Content]],
        why: Sequence[str],
        valid_loss: float | None,
    ) -> None:
        """Begin to commit a checkpoint of `step` and to remove those that the policy lets go; see `check`, `settle`.

        What makes a file is called where the file is written.

        The rows that the checkpoint counts on are on the disk before it is.

        Raises:
            StorageError: this save or the one before it failed.
        """

        def work() -> None:
            self.metrics.sync()
            self.samples.sync()
            contents = {name: made() if callable(made) else made for name, made in files.items()}
            metrics = {} if valid_loss is None else {BEST_METRIC: valid_loss}
            self.store.commit(step, contents, why=list(why), metrics=metrics)
            self._saved = step
            self.store.rotate(set(self.reasons()))
            if self.backup:
                self.backup.wake()

        self._saver.begin(work)

    def check(self) -> None:
        """Note a save that has ended. Raises StorageError if it failed."""
        self._saver.check()
        saved, self._saved = self._saved, None
        if saved is not None:
            self.status(last_checkpoint=saved)

    def settle(self) -> None:
        """Return once nothing is being saved. Raises StorageError if that save failed."""
        self._saver.wait()
        self.check()

    def reasons(self) -> dict[int, list[str]]:
        """The checkpoints that stay, each with why."""
        own = [c for c in self.store.checkpoints() if c.run_id == self.store.run_id]
        saved = [SavedStep(c.step, is_scheduled(c.why), c.metrics.get(BEST_METRIC)) for c in own]
        return select_retained(saved, self.policy, source=self.source_step)

    def _matter(self) -> list[int]:
        """The checkpoints that are mirrored to the backup."""
        ended = {c.step for c in self.store.checkpoints() if is_end(c.why)}
        return select_mirrored(self.reasons(), ended)

    def result_step(self, which: str) -> int | None:
        """The step whose adapter is the run's result: the best one on disk (`which` is best), else the last."""
        own = [c for c in self.store.checkpoints() if c.run_id == self.store.run_id]
        if not own:
            return None
        measured = [c for c in own if math.isfinite(c.metrics.get(BEST_METRIC, math.nan))]
        if which == "best" and measured:
            return min(measured, key=lambda c: (c.metrics[BEST_METRIC], c.step)).step
        return max(c.step for c in own)

    def write_result(self, step: int) -> None:
        """Make adapters/ the adapter of checkpoint `step`: the new one is complete before the old one goes."""
        loaded = self.store.load(self.store.folder / step_name(step))
        files = {name: loaded.files[name] for name in (ADAPTERS, ADAPTER_CONFIG)}
        sealed = {**files, manifest.NAME: manifest.write(manifest_of(loaded.checkpoint, files))}
        replace_folder(self.directory.result, sealed, FileSystem())

    def end_rows(self) -> None:
        """Bring the rows to the disk, and leave no empty file of samples: before a status tells the end."""
        self.metrics.sync()
        self.samples.sync()
        self._drop_empty()

    def _drop_empty(self) -> None:
        if self.samples.offset == 0:
            self.directory.samples.unlink(missing_ok=True)

    def close(self) -> None:
        """End a save that is under way, close the row files and the loggers."""
        failed = self._saver.close()
        with suppress(StorageError):
            if failed is not None:  # another failure ended the run: tell both
                self.status(reason="; ".join(str(r) for r in (self._status.get("reason"), failed) if r))
            self.check()
        if self.backup:
            patience = time.monotonic() + _LAST_MIRROR
            self.backup.finish(lambda: time.monotonic() < patience)  # nothing to do where the run ended well
        self.metrics.close()
        self.samples.close()
        self._drop_empty()
        for logger in self.loggers:
            logger.close()


def copy_rows(source: Path, target: Path, size: int) -> None:
    """Begin a branch's row file with the first `size` bytes of the run that it leaves.

    Raises:
        CheckpointError: the source has fewer bytes than the checkpoint saw.
    """
    data = FileSystem().read_file(source, 1 << 40)[:size] if source.exists() else b""
    if len(data) < size:
        raise CheckpointError(f"{source} has {len(data)} bytes, the checkpoint saw {size}: it was cut or replaced.")
    target.write_bytes(data)


def rows_of_step(path: Path, step: int) -> dict[int, dict[str, Any]]:
    """The samples written at `step`, by row."""
    return {row["row"]: row for row in read_rows(path) if row["step"] == step and "row" in row}
