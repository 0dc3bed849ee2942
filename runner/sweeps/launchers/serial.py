"""The default launcher: jobs one after the other in this process, sharing the base model, the data and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.config.invocation import Invocation
from runner.sweeps.job import train_job
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.plan import PlannedJob, job_labels

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def launch(
    job_overrides: Sequence[Sequence[str]], *, context: HydraContext, composed: DictConfig, invocation: Invocation
) -> list[JobReturn]:
    """Run the jobs, given as `PlannedJob.launch_overrides`; a failed job does not stop the others.

    Jobs of the same base model and data run next to each other, whatever their numbers, so that each is loaded once.

    Raises:
        SystemExit: a signal stopped the process; the job in progress has saved.
    """
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.training.component_loader import ComponentLoader

    composer, loader = JobComposer(context.config_loader, composed), ComponentLoader()
    sweep = Path(composed.hydra.sweep.dir)
    HydraConfig.instance().set_config(composed)  # for ${hydra:…} in a user's config
    jobs = [PlannedJob.parse(overrides) for overrides in job_overrides]
    labels = job_labels(jobs)
    returns = [JobReturn() for _ in jobs]
    for i in _loading_order(composer, jobs):
        job, result = jobs[i], returns[i]
        result.overrides = list(job.overrides)
        try:
            result.cfg = composer.compose(job.overrides)
            hydra = composer.hydra_node(job.overrides)
            folder = sweep / str(job.number)
            result.return_value = train_job(
                result.cfg,
                folder,
                label=f"job {job.number}  {labels[i]}",
                experiment=hydra.runtime.choices.get("experiment"),
                stop_at=invocation.stop_at,
                loader=loader,
                on_claim=partial(_write_record, result.cfg, hydra, job, folder),
            )
            result.status = JobStatus.COMPLETED
        except Exception as error:
            result.return_value, result.status = error, JobStatus.FAILED
    return returns


def _loading_order(composer: JobComposer, jobs: Sequence[PlannedJob]) -> list[int]:
    """Return the indexes of the jobs, those of one base model and data set next to each other."""
    configs = [composer.compose(job.overrides) for job in jobs]
    keys = [(repr(config.model), repr(config.data)) for config in configs]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return sorted(range(len(jobs)), key=lambda i: first[keys[i]])


def _write_record(composed: DictConfig, hydra: DictConfig, job: PlannedJob, folder: Path) -> None:
    """Write .hydra/ as Hydra's own launcher does."""
    record = folder / ".hydra"
    record.mkdir(exist_ok=True)
    with read_write(hydra), open_dict(hydra):
        hydra.job.num = hydra.job.id = job.number
        hydra.overrides.task = list(job.overrides)
        hydra.runtime.output_dir = str(folder)
    contents: dict[str, Any] = {"config": composed, "overrides": list(job.overrides), "hydra": {"hydra": hydra}}
    for name, content in contents.items():
        node = content if OmegaConf.is_config(content) else OmegaConf.create(content)
        text = yaml.dump(OmegaConf.to_container(node, enum_to_str=True), Dumper=_Dumper, sort_keys=False)
        (record / f"{name}.yaml").write_text(text, encoding="utf-8")
