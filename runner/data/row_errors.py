"""Rows that cannot be trained on: one reason a row, all of them reported together."""

from __future__ import annotations

from pathlib import Path

from runner.common.errors import DataError

LISTED = 10


class RowError(ValueError):
    """Why one row cannot be used, as the end of a sentence that starts with its file and line."""


class RowErrors:
    """Collects bad rows over all files of a data set; keeps the first `LISTED` and the number of the rest."""

    def __init__(self) -> None:
        self.count = 0
        self._listed: list[str] = []

    def add(self, file: Path, line: int, reason: str) -> None:
        """Note that `line` (from 1) of `file` is bad."""
        self.count += 1
        if len(self._listed) < LISTED:
            self._listed.append(f"  {file}:{line}: {reason}")

    def merge(self, other: RowErrors) -> None:
        """Note all of `other`, whose rows come after those that are here."""
        self.count += other.count
        self._listed += other._listed[: LISTED - len(self._listed)]

    def raise_if_any(self) -> None:
        """Raises DataError with the first rows and the number of the others, if there is a bad row."""
        if not self.count:
            return
        rows = "1 row" if self.count == 1 else f"{self.count} rows"
        more = self.count - len(self._listed)
        tail = [f"  and {more} more"] if more else []
        raise DataError("\n".join([f"{rows} of the data cannot be used:", *self._listed, *tail]))
