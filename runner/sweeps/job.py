"""One job of a sweep, from its record: claim its folder or resume the run in it, then train, under any launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runner.app import guard
from runner.app.compose import checked_by_schema, stored_settings
from runner.app.resolve import config_to_store, resolve_config, resolve_to_start
from runner.config import serialize
from runner.config.invocation import Invocation
from runner.config.labels import Labels
from runner.reports.job_settings import job_labels
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id
from runner.runs.sweep_manifest import SweepJob, read_manifest
from runner.sweeps.plan import has_begun

if TYPE_CHECKING:
    from runner.training.component_loader import ComponentLoader


@dataclass(frozen=True)
class JobTask:
    """The task function of a sweep: a launcher that is not ours calls it with the composed config of a job.

    The job runs what its record in the manifest says. It is picklable, so that the invocation reaches the worker
    processes of launchers such as joblib.
    """

    invocation: Invocation
    sweep: Path

    def __call__(self, composed: DictConfig) -> float | None:
        """Run the job that Hydra set up in this process, and return its objective."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        manifest = read_manifest(self.sweep)
        job = manifest.job_in(folder.name)
        if job is None:  # neither the sweeper nor the launcher is ours: nothing was recorded
            config = resolve_config(composed)
            config.experiment = config.experiment or hydra.runtime.choices.get("experiment")
            overrides = tuple(override for override in hydra.overrides.task if not override.startswith("stored="))
            stored = config_to_store(composed, config)
            job = SweepJob(hydra.job.num, folder.name, overrides, stored, labels=Labels.take(stored))
        label = job_labels(manifest.jobs).get(job.number, " ".join(job.overrides))
        return train_job(
            job, folder, label=f"job {job.number}  {label}", invocation=self.invocation, written=[hydra.output_subdir]
        )


def train_job(
    job: SweepJob,
    folder: Path,
    *,
    label: str,
    invocation: Invocation,
    loader: ComponentLoader | None = None,
    record: Mapping[str, str] | None = None,
    changes: Mapping[str, Any] | None = None,
    written: Sequence[str | None] = (),
) -> float | None:
    """Run `job` in `folder` and return its objective.

    A folder with a config.yaml resumes from its newest checkpoint, with its stored config and what was changed since,
    for all jobs or for this one. Any other is claimed, and gets the files of `record`, Hydra's record of a start: path
    to text. It may hold the names that Hydra has `written` there already. `changes` are settings for this start, by
    dotted name. The job trains to the step that its record names, or to its end.

    Raises:
        RunnerError: the job failed or diverged; its status says why.
        SystemExit: the process was asked to stop; the job saved and can be resumed.
    """
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.training.local_ranks import joined_world
    from runner.training.run import train_run

    source = ResumeSource(run=folder) if has_begun(folder) else None
    if source is not None:
        stored = serialize.change_dict(stored_settings(Invocation(resume=folder), source), job.later_changes)
    else:
        assert job.config is not None
        stored = serialize.change_dict(job.config, job.own_changes)
    composed = composed_from(serialize.change_dict(stored, changes or {}))
    composed.model.trust_remote_code = invocation.settings.get(guard.TRUST) == "true"
    stop_at = min((step for step in (job.stop_at, invocation.stop_at) if step is not None), default=None)
    config = resolve_to_start(composed, stop_at, needs_adapter=source is None)
    directory = RunDirectory(folder, config.checkpoint.dir)
    if source is None:
        directory.claim({*filter(None, written), *(name.partition("/")[0] for name in record or {})})
        for name, text in (record or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    stored = config_to_store(composed, config)
    Labels.take(stored)  # the record of the job has its own, and those that all jobs share are the sweep's
    spec = RunSpec(
        config,
        stored,
        directory,
        source,
        new_run_id(),
        stop_at=stop_at,
        label=label,
        labels=job.labels,
        supervise=invocation.supervise,
    )
    with joined_world(invocation) as world:
        return train_run(spec, loader, world)


def composed_from(stored: dict[str, Any]) -> DictConfig:
    """Return a stored config as a composed one, checked by the schema.

    Raises:
        ConfigError: it refers to other settings more often than a config may.
    """
    guard.check_references([stored])
    return checked_by_schema(stored)
