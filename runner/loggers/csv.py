"""metrics.csv in the run directory: one line a row, the columns that every row of a split may have."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from runner.common.atomic_io import open_text, storage_errors
from runner.common.errors import ConfigError

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
    """Writes the columns of `COLUMNS`; on resume the lines beyond the checkpoint are taken out."""

    def __init__(self, file: str) -> None:
        if Path(file).name != file or not file.endswith(".csv"):
            raise ConfigError(f"loggers.csv.file={file} has to be a plain file name that ends in .csv.")
        self._file = file
        self._out: TextIO | None = None

    def open(self, run: Path, step: int) -> None:
        """Open the file for appending after `step`."""
        path = run / self._file
        kept: list[list[str]] = []
        if step and path.is_file():
            with path.open(newline="") as old:
                kept = [
                    line for line in list(csv.reader(old))[1:] if line and line[0].isdigit() and int(line[0]) <= step
                ]
        self._out = open_text(path, append=False)
        with storage_errors(path, "cannot be written"):
            csv.writer(self._out).writerows([list(COLUMNS), *kept])
            self._out.flush()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        assert self._out is not None
        csv.writer(self._out).writerow([row.get(column, "") for column in COLUMNS])
        self._out.flush()

    def close(self) -> None:
        """Close the file."""
        if self._out is not None:
            self._out.close()
