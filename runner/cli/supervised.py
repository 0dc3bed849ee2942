"""The child of `runner.cli.supervise`: `python -m runner.cli.supervised DESCRIPTOR ARGUMENTS…`.

DESCRIPTOR is its end of the pair of sockets. It writes the directory of its run there as a line of JSON. It reads the
numbers of signals that the supervisor was sent, one a line; where they end, so has the supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from runner.cli.main import main as run_program
from runner.training.signals import request_stop


def main() -> int:
    """Run the command line of this process, supervised, and return the exit code."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    threading.Thread(target=_watch, args=(channel,), daemon=True).start()

    def report_run(path: Path) -> None:
        channel.sendall(json.dumps(str(path)).encode() + b"\n")

    return run_program(sys.argv[2:], report_run)


def _watch(channel: socket.socket) -> None:
    """Stop where the supervisor asks for it or ends; a second request ends the process at once, as a second signal."""
    requested = False
    with suppress(ConnectionError), channel.makefile() as lines:  # reset, where a killed supervisor left lines unread
        for line in lines:
            number = signal.Signals(int(line))
            if requested:
                os._exit(128 + number)
            requested = True
            request_stop(number)
    if not requested:
        print("runner: the supervising process has ended; saving and stopping", file=sys.stderr, flush=True)
    request_stop()


if __name__ == "__main__":
    sys.exit(main())
