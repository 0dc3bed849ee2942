"""A sweep from its overrides to its results: plan and record its jobs, launch what is left, report every job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.app.hydra_internals import job_error
from runner.common.errors import ConfigError, RunnerError
from runner.common.text import first_line, relative_path
from runner.config.invocation import INVOCATION_ARGUMENTS, Invocation
from runner.reports.html.write import write_report_or_say_why
from runner.reports.screen import Screen
from runner.reports.sweep_results import SweepResults, print_sweep_results, read_sweep_results, write_sweep_results
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps import grid
from runner.sweeps.extension import extend
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.job_planner import JobPlanner
from runner.sweeps.labels import relabel, share_labels, take_labels
from runner.sweeps.params import expand
from runner.sweeps.plan import PlannedJob, has_begun, remaining_jobs, unchangeable_jobs

OWN_SWEEPERS = tuple(f"hydra_plugins.mlx_runner.plugins.{name}" for name in ("GridSweeper", "SearchSweeper"))
"""The sweepers that call `run_sweep` and `run_search`, which report their jobs themselves."""
PROCESS_LAUNCHER = "hydra_plugins.mlx_runner.plugins.ProcessLauncher"
OWN_PROCESS_LAUNCHERS = (
    PROCESS_LAUNCHER,
    *(f"hydra_plugins.mlx_runner.plugins.{name}" for name in ("RayLauncher", "SubmititLauncher")),
)
"""The launchers whose jobs can have a process of their own."""


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
    """Run the sweep of `arguments` (task overrides) in hydra.sweep.dir, whose lock is held: what is left of it.

    Args:
        params: hydra.sweeper.params, overrides of the sweep that stand in a config.

    Raises:
        ConfigError: an override that no job could run with; nothing has started or been recorded then.
        SweepFailed: at the end, if a job failed or diverged.
    """
    folder = Path(composed.hydra.sweep.dir)
    manifest = sweep_manifest.read_manifest(folder)
    composer = JobComposer(context.config_loader, composed)
    if manifest.jobs:
        _complete_earlier_version(manifest, arguments, composer, composed, invocation)
        planner = JobPlanner(composer, manifest, composed, invocation.stop_at)
        labels, typed = take_labels([composer.parse(text) for text in invocation.sweep_overrides])
        added = extend(manifest, typed, composer, planner)
        _refuse_links(folder, [*manifest.jobs, *added.jobs])
        relabel(folder, labels)  # nothing refuses the resume after this
        recorded = [a for a in manifest.arguments if a.startswith("-") or not a.startswith("hydra")]
        manifest.record(
            arguments=grid.merge_arguments(recorded, grid.stored_arguments(invocation)),
            launcher=launcher_record(composed),
            changes=added.changes,
            jobs=share_labels(folder, added.jobs),
        )
        for name, value in added.changes.items():
            print(f"changed for all jobs: {name}={value}")
    else:
        planner = JobPlanner(composer, manifest, composed, invocation.stop_at)
        combinations = expand(arguments, params or {}, composer)
        jobs = planner.plan(combinations)
        _refuse_links(folder, jobs)
        jobs = share_labels(folder, jobs)
        OmegaConf.save(composed, folder / "multirun.yaml")  # as Hydra's own sweeper does
        manifest.record(arguments=grid.stored_arguments(invocation), launcher=launcher_record(composed), jobs=jobs)
        if len(jobs) < len(combinations):
            print(f"{len(combinations) - len(jobs)} combinations give the config of another job and are left out")
    if unchanged := unchangeable_jobs(manifest):
        numbers = ", ".join(str(job.number) for job in unchanged)
        noun = "job" if len(unchanged) == 1 else "jobs"
        print(f"not changed: {noun} {numbers}, of which `runner clean` left no checkpoint")
    remaining = remaining_jobs(manifest)
    print(_plan_text(manifest, remaining), flush=True)
    return launch_and_report(manifest, remaining, launcher, composed.hydra.output_subdir)


def launch_and_report(
    manifest: SweepManifest, jobs: Sequence[PlannedJob], launcher: Launcher, output_subdir: str | None
) -> list[JobReturn]:
    """Run the jobs with the launcher and report all jobs of the sweep.

    Raises:
        SweepFailed: a job failed or diverged.
    """
    returns: list[JobReturn] = []
    try:
        if jobs:
            overrides = [job.launch_overrides(manifest.folder, output_subdir) for job in jobs]
            returns = list(launcher.launch(overrides, initial_job_idx=0))
    finally:
        # `returns` is shorter than `jobs` where a signal ended the launch.
        failed = [(planned.job, done) for planned, done in zip(jobs, returns, strict=False) if job_error(done)]
        results = report(manifest, {job.number: str(job_error(done)) for job, done in failed})
    refuse_failed(results)
    return returns


def refuse_failed(results: SweepResults) -> None:
    """Raise SweepFailed if a job failed or diverged."""
    if results.failed:
        raise SweepFailed(
            f"{results.failed} of {len(results.jobs)} jobs failed or diverged; the table and results.csv say why. "
            "resume= tries failed ones again; diverged ones need other settings."
        )


def launcher_record(composed: DictConfig) -> dict[str, Any]:
    """Return what the manifest records of the launcher."""
    jobs = composed.hydra.launcher.get("jobs")
    name = str(composed.hydra.runtime.choices["hydra/launcher"])
    # Hydra's name of its default, which is ours here.
    return {"name": "serial" if name == "basic" else name, "jobs": jobs if type(jobs) is int else None}


def _complete_earlier_version(
    manifest: SweepManifest,
    arguments: Sequence[str],
    composer: JobComposer,
    composed: DictConfig,
    invocation: Invocation,
) -> None:
    """Record the configs of the jobs of an earlier version, which recorded overrides alone, and jobs that it missed.

    The config of a job that has begun is in its folder; the others are composed from today's files. An earlier version
    that was killed while it wrote its manifest left out the last jobs: they follow from the recorded arguments.
    """
    if all(job.config is not None for job in manifest.jobs):
        return
    planner = JobPlanner(composer, manifest, composed, invocation.stop_at)
    completed: list[SweepJob] = []
    for job in manifest.jobs:
        folder = manifest.folder / job.folder
        if has_begun(folder):
            completed.append(replace(job, config=RunDirectory(folder).read_config()))
        elif job.config is None:
            completed.append(planner.complete(job))
    if any(not has_begun(manifest.folder / job.folder) for job in completed):
        print(
            "an earlier version started this sweep and recorded no configs: those of the jobs that had not "
            "begun are composed from the present files"
        )
    manifest.record(jobs=completed)
    texts = [a for a in manifest.arguments if not a.startswith(("-", "hydra", "+hydra"))]
    texts = [text for text in texts if grid.override_key(text) not in INVOCATION_ARGUMENTS]
    texts += [argument for argument in arguments if argument.startswith("stored=")]  # of a repeated run
    try:
        recorded = [frozenset(job.overrides) for job in manifest.jobs]
        missed = [o for o in expand(texts, {}, composer) if not any(job >= {*o} for job in recorded)]
        jobs = JobPlanner(composer, manifest, composed, invocation.stop_at).plan(missed)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(
            "whether the earlier version was killed before it had recorded all jobs is not known, since its arguments "
            f"cannot be composed any more ({first_line(str(error))}): add what is missing with resume=SWEEP key=values"
        )
        return
    if jobs:
        print(f"the earlier version was killed before it had recorded all jobs: {len(jobs)} more are planned")
        manifest.record(jobs=jobs)


def _refuse_links(folder: Path, jobs: Sequence[SweepJob]) -> None:
    """Refuse to start a job in a symbolic link, which could lead out of the sweep."""
    for path in (folder / job.folder for job in jobs):
        if path.is_symlink() and not has_begun(path):
            raise ConfigError(f"{path} is a symbolic link, which a sweep does not follow: remove it.")


def _plan_text(manifest: SweepManifest, jobs: Sequence[PlannedJob]) -> str:
    """Return what is left to do: ``sweep  outputs/sweeps/x: 6 jobs, 1 to start, 2 to resume, 3 done``."""
    resumed = sum(job.resumes for job in jobs)
    counts = {"to start": len(jobs) - resumed, "to resume": resumed, "done": len(manifest.jobs) - len(jobs)}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    total = "1 job" if len(manifest.jobs) == 1 else f"{len(manifest.jobs)} jobs"
    return f"sweep  {relative_path(manifest.folder)}: {total}, {', '.join(parts)}"


def report(manifest: SweepManifest, errors: Mapping[int, str]) -> SweepResults:
    """Write and print the results, and the page of the sweep; `errors` are what jobs raised, by number."""
    results = read_sweep_results(manifest, errors)
    write_sweep_results(results)
    if problem := write_report_or_say_why(results.folder, errors):
        print(problem)
    print_sweep_results(results, Screen())
    return results
