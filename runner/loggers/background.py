"""A logger called in a thread of its own: neither its failures nor its delays reach training."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from runner.common.errors import StorageError
from runner.common.text import count, shorten
from runner.loggers import Logger
from runner.loggers.logged_run import LoggedRow, LoggedRun

_NOTICE_SECONDS = 2.0
"""How long the end of a run waits for loggers without a line that says so."""


class BackgroundLogger:
    """Passes calls on in their order. After a failure it is logged no more until the run ends or is resumed: whichever
    comes first logs the rows that are missing."""

    def __init__(self, name: str, logger: Logger) -> None:
        """`name`: the logger's section in the config, for messages. Nothing is opened yet."""
        self.name = name
        self._logger = logger
        self._run: LoggedRun | None = None
        self._is_open = False
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._done = threading.Event()
        self._failed = False

    def open(self, run: LoggedRun) -> None:
        """Open the logger with the rows that the run has kept."""
        self._run, self._is_open = run, True
        try:
            self._logger.load(run)
        except Exception as error:
            self._fail(error)
        else:
            self._calls.put(partial(self._logger.open, run))
        # A daemon: a service that hangs must not keep the process from ending.
        threading.Thread(target=self._work, name=f"logger {self.name}", daemon=True).start()

    def log(self, row: LoggedRow) -> None:
        """Log a row."""
        self._calls.put(partial(self._log, row))

    def close(self, state: str) -> bool:
        """Log what is left and close the logger, in the background; `state` is that of the run.

        Returns:
            whether it was open.
        """
        was_open, self._is_open = self._is_open, False
        if was_open:
            self._calls.put(partial(self._close, state))
        return was_open

    def wait(self, seconds: float) -> bool:
        """Return whether the logger is closed, after at most `seconds`."""
        return self._done.wait(max(0.0, seconds))

    def new_messages(self) -> list[str]:
        """Return the messages since the last call: each failure comes once."""
        messages = []
        while not self._messages.empty():
            messages.append(self._messages.get())
        return messages

    def _work(self) -> None:
        while not self._done.is_set():
            call = self._calls.get()
            try:
                call()
            except BaseException as error:  # whatever a library raises: the run must not wait for a dead thread
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed:
            self._messages.put(_failure(self.name, error))
        self._failed = True

    def _log(self, row: LoggedRow) -> None:
        if not self._failed:
            self._logger.log(row)

    def _close(self, state: str) -> None:
        try:
            if self._failed and self._run is not None:
                self._logger.load(self._run)
                self._logger.open(self._run.with_rows())
                self._messages.put(f"loggers.{self.name} has all rows now.")
        finally:
            try:
                self._logger.close(state)
            finally:
                self._done.set()


def build_background(loggers: Mapping[str, Logger]) -> list[BackgroundLogger]:
    """Return the named loggers, each with a thread of its own."""
    return [BackgroundLogger(name, logger) for name, logger in loggers.items()]


def finish(
    loggers: Sequence[BackgroundLogger], state: str, seconds: float, print_line: Callable[[str], None] | None = None
) -> list[str]:
    """Close those of `loggers` that are open and wait for them, together at most `seconds`; return what to report."""
    start = time.monotonic()
    loggers = [logger for logger in loggers if logger.close(state)]
    behind = [logger for logger in loggers if not logger.wait(start + min(seconds, _NOTICE_SECONDS) - time.monotonic())]
    if behind and print_line is not None:
        print_line(f"waiting for {', '.join(f'loggers.{logger.name}' for logger in behind)}")
    behind = [logger for logger in behind if not logger.wait(start + seconds - time.monotonic())]
    lines = [line for logger in loggers for line in logger.new_messages()]
    return lines + [
        f"loggers.{logger.name} did not end within {count(round(seconds), 'second')}; metrics.jsonl has every row."
        for logger in behind
    ]


def _failure(name: str, error: BaseException) -> str:
    reason = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
    reason = shorten(" ".join(reason.split()), 300).rstrip(".")
    again = "metrics.jsonl has every row, and the end of the run, or a resume, tries again"
    return f"loggers.{name} failed and is left out: {reason}; {again}."
