"""Which jobs of a sweep are left to run, and how they are named to a launcher of Hydra."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoints.save_policy import StopReason
from runner.config import serialize
from runner.config.quoting import quote_text
from runner.runs.directory import RunDirectory
from runner.runs.restarts import newest_checkpoint, stored_run
from runner.runs.sweep_manifest import SweepJob, SweepManifest

_DIVERGED = "diverged"
"""A job that diverged does so again with the same settings, so a resumed sweep does not run it again."""
_INPUTS = ("data.", "model.")
"""Sections of what a run reads."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that is left to run."""

    job: SweepJob
    resumes: bool
    """Whether its run has begun, and resumes from its newest checkpoint."""
    label: str = ""
    """What tells it from the other jobs of the sweep."""

    def launch_overrides(self, sweep: Path, output_subdir: str | None) -> list[str]:
        """Return the overrides for a launcher of Hydra: those of the job, its folder, and what Hydra may write there.

        A launcher of ours reads from the folder's name which job of the manifest it has to run.
        """
        record = None if self.resumes else output_subdir  # .hydra/ stays that of the first start
        return [
            *self.job.overrides,
            f"hydra.sweep.dir={quote_text(str(sweep))}",
            f"hydra.sweep.subdir={quote_text(self.job.folder)}",
            f"hydra.output_subdir={'null' if record is None else quote_text(record)}",
        ]


def remaining_jobs(manifest: SweepManifest, numbers: Iterable[int] | None = None) -> list[PlannedJob]:
    """Return the jobs that are not done, of all or of those with these numbers, in the order of their numbers.

    A finished job is run again where settings were changed since, as `resume=` does with a single run; not for another
    location of its data or model, which it does not need any more.
    """
    remaining = []
    for job in manifest.jobs if numbers is None else [manifest.jobs[number] for number in sorted(numbers)]:
        folder = manifest.folder / job.folder
        begun = has_begun(folder)
        if not begun or not _is_done(RunDirectory(folder), job):
            remaining.append(PlannedJob(job, begun))
    return remaining


def has_begun(folder: Path) -> bool:
    """Return whether a run has begun in `folder`: without a config there is nothing to resume."""
    return (folder / "config.yaml").is_file()


def unchangeable_jobs(manifest: SweepManifest) -> list[SweepJob]:
    """Return the finished jobs that settings were changed for since, and that `runner clean` left no checkpoint of, so
    that they keep what they had."""
    directories = [(job, RunDirectory(manifest.folder / job.folder)) for job in manifest.jobs]
    return [
        job
        for job, directory in directories
        if has_begun(directory.path) and _is_cleaned(directory) and _is_changed(directory, job)
    ]


def _is_done(directory: RunDirectory, job: SweepJob) -> bool:
    status = directory.read_status()
    state = status["state"]
    if state == "stopped" and job.stop_at is not None and (status.get("step") or 0) >= job.stop_at:
        # It waits for the search to continue it; but where a signal stopped it there, its evaluation may be missing.
        return status.get("reason") == StopReason.STOP_AT.value and not _is_changed(directory, job)
    if state != "finished":
        return bool(state == _DIVERGED)
    return not _is_changed(directory, job) or _is_cleaned(directory)


def _is_changed(directory: RunDirectory, job: SweepJob) -> bool:
    """Return whether settings of the job that began in the directory were changed since."""
    changes = {name: value for name, value in job.later_changes.items() if not name.startswith(_INPUTS)}
    if not changes:
        return False
    stored = serialize.flatten_stored(directory.read_config())
    return any(stored.get(name) != value for name, value in changes.items())


def _is_cleaned(directory: RunDirectory) -> bool:
    """Return whether the run is finished and `runner clean` left no checkpoint from which it could resume."""
    status = directory.read_status()
    if status["state"] != "finished" or not status.get("cleaned"):
        return False
    stored = stored_run(directory.path)
    return stored is not None and newest_checkpoint(stored) is None
