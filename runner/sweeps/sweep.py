"""A sweep from its words to its end: plan what is left, launch it, tell what came of every job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from runner.app.resolve import require_adapter, resolve_config
from runner.common.errors import ConfigError, RunnerError
from runner.common.text import relative_path
from runner.config.invocation import Invocation
from runner.config.validation import validate_stop_at
from runner.reports.screen import Screen
from runner.reports.sweep_results import print_sweep_results, read_sweep_results, write_sweep_results
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepJob, SweepManifest, job_id
from runner.sweeps import grid
from runner.sweeps.compose import JobComposer
from runner.sweeps.job import has_begun, remove_aborted_start

DONE = ("finished", "diverged")
"""States that a resumed sweep leaves alone: a diverged job diverges again, unless its overrides change."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that is left to do."""

    job: SweepJob
    goes_on: bool
    """Whether its run began and goes on from where it stands."""
    overrides: tuple[str, ...]


class SweepFailed(RunnerError):
    """Some jobs failed or diverged; the others finished."""


def run_sweep(
    arguments: Sequence[str],
    *,
    params: dict[str, Any] | None,
    launcher: Launcher,
    context: HydraContext,
    config: DictConfig,
    invocation: Invocation,
) -> list[JobReturn]:
    """Run the sweep of `arguments` (task overrides) in hydra.sweep.dir: all of it, or what is left of it.

    Raises:
        ConfigError: a word or a value that no job could run with; nothing has started then.
        DirectoryInUse: another process works on the sweep.
        SweepFailed: at the end, if a job failed or diverged.
    """
    folder = Path(config.hydra.sweep.dir)
    directory = RunDirectory(folder)
    try:
        directory.lock()
        known = sweep_manifest.read_manifest(folder)
        wanted = _grid(arguments, params, context)
        _check_all(wanted, known, context, config, invocation.stop_at)
    except BaseException:
        directory.unlock()
        _remove_if_empty(folder)
        raise
    try:
        if not known.jobs:
            OmegaConf.save(config, folder / "multirun.yaml")  # as Hydra's own sweeper does
        known.add(grid.stored_overrides(invocation), [(job_id(overrides), overrides) for overrides in wanted])
        planned = plan(known, wanted)
        _say(known, planned)
        returns: list[JobReturn] = []
        try:
            if planned:
                returns = list(launcher.launch([_words(p) for p in planned], initial_job_idx=0))
        finally:
            errors = {
                one.job.number: str(done._return_value)
                for one, done in zip(planned, returns, strict=False)
                if done.status == JobStatus.FAILED
            }
            results = read_sweep_results(known, errors)
            write_sweep_results(results)
            print_sweep_results(results, Screen())
        if results.failed:
            raise SweepFailed(
                f"{results.failed} of {len(known.jobs)} jobs failed or diverged; the table and results.csv say why. "
                "resume= tries failed ones again; diverged ones need other settings."
            )
        return returns
    finally:
        directory.unlock()


def plan(known: SweepManifest, wanted: Sequence[tuple[str, ...]]) -> list[PlannedJob]:
    """What is left to do, in the order of the jobs' numbers: all jobs of the manifest that are not done.

    States are read from the runs themselves, so that they are true after a crash.
    """
    fresh = {job_id(overrides): overrides for overrides in wanted}
    left = []
    for job in known.jobs.values():
        folder = known.folder / job.folder
        begun = has_begun(folder)
        if begun and RunDirectory(folder).read_status()["state"] in DONE:
            continue
        left.append(PlannedJob(job, begun, fresh.get(job.identity, job.overrides)))
    return left


def _grid(arguments: Sequence[str], params: dict[str, Any] | None, context: HydraContext) -> list[tuple[str, ...]]:
    words = [f"{key}={_param(value)}" for key, value in (params or {}).items()]
    parser = OverridesParser.create(config_loader=context.config_loader)
    return grid.expand_grid(parser.parse_overrides([*words, *arguments]))


def _param(value: Any) -> str:
    """A value of hydra.sweeper.params: text in the grammar of overrides, or a list of values."""
    if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
        return ",".join(json.dumps(v) if isinstance(v, str) else str(v) for v in value)
    return str(value)


def _check_all(
    wanted: list[tuple[str, ...]],
    known: SweepManifest,
    context: HydraContext,
    config: DictConfig,
    stop_at: int | None,
) -> None:
    """Compose and check every new job before the first starts: one wrong value is told at once."""
    composer = JobComposer(context.config_loader, config)
    for overrides in wanted:
        if job_id(overrides) not in known.jobs:
            try:
                resolved = resolve_config(composer.compose(overrides))
                validate_stop_at(stop_at, resolved)
                require_adapter(resolved)
            except ConfigError as error:
                raise ConfigError(f"job {' '.join(overrides)}: {error}") from error


def _words(planned: PlannedJob) -> list[str]:
    own = [f"hydra.sweep.subdir={planned.job.folder}"]
    if planned.goes_on:
        own.append("hydra.output_subdir=null")  # the first start's record stays
    return [*planned.overrides, *own]


def _say(known: SweepManifest, planned: Sequence[PlannedJob]) -> None:
    on = sum(p.goes_on for p in planned)
    done = len(known.jobs) - len(planned)
    parts = [f"{len(planned) - on} to start" if len(planned) - on else "", f"{on} to go on" if on else ""]
    parts.append(f"{done} done" if done else "")
    print(
        f"sweep  {relative_path(known.folder)}: {len(known.jobs)} jobs, {', '.join(p for p in parts if p)}", flush=True
    )
    for one in planned:
        remove_aborted_start(known.folder / one.job.folder)


def _remove_if_empty(folder: Path) -> None:
    """A sweep that was refused before anything started leaves no folder behind."""
    try:
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return
