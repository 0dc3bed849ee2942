"""The files that a run writes: metrics, samples, losses of rows, status, checkpoints, result and the loggers' files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from runner.checkpoints import manifest
from runner.checkpoints.mirror import BackupMirror
from runner.checkpoints.run_retention import RunRetention
from runner.checkpoints.store import file_records
from runner.common.atomic_io import replace_folder
from runner.common.clock import utc_now
from runner.common.errors import StorageError
from runner.common.filesystem import Content, FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS, BEST_METRIC
from runner.common.text import relative_path
from runner.loggers import background as background_loggers
from runner.loggers.background import BackgroundLogger
from runner.loggers.logged_run import LoggedRow, LoggedRun
from runner.runs.directory import RunDirectory
from runner.runs.row_losses import RowLossWriter
from runner.runs.rows import RowFile
from runner.training.async_saver import AsyncSaver
from runner.training.evaluate import EvaluatedRows

_FAILED_SECONDS = 10.0
"""How long a failed run waits for its backup, and for its loggers."""


@dataclass(frozen=True)
class FilePositions:
    """How far the files of a run were written; stored in a checkpoint so that a resume can cut them back."""

    metrics_offset: int = 0
    """Bytes of metrics.jsonl."""
    samples_offset: int = 0
    """Bytes of samples.jsonl."""
    row_losses_offset: int = 0
    """Bytes of row_losses.jsonl."""
    seconds: float = 0.0
    """Wall time of the run so far, over all its resumes."""


class RunWriter:
    """Writes a run's directory. Only the process that holds the directory's lock may have one."""

    def __init__(
        self,
        directory: RunDirectory,
        retention: RunRetention,
        loggers: Sequence[BackgroundLogger],
        *,
        background: bool,
        backup: BackupMirror | None,
    ) -> None:
        """Prepare the writer; nothing is opened or written yet. `background` writes checkpoints on a thread."""
        self.directory = directory
        self.retention = retention
        self.store = retention.store
        self.loggers = list(loggers)
        self.backup = backup
        self._metrics: RowFile
        self._samples: RowFile
        self._row_losses: RowLossWriter
        self._saver = AsyncSaver(background)
        self._saved_step: int | None = None
        self._new_samples: list[Mapping[str, Any]] = []
        self._messages: list[str] = []
        self._status: dict[str, Any] = {}
        self._seconds_before = 0.0
        self._start = time.monotonic()

    def open(self, run: LoggedRun, saved: FilePositions | None = None) -> None:
        """Open the row files, cut to their length at the checkpoint, and the loggers with the rows that remain."""
        saved = saved or FilePositions()
        self._metrics = RowFile(self.directory.metrics, saved.metrics_offset)
        self._samples = RowFile(self.directory.samples, saved.samples_offset)
        self._row_losses = RowLossWriter(self.directory.row_losses, saved.row_losses_offset)
        if self._row_losses.lost:
            self._messages.append(
                f"{relative_path(self.directory.row_losses)} was removed or cut, and is begun anew: runner compare "
                "does not know the losses of earlier evaluations"
            )
        self._seconds_before = saved.seconds
        self._start = time.monotonic()
        run = run.with_rows() if self.loggers else run
        for logger in self.loggers:
            logger.open(run)

    def positions(self) -> FilePositions:
        """Return how far the files are written, for a checkpoint."""
        return FilePositions(
            self._metrics.offset, self._samples.offset, self._row_losses.file.offset, seconds=self.seconds()
        )

    def seconds(self) -> float:
        """Return the wall time of the run so far, over all its resumes."""
        return self._seconds_before + time.monotonic() - self._start

    def log_metrics(self, **fields: Any) -> None:
        """Append a row to metrics.jsonl and pass it to every logger."""
        row = {**fields, "time": utc_now()}
        self._metrics.append(row)
        logged, self._new_samples = LoggedRow(row, self._new_samples), []
        for logger in self.loggers:
            logger.log(logged)

    def log_sample(self, **fields: Any) -> None:
        """Append a row to samples.jsonl; loggers get it with the next row of metrics."""
        self._samples.append(fields)
        self._new_samples.append(fields)

    def log_row_losses(self, step: int, split: str, fingerprint: str, rows: EvaluatedRows) -> None:
        """Append the losses of the evaluated rows to row_losses.jsonl; `fingerprint` is that of the rows."""
        self._row_losses.append(step, split, fingerprint, rows.losses, rows.tokens)

    def new_messages(self) -> list[str]:
        """Return what the files, the backup and the loggers report since the last call; each message comes once."""
        own, self._messages = self._messages, []
        backup = self.backup.new_messages() if self.backup else []
        return [*own, *backup, *(line for logger in self.loggers for line in logger.new_messages())]

    def finish_loggers(self, state: str, seconds: float, print_line: Callable[[str], None]) -> list[str]:
        """Close the loggers of a run that ends in `state`, wait up to `seconds`, and return what to report."""
        return background_loggers.finish(self.loggers, state, seconds, print_line)

    def update_status(self, *, durable: bool = False, **fields: Any) -> None:
        """Set fields of status.json; None removes a field. `durable`: it survives a power cut."""
        self._status.update(pid=os.getpid(), host=socket.gethostname(), updated=utc_now(), **fields)
        self._status = {key: value for key, value in self._status.items() if value is not None}
        self.directory.write_status(self._status, durable=durable)

    def save_checkpoint(
        self,
        step: int,
        files: Mapping[str, Content | Callable[[], Content]],
        save_reasons: Sequence[str],
        valid_loss: float | None,
    ) -> None:
        """Start to commit a checkpoint and to remove those that the retention policy does not keep.

        Rows are synced before the checkpoint that counts on them. Callables in `files` run on the saver thread.

        Raises:
            StorageError: the previous save failed, or without a background thread this one.
        """

        def save() -> None:
            for file in self._row_files():
                file.sync()
            contents = {name: content() if callable(content) else content for name, content in files.items()}
            metrics = {} if valid_loss is None else {BEST_METRIC: valid_loss}
            self.store.commit(step, contents, save_reasons=save_reasons, metrics=metrics)
            self._saved_step = step
            self.store.rotate(set(self.retention.retained_steps()))
            if self.backup:
                self.backup.wake()

        self._saver.start(save)

    def record_finished_save(self) -> None:
        """Record a completed save in status.json; do not wait for one in progress.

        Raises:
            StorageError: the save failed.
        """
        self._saver.check()
        step, self._saved_step = self._saved_step, None
        if step is not None:
            self.update_status(last_checkpoint=step)

    def finish_save(self) -> None:
        """Wait for the save in progress and record it. Raises as `record_finished_save`."""
        self._saver.wait()
        self.record_finished_save()

    def write_result(self, step: int) -> None:
        """Replace adapters/ by the adapter of the checkpoint of `step`, atomically."""
        loaded = self.store.load_step(step)
        files = {name: loaded.files[name] for name in (ADAPTERS, ADAPTER_CONFIG)}
        sealed = replace(loaded.checkpoint.manifest, files=file_records(files))
        with_manifest = {**files, manifest.NAME: manifest.write(sealed)}
        replace_folder(self.directory.result, with_manifest, FileSystem())

    def finish_rows(self) -> None:
        """Sync the row files before the final status, and remove those that are optional and empty."""
        for file in self._row_files():
            file.sync()
        self._remove_empty_files()

    def close(self) -> None:
        """Wait for the save in progress, close the row files and the loggers."""
        error = self._saver.close()
        with suppress(StorageError):
            if error is not None:  # the run failed for another reason: record both
                self.update_status(reason="; ".join(str(r) for r in (self._status.get("reason"), error) if r))
            self.record_finished_save()
        if self.backup:
            deadline = time.monotonic() + _FAILED_SECONDS
            self.backup.finish(lambda: time.monotonic() < deadline)  # does nothing if the run completed
        for file in self._row_files():
            file.close()
        self._remove_empty_files()
        background_loggers.finish(self.loggers, str(self._status.get("state")), _FAILED_SECONDS)

    def _row_files(self) -> tuple[RowFile, ...]:
        return self._metrics, self._samples, self._row_losses.file

    def _remove_empty_files(self) -> None:
        for file in self._row_files()[1:]:
            if file.offset == 0:
                file.path.unlink(missing_ok=True)


class DiscardingWriter(RunWriter):
    """Writes nothing: the writer of a rank that is not the first."""

    def __init__(self, retention: RunRetention) -> None:
        self.retention, self.backup = retention, None

    def log_metrics(self, **fields: Any) -> None:
        """Discard the row."""

    def log_row_losses(self, step: int, split: str, fingerprint: str, rows: EvaluatedRows) -> None:
        """Discard the losses."""

    def new_messages(self) -> list[str]:
        """Return nothing."""
        return []

    def update_status(self, *, durable: bool = False, **fields: Any) -> None:
        """Write no status."""

    def record_finished_save(self) -> None:
        """Record nothing: nothing is saved here."""

    def finish_save(self) -> None:
        """Wait for nothing."""
