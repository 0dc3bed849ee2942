"""JobExecutor, what a launcher of ours does with the jobs of one sweep; see `hydra_plugins.mlx_runner.plugins`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from runner.config.invocation import Invocation
from runner.sweeps.launched import launched_jobs
from runner.sweeps.plan import PlannedJob

Options = TypeVar("Options")


class JobExecutor(ABC):
    """Runs jobs of one sweep. A search calls `launch` many times: what is loaded or started stays until `close`."""

    def __init__(
        self, context: HydraContext, composed: DictConfig, invocation: Invocation, fail_fast: bool = False
    ) -> None:
        """
        Args:
            composed: the config of the sweep, with Hydra's node.
            fail_fast: whether no job is started after one has failed.
        """
        self.context, self.composed, self.invocation = context, composed, invocation
        self.fail_fast = fail_fast

    @property
    def sweep(self) -> Path:
        """The directory of the sweep."""
        return Path(self.composed.hydra.sweep.dir)

    @property
    def ranks(self) -> int:
        """Processes of each job."""
        return self.invocation.ranks or 1

    @abstractmethod
    def at_once(self) -> int:
        """Return how many jobs it runs at once."""

    @abstractmethod
    def run(self, jobs: Sequence[PlannedJob]) -> list[JobReturn]:
        """Run the jobs and return how each ended; one that was not started has no status.

        Raises:
            SystemExit: a signal stopped this process; the jobs in progress have saved.
        """

    def close(self) -> None:  # noqa: B027 (an executor that keeps nothing has nothing to close)
        """Free what was kept from one launch to the next."""

    def launch(self, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
        """Run the jobs that a sweeper gives. One that fails does not stop the others, unless `fail_fast`.

        Raises:
            ConfigError: an override of another package's sweeper that no job could run with.
            SystemExit: a signal stopped this process; the jobs in progress have saved.
        """
        return self.run(launched_jobs(job_overrides, self.context, self.composed, self.invocation))


class ClusterExecutor(JobExecutor, Generic[Options]):
    """Runs jobs on a cluster, with options of its own."""

    def __init__(
        self, context: HydraContext, composed: DictConfig, invocation: Invocation, fail_fast: bool, options: Options
    ) -> None:
        super().__init__(context, composed, invocation, fail_fast)
        self.options = options


def loading_order(jobs: Sequence[PlannedJob]) -> list[int]:
    """Return the indexes of the jobs, those of one base model and data set next to each other."""
    configs = [planned.job.config or {} for planned in jobs]
    keys = [(repr(config.get("model")), repr(config.get("data"))) for config in configs]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return sorted(range(len(jobs)), key=lambda i: first[keys[i]])
