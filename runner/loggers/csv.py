"""metrics.csv in the run directory: one line a row, with the columns of `COLUMNS` and those that the settings add."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from runner.common.atomic_io import open_text, write_atomically
from runner.common.errors import ConfigError
from runner.common.storage_errors import storage_errors
from runner.config.schema import METHOD_MEASURES
from runner.loggers.logged_run import LoggedRow, LoggedRun

COLUMNS = (
    "step",
    "split",
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens",
    "tokens_per_second",
    "peak_memory_gb",
)


class CsvLogger:
    """Writes a CSV file that holds the rows of metrics.jsonl, also after a resume and in a branch."""

    def __init__(self, file: str) -> None:
        """`file` is the name of the file in the run directory.

        Raises:
            ConfigError: it is not a plain name that ends in .csv.
        """
        if Path(file).name != file or not file.endswith(".csv"):
            raise ConfigError(f"loggers.csv.file={file} is invalid: must be a plain file name that ends in .csv.")
        self._name = file
        self._path = Path(file)
        self._file: TextIO | None = None
        self._columns: tuple[str, ...] = COLUMNS

    def load(self, run: LoggedRun) -> None:
        """There is no library."""

    def open(self, run: LoggedRun) -> None:
        """Replace the file by the header and the rows of `run`, and open it for appending."""
        self._path = run.path / self._name
        self._columns = _columns(run)
        rows = [dict(zip(self._columns, self._columns, strict=True)), *(row.metrics for row in run.rows)]
        write_atomically(self._path, self._format(rows), durable=False)
        self._file = open_text(self._path)

    def log(self, row: LoggedRow) -> None:
        """Append one row."""
        assert self._file is not None
        with storage_errors(self._path, "written"):
            self._file.write(self._format([row.metrics]))
            self._file.flush()

    def close(self, state: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _format(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.writer(text).writerows([row.get(column, "") for column in self._columns] for row in rows)
        return text.getvalue()


def _columns(run: LoggedRun) -> tuple[str, ...]:
    """Return the columns of `run`: of the settings at present, and of the rows that earlier ones left."""
    settings = run.settings()
    wanted = {
        "score": settings.get("data.metric_rows", 0) != 0,
        "skipped_updates": settings.get("train.on_nonfinite") == "skip",
    }
    present = {name for row in run.rows for name in row.metrics}
    measures = METHOD_MEASURES.get(settings.get("method.name", ""), ())
    return (*COLUMNS, *measures, *(name for name, is_wanted in wanted.items() if is_wanted or name in present))
