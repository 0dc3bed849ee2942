"""hydra/launcher=serial: jobs run one after the other in this process and share the base model and the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, env_override
from hydra.types import HydraContext
from omegaconf import DictConfig

from runner.common.errors import Diverged
from runner.config.invocation import Invocation
from runner.sweeps.hydra_node import record_files
from runner.sweeps.job import JobTask, train_job
from runner.sweeps.launched import job_config_of, launched_jobs
from runner.sweeps.plan import PlannedJob


def launch(
    job_overrides: Sequence[Sequence[str]],
    *,
    fail_fast: bool,
    context: HydraContext,
    composed: DictConfig,
    invocation: Invocation,
) -> list[JobReturn]:
    """Run the jobs that a sweeper gives; a failed job does not stop the others, unless `fail_fast`.

    Jobs of the same base model and data run next to each other, whatever their numbers, so that each is loaded once.

    Raises:
        SystemExit: a signal stopped the process; the job in progress has saved.
    """
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.training.component_loader import ComponentLoader

    loader, sweep = ComponentLoader(), Path(composed.hydra.sweep.dir)
    jobs = launched_jobs(job_overrides, context, composed, invocation)
    returns = [JobReturn() for _ in jobs]
    for i in loading_order(jobs):
        planned, result = jobs[i], returns[i]
        job_config = job_config_of(planned, composed)
        result.overrides, result.cfg = list(planned.job.overrides), job_config
        context.callbacks.on_job_start(config=job_config, task_function=JobTask(invocation, sweep))
        try:
            with env_override(dict(job_config.hydra.job.env_set)):
                result.return_value = train_job(
                    planned.job,
                    sweep / planned.job.folder,
                    label=f"job {planned.job.number}  {planned.label}",
                    invocation=invocation,
                    loader=loader,
                    record={} if planned.resumes else record_files(job_config),
                )
            result.status = JobStatus.COMPLETED
        except Exception as error:
            result.return_value, result.status = error, JobStatus.FAILED
            state = "diverged" if isinstance(error, Diverged) else "failed"
            print(f"job {planned.job.number} {state}: {error}", flush=True)
        context.callbacks.on_job_end(config=job_config, job_return=result)
        if fail_fast and result.status == JobStatus.FAILED:
            break
    return returns


def loading_order(jobs: Sequence[PlannedJob]) -> list[int]:
    """Return the indexes of the jobs, those of one base model and data set next to each other."""
    configs = [planned.job.config or {} for planned in jobs]
    keys = [(repr(config.get("model")), repr(config.get("data"))) for config in configs]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return sorted(range(len(jobs)), key=lambda i: first[keys[i]])
