"""RunSpec, everything training needs to start or resume a run; ResumeSource, the checkpoint it resumes from."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.common.commands import resume_command
from runner.common.errors import ConfigError
from runner.common.layout import STEP_NAME
from runner.config import environment
from runner.config.invocation import Supervision
from runner.config.labels import NO_LABELS, Labels
from runner.config.schema import Config
from runner.config.serialize import to_dict
from runner.runs.directory import RunDirectory
from runner.runs.find import is_sweep_folder
from runner.runs.sweep_manifest import read_manifest


@dataclass(frozen=True)
class ResumeSource:
    """The run and checkpoint that a resumed run continues from."""

    run: Path
    """The run directory."""
    checkpoint: Path | None = None
    """One checkpoint of it; None selects the newest valid one."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The stored config of the run, read once.

        Raises:
            ConfigError: config.yaml is missing or cannot be read.
        """
        return RunDirectory(self.run).read_config()

    @property
    def branch(self) -> bool:
        """Whether the run continues in a new directory, from one named checkpoint; the source stays unchanged."""
        return self.checkpoint is not None


@dataclass(frozen=True)
class RunSpec:
    """Everything that training needs to start or resume a run."""

    config: Config
    stored: dict[str, Any]
    """The config as written to config.yaml, with ${oc.env:…} unresolved."""
    directory: RunDirectory
    source: ResumeSource | None
    """Where the run resumes from; None for a new run."""
    run_id: str
    stop_at: int | None = None
    """Update after which this invocation stops the run, resumable."""
    label: str | None = None
    """Name of a sweep's job that shares the terminal with other jobs; None for a run alone."""
    precision: dict[str, str] | None = None
    """What model.dtype and model.dequantize on auto meant when the run began; None where it begins here."""
    repeats: Path | None = None
    """The run whose settings a new run takes."""
    labels: Labels = NO_LABELS
    """Those of a new run; one that resumes in its directory keeps what that holds."""
    on_accepted: Callable[[], None] | None = None
    """Called once a resume in the run's own directory was accepted: a refused one changes nothing."""
    supervise: Supervision | None = None
    """Given where a supervisor starts this process again."""

    def redacted(self, text: str) -> str:
        """Return `text` with ${oc.env:NAME} in place of each value that a setting took from the environment."""
        return environment.redacted(text, to_dict(self.config), self.stored)


def find_resume_source(path: Path) -> ResumeSource:
    """Return the run, or the checkpoint of a run, that `resume=path` names.

    Raises:
        ConfigError: `path` is neither; says what it is instead.
    """
    path = Path(path)
    if not path.exists():
        jobs = [job.folder for job in read_manifest(path.parent).jobs]
        if path.name in jobs:
            raise ConfigError(f"resume={path}: this job has not started; to start it: {resume_command(path.parent)}")
        if jobs:
            raise ConfigError(f"resume={path}: the sweep has no such job; it has {jobs[0]} to {jobs[-1]}.")
        raise ConfigError(f"resume={path}: there is no such directory.")
    if STEP_NAME.fullmatch(path.name):
        for parent in path.parents:
            if (parent / "config.yaml").is_file():
                return ResumeSource(run=parent.absolute(), checkpoint=path.absolute())
        raise ConfigError(f"resume={path}: no run directory (with a config.yaml) lies above this checkpoint.")
    if (path / "config.yaml").is_file():
        return ResumeSource(run=path.absolute())
    if is_sweep_folder(path):
        raise ConfigError(f"resume={path}: this is a sweep; to resume one of its runs: {resume_command(path / '0')}")
    raise ConfigError(f"resume={path}: not a run directory (no config.yaml) and not a checkpoint (step-0000100).")


def new_run_id() -> str:
    """Return a random identity for a run, so that runs started in the same second differ."""
    return secrets.token_hex(8)
