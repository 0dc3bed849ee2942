"""The jobs that a launcher of ours gets: looked up in the manifest, or recorded there for a third-party sweeper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig

from runner.config.invocation import Invocation
from runner.config.quoting import unquote
from runner.reports.job_settings import job_labels
from runner.runs import sweep_manifest
from runner.sweeps import grid
from runner.sweeps.hydra_node import set_folder, with_hydra_node
from runner.sweeps.job import composed_from
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.job_planner import JobPlanner
from runner.sweeps.labels import share_labels
from runner.sweeps.plan import PlannedJob, has_begun
from runner.sweeps.sweep import launcher_record


def launched_jobs(
    job_overrides: Sequence[Sequence[str]], context: HydraContext, composed: DictConfig, invocation: Invocation
) -> list[PlannedJob]:
    """Return the jobs that a sweeper gives to a launcher.

    GridSweeper names the folder of each, which is recorded. The jobs of another sweeper are new: each is recorded with
    its config first.

    Raises:
        ConfigError: an override of another sweeper that no job could run with.
    """
    folder = Path(composed.hydra.sweep.dir)
    manifest = sweep_manifest.read_manifest(folder)
    named = [_folder(overrides) for overrides in job_overrides]
    if any(name is None for name in named):
        parser = OverridesParser.create(config_loader=context.config_loader)
        planner = JobPlanner(JobComposer(context.config_loader, composed), manifest, composed, invocation.stop_at)
        overrides = [grid.expand_grid(parser.parse_overrides(list(texts)))[0] for texts in job_overrides]
        jobs = share_labels(folder, planner.plan(overrides, again=True))
        manifest.record(arguments=grid.stored_arguments(invocation), launcher=launcher_record(composed), jobs=jobs)
    else:
        found = [manifest.job_in(name or "") for name in named]
        jobs = [job for job in found if job is not None]
        assert len(jobs) == len(named)
    labels = job_labels(manifest.jobs)
    return [PlannedJob(job, has_begun(folder / job.folder), labels[job.number]) for job in jobs]


def job_config_of(planned: PlannedJob, composed: DictConfig) -> DictConfig:
    """Return the config of a job with the node that Hydra's launchers give it, which ${hydra:…} sees from now on."""
    job = planned.job
    job_config = with_hydra_node(
        composed_from(dict(job.config or {})), composed, number=job.number, overrides=job.overrides, choices=job.choices
    )
    set_folder(job_config, Path(composed.hydra.sweep.dir), job.folder)
    return job_config


def _folder(overrides: Sequence[str]) -> str | None:
    return next((unquote(o.partition("=")[2]) for o in overrides if o.startswith("hydra.sweep.subdir=")), None)
