"""The jobs of one launch that other processes train: what is asked for each, how it ended, and the lines about it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.common.errors import GaveUp, RunnerError
from runner.config.invocation import Invocation
from runner.runs.directory import RunDirectory
from runner.runs.restarts import RestartPolicy
from runner.sweeps.hydra_node import record_files
from runner.sweeps.job import JobTask
from runner.sweeps.launched import job_config_of
from runner.sweeps.launchers.request import job_request
from runner.sweeps.plan import PlannedJob


class TrackedJobs:
    """The jobs of one launch, by their index in it."""

    def __init__(
        self, jobs: Sequence[PlannedJob], context: HydraContext, composed: DictConfig, invocation: Invocation
    ) -> None:
        self.jobs = jobs
        self.returns = [JobReturn() for _ in jobs]
        self._context, self._composed, self._invocation = context, composed, invocation
        self._sweep = Path(composed.hydra.sweep.dir)
        self._policies: dict[int, RestartPolicy] = {}
        """Of the jobs whose process has died once."""
        self._started: set[int] = set()

    def directory(self, i: int) -> RunDirectory:
        """Return the directory of a job's run."""
        return RunDirectory(self._sweep / self.jobs[i].job.folder)

    def log(self, i: int) -> Path:
        """Return the file that the output of a job is appended to."""
        return self._sweep / "logs" / f"{self.jobs[i].job.folder}.log"

    def start(self, i: int) -> dict[str, Any]:
        """Record that the job starts, or starts again, and return the request for a worker."""
        planned, result = self.jobs[i], self.returns[i]
        result.cfg = job_config_of(planned, self._composed)
        result.overrides = list(planned.job.overrides)
        if i not in self._started:
            task = JobTask(self._invocation, self._sweep)
            self._context.callbacks.on_job_start(config=result.cfg, task_function=task)
            self._started.add(i)
        return job_request(
            planned.job,
            self._sweep / planned.job.folder,
            label=planned.label,
            log=self.log(i),
            invocation=self._invocation,
            record={} if planned.resumes else record_files(result.cfg),
            changes=self._policies[i].changes if i in self._policies else {},
        )

    def next_start(self, i: int, end: int | str) -> str | None:
        """Return a line about the job if its process died and it is to be started again.

        Args:
            end: the exit code of its process, or what took the process away.

        Returns:
            None where it ended for another reason, or died too often: its status says why then.
        """
        job, policy = self.jobs[i].job, self._policies.setdefault(i, RestartPolicy())
        run = self._sweep / job.folder
        with suppress(GaveUp):
            line = policy.next_start_after(end, run) if isinstance(end, str) else policy.next_start(end, run)
            if line:
                return f"job {job.number:<3} {line}"
        return None

    def finish(self, i: int, code: int, reply: dict[str, Any]) -> str:
        """Record how a job ended and return a line about it: number, step, losses, state with its reason, overrides.

        Args:
            code: exit code of the job, or of its process; negative for a signal that killed it.
            reply: what its worker replied, with the `value` of its objective or the `error`.
        """
        reason = reply.get("error")
        result, job, directory = self.returns[i], self.jobs[i].job, self.directory(i)
        status = directory.read_status()
        if code == 0:
            result.status, result.return_value = JobStatus.COMPLETED, reply.get("value")
        else:
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
        status = directory.read_status()
        state = str(status.get("state"))
        if result.status == JobStatus.FAILED:
            state = f"{state} ({str(status.get('reason') or result._return_value).splitlines()[0]})"
        return self._text(i, status, [state])

    def has_failed(self, i: int) -> bool:
        """Return whether the job ended and did not complete."""
        return bool(self.returns[i].status == JobStatus.FAILED)

    def progress_text(self, i: int) -> str:
        """Return one line on a job in progress: number, step, losses, overrides."""
        return self._text(i, self.directory(i).read_status(), [])

    def _text(self, i: int, status: dict[str, Any], outcome: list[str]) -> str:
        step = f"{status.get('step', 0)}/{status.get('iters', '?')}"
        losses = [(label, status.get(f"{label}_loss")) for label in ("train", "valid")]
        texts = [f"{label} {loss:.4f}" for label, loss in losses if isinstance(loss, float)]
        return "  ".join([f"job {self.jobs[i].job.number:<3} {step:>11}", *texts, *outcome, self.jobs[i].label])


class ProgressLines:
    """Prints lines, and on a terminal keeps one line for each job in progress below them."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console, self._live = console, live

    def print(self, text: str) -> None:
        """Print a line that stays."""
        (self._live.console if self._live else self._console).print(text, markup=False)

    def update(self, texts: Sequence[str]) -> None:
        """Show these lines in place of the last ones, where there is a terminal."""
        if self._live is not None:
            self._live.update(Text("\n".join(texts)))

    @property
    def is_shown(self) -> bool:
        """Whether `update` shows anything."""
        return self._live is not None


@contextmanager
def progress_lines() -> Iterator[ProgressLines]:
    """Show lines about jobs while they run."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield ProgressLines(console, None)
        return
    with Live(console=console, transient=True, refresh_per_second=2) as live:
        yield ProgressLines(console, live)
