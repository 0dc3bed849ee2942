"""The command line in this process, for tests that need no process of its own: Python's imports are paid once."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

import pytest

from runner.cli.main import main


class CommandLineInProcess:
    """The program as a user runs it in the working directory `folder`, without a new process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        """Run the program, assert that its exit code is `expect`, and return its output."""
        output = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(arguments)
        assert code == expect, f"exit code {code}\n{output.getvalue()}"
        return output.getvalue()

    @staticmethod
    def results(sweep: Path) -> dict[int, dict[str, str]]:
        """Return the rows of a sweep's results.csv by job number."""
        with (sweep / "results.csv").open() as lines:
            return {int(row["job"]): row for row in csv.DictReader(lines)}


@pytest.fixture
def inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLineInProcess:
    """`inline("model=tiny", …)` runs the program in a temporary folder, in this process."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("RUNNER_TRACEBACK", raising=False)
    return CommandLineInProcess(tmp_path)
