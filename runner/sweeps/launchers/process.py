"""hydra/launcher=process: jobs run in worker processes, several at once."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.app import guard
from runner.backends.blas import thread_count
from runner.backends.mlx_build import is_gpu_build
from runner.common.cores import usable_cores
from runner.common.errors import GaveUp, RunnerError
from runner.config.invocation import Invocation
from runner.runs.directory import RunDirectory
from runner.runs.restarts import RestartPolicy, ends_process
from runner.sweeps.hydra_node import record_files
from runner.sweeps.job import JobTask
from runner.sweeps.launched import job_config_of, launched_jobs
from runner.sweeps.launchers.memory import jobs_that_fit
from runner.sweeps.launchers.serial import loading_order
from runner.sweeps.plan import PlannedJob
from runner.training.signals import StopSignals

_POLL_SECONDS = 0.5


@dataclass
class Worker:
    """A process that trains one job after the other; see `runner.sweeps.launchers.worker`."""

    process: subprocess.Popen[bytes]
    job: int | None = None
    """Index of the job in progress."""
    stop_requested: bool = False
    received: bytes = field(default=b"")

    @property
    def replies(self) -> IO[bytes]:
        """Its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout

    def send(self, request: dict[str, Any]) -> None:
        """Send it a request; one that has ended is noticed when its replies are read."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def read_reply(self) -> dict[str, Any] | None:
        """Return the reply that has arrived in whole; an empty one where the process has ended."""
        data = os.read(self.replies.fileno(), 65536)
        if not data:
            return {}
        self.received += data
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None
        self.received = rest
        reply: dict[str, Any] = json.loads(line)
        return reply

    def request_stop(self, number: signal.Signals) -> None:
        """Pass a signal on, once: a second one would end the job without a save."""
        if not self.stop_requested and self.process.poll() is None:
            self.process.send_signal(number)
            self.stop_requested = True

    def close(self) -> int:
        """Close its pipes, wait for its end and return its exit code."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.replies.close()
        return code


