"""A sweep from its overrides to its results: expand the grid, plan what is left, launch it, report every job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from runner.app.resolve import resolve_to_start
from runner.common.errors import ConfigError, RunnerError
from runner.common.text import relative_path
from runner.config.invocation import Invocation
from runner.reports.screen import Screen
from runner.reports.sweep_results import SweepResults, print_sweep_results, read_sweep_results, write_sweep_results
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepManifest, job_id
from runner.sweeps import grid
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.plan import PlannedJob, plan_jobs


class SweepFailed(RunnerError):
    """Raised at the end of a sweep in which jobs failed or diverged."""


def run_sweep(
    arguments: Sequence[str],
    *,
    params: dict[str, Any] | None,
    launcher: Launcher,
    context: HydraContext,
    composed: DictConfig,
    invocation: Invocation,
) -> list[JobReturn]:
    """Run the sweep of `arguments` (task overrides) in hydra.sweep.dir: all of it, or what is left of it.

    Args:
        params: hydra.sweeper.params, overrides of the sweep that stand in a config.

    Raises:
        ConfigError: an override that no job could run with; nothing has started then.
        DirectoryInUse: another process works on the sweep.
        SweepFailed: at the end, if a job failed or diverged.
    """
    folder = Path(composed.hydra.sweep.dir)
    directory = RunDirectory(folder)
    try:
        directory.lock()
        manifest = sweep_manifest.read_manifest(folder)
        overrides_of_jobs = _expand(arguments, params, context)
        _check_new_jobs(overrides_of_jobs, manifest, JobComposer(context.config_loader, composed), invocation.stop_at)
    except BaseException:
        directory.unlock()
        _remove_if_empty(folder)
        raise
    try:
        if not manifest.jobs:
            OmegaConf.save(composed, folder / "multirun.yaml")  # as Hydra's own sweeper does
        manifest.add(grid.stored_arguments(invocation), overrides_of_jobs)
        jobs = plan_jobs(manifest, overrides_of_jobs)
        _refuse_links(folder, jobs)
        print(_plan_text(manifest, jobs), flush=True)
        returns: list[JobReturn] = []
        try:
            if jobs:
                returns = list(launcher.launch([job.launch_overrides() for job in jobs], initial_job_idx=0))
        finally:
            results = _report(manifest, jobs, returns)
        if results.failed:
            raise SweepFailed(
                f"{results.failed} of {len(manifest.jobs)} jobs failed or diverged; the table and results.csv say why. "
                "resume= tries failed ones again; diverged ones need other settings."
            )
        return returns
    finally:
        directory.unlock()


def _expand(arguments: Sequence[str], params: dict[str, Any] | None, context: HydraContext) -> list[tuple[str, ...]]:
    overrides = [f"{key}={_param_text(value)}" for key, value in (params or {}).items()]
    parser = OverridesParser.create(config_loader=context.config_loader)
    return grid.expand_grid(parser.parse_overrides([*overrides, *arguments]))


def _param_text(value: Any) -> str:
    """Return a value of hydra.sweeper.params, which is text in the grammar of overrides or a list of values."""
    if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
        return ",".join(json.dumps(item) if isinstance(item, str) else str(item) for item in value)
    return str(value)


def _check_new_jobs(
    overrides_of_jobs: Sequence[tuple[str, ...]], manifest: SweepManifest, composer: JobComposer, stop_at: int | None
) -> None:
    """Compose and validate every new job before the first starts, so that an invalid value is reported at once."""
    for overrides in overrides_of_jobs:
        if job_id(overrides) not in manifest.jobs:
            try:
                resolve_to_start(composer.compose(overrides), stop_at, needs_adapter=True)
            except ConfigError as error:
                raise ConfigError(f"job {' '.join(overrides)}: {error}") from error


def _refuse_links(folder: Path, jobs: Sequence[PlannedJob]) -> None:
    """Refuse to start a job in a symbolic link, which could lead out of the sweep."""
    for job in jobs:
        path = folder / str(job.number)
        if not job.resumes and path.is_symlink():
            raise ConfigError(f"{path} is a symbolic link, which a sweep does not follow: remove it.")


def _plan_text(manifest: SweepManifest, jobs: Sequence[PlannedJob]) -> str:
    """Return what is left to do: ``sweep  outputs/sweeps/x: 6 jobs, 1 to start, 2 to resume, 3 done``."""
    resumed = sum(job.resumes for job in jobs)
    counts = {"to start": len(jobs) - resumed, "to resume": resumed, "done": len(manifest.jobs) - len(jobs)}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return f"sweep  {relative_path(manifest.folder)}: {len(manifest.jobs)} jobs, {', '.join(parts)}"


def _report(manifest: SweepManifest, jobs: Sequence[PlannedJob], returns: Sequence[JobReturn]) -> SweepResults:
    """Write and print the results; `returns` is shorter than `jobs` where a signal ended the launch."""
    errors = {
        job.number: str(done._return_value)
        for job, done in zip(jobs, returns, strict=False)
        if done.status == JobStatus.FAILED
    }
    results = read_sweep_results(manifest, errors)
    write_sweep_results(results)
    print_sweep_results(results, Screen())
    return results


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of a sweep that was refused before anything was written into it."""
    with suppress(OSError):
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
