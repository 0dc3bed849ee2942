"""Stop signals: the first SIGTERM, SIGINT or SIGHUP asks the run to stop, a second one ends the process at once.

Ending at once is safe because checkpoints are committed atomically. A run on several ranks stops where all of them know
of the signal: until then it is requested, and work on it may be abandoned.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequested(Exception):
    """Raised where work can be abandoned because a stop signal arrived; its partial results are discarded."""


class StopSignals:
    """A context manager that records a stop signal; the previous handlers return at its end."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The stop signal by which the run ends, the same on all ranks at the same point of their work."""
        self.requested: signal.Signals | None = None
        """The first stop signal received, or SIGTERM where `request_stop` asked for a stop."""
        self._tell: Callable[[signal.Signals], None] | None = None
        self._received = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python sets handlers on the main thread only; in a launcher's worker thread signals are not recorded.
        if threading.current_thread() is threading.main_thread():
            around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if isinstance(around, StopSignals) and around.requested is not None:
                self.request(around.requested)  # it came before this one listened
            for number in STOP_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def request(self, number: signal.Signals) -> None:
        """Ask for a stop as the first signal does; unlike a signal it never counts as the second one."""
        if self.requested is None:
            self.requested = number
            if self._tell is not None:
                self._tell(number)
            else:
                self.signal = number

    def share(self, tell: Callable[[signal.Signals], None]) -> None:
        """From now on `tell` other ranks of a request, which counts once all `agree`."""
        self._tell = tell
        if self.requested is not None:
            tell(self.requested)

    def agree(self, number: signal.Signals) -> None:
        """Take a signal that some rank received as that of all: they know of it at the same point of their work."""
        self.requested = self.requested or number
        self.signal = self.signal or number

    def stop_sharing(self) -> None:
        """After the last point at which ranks agree: a request counts at once, as in a process alone."""
        self._tell = None
        self.signal = self.signal or self.requested

    def check(self) -> None:
        """Raise StopRequested if a stop signal was received."""
        if self.requested is not None:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = True
        self.request(signal.Signals(number))


def request_stop(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask this process to stop, from any thread, as a first signal does; a stop in progress is not cut short by it.

    Before a run records signals, the process ends as by SIGTERM.
    """
    stops = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(stops, StopSignals):
        stops.request(number)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
