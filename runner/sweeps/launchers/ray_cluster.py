"""The Ray cluster of hydra/launcher=ray: which nodes it has, and a place for each job that runs at once on them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.text import count
from runner.sweeps.launchers.options import require_reachable
from runner.sweeps.launchers.ray_node import NodeFacts, NodeWorker, node_facts, package_versions, sweep_identity

_CONCURRENT_CALLS = 4
"""Of a worker: a job, its stop, its snapshot, its end."""
_PROBE_SECONDS = 120
_MAX_LOST = 5
"""Workers of a node that are replaced in one sweep."""


@dataclass
class Place:
    """Where one job at a time runs: a worker on a node."""

    node: str
    """The node's id in the cluster."""
    host: str
    shares_folder: bool
    worker: Any
    """The actor, a `NodeWorker`."""
    starting: Any
    """What is ready once the worker has its place; None from then on."""
    job: int | None = None
    """Index of the job in progress."""
    known: dict[str, str] = field(default_factory=dict)
    """Checkpoints of the job that have been copied here, where the node does not share the folder of the sweep."""


class Cluster:
    """A connection to a Ray cluster, and the workers of one sweep on it."""

    def __init__(
        self,
        address: str | None,
        *,
        per_node: int | None,
        ranks: int,
        cpus: float,
        gpus: float,
        environment: Mapping[str, str],
    ) -> None:
        """Connect to the cluster, or start one on this machine.

        Args:
            address: `host:port`, `auto` for a cluster that runs on this machine, `local` for a new one here, None for
                the first of both that can be had.
            per_node: jobs at once on each node; None for as many as fit.
            ranks: processes of each job.
            cpus: CPUs of the node for each job, as Ray counts them.
            gpus: the same for GPUs.
            environment: variables of the jobs.

        Raises:
            ConfigError: there is no such cluster.
        """
        self.ray = _connect(address)
        """The module `ray`, connected."""
        self._per_node, self._ranks, self._cpus, self._gpus = per_node, ranks, cpus, gpus
        self._environment = dict(environment)
        self._sweep = self._identity = ""
        self._models: list[str] = []
        self.places: list[Place] = []
        self._seen: set[str] = set()
        """Nodes that were asked what they are."""
        self._facts: dict[str, NodeFacts] = {}
        """Of the nodes that train."""
        self._workers: dict[str, int] = {}
        """How many each of them has."""
        self._lost: Counter[str] = Counter()
        """Workers that ended, by node."""
        self._probes: dict[Any, str] = {}

    @property
    def asked(self) -> str:
        """What a job asks of its node."""
        return f"{self._cpus or 0:g} CPU" + (f" and {self._gpus:g} GPU" if self._gpus else "")

    def capacity(self, fitting: int) -> int:
        """Return how many jobs would run at once, if each node were as this one, which `fitting` jobs fit on."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        return sum(min(self._room(node), self._per_node or fitting) for node in nodes)

    def begin(self, sweep: Path, models: Collection[str]) -> list[str]:
        """Start workers for the jobs of a sweep, which use `models`; return lines about the nodes.

        Raises:
            ConfigError: a node has other versions of what the jobs compute with, or another sweep at the same path.
        """
        identity = sweep_identity(sweep)
        assert identity is not None, "jobs are recorded before they are launched"
        self._sweep, self._identity, self._models = str(sweep), identity, sorted(models)
        self._look_at_new(self._alive())
        return list(self._take_up_known(self._alive(), timeout=_PROBE_SECONDS))

    def update(self) -> list[str]:
        """Take up nodes that have joined, and return a line about each; one that cannot train the jobs is left out."""
        nodes = self._alive()
        self._look_at_new(nodes)
        for node_id, facts in self._facts.items():
            missing = self._workers[node_id] - sum(place.node == node_id for place in self.places)
            if node_id in nodes and missing > 0 and self._lost[node_id] < _MAX_LOST:
                self._add_places(nodes[node_id], facts, missing)
        lines: list[str] = []
        try:
            lines.extend(self._take_up_known(nodes, timeout=0))
        except ConfigError as error:
            lines.append(f"left out: {error}")
        return lines

    def remove(self, place: Place) -> None:
        """Give up a place whose worker is gone; a worker of a node that is still there is replaced."""
        self.places.remove(place)
        self._lost[place.node] += 1

    def _alive(self) -> dict[str, dict[str, Any]]:
        return {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}

    def _look_at_new(self, nodes: Mapping[str, dict[str, Any]]) -> None:
        """Ask the nodes that are not known what they are."""
        for node_id in nodes.keys() - self._seen:
            if self._room(nodes[node_id]):
                self._seen.add(node_id)
                probe = self.ray.remote(node_facts).options(num_cpus=0, scheduling_strategy=self._on(node_id))
                self._probes[probe.remote(self._sweep, self._identity, self._models, self._ranks)] = node_id

    def _take_up_known(self, nodes: Mapping[str, dict[str, Any]], timeout: float) -> Iterator[str]:
        """Start workers on the nodes that have answered, and yield a line about each.

        Raises:
            ConfigError: a node cannot train the jobs.
        """
        asked = [*self._probes]
        ready = self.ray.wait(asked, num_returns=len(asked), timeout=timeout)[0] if asked else []
        for reference in ready:
            node_id = self._probes.pop(reference)
            try:
                facts = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raise ConfigError(f"a node of the cluster cannot train the jobs: {error.cause}") from None
            except self.ray.exceptions.RayError:
                self._seen.discard(node_id)  # if it was only cut off, it is looked at again
                continue
            if node_id in nodes:
                yield self._take_up(nodes[node_id], facts)

    def close(self) -> None:
        """End the workers and leave the cluster; one that was started here ends."""
        closing = [place.worker.close.remote() for place in self.places if place.starting is None]
        if closing:
            self.ray.wait(closing, num_returns=len(closing), timeout=_PROBE_SECONDS)
        self.places.clear()
        self.ray.shutdown()

    def _take_up(self, node: dict[str, Any], facts: NodeFacts) -> str:
        """Start the workers of a node that was looked at, and return a line about it."""
        node_id = node["NodeID"]
        own = package_versions()
        if different := [name for name, number in own.items() if facts.versions.get(name) != number]:
            texts = [f"{name} {facts.versions.get(name)}, here {own[name]}" for name in different]
            raise ConfigError(f"{facts.host} cannot continue what this machine computes: it has {'; '.join(texts)}.")
        workers = min(self._room(node), self._per_node or facts.fitting)
        self._facts[node_id], self._workers[node_id] = facts, workers
        self._add_places(node, facts, workers)
        folder = "" if facts.shares_folder else "; the folder of the sweep is not shared: its jobs are copied"
        return f"node {facts.host}: {count(workers, 'job')} at once{folder}"

    def _add_places(self, node: dict[str, Any], facts: NodeFacts, number: int) -> None:
        node_id, cores = node["NodeID"], max(1, int(node["Resources"].get("CPU", 1)))
        actor = self.ray.remote(NodeWorker).options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_concurrency=_CONCURRENT_CALLS,
            scheduling_strategy=self._on(node_id),
        )
        for _ in range(number):
            processes = self._workers[node_id] * self._ranks
            worker = actor.remote(self._sweep, self._identity, cores, processes, self._environment)
            self.places.append(Place(node_id, facts.host, facts.shares_folder, worker, worker.ping.remote()))

    def _room(self, node: dict[str, Any]) -> int:
        """Return how many jobs have room on a node by what each asks for."""
        rooms = [int(node["Resources"].get("CPU", 0) // self._cpus)] if self._cpus else []
        rooms += [int(node["Resources"].get("GPU", 0) // self._gpus)] if self._gpus else []
        return min(rooms, default=int(node["Resources"].get("CPU", 0)))

    def _on(self, node_id: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _connect(address: str | None) -> Any:
    """Connect this process to a cluster and return the module `ray`. Nothing is reported to Ray's makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    options = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    try:
        ray.init(address=address or _address_here(), **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        wanted = "" if address is None else f"hydra.launcher.address={address}: "
        raise ConfigError(
            f"{wanted}no Ray cluster can be used ({error}). Is it running? ray status. If it asks for a token: "
            "RAY_AUTH_MODE=token here, too."
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray sets its own, which would end this process without a report
    return ray


def _address_here() -> str | None:
    """Return None, with which Ray finds the cluster that was last started on this machine, or `local` where that does
    not answer: Ray itself would try for minutes to reach one that a crash has ended.

    Raises:
        ConfigError: nothing answers at $RAY_ADDRESS.
    """
    from ray._private.services import find_bootstrap_address

    address = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)
    if not address:
        return "local"
    try:
        require_reachable(address)
    except ConfigError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        return "local"
    return None
