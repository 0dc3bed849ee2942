"""hydra/launcher=process: each job is a process of its own, a plain run in its folder; several run at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.app.resolve import resolve_config
from runner.backends.blas import thread_count
from runner.common.cores import usable_cores
from runner.common.errors import ConfigError, RunnerError
from runner.config.invocation import Invocation
from runner.config.quoting import quote_text
from runner.runs.directory import RunDirectory
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.launchers.memory import jobs_that_fit
from runner.sweeps.plan import PlannedJob, job_labels
from runner.training.signals import StopSignals

_POLL_SECONDS = 0.2
_REFRESH_SECONDS = 1.0


@dataclass
class JobProcess:
    """A job in its process."""

    job: PlannedJob
    label: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    stop_requested: bool = False

    def request_stop(self, number: signal.Signals) -> None:
        """Pass a signal on, once: a second one would end the job without a save."""
        if not self.stop_requested and self.process.poll() is None:
            self.process.send_signal(number)
            self.stop_requested = True

    def close(self) -> JobReturn:
        """Return the result of the ended process."""
        self.log.close()
        code = self.process.returncode
        result = JobReturn()
        result.overrides = list(self.job.overrides)
        if code == 0:
            result.status, result.return_value = JobStatus.COMPLETED, None
            return result
        directory = RunDirectory(self.folder)
        status = directory.read_status()
        reason = status.get("reason")
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            if status.get("state") == "interrupted":
                # The process could not: its status still says running.
                directory.write_status({**status, "state": "interrupted", "reason": reason})
        result.status = JobStatus.FAILED
        result.return_value = RunnerError(f"job {self.job.number}: {reason or f'exit code {code}'}")
        return result

    def progress_text(self) -> str:
        """Return one line: number, step, losses, overrides."""
        return self._text(RunDirectory(self.folder).read_status(), [])

    def outcome_text(self) -> str:
        """Return one line for the ended job: number, step, losses, state with its reason, overrides."""
        status, code = RunDirectory(self.folder).read_status(), self.process.returncode
        reason = str(status.get("reason") or "").split("\n")[0]
        state = str(status.get("state"))
        return self._text(status, [state if code == 0 else f"{state} ({reason or f'exit {code}'})"])

    def _text(self, status: dict[str, object], outcome: list[str]) -> str:
        step = f"{status.get('step', 0)}/{status.get('iters', '?')}"
        losses = [(label, status.get(f"{label}_loss")) for label in ("train", "valid")]
        texts = [f"{label} {loss:.4f}" for label, loss in losses if isinstance(loss, float)]
        return "  ".join([f"job {self.job.number:<3} {step:>11}", *texts, *outcome, self.label])


def launch(
    job_overrides: Sequence[Sequence[str]],
    *,
    at_once: int | None,
    context: HydraContext,
    composed: DictConfig,
    invocation: Invocation,
) -> list[JobReturn]:
    """Run the jobs, given as `PlannedJob.launch_overrides`, and share the cores between those that run at once.

    A job that is killed or runs out of memory counts as failed and does not stop the others.

    Args:
        at_once: how many jobs run at once; None: as many as fit into memory and cores.

    Raises:
        SystemExit: a signal stopped the process; it was passed on to every running job, which has saved.
    """
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ConfigError(f"hydra.launcher.jobs={at_once} is invalid: must be 1 or more, or null.")
    sweep = Path(composed.hydra.sweep.dir)
    jobs = [PlannedJob.parse(overrides) for overrides in job_overrides]
    if at_once is None:
        composer = JobComposer(context.config_loader, composed)
        at_once = jobs_that_fit({resolve_config(composer.compose(job.overrides)).model.path for job in jobs})
    at_once = min(at_once, len(jobs))
    threads = max(1, thread_count(at_once, usable_cores()))
    labels = job_labels(jobs)
    (sweep / "logs").mkdir(exist_ok=True)
    print(f"processes: {at_once} at once, {threads} BLAS threads each; output in {sweep / 'logs'}", flush=True)
    waiting, running = list(range(len(jobs))), dict[int, JobProcess]()
    returns: dict[int, JobReturn] = {}
    with StopSignals() as stops, ExitStack() as stack:
        console = Console(highlight=False, soft_wrap=True)
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, transient=True, refresh_per_second=2))
        refreshed = 0.0
        while waiting or running:
            if stops.signal is not None:
                waiting.clear()
                for process in running.values():
                    process.request_stop(stops.signal)
            while waiting and len(running) < at_once:
                i = waiting.pop(0)
                running[i] = _start(jobs[i], labels[i], sweep, threads, invocation)
            for i in [i for i, process in running.items() if process.process.poll() is not None]:
                ended = running.pop(i)
                returns[i] = ended.close()
                (live.console if live else console).print(ended.outcome_text(), markup=False)
            if live is not None and time.monotonic() - refreshed > _REFRESH_SECONDS:
                live.update(Text("\n".join(process.progress_text() for process in running.values())))
                refreshed = time.monotonic()
            time.sleep(_POLL_SECONDS)
        if stops.signal is not None:
            raise SystemExit(128 + stops.signal)
    return [returns[i] for i in range(len(jobs))]


def _start(job: PlannedJob, label: str, sweep: Path, threads: int, invocation: Invocation) -> JobProcess:
    folder = sweep / str(job.number)
    if job.resumes:
        arguments = [f"resume={quote_text(str(folder))}"]
        arguments += [override for override in job.overrides if override.startswith("model.trust_remote_code=")]
    else:
        arguments = [override for override in job.overrides if not override.startswith("stored=")]
        # The mode is set, since an experiment file may say that it is a sweep.
        arguments += ["hydra.mode=RUN", f"hydra.run.dir={quote_text(str(folder))}"]
        if invocation.repeat is not None:
            arguments.append(f"repeat={quote_text(str(invocation.repeat))}")
    if invocation.stop_at is not None:
        arguments.append(f"train.stop_at={invocation.stop_at}")
    flags = [argument for argument in invocation.flags if argument.startswith("--config-dir=")]
    log = (sweep / "logs" / f"{job.number}.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *flags, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": str(threads)},
        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on once
    )
    return JobProcess(job, label, folder, process, log)
