"""Runs and sweeps below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runner.common import layout
from runner.common.errors import ConfigError, RunnerError
from runner.common.layout import STATES
from runner.config.labels import NO_LABELS, Labels
from runner.runs import sweep_manifest
from runner.runs.inspect import RunInfo, modified_time, read_run
from runner.runs.labels import read_labels
from runner.runs.objective import Objective, objective_of
from runner.runs.search_record import lost_record, read_rungs, replicated_jobs
from runner.runs.sweep_manifest import SweepManifest

_SWEEP_FILES = ("multirun.yaml", sweep_manifest.NAME)
"""Either of them makes a folder a sweep; its runs are its numbered subfolders."""
_SIGNS_OF_A_RUN = {
    layout.CONFIG,
    layout.STATUS,
    layout.LOCK,
    layout.METRICS,
    layout.LOG,
    layout.CHECKPOINTS,
    layout.HYDRA,
}


@dataclass(kw_only=True)
class SweepInfo:
    """A sweep: a folder whose numbered subfolders are runs."""

    path: Path
    runs: list[RunInfo]
    """In the order of their numbers."""
    waiting: int = 0
    """Number of jobs in the manifest that have no folder yet."""
    problem: str | None = None
    """Why the manifest cannot be read, or what else of the sweep is lost."""
    manifest: SweepManifest | None = None
    """None where it cannot be read."""
    labels: Labels = NO_LABELS

    @property
    def repeats(self) -> Path | None:
        """The run, or the sweep for its best job, whose settings it varies."""
        return self.manifest.repeats if self.manifest else None

    @property
    def states(self) -> dict[str, int]:
        """The number of runs in each state, and of waiting jobs."""
        counts = Counter(run.state for run in self.runs)
        counts["waiting"] = self.waiting
        return {state: counts[state] for state in (*STATES, "unknown", "waiting") if counts[state]}

    @property
    def best(self) -> RunInfo | None:
        """The best run by the sweep's objective; the first of equal ones."""
        return self.objective.best(self.runs)

    @cached_property
    def objective(self) -> Objective:
        """What ranks its runs."""
        return objective_of(self.runs)

    @property
    def best_loss(self) -> float | None:
        """The validation loss of its best run."""
        return self.best.best_loss if self.best else None

    @property
    def updated(self) -> float:
        """When one of its runs last wrote a file, in seconds since 1970."""
        return max((run.updated for run in self.runs), default=modified_time(self.path))

    @property
    def size_bytes(self) -> int:
        """The size of all its runs."""
        return sum(run.size_bytes for run in self.runs)


def find_runs(root: Path, unlisted: Callable[[Path, OSError], None] | None = None) -> list[RunInfo | SweepInfo]:
    """Return the runs and sweeps at or below `root`, newest first.

    Links, hidden folders and folders that cannot be listed are skipped; a run is not searched for other runs.

    Args:
        unlisted: called with each folder that cannot be listed, and why.
    """
    found: list[RunInfo | SweepInfo] = []
    pending = [Path(root)]
    while pending:
        folder = pending.pop()
        names, folders = _list(folder, unlisted)
        if names & set(_SWEEP_FILES):
            found.append(read_sweep(folder))
        elif looks_like_run(names):
            found.append(read_run(folder))
        else:
            pending += [folder / name for name in folders if not name.startswith(".")]
    return sorted(found, key=lambda entry: (-entry.updated, str(entry.path)))


def find_labelled(root: Path) -> list[tuple[Path, Labels]]:
    """Return the runs, jobs and sweeps at or below `root` that have labels of their own; nothing else is read."""
    found = []
    pending = [Path(root)]
    while pending:
        folder = pending.pop()
        names, folders = _list(folder)
        if layout.LABELS in names:
            found.append((folder, read_labels(folder)))
        if names & set(_SWEEP_FILES) or not looks_like_run(names):
            pending += [folder / name for name in folders if not name.startswith(".")]
    return found


def looks_like_run(names: Iterable[str]) -> bool:
    """Return whether a folder with these names in it is a run or the remains of one.

    Two files of a run are required, since other programs write a config.yaml as well.
    """
    return len(_SIGNS_OF_A_RUN & set(names)) >= 2


def is_sweep_folder(path: Path) -> bool:
    """Return whether the folder is a sweep."""
    return any((path / name).is_file() for name in _SWEEP_FILES)


def is_run_or_sweep(path: Path) -> bool:
    """Return whether the folder itself, not a link to it, is a run or a sweep."""
    names, _ = _list(path)
    return not path.is_symlink() and (is_sweep_folder(path) or looks_like_run(names))


def read_sweep(path: Path) -> SweepInfo:
    """Read the sweep in `path`; a damaged manifest is named in `SweepInfo.problem`."""
    _, folders = _list(path)
    names = sorted((name for name in folders if name.isascii() and name.isdigit()), key=lambda n: (int(n[:18]), n))
    jobs: list[str] = []
    manifest = problem = None
    try:
        manifest = sweep_manifest.read_manifest(path)
        jobs, problem = [job.folder for job in manifest.jobs], lost_record(manifest)
    except (RunnerError, OSError) as error:
        problem = str(error)
    labels, rungs = read_labels(path), read_rungs(path)
    present = [name for name in jobs if name in folders]
    runs = [
        read_run(path / name, labels, rungs) for name in [*present, *(name for name in names if name not in present)]
    ]
    if manifest is not None:
        mark_seeds(path, {manifest.numbers[run.path.name]: run for run in runs if run.path.name in manifest.numbers})
    waiting = len(jobs) - len(present)
    return SweepInfo(path=path, runs=runs, waiting=waiting, problem=problem, manifest=manifest, labels=labels)


def mark_seeds(sweep: Path, runs: Mapping[int, RunInfo]) -> None:
    """Mark the jobs of a search, by number, that train a trial with another seed: `RunInfo.seed_of`."""
    for job, trial in replicated_jobs(sweep).items():
        if job in runs and trial in runs:
            runs[job].seed_of = runs[trial].path


def run_or_best_job(path: Path) -> Path:
    """Return `path`, or the folder of its best job where it is a sweep.

    Raises:
        ConfigError: no job of the sweep has a value of the objective.
    """
    if not is_sweep_folder(path):
        return path
    sweep = read_sweep(path)
    if sweep.best is None:
        raise ConfigError(
            f"{path} is a sweep, and none of its jobs has a {sweep.objective.metric} yet: name one of them."
        )
    return sweep.best.path


def _list(folder: Path, unlisted: Callable[[Path, OSError], None] | None = None) -> tuple[set[str], list[str]]:
    """Return the names in `folder`, and those of them that are folders; `unlisted` as for `find_runs`."""
    names, folders = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.add(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
    except OSError as error:
        if unlisted is not None and not isinstance(error, FileNotFoundError):  # or else it was removed meanwhile
            unlisted(folder, error)
    return names, folders
