"""Stopping on request: the first SIGTERM, Ctrl-C or hang-up asks, the second ends at once: commits are atomic."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

_ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequested(Exception):
    """Raised inside an evaluation or a generation when a stop was asked for; nothing of it is kept."""


class StopSignals:
    """Whether a signal asked the run to stop. A context manager: the former handlers come back."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers; elsewhere (a launcher's worker thread) signals go unasked.
        if threading.current_thread() is threading.main_thread():
            for number in _ASKS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.signal is not None:
            raise StopRequested

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
