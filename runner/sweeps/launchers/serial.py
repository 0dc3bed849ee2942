"""hydra/launcher=serial: jobs run one after the other in this process and share the base model and the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus, env_override

from runner.common.errors import Diverged
from runner.sweeps.hydra_node import record_files
from runner.sweeps.job import JobTask, train_job
from runner.sweeps.launched import job_config_of
from runner.sweeps.launchers.executor import JobExecutor, loading_order
from runner.sweeps.plan import PlannedJob

if TYPE_CHECKING:
    from runner.training.component_loader import ComponentLoader


class SerialExecutor(JobExecutor):
    """Runs jobs in this process. Jobs of the same base model and data run next to each other, whatever their numbers,
    so that each is loaded once."""

    def at_once(self) -> int:
        """Return 1."""
        return 1

    @cached_property
    def _loader(self) -> ComponentLoader:
        from runner.backends import blas

        blas.load_blas()  # before MLX is imported
        from runner.training.component_loader import ComponentLoader

        return ComponentLoader()

    def run(self, jobs: Sequence[PlannedJob]) -> list[JobReturn]:
        """Run the jobs."""
        returns = [JobReturn() for _ in jobs]
        for i in loading_order(jobs):
            planned, result = jobs[i], returns[i]
            job_config = job_config_of(planned, self.composed)
            result.overrides, result.cfg = list(planned.job.overrides), job_config
            task = JobTask(self.invocation, self.sweep)
            self.context.callbacks.on_job_start(config=job_config, task_function=task)
            try:
                with env_override(dict(job_config.hydra.job.env_set)):
                    result.return_value = train_job(
                        planned.job,
                        self.sweep / planned.job.folder,
                        label=f"job {planned.job.number}  {planned.label}",
                        invocation=self.invocation,
                        loader=self._loader,
                        record={} if planned.resumes else record_files(job_config),
                    )
                result.status = JobStatus.COMPLETED
            except Exception as error:
                result.return_value, result.status = error, JobStatus.FAILED
                state = "diverged" if isinstance(error, Diverged) else "failed"
                print(f"job {planned.job.number} {state}: {error}", flush=True)
            self.context.callbacks.on_job_end(config=job_config, job_return=result)
            if self.fail_fast and result.status == JobStatus.FAILED:
                break
        return returns

    def close(self) -> None:
        """Free the base model, the data and the caches."""
        if "_loader" in vars(self):
            self._loader.close()
            del self._loader
