"""Rows that cannot be trained on: one reason per row, all of them reported together."""

from __future__ import annotations

from pathlib import Path

from runner.common.errors import DataError

MAX_LISTED = 10


class RowError(ValueError):
    """The reason why a row cannot be used, worded to follow its file and line."""


def locate(file: Path, number: int) -> str:
    """Return where a row is: the file and the line of JSON Lines, of other files the number of the row."""
    return f"{file}:{number}" if file.suffix == ".jsonl" else f"{file} row {number}"


class RowErrors:
    """The row errors of all files of a data set: the first `MAX_LISTED` as text, and the number of all of them."""

    def __init__(self) -> None:
        self.count = 0
        self.listed: list[str] = []

    def add(self, file: Path, line: int, reason: str) -> None:
        """Record that `line` (from 1) of `file`, or its row of that number, cannot be used."""
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"  {locate(file, line)}: {reason}")

    def merge(self, later: RowErrors) -> None:
        """Append the errors of rows that come after the ones recorded so far."""
        self.count += later.count
        self.listed += later.listed[: MAX_LISTED - len(self.listed)]

    def raise_if_any(self) -> None:
        """Raise a DataError with the listed rows and the number of the remaining ones, if there is any error."""
        if not self.count:
            return
        rows = "1 row" if self.count == 1 else f"{self.count} rows"
        remaining = self.count - len(self.listed)
        more = [f"  and {remaining} more"] if remaining else []
        raise DataError("\n".join([f"{rows} of the data cannot be used:", *self.listed, *more]))
