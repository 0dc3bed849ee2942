"""One job of a sweep: claim its folder or resume the run in it, then train, whichever launcher runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runner.app.compose import stored_settings
from runner.app.resolve import config_to_store, resolve_to_start
from runner.config.invocation import Invocation
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id
from runner.sweeps.plan import has_begun

if TYPE_CHECKING:
    from runner.training.component_loader import ComponentLoader


@dataclass(frozen=True)
class JobTask:
    """The task function of a sweep: a launcher calls it with the composed config of a job.

    It is picklable, so that the invocation reaches the worker processes of launchers such as joblib.
    """

    invocation: Invocation

    def __call__(self, composed: DictConfig) -> float | None:
        """Run the job that Hydra set up in this process, and return its objective."""
        hydra = HydraConfig.get()
        overrides = [override for override in hydra.overrides.task if not override.startswith("stored=")]
        return train_job(
            composed,
            Path(hydra.runtime.output_dir),
            label=f"job {hydra.job.num}  {' '.join(overrides)}",
            experiment=hydra.runtime.choices.get("experiment"),
            stop_at=self.invocation.stop_at,
        )


def train_job(
    composed: DictConfig,
    folder: Path,
    *,
    label: str,
    experiment: str | None,
    stop_at: int | None = None,
    loader: ComponentLoader | None = None,
    on_claim: Callable[[], None] | None = None,
) -> float | None:
    """Run the job of the `composed` config in `folder` and return its objective.

    A folder with a config.yaml resumes from its newest checkpoint, with its stored config. Any other is claimed, and
    `on_claim` is called then.

    Raises:
        RunnerError: the job failed or diverged; its status says why.
        SystemExit: the process was asked to stop; the job saved and can be resumed.
    """
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.training.run import train_run

    source = ResumeSource(run=folder) if has_begun(folder) else None
    if source is not None:
        composed = _config_of_resumed_job(source, composed)
    config = resolve_to_start(composed, stop_at, needs_adapter=source is None)
    config.experiment = config.experiment or experiment
    directory = RunDirectory(folder, config.checkpoint.dir)
    if source is None:
        directory.claim()
        if on_claim is not None:
            on_claim()
    stored = config_to_store(composed, config)
    return train_run(RunSpec(config, stored, directory, source, new_run_id(), stop_at, label), loader)


def _config_of_resumed_job(source: ResumeSource, composed: DictConfig) -> DictConfig:
    """Return the stored config of the run to resume: the files and defaults that it was composed from may have changed.

    Trust in a model's code is never stored, so it is taken from the `composed` config.
    """
    settings = stored_settings(Invocation(resume=source.run), source)
    config = OmegaConf.merge(OmegaConf.structured(Config), settings)
    assert isinstance(config, DictConfig)
    config.model.trust_remote_code = composed.model.trust_remote_code
    return config
