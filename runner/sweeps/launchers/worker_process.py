"""A worker process as the process that started it sees it; what it does is in `runner.sweeps.launchers.worker`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any


class WorkerProcess:
    """A process that trains one job after the other. Where this process ends, the job in progress saves and stops."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it; `environment` is added to that of this process."""
        self.job: int | None = None
        """Index of the job in progress, for whoever gives it jobs."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.sweeps.launchers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on once
        )
        self._stop_requested = False
        self._received = b""

    @property
    def replies(self) -> IO[bytes]:
        """Its standard output."""
        assert self._process.stdout is not None
        return self._process.stdout

    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def send(self, request: Mapping[str, Any]) -> None:
        """Send it a request; one that has ended is noticed when its replies are read."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def read_reply(self) -> dict[str, Any] | None:
        """Return the reply that has arrived in whole; an empty one where the process has ended."""
        data = os.read(self.replies.fileno(), 65536)
        if not data:
            return {}
        self._received += data
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        reply: dict[str, Any] = json.loads(line)
        return reply

    def request_stop(self, number: signal.Signals) -> None:
        """Pass a signal on, once: a second one would end the job without a save."""
        if not self._stop_requested and self.is_running():
            self._process.send_signal(number)
            self._stop_requested = True

    def end_requests(self) -> None:
        """Let it know that no request will follow: a job in progress saves and stops."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> int:
        """Close its pipes, wait for its end and return its exit code; a job in progress saves and stops."""
        self.end_requests()
        code = self._process.wait()
        self.replies.close()
        return code
