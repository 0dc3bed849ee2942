"""hydra/launcher=process: jobs run in worker processes, several at once."""

from __future__ import annotations

import selectors
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from runner.backends.blas import thread_count
from runner.backends.mlx_build import is_gpu_build
from runner.common.cores import usable_cores
from runner.config.invocation import Invocation
from runner.runs.restarts import ends_process
from runner.runs.sweep_manifest import read_manifest
from runner.sweeps.launchers.executor import JobExecutor, loading_order
from runner.sweeps.launchers.memory import jobs_that_fit
from runner.sweeps.launchers.tracking import TrackedJobs, progress_lines
from runner.sweeps.launchers.worker_process import WorkerProcess
from runner.sweeps.plan import PlannedJob
from runner.training.signals import StopSignals

_POLL_SECONDS = 0.5


class ProcessExecutor(JobExecutor):
    """Runs jobs in worker processes. A killed worker fails its own job only, and another takes its place; where the
    sweep is supervised, its job is started again. Workers that are idle wait for the jobs of the next launch.

    Jobs share the cores. How many run at once is the same for all launches of a sweep, also where a launch has fewer
    jobs, since bits depend on the number of BLAS threads on the CPU.
    """

    def __init__(
        self,
        context: HydraContext,
        composed: DictConfig,
        invocation: Invocation,
        fail_fast: bool = False,
        limit: int | None = None,
    ) -> None:
        """`limit`: how many jobs run at once; None: as many as fit into memory and cores, and one on a GPU."""
        super().__init__(context, composed, invocation, fail_fast)
        self._limit = limit
        self._settled = False
        self._threads: int | None = None
        """BLAS threads of each worker; None where a GPU computes."""
        self._workers: dict[int, WorkerProcess] = {}
        """By the descriptor of their replies."""
        self._selector = selectors.DefaultSelector()
        supervised_on_gpu = invocation.supervise is not None and is_gpu_build()
        self._one_job_each = supervised_on_gpu or invocation.ranks is not None
        """Whether each job has a new worker: the limits of `training.process_limit` are those of a process, and MLX
        connects a process with other ranks only once."""

    def at_once(self) -> int:
        """Return how many jobs run at once: those that were asked for, or as many as fit."""
        if self._limit is None:
            jobs = read_manifest(self.sweep).jobs
            models = {str((job.config or {})["model"]["path"]) for job in jobs} or {str(self.composed.model.path)}
            fitting = jobs_that_fit(models, self.ranks)
            if not jobs:
                return fitting
            self._limit = fitting
        return self._limit

    def run(self, jobs: Sequence[PlannedJob]) -> list[JobReturn]:
        """Run the jobs. Where this process ends, its workers save and end too.

        Raises:
            SystemExit: a signal stopped the process; it was passed on to every running job, which has saved.
        """
        tracked = TrackedJobs(jobs, self.context, self.composed, self.invocation)
        waiting = loading_order(jobs)
        self._describe(jobs)
        with StopSignals() as stops, progress_lines() as lines:
            try:
                while waiting or self._running():
                    if stops.signal is not None:
                        waiting.clear()
                        for worker in self._running():
                            worker.request_stop(stops.signal)
                    self._start_jobs(waiting, tracked)
                    for key, _ in self._selector.select(_POLL_SECONDS):
                        worker = self._workers[key.fd]
                        if (reply := worker.read_reply()) is None:
                            continue
                        i, code = worker.job, self._end_job(worker, reply)
                        if i is None:
                            continue
                        again = self.invocation.supervise is not None and stops.signal is None
                        text = tracked.next_start(i, code) if again else None
                        if text is not None:
                            waiting.insert(0, i)
                        else:
                            text = tracked.finish(i, code, reply)
                            if self.fail_fast and tracked.has_failed(i):
                                waiting.clear()
                        lines.print(text)
                    if lines.is_shown:
                        lines.update([tracked.progress_text(w.job) for w in self._running() if w.job is not None])
                if stops.signal is not None:
                    raise SystemExit(128 + stops.signal)
            except BaseException:
                self.close()
                raise
        return tracked.returns

    def close(self) -> None:
        """End the workers; a job in progress saves and stops."""
        for worker in [*self._workers.values()]:
            self._end_worker(worker)

    def _describe(self, jobs: Sequence[PlannedJob]) -> None:
        """Print how the jobs are run, and settle the share of a worker in the cores at the first launch."""
        logs = self.sweep / "logs"
        logs.mkdir(exist_ok=True)
        if not self._settled:
            self._settled = True
            at_once = min(self.at_once(), max(len(jobs), len(read_manifest(self.sweep).jobs)))
            self._threads = None if is_gpu_build() else thread_count(at_once * self.ranks, usable_cores())
            threads = f", {self._threads} BLAS threads each" if self._threads else ""
            print(f"processes: {at_once} at once{threads}; output in {logs}", flush=True)

    def _running(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers.values() if worker.job is not None]

    def _start_jobs(self, waiting: list[int], tracked: TrackedJobs) -> None:
        """Give waiting jobs to idle workers, of which there may be `at_once`."""
        while waiting:
            idle = next((worker for worker in self._workers.values() if worker.job is None), None)
            if idle is not None and not idle.is_running():
                self._end_worker(idle)
                continue
            if idle is None:
                if len(self._workers) >= self.at_once():
                    return
                idle = self._start_worker()
            idle.job = waiting.pop(0)
            idle.send(tracked.start(idle.job))

    def _start_worker(self) -> WorkerProcess:
        threads = {"OPENBLAS_NUM_THREADS": str(self._threads)} if self._threads else {}
        worker = WorkerProcess({**threads, **self.composed.hydra.job.env_set})
        self._workers[worker.replies.fileno()] = worker
        self._selector.register(worker.replies, selectors.EVENT_READ)
        return worker

    def _end_job(self, worker: WorkerProcess, reply: dict[str, Any]) -> int:
        """Take the worker's job from it and return its exit code; without a reply, the process itself has ended."""
        worker.job = None
        code: int | None = reply.get("code")
        if code is None or ends_process(code) or self._one_job_each:
            ended = self._end_worker(worker)
            code = ended if code is None else code
        return code

    def _end_worker(self, worker: WorkerProcess) -> int:
        """End a worker and return its exit code."""
        del self._workers[worker.replies.fileno()]
        self._selector.unregister(worker.replies)
        return worker.close()
