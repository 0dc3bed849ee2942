"""Which jobs of a sweep are left to run, and how they are passed through Hydra to a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepManifest, job_id

DONE = ("finished", "diverged")
"""States of jobs that a resumed sweep does not run again: a diverged job diverges again with the same overrides."""


@dataclass(frozen=True)
class PlannedJob:
    """A job to run in the folder `number` of the sweep."""

    number: int
    overrides: tuple[str, ...]
    resumes: bool
    """Whether its run has begun, and resumes from its newest checkpoint."""

    def launch_overrides(self) -> list[str]:
        """Return the overrides for a launcher of Hydra: the folder, and whether Hydra may write its own record."""
        hydra_overrides = [f"hydra.sweep.subdir={self.number}"]
        if self.resumes:
            hydra_overrides.append("hydra.output_subdir=null")  # .hydra/ stays that of the first start
        return [*self.overrides, *hydra_overrides]

    @classmethod
    def parse(cls, launch_overrides: Sequence[str]) -> PlannedJob:
        """Return the job whose `launch_overrides` these are."""
        hydra_overrides = dict(override.split("=", 1) for override in launch_overrides if override.startswith("hydra."))
        return cls(
            number=int(hydra_overrides["hydra.sweep.subdir"]),
            overrides=tuple(override for override in launch_overrides if not override.startswith("hydra.")),
            resumes=hydra_overrides.get("hydra.output_subdir") == "null",
        )


def plan_jobs(manifest: SweepManifest, grid: Sequence[tuple[str, ...]]) -> list[PlannedJob]:
    """Return all jobs of the manifest that are not done, in the order of their numbers.

    `grid` holds the overrides as typed now, which may be in another order than those in the manifest.
    """
    typed = {job_id(overrides): overrides for overrides in grid}
    jobs = []
    for job in manifest.jobs.values():
        folder = manifest.folder / job.folder
        begun = has_begun(folder)
        if not begun or RunDirectory(folder).read_status()["state"] not in DONE:
            jobs.append(PlannedJob(job.number, typed.get(job.identity, job.overrides), begun))
    return jobs


def has_begun(folder: Path) -> bool:
    """Return whether a run has begun in `folder`: it writes its config first."""
    return (folder / "config.yaml").is_file()


def job_labels(jobs: Sequence[PlannedJob]) -> list[str]:
    """Return the overrides of each job that not all jobs share, as one text."""
    shared = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(override for override in job.overrides if override not in shared) for job in jobs]
