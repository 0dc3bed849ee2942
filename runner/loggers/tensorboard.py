"""An event file in the run directory, which TensorBoard reads: `tensorboard --logdir outputs`."""

from __future__ import annotations

import importlib
import time
from typing import Any

from runner.common.storage_errors import storage_errors
from runner.config.quoting import yaml_value
from runner.loggers.logged_run import LoggedRow, LoggedRun

_FILES = "events.out.tfevents.*"
_COMPARED = dict.fromkeys(("train/loss", "valid/loss", "test/loss"))
"""The columns of TensorBoard's table of hyperparameters."""


class TensorBoardLogger:
    """Writes scalars, samples as text and the settings as hyperparameters. TensorBoard names a run by its folder, so
    that the jobs of a sweep stand together.

    The file is written anew from the rows that are kept, at the start of each process.
    """

    REQUIRES = ("tensorboardX",)

    def __init__(self) -> None:
        """It has no options."""
        self._writer: Any = None

    def load(self, run: LoggedRun) -> None:
        """Import tensorboardX."""
        importlib.import_module("tensorboardX.summary")

    def open(self, run: LoggedRun) -> None:
        """Replace the run's event files by one with the settings and the rows of `run`."""
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's queue and thread hang on a full disk
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import hparams, text

        with storage_errors(run.path, "written"):
            for path in run.path.glob(_FILES):
                path.unlink()
            self._writer = EventsWriter(str(run.path / "events"))
            # A TensorBoard that has read the file before forgets what it read.
            self._write(0.0, 0, session_log=SessionLog(status=SessionLog.START))
            settings = {name: _hyperparameter(value) for name, value in run.settings().items()}
            experiment, start, _ = hparams(settings, _COMPARED)
            shown = {"name": run.name, "tags": ", ".join(run.tags), "note": run.note or ""}
            shown = {**{name: value for name, value in shown.items() if value}, **settings}
            table = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in shown.items())
            config = text("config", f"| setting | value |\n|---|---|\n{table}")
            for summary in (experiment, start, config):
                self._write(run.rows[0].seconds if run.rows else None, 0, summary=summary)
            for row in run.rows:
                self._log(row)
            self._writer.flush()

    def log(self, row: LoggedRow) -> None:
        """Append a row."""
        self._log(row)
        self._writer.flush()

    def close(self, state: str) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _log(self, row: LoggedRow) -> None:
        from tensorboardX.summary import scalar, text

        for name, value in row.values().items():
            self._write(row.seconds, row.step, summary=scalar(name, value))
        for sample in row.samples:
            lines = (f"**{name}**\n\n{_code(sample.get(name))}" for name in ("prompt", "expected", "text", "score"))
            tag = f"{row.split}/samples/{sample.get('row')}"
            self._write(row.seconds, row.step, summary=text(tag, "\n\n".join(lines)))

    def _write(self, seconds: float | None, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time() if seconds is None else seconds, step=step, **content))


def _hyperparameter(value: Any) -> Any:
    return (
        value if isinstance(value, int | float | str) else yaml_value(value) if isinstance(value, list) else str(value)
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _code(value: Any) -> str:
    """Return `value` as an indented block: Markdown shows it as it is."""
    return "\n".join(f"    {line}" for line in str(value).splitlines() or [""])
