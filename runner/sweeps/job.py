"""One job of a sweep: its folder tells whether it starts or goes on, whichever launcher runs it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runner.app.resolve import resolve_config, stored_config
from runner.backends.cpu import blas
from runner.common.atomic_io import is_draft
from runner.common.errors import ConfigError
from runner.config.invocation import Invocation
from runner.config.schema import Config
from runner.config.validation import validate_stop_at
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id

if TYPE_CHECKING:
    from runner.training.shared import SharedComponents


@dataclass(frozen=True)
class JobTask:
    """The task function of a sweep: a launcher calls it with the composed config of a job.

    It is picklable, so that the invocation reaches the worker processes of launchers such as joblib.
    """

    invocation: Invocation

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run the job that Hydra set up in this process, and return its objective."""
        hydra = HydraConfig.get()
        overrides = [override for override in hydra.overrides.task if not override.startswith("stored=")]
        return run_job(
            cfg,
            Path(hydra.runtime.output_dir),
            number=hydra.job.num,
            label=" ".join(overrides),
            experiment=hydra.runtime.choices.get("experiment"),
            stop_at=self.invocation.stop_at,
        )


def run_job(
    cfg: DictConfig,
    folder: Path,
    *,
    number: int,
    label: str,
    experiment: str | None,
    stop_at: int | None = None,
    shared: SharedComponents | None = None,
) -> float | None:
    """Run the job of the composed `cfg` in `folder` and return its objective.

    A folder with a config.yaml is a run that began: it goes on from its newest checkpoint.

    Raises:
        RunnerError: the job failed or diverged; its status says why.
        SystemExit: the process was asked to stop; the job saved and can be resumed.
    """
    report = blas.load_blas()  # before MLX is imported
    from runner.training.run import run

    config = resolve_config(cfg)
    validate_stop_at(stop_at, config)
    config.experiment = experiment
    directory = RunDirectory(folder, config.checkpoint.dir)
    source = _open(directory, config)
    start = RunSpec(config, stored_config(cfg, config), directory, source, new_run_id(), stop_at=stop_at)
    start.label = f"job {number}  {label}"
    return run(start, report, shared)


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The job's overrides, and the words that the sweeper added for the launcher."""
    own = {key: value for key, _, value in (w.partition("=") for w in words if w.startswith("hydra."))}
    return [word for word in words if not word.startswith("hydra.")], own


def differing_overrides(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Of each job the overrides that not all of them have, as one text."""
    shared = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set()
    return [" ".join(word for word in words if word not in shared) for words in jobs]


def has_begun(folder: Path) -> bool:
    """Whether a run began in `folder`: its config is the first thing it writes."""
    return (folder / "config.yaml").is_file()


def remove_aborted_start(folder: Path, checkpoints: str = "checkpoints") -> None:
    """Remove what a start leaves that was killed before it wrote its config: Hydra's record and an empty claim.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not folder.is_dir() or has_begun(folder):
        return
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link: a job's folder is never one.")
    known = {".hydra", ".lock", "run.log", checkpoints}
    for path in list(folder.iterdir()):
        if path.is_symlink() or not (path.name in known or is_draft(path.name)):
            raise ConfigError(f"{folder} is not a run and holds {path.name}: move it away, then resume the sweep.")
        if path.name == ".hydra":
            shutil.rmtree(path)
        elif path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def _open(directory: RunDirectory, config: Config) -> ResumeSource | None:
    if has_begun(directory.path):
        return ResumeSource(run=directory.path)
    directory.claim()
    return None
