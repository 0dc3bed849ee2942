"""hydra/launcher=submitit: each job of the sweep is a job of SLURM."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, env_override

from runner.common.atomic_io import write_atomically
from runner.common.errors import EXIT_FAILED, EXIT_IN_USE, ConfigError
from runner.common.text import count
from runner.runs.restarts import NODE_LOST, PREEMPTED
from runner.sweeps.launchers.executor import ClusterExecutor
from runner.sweeps.launchers.submissions import Submissions, cluster_state
from runner.sweeps.launchers.submitit_task import SubmittedJob
from runner.sweeps.launchers.tracking import ProgressLines, TrackedJobs, progress_lines
from runner.sweeps.plan import PlannedJob
from runner.training.signals import StopSignals

_POLL_SECONDS = 1.0
_MAX_TIMEOUTS = 10_000
"""How often a job that ran out of time is continued: each time it gets on."""
_STOP_SECONDS = 120.0
"""How long jobs that were cancelled may take to save."""
_CAUSES = {
    "NODE_FAIL": NODE_LOST,
    "BOOT_FAIL": NODE_LOST,
    "PREEMPTED": PREEMPTED,
    "TIMEOUT": PREEMPTED,
    "FINISHED": PREEMPTED,  # of cluster=local, which continues a job a few times only
}
"""Ends without a result after which the run is continued in another job, as SLURM and submitit name them."""


@dataclass
class SubmititOptions:
    """The options of the launcher."""

    cluster: str | None = "slurm"
    folder: str | None = None
    jobs: int = 16
    timeout_min: int = 240
    signal_delay_s: int = 120
    cpus: int = 4
    gpus: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    setup: list[str] = field(default_factory=list)


class SubmititExecutor(ClusterExecutor[SubmititOptions]):
    """Runs each job as one of the cluster's. They outlive this process: a resumed sweep waits for those that it finds
    in the queue or running."""

    def at_once(self) -> int:
        """Return how many jobs the cluster is asked to run at once."""
        return 1 if self.options.cluster == "debug" else self.options.jobs

    def run(self, jobs: Sequence[PlannedJob]) -> list[JobReturn]:
        """Submit the jobs and wait for all.

        Raises:
            ConfigError: submitit refuses an option, or there is no such cluster.
            SystemExit: a signal stopped this process: the jobs were cancelled, and those in progress have saved.
        """
        tracked = TrackedJobs(jobs, self.context, self.composed, self.invocation)
        (self.sweep / "logs").mkdir(exist_ok=True)
        folder = Path(self.options.folder) if self.options.folder else self.sweep / "logs" / "submitit"
        executor = make_executor(self.options, folder.absolute())
        jobs_at_once = count(self.at_once(), "job")
        print(f"{executor.cluster}: {jobs_at_once} at once; output in {self.sweep / 'logs'}", flush=True)
        with StopSignals() as stops, progress_lines() as lines:
            _SubmititLaunch(self, executor, tracked, lines).run(stops)
        return tracked.returns


class _SubmititLaunch:
    """One launch: submits jobs and settles how each ended."""

    def __init__(self, launcher: SubmititExecutor, executor: Any, tracked: TrackedJobs, lines: ProgressLines) -> None:
        self._executor, self._tracked, self._lines = executor, tracked, lines
        self._fail_fast, self._at_once = launcher.fail_fast, launcher.at_once()
        self._cpus = launcher.options.cpus
        self._environment = {name: str(value) for name, value in launcher.composed.hydra.job.env_set.items()}
        """Of the jobs, which inherit it: it may hold what no file should."""
        self._submissions = Submissions(launcher.sweep)
        self._waiting = [*range(len(tracked.jobs))]
        self._submitted: dict[int, Any] = {}
        """By the index of a job, that of the cluster."""

    def run(self, stops: StopSignals) -> None:
        """Run all jobs."""
        self._find_submitted()
        while self._waiting or self._submitted:
            if stops.signal is not None:
                self._cancel()
                raise SystemExit(128 + stops.signal)
            self._submit()
            time.sleep(_POLL_SECONDS)
            for i, job in [*self._submitted.items()]:
                if self._submissions.is_done(job):
                    del self._submitted[i]
                    self._settle(i, job)
            if self._lines.is_shown:
                self._lines.update([self._tracked.progress_text(i) for i in self._submitted])

    def _find_submitted(self) -> None:
        """Take over jobs that an earlier process of the sweep submitted and that have not ended."""
        for i, planned in enumerate(self._tracked.jobs):
            if (job := self._submissions.find(planned.job.number)) is not None:
                self._write_request(i)  # for one that waits in the queue or will be requeued
                self._waiting.remove(i)
                self._submitted[i] = job
                self._lines.print(
                    f"job {planned.job.number:<3} was submitted as {job.job_id} and has not ended: waiting"
                )

    def _submit(self) -> None:
        """Submit the waiting jobs that no process trains; SLURM limits how many of an array run at once."""
        free = [i for i in self._waiting if not self._tracked.directory(i).is_locked()]
        if self._executor.cluster != "slurm":
            free = free[: max(0, self._at_once - len(self._submitted))]
        if not free:
            return
        calls = [SubmittedJob(str(self._write_request(i))) for i in free]
        try:
            with env_override(self._environment), self._executor.batch():
                jobs = [self._executor.submit(call) for call in calls]
        except Exception as error:  # sbatch may refuse whatever it likes
            raise ConfigError(f"the jobs cannot be submitted: {type(error).__name__}: {error}") from None
        for i, job in zip(free, jobs, strict=True):
            self._waiting.remove(i)
            self._submitted[i] = job
            self._submissions.record(self._tracked.jobs[i].job.number, job, self._executor.cluster)

    def _write_request(self, i: int) -> Path:
        """Write what the job is asked to do, and return the path."""
        request = {**self._tracked.start(i), "cpus": self._cpus}
        path = self._submissions.request_file(self._tracked.jobs[i].job.folder)
        write_atomically(path, json.dumps(request, indent=1) + "\n")
        return path

    def _settle(self, i: int, job: Any) -> None:
        """Record how a job ended, or let it wait to be submitted again."""
        reply, state = self._submissions.result(job), cluster_state(job)
        code = EXIT_FAILED if reply is None else int(reply["code"])
        if code == EXIT_IN_USE and self._tracked.directory(i).is_locked():
            self._waiting.append(i)  # until the process that trains it has ended
            return
        cause = _CAUSES.get(state) if reply is None else PREEMPTED if code > 128 else None
        text = self._tracked.next_start(i, cause) if cause else None
        if text is not None:
            self._waiting.append(i)
        else:
            error = {"error": f"the cluster's job {job.job_id} ended without a result ({state or 'state unknown'})"}
            text = self._tracked.finish(i, code, error if reply is None else reply)
            if self._fail_fast and self._tracked.has_failed(i):
                self._waiting.clear()
        self._lines.print(text)

    def _cancel(self) -> None:
        """Cancel the jobs, and wait until those in progress have saved."""
        for job in self._submitted.values():
            job.cancel(check=False)
        deadline = time.monotonic() + _STOP_SECONDS
        while any(self._tracked.directory(i).is_locked() for i in self._submitted) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 5)


def make_executor(options: SubmititOptions, folder: Path) -> Any:
    """Return submitit's executor with the options.

    Raises:
        ConfigError: submitit refuses an option, or there is no such cluster.
    """
    import submitit

    limits = {f"{name}_max_num_timeout": _MAX_TIMEOUTS for name in ("slurm", "local")}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.cluster, **limits)
        executor.update_parameters(**_parameters(options))
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"hydra/launcher=submitit with hydra.launcher.cluster={options.cluster}: {error}") from None
    return executor


def _parameters(options: SubmititOptions) -> Mapping[str, Any]:
    """Return the options by submitit's names; it leaves out those that are None."""
    return {
        "name": "runner",
        "timeout_min": options.timeout_min,
        "cpus_per_task": options.cpus,
        "gpus_per_node": options.gpus,
        "mem_gb": options.mem_gb,
        "tasks_per_node": 1,
        "nodes": 1,
        "stderr_to_stdout": True,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_array_parallelism": options.jobs,
        "slurm_signal_delay_s": options.signal_delay_s,
        "slurm_setup": options.setup or None,
        "local_setup": options.setup or None,
    }
