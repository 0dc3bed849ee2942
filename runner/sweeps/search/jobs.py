"""The jobs of a search: planned from suggested values, recorded in the manifest of the sweep, and launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.plugins.launcher import Launcher

from runner.app.hydra_internals import job_error
from runner.common.errors import StorageError
from runner.common.text import single_line
from runner.runs.directory import RunDirectory
from runner.runs.inspect import modified_time
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps.job_planner import JobPlanner
from runner.sweeps.plan import has_begun, remaining_jobs
from runner.sweeps.search.dimensions import Value
from runner.sweeps.search.outcome import Progress, read_progress
from runner.sweeps.search.space import Space


@dataclass(frozen=True)
class Launched:
    """How a launch went."""

    any_started: bool = False
    failed_fast: str = ""
    """What failed, where the launcher has fail_fast: it starts no job after that."""


class TrialJobs:
    """Plans the jobs of trials, and trains them as far as the search decides."""

    def __init__(
        self,
        manifest: SweepManifest,
        planner: JobPlanner,
        space: Space,
        launcher: Launcher,
        output_subdir: str | None,
        template: SweepJob,
    ) -> None:
        """Keep what jobs are planned from: those of the trials are the `template` with other values."""
        self._manifest, self._planner, self._space = manifest, planner, space
        self._launcher, self._output_subdir, self._template = launcher, output_subdir, template
        self._unrecorded: list[SweepJob] = []
        self.errors: dict[int, str] = {}
        """What the last start of a job by this process raised, by its number."""

    @property
    def sweep(self) -> Path:
        """The directory of the sweep."""
        return self._manifest.folder

    def folder(self, number: int) -> Path:
        """Return the directory of a job."""
        return self._manifest.folder / self._manifest.jobs[number].folder

    def find_or_plan(self, params: Mapping[str, Value]) -> SweepJob:
        """Return the job with these values: the one that has them already, or a new one, which is not recorded yet.

        Raises:
            ConfigError: no run can have them.
        """
        typed = self._space.overrides(params)
        if self._space.has_groups:  # whose files other overrides go on top of
            changes = self._manifest.jobs[0].changes if self._manifest.jobs else {}
            return self._add(*self._planner.find_or_compose([*self._space.fixed, *typed], changes))
        return self._add(*self._planner.find_or_plan(self._template, self._space.fixed, typed))

    def has(self, number: int) -> bool:
        """Return whether a job of this number is recorded."""
        return number < len(self._manifest.jobs)

    def has_begun(self, number: int) -> bool:
        """Return whether there is a run of this job."""
        return has_begun(self.folder(number))

    def find_or_plan_seed(self, number: int, seed: int) -> SweepJob:
        """Return the job that trains what a recorded job does, with another seed."""
        job = self._manifest.jobs[number]
        return self._add(*self._planner.find_or_plan(job, job.overrides, [f"seed={seed}"]))

    def record(self, stops: Mapping[int, int | None]) -> None:
        """Record the jobs that were planned, and how far jobs train now: number to step, None to the end."""
        new = self._unrecorded
        changed = {
            number: step
            for number, step in stops.items()
            if number >= len(self._manifest.jobs) or self._manifest.jobs[number].stop_at != step
        }
        self._manifest.record(jobs=new, stops=changed)
        self._unrecorded.clear()

    def apply_changes(self) -> None:
        """Start the jobs that have ended or wait once more, so that they have the settings that were changed since."""
        states = ("finished", "stopped")
        folders = {job.number: self._manifest.folder / job.folder for job in self._manifest.jobs}
        self.launch([n for n, folder in folders.items() if RunDirectory(folder).read_status()["state"] in states])

    def last_written(self) -> float:
        """Return when a job last wrote its metrics, in seconds since 1970; 0 where none has."""
        folders = [self._manifest.folder / job.folder for job in self._manifest.jobs]
        return max((modified_time(RunDirectory(folder).metrics) for folder in folders), default=0.0)

    def progress(self) -> Progress:
        """Return how far all jobs are together."""
        runs = [read_progress(self.folder(job.number)) for job in self._manifest.jobs]
        return Progress(sum(run.updates for run in runs), sum(run.seconds for run in runs))

    def launch(self, numbers: Sequence[int]) -> Launched:
        """Train these jobs as far as is recorded.

        Raises:
            StorageError: nothing can be written any more, so that no other job could run.
            SystemExit: a signal stopped the jobs.
        """
        left = remaining_jobs(self._manifest, numbers)
        if not left:
            return Launched()
        run_jobs = getattr(self._launcher, "run_jobs", None)
        if callable(run_jobs):
            shared = {*self._space.fixed}
            texts = [[o.lstrip("+") for o in one.job.overrides if o not in shared] for one in left]
            left = [replace(one, label=" ".join(text)) for one, text in zip(left, texts, strict=True)]
            returns = run_jobs(left)
        else:  # a launcher of another package
            overrides = [job.launch_overrides(self._manifest.folder, self._output_subdir) for job in left]
            returns = self._launcher.launch(overrides, initial_job_idx=0)
        failed_fast = ""
        for one, done in zip(left, returns, strict=False):
            number, error = one.job.number, job_error(done)
            self.errors.pop(number, None)
            if isinstance(error, StorageError):
                raise error
            if error is not None:
                self.errors[number] = str(error)
                if not failed_fast and getattr(self._launcher, "fail_fast", False):
                    failed_fast = f"job {number}: {single_line(str(error))}"
        return Launched(True, failed_fast)

    def _add(self, job: SweepJob, is_new: bool) -> SweepJob:
        if is_new:
            self._unrecorded.append(job)
        return job
