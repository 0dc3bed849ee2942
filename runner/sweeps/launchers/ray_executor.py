"""hydra/launcher=ray: jobs run on the nodes of a Ray cluster. One whose node is lost continues on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.utils import JobReturn

from runner.runs.sweep_manifest import read_manifest
from runner.sweeps.launchers.executor import ClusterExecutor
from runner.sweeps.launchers.memory import jobs_that_fit
from runner.sweeps.launchers.ray_cluster import Cluster
from runner.sweeps.launchers.ray_launch import RayLaunch
from runner.sweeps.launchers.tracking import TrackedJobs, progress_lines
from runner.sweeps.plan import PlannedJob
from runner.training.signals import StopSignals


@dataclass
class RayOptions:
    """The options of the launcher."""

    address: str | None = None
    jobs: int | None = None
    cpus: float | None = None
    """For all ranks of a job; None: one for each."""
    gpus: float = 0


class RayExecutor(ClusterExecutor[RayOptions]):
    """Runs jobs on the nodes of a cluster, whose workers keep what they have loaded until `close`."""

    _cluster: Cluster | None = None
    _has_begun = False

    def at_once(self) -> int:
        """Return how many jobs the nodes of the cluster run at once now; at least 1, since nodes may join.

        Before jobs are recorded it is an estimate, from what fits on this machine.
        """
        cluster = self._connected()
        if cluster.places or read_manifest(self.sweep).jobs:
            return max(1, len(self._begun().places))
        return max(1, cluster.capacity(jobs_that_fit([str(self.composed.model.path)], self.ranks)))

    def run(self, jobs: Sequence[PlannedJob]) -> list[JobReturn]:
        """Run the jobs. Where this process ends, the jobs in progress save and stop.

        Raises:
            ConfigError: there is no such cluster, or a node of it cannot train the jobs.
            SystemExit: a signal stopped the process; it was passed on to every running job, which has saved.
        """
        tracked = TrackedJobs(jobs, self.context, self.composed, self.invocation)
        (self.sweep / "logs").mkdir(exist_ok=True)
        with StopSignals() as stops, progress_lines() as lines:
            try:
                RayLaunch(self._begun(), tracked, lines, self.fail_fast).run(stops)
            except BaseException:
                self.close()
                raise
        return tracked.returns

    def close(self) -> None:
        """End the workers and leave the cluster."""
        if self._cluster is not None:
            cluster, self._cluster, self._has_begun = self._cluster, None, False
            cluster.close()

    def _connected(self) -> Cluster:
        if self._cluster is None:
            self._cluster = Cluster(
                self.options.address,
                per_node=self.options.jobs,
                ranks=self.ranks,
                cpus=self.ranks if self.options.cpus is None else self.options.cpus,
                gpus=self.options.gpus,
                environment=dict(self.composed.hydra.job.env_set),
            )
        return self._cluster

    def _begun(self) -> Cluster:
        """Return the cluster with workers for the jobs of the sweep."""
        cluster = self._connected()
        if not self._has_begun:
            self._has_begun = True
            models = {str((job.config or {})["model"]["path"]) for job in read_manifest(self.sweep).jobs}
            lines = cluster.begin(self.sweep, models)
            print(*lines, f"output in {self.sweep / 'logs'}", sep="\n", flush=True)
        return cluster
