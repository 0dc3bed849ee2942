"""`supervise=true`: a process without MLX and Hydra that starts a run as a child, and again wherever the child dies.

The child is `runner.cli.supervised`. It shares the terminal, so that all looks as without a supervisor. A pair of
sockets joins the two: the child tells the directory of its run, and the supervisor passes on requests to stop. Where
the supervisor itself is killed, the sockets tell the child, which saves and stops.

A run on several ranks has a supervisor for each: where one rank dies, all children end, and each supervisor starts its
own again, which join anew and continue from rank 0's last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from runner.config import labels
from runner.config.invocation import Invocation
from runner.runs.restarts import FollowerPolicy, RestartPolicy, stored_run

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FOR_EACH_START = ("supervise", "ranks", "train.stop_at", "model.trust_remote_code")
"""What a resume needs to be told again; settings of Hydra too. All else is in the run's config.yaml."""


def supervise_run(arguments: Sequence[str], invocation: Invocation) -> int:
    """Run the command line `arguments` (`invocation`, parsed) as a supervised child, and return its exit code.

    Raises:
        GaveUp: the child died three times in a row without a new checkpoint.
    """
    return _Supervisor(arguments, invocation).run()


class _Supervisor:
    def __init__(self, arguments: Sequence[str], invocation: Invocation) -> None:
        self._typed, self._continues = list(arguments), invocation.resume is not None
        self._arguments = self._typed
        self._run: Path | None = None
        """Directory of the run, once the child has claimed or locked it."""
        self._follows = invocation.launch is not None and invocation.launch.rank > 0
        self._policy = FollowerPolicy() if self._follows else RestartPolicy()
        self._stop: signal.Signals | None = None
        self._channel: socket.socket | None = None

    def run(self) -> int:
        with self._signals_passed_on():
            while True:
                code = self._run_child()
                if self._stop is not None:
                    return code if code >= 0 else 128 + self._stop
                if code < 0:
                    _restore_terminal()
                line = self._policy.next_start(code, self._run)
                if line is None:
                    return code if code >= 0 else 128 - code
                if self._follows:
                    self._run = None  # until it has joined again
                    continue
                with suppress(OSError):  # a closed terminal
                    print(f"runner: {line}", file=sys.stderr, flush=True)
                self._arguments = self._next_arguments()

    def _run_child(self) -> int:
        """Start the child, wait for its end and return its exit code; a signal is a negative one."""
        self._channel, child_end = socket.socketpair()
        with self._channel, child_end:
            if self._stop is not None:  # it arrived while no child was there
                return 128 + self._stop
            child = subprocess.Popen(
                [sys.executable, "-m", "runner.cli.supervised", str(child_end.fileno()), *self._arguments],
                pass_fds=[child_end.fileno()],
            )
            child_end.close()
            code = child.wait()
            messages = b""
            with suppress(OSError):  # nothing more is there
                while data := self._channel.recv(65536, socket.MSG_DONTWAIT):
                    messages += data
        for line in messages.splitlines():
            self._run = Path(json.loads(line))
        return code

    def _next_arguments(self) -> list[str]:
        """Return the command line that continues the run, or starts it again if nothing was stored."""
        if self._run is None:
            return self._typed
        if stored_run(self._run) is None:
            return [*_without(self._typed, "hydra.run.dir"), f"hydra.run.dir={self._run}"]
        # What was typed with resume= is typed again: the child may have died before it stored that.
        # Labels were set when the run was locked, and a person may have changed them since.
        kept = _without(self._typed, "hydra.run.dir", "resume", "repeat", *labels.SETTINGS)
        if not self._continues:
            kept = [argument for argument in kept if not _is_override(argument) or _is_for_each_start(_key(argument))]
        changes = [f"{name}={str(value).lower()}" for name, value in self._policy.changes.items()]
        return [f"resume={self._run}", *_without(kept, *self._policy.changes), *changes]

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        # A SIGHUP that nohup ignores stays ignored, here and in the child.
        numbers = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the child to stop. It is not sent the signal itself: a terminal's Ctrl-C and some job schedulers signal
        both processes, and a second signal would end the child without a save."""
        self._stop = self._stop or signal.Signals(number)
        if self._channel is not None:
            with suppress(OSError):
                self._channel.send(b"%d\n" % number)


def _key(argument: str) -> str:
    return argument.lstrip("+").partition("=")[0]


def _is_override(argument: str) -> bool:
    """Return whether `argument` is an override, and not a flag or its value."""
    return "=" in argument and not argument.startswith("-")


def _is_for_each_start(key: str) -> bool:
    return key in _FOR_EACH_START or key.startswith(("hydra.", "hydra/"))


def _without(arguments: Sequence[str], *keys: str) -> list[str]:
    return [argument for argument in arguments if not (_is_override(argument) and _key(argument) in keys)]


def _restore_terminal() -> None:
    """Show the cursor and clear the line of a live display that a killed child left behind."""
    with suppress(OSError, ValueError):
        if os.isatty(sys.stdout.fileno()):
            os.write(sys.stdout.fileno(), b"\r\x1b[2K\x1b[?25h")