class ProcessLaunch:
    """Runs jobs in worker processes. A killed worker fails its own job only, and another takes its place; where the
    sweep is supervised, its job is started again."""

    def __init__(
        self,
        jobs: Sequence[PlannedJob],
        at_once: int,
        context: HydraContext,
        composed: DictConfig,
        invocation: Invocation,
    ) -> None:
        self.jobs = jobs
        self.returns = [JobReturn() for _ in jobs]
        self._context, self._composed, self._invocation = context, composed, invocation
        self._sweep = Path(composed.hydra.sweep.dir)
        self._waiting = loading_order(jobs)
        self._at_once = min(at_once, len(jobs))
        self._threads = None if is_gpu_build() else thread_count(self._at_once, usable_cores())
        """BLAS threads of each worker; None where a GPU computes."""
        self._workers: dict[int, Worker] = {}
        """By the descriptor of their replies."""
        self._selector = selectors.DefaultSelector()
        self._one_job_each = invocation.supervise is not None and is_gpu_build()
        """Whether each job has a new worker: the limits of `training.process_limit` are those of a process."""
        self._policies: dict[int, RestartPolicy] = {}
        """By the index of a supervised job that has ended once."""

    def run(self, fail_fast: bool) -> None:
        """Run all jobs.

        Raises:
            SystemExit: a signal stopped the process; it was passed on to every running job, which has saved.
        """
        logs = self._sweep / "logs"
        logs.mkdir(exist_ok=True)
        threads = f", {self._threads} BLAS threads each" if self._threads else ""
        print(f"processes: {self._at_once} at once{threads}; output in {logs}", flush=True)
        with StopSignals() as stops, ExitStack() as stack:
            console = Console(highlight=False, soft_wrap=True)
            live = None
            if console.is_terminal:
                live = stack.enter_context(Live(console=console, transient=True, refresh_per_second=2))
            stack.callback(self._close_workers)
            while self._waiting or self._running():
                if stops.signal is not None:
                    self._waiting.clear()
                    for worker in self._running():
                        worker.request_stop(stops.signal)
                self._start_jobs()
                for key, _ in self._selector.select(_POLL_SECONDS):
                    worker = self._workers[key.fd]
                    if (reply := worker.read_reply()) is None:
                        continue
                    i, code = worker.job, self._end_job(worker, reply)
                    if i is None:
                        continue
                    text = None if stops.signal is not None else self._start_again(i, code)
                    if text is None:
                        self._finish(i, code, reply)
                        text = self._outcome_text(i)
                        if fail_fast and self.returns[i].status == JobStatus.FAILED:
                            self._waiting.clear()
                    (live.console if live else console).print(text, markup=False)
                if live is not None:
                    live.update(Text("\n".join(self._progress_text(worker) for worker in self._running())))
            if stops.signal is not None:
                raise SystemExit(128 + stops.signal)

    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.job is not None]

    def _start_jobs(self) -> None:
        """Give waiting jobs to idle workers, of which there may be `at_once`."""
        while self._waiting:
            idle = next((worker for worker in self._workers.values() if worker.job is None), None)
            if idle is None:
                if len(self._workers) >= self._at_once:
                    return
                idle = self._start_worker()
            i = self._waiting.pop(0)
            planned, result = self.jobs[i], self.returns[i]
            result.cfg = job_config_of(planned, self._composed)
            result.overrides = list(planned.job.overrides)
            task = JobTask(self._invocation, self._sweep)
            if i not in self._policies:  # else it is started again
                self._context.callbacks.on_job_start(config=result.cfg, task_function=task)
            log = self._sweep / "logs" / f"{planned.job.folder}.log"
            idle.job = i
            record = {} if planned.resumes else record_files(result.cfg)
            request = {"job": planned.job.number, "label": planned.label, "log": str(log), "record": record}
            idle.send({**request, "changes": self._policies[i].changes if i in self._policies else {}})

    def _start_worker(self) -> Worker:
        threads = {"OPENBLAS_NUM_THREADS": str(self._threads)} if self._threads else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "runner.sweeps.launchers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, **self._composed.hydra.job.env_set},
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on once
        )
        worker = Worker(process)
        typed = {name: value for name, value in self._invocation.settings.items() if name == guard.TRUST}
        supervise = self._invocation.supervise and asdict(self._invocation.supervise)
        start = {"sweep": str(self._sweep), "stop_at": self._invocation.stop_at, "settings": typed}
        worker.send({**start, "supervise": supervise})
        self._workers[worker.replies.fileno()] = worker
        self._selector.register(worker.replies, selectors.EVENT_READ)
        return worker

    def _end_job(self, worker: Worker, reply: dict[str, Any]) -> int:
        """Take the worker's job from it and return its exit code; without a reply, the process itself has ended."""
        worker.job = None
        code: int | None = reply.get("code")
        if code is None or ends_process(code) or self._one_job_each:
            descriptor = worker.replies.fileno()
            self._selector.unregister(worker.replies)
            del self._workers[descriptor]
            ended = worker.close()
            code = ended if code is None else code
        return code

    def _start_again(self, i: int, code: int) -> str | None:
        """Put the job back among those that wait if its process died, and return a line about it.

        Returns:
            None where it ended for another reason, died too often, or is not supervised.
        """
        if self._invocation.supervise is None:
            return None
        job = self.jobs[i].job
        with suppress(GaveUp):  # its status says why
            if line := self._policies.setdefault(i, RestartPolicy()).next_start(code, self._sweep / job.folder):
                self._waiting.insert(0, i)
                return f"job {job.number:<3} {line}"
        return None

    def _finish(self, i: int, code: int, reply: dict[str, Any]) -> None:
        """Record how a job ended."""
        reason = reply.get("error")
        result, job = self.returns[i], self.jobs[i].job
        if code == 0:
            result.status, result.return_value = JobStatus.COMPLETED, reply.get("value")
        else:
            directory = RunDirectory(self._sweep / job.folder)
            status = directory.read_status()
            if code < 0:
                reason = f"killed by {signal.Signals(-code).name}"
                if status.get("state") == "interrupted":
                    # The process could not: its status still says running.
                    directory.write_status({"reason": reason, **status, "state": "interrupted"})
            result.status = JobStatus.FAILED
            result.return_value = RunnerError(
                f"job {job.number}: {status.get('reason') or reason or f'exit code {code}'}"
            )
        self._context.callbacks.on_job_end(config=result.cfg, job_return=result)

    def _close_workers(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._selector.close()

    def _progress_text(self, worker: Worker) -> str:
        """Return one line on the job in progress: number, step, losses, overrides."""
        assert worker.job is not None
        return self._text(worker.job, self._status(worker.job), [])

    def _outcome_text(self, i: int) -> str:
        """Return one line on an ended job: number, step, losses, state with its reason, overrides."""
        status, result = self._status(i), self.returns[i]
        state = str(status.get("state"))
        if result.status == JobStatus.FAILED:
            state = f"{state} ({str(status.get('reason') or result._return_value).splitlines()[0]})"
        return self._text(i, status, [state])

    def _status(self, i: int) -> dict[str, Any]:
        return RunDirectory(self._sweep / self.jobs[i].job.folder).read_status()

    def _text(self, i: int, status: dict[str, Any], outcome: list[str]) -> str:
        step = f"{status.get('step', 0)}/{status.get('iters', '?')}"
        losses = [(label, status.get(f"{label}_loss")) for label in ("train", "valid")]
        texts = [f"{label} {loss:.4f}" for label, loss in losses if isinstance(loss, float)]
        return "  ".join([f"job {self.jobs[i].job.number:<3} {step:>11}", *texts, *outcome, self.jobs[i].label])


def launch(
    job_overrides: Sequence[Sequence[str]],
    *,
    at_once: int | None,
    fail_fast: bool,
    context: HydraContext,
    composed: DictConfig,
    invocation: Invocation,
) -> list[JobReturn]:
    """Run the jobs that a sweeper gives, and share the cores between those that run at once.

    A job that is killed or runs out of memory counts as failed and does not stop the others, unless `fail_fast`. Where
    this process ends, its workers save and end too.

    Args:
        at_once: how many jobs run at once; None: as many as fit into memory and cores, and one on a GPU.
        fail_fast: whether no job is started after one has failed.

    Raises:
        SystemExit: a signal stopped the process; it was passed on to every running job, which has saved.
    """
    jobs = launched_jobs(job_overrides, context, composed, invocation)
    if at_once is None:
        at_once = jobs_that_fit({str((planned.job.config or {})["model"]["path"]) for planned in jobs})
    running = ProcessLaunch(jobs, at_once, context, composed, invocation)
    running.run(fail_fast)
    return running.returns
