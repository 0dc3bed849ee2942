"""A worker process of a launcher: it imports MLX once and trains one job after the other.

Requests come as JSON lines on standard input, see `runner.sweeps.launchers.request`. The reply to each is a line on
standard output: {"job": N, "code": exit code}, with its "value" (the objective) or its "error".
Where standard input ends, its parent has ended: the job in progress saves and stops.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from runner.common.errors import EXIT_DONE, RunnerError
from runner.runs.restarts import ends_process
from runner.sweeps.launchers.request import requested_invocation, requested_job
from runner.training.signals import STOP_SIGNALS, request_stop

if TYPE_CHECKING:
    from runner.training.component_loader import ComponentLoader

_FAILED = 1


def main() -> None:
    """Train the jobs that are requested until there are no more."""
    requests = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    _receive_signals()
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.training.component_loader import ComponentLoader

    pending: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(requests, pending), daemon=True).start()
    with closing(ComponentLoader()) as loader:
        while (request := pending.get()) is not None:
            _redirect_output(Path(request["log"]))
            reply = _train(request, loader)
            pending.task_done()
            print(json.dumps({"job": request["job"]["number"], **reply}), file=replies, flush=True)
            if ends_process(reply["code"]):
                break


def _read(requests: IO[str], pending: queue.Queue[dict[str, Any] | None]) -> None:
    for line in requests:
        pending.put(json.loads(line))
    if pending.unfinished_tasks:  # the parent closes the pipe of an idle worker only, so it has ended
        request_stop()
    pending.put(None)


def _train(request: Mapping[str, Any], loader: ComponentLoader) -> dict[str, Any]:
    """Train the job of a request and return the reply: its exit code, why it failed, and its objective."""
    from runner.sweeps.job import train_job

    try:
        value = train_job(
            requested_job(request),
            Path(request["folder"]),
            label=request["label"],
            invocation=requested_invocation(request),
            loader=loader,
            record=request["record"],
            changes=request["changes"],
        )
    except RunnerError as error:
        print("\n".join(f"runner: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return {"code": error.exit_code, "error": str(error)}
    except SystemExit as stop:
        return {"code": stop.code if isinstance(stop.code, int) else _FAILED}
    except Exception as error:
        traceback.print_exception(error)
        return {"code": _FAILED, "error": f"{type(error).__name__}: {error}"}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return {"code": EXIT_DONE, "value": value}


def _receive_signals() -> None:
    """Receive the signals that stop a run, which a parent on a cluster may block, and ignore those by which a cluster
    announces a stop to all processes of a job: the parent asks for it. Before a job begins there is nothing to save."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would print where it was
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    main()
