"""What a job of hydra/launcher=submitit does where the cluster runs it: it trains in a worker process, which it lets
save when the cluster wants its machine back.

submitit pickles a `SubmittedJob`, which holds one path: that of a JSON file with the request for the worker.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from runner.backends.blas import thread_count
from runner.backends.mlx_build import is_gpu_build
from runner.sweeps.launchers.worker_process import WorkerProcess

_GRACE_SECONDS = 600.0
"""How long a job of SLURM that was told to end waits for what SLURM does with it."""


class SubmittedJob:
    """A job of a sweep, as submitit calls it, also after it was put into the queue again: what it continues from is in
    the directory of its run."""

    _worker: WorkerProcess | None = None

    def __init__(self, request: str) -> None:
        """`request`: path of the request, which is read when the job starts."""
        self.request = request

    def __call__(self) -> dict[str, Any]:
        """Train the job, and return its exit code with its value or its error."""
        request = json.loads(Path(self.request).read_text(encoding="utf-8"))
        blas_threads = thread_count(request.get("ranks") or 1, request["cpus"])
        threads = {} if is_gpu_build() else {"OPENBLAS_NUM_THREADS": str(blas_threads)}
        self._worker = worker = WorkerProcess(threads)
        before = signal.signal(signal.SIGTERM, self._stop)  # submitit's own handler lets it pass
        try:
            worker.send(request)
            while (reply := worker.read_reply()) is None:
                pass
            reply = {"code": worker.close(), **reply}
            if reply["code"] > 128 and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                # What follows decides whether the job was cancelled or preempted: its end, or the signal by which
                # submitit puts it into the queue again. A result would say that it is over.
                time.sleep(_GRACE_SECONDS)
            return reply
        finally:
            signal.signal(signal.SIGTERM, before)

    def checkpoint(self) -> Any:
        """Save and stop, and return what submitit puts into the queue again. It calls this in a signal handler."""
        from submitit.helpers import DelayedSubmission

        if self._worker is not None:
            self._worker.close()
        return DelayedSubmission(SubmittedJob(self.request))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._worker is not None:
            self._worker.end_requests()
