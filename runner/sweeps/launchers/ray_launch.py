"""One launch of hydra/launcher=ray: gives waiting jobs to the workers of the cluster and settles how each ended."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.transfer import PackedRun, checkpoint_hashes, pack, unpack
from runner.common.errors import EXIT_FAILED, EXIT_IN_USE, RunnerError
from runner.runs.directory import RunDirectory
from runner.runs.restarts import NODE_LOST, PREEMPTED, stored_run
from runner.sweeps.launchers.executor import loading_order
from runner.sweeps.launchers.ray_cluster import Cluster, Place
from runner.sweeps.launchers.ray_node import JobEnd, Snapshot
from runner.sweeps.launchers.tracking import ProgressLines, TrackedJobs
from runner.training.signals import StopSignals

_POLL_SECONDS = 0.5
_NODES_EVERY = 2.0
"""Seconds between looks at which nodes there are."""
_SNAPSHOT_EVERY = 5.0
"""Seconds between copies of a job from a node that does not share the folder of the sweep."""
_IN_USE_SECONDS = 60.0
"""How long a job waits for a process that still holds its directory, such as one whose node was cut off."""
_IN_USE_RETRY = 1.0


class RayLaunch:
    """Runs the jobs of one launch on a cluster, whose nodes may come and go."""

    def __init__(self, cluster: Cluster, tracked: TrackedJobs, lines: ProgressLines, fail_fast: bool) -> None:
        self._cluster, self._tracked, self._lines, self._fail_fast = cluster, tracked, lines, fail_fast
        self._waiting = loading_order(tracked.jobs)
        self._ends: dict[Any, Place] = {}
        """By what a job returns at its end, where it runs."""
        self._snapshots: dict[Any, Place] = {}
        self._copies: dict[int, LentRun] = {}
        """Of the jobs that train in a folder of their node."""
        self._not_before: dict[int, float] = {}
        self._in_use_since: dict[int, float] = {}
        self._next_look = self._next_snapshot = 0.0
        self._stopping = self._told = False

    def run(self, stops: StopSignals) -> None:
        """Run all jobs.

        Raises:
            RunnerError: a node that has joined cannot train them.
            SystemExit: a signal stopped this process; it was passed on to every running job, which has saved.
        """
        try:
            while self._waiting or self._ends:
                if stops.signal is not None:
                    self._waiting.clear()
                    if not self._stopping:
                        self._stopping = True
                        for place in self._ends.values():
                            place.worker.stop.remote(int(stops.signal))
                self._look_at_nodes()
                self._start_jobs()
                self._take_snapshots()
                for reference in self._arrived():
                    self._receive(reference)
                if self._lines.is_shown:
                    running = [place.job for place in self._ends.values() if place.job is not None]
                    self._lines.update([self._tracked.progress_text(i) for i in running])
        finally:
            for copy in self._copies.values():
                copy.directory.unlock()
        if stops.signal is not None:
            raise SystemExit(128 + stops.signal)

    def _look_at_nodes(self) -> None:
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _NODES_EVERY
            for line in self._cluster.update():
                self._lines.print(line)
            if self._waiting and not self._cluster.places and not self._told:
                self._told = True
                self._lines.print(
                    f"no node of the cluster has room for a job now, which asks for {self._cluster.asked}: waiting for "
                    "one (ray status; hydra.launcher.cpus and gpus)"
                )

    def _start_jobs(self) -> None:
        """Give jobs that may start to free places."""
        free = [place for place in self._cluster.places if place.starting is None and place.job is None]
        for i in [i for i in self._waiting if self._not_before.get(i, 0) <= time.monotonic()]:
            if not free:
                return
            self._waiting.remove(i)
            place, packed = free[0], None
            request = self._tracked.start(i)
            if not place.shares_folder:
                try:
                    self._copies[i] = copy = LentRun(self._tracked.directory(i).path, self._tracked.log(i))
                    packed = copy.pack()
                except RunnerError as error:
                    self._settle(i, error.exit_code, {"error": str(error)})
                    continue
                place.known = copy.known()
            place.job = i
            self._ends[place.worker.run.remote(request, packed)] = free.pop(0)

    def _take_snapshots(self) -> None:
        """Ask for copies of the jobs in progress, so that little is lost with a node."""
        if time.monotonic() < self._next_snapshot:
            return
        self._next_snapshot = time.monotonic() + _SNAPSHOT_EVERY
        asked = {id(place) for place in self._snapshots.values()}
        for place in self._ends.values():
            if not place.shares_folder and id(place) not in asked:
                self._snapshots[place.worker.snapshot.remote(place.job, place.known)] = place

    def _arrived(self) -> list[Any]:
        """Wait for a moment and return the references of what has arrived."""
        starting = [place.starting for place in self._cluster.places if place.starting is not None]
        references = [*self._ends, *self._snapshots, *starting]
        if not references:
            time.sleep(_POLL_SECONDS)
            return []
        self._cluster.ray.wait(references, timeout=_POLL_SECONDS)
        ready, _ = self._cluster.ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _receive(self, reference: Any) -> None:
        ray = self._cluster.ray
        if (place := self._snapshots.pop(reference, None)) is not None:
            with suppress(ray.exceptions.RayError):  # the end of the job tells of the node
                self._receive_snapshot(place, ray.get(reference))
        elif (place := self._ends.pop(reference, None)) is not None:
            self._receive_end(place, reference)
        else:
            place = next(place for place in self._cluster.places if place.starting == reference)
            try:
                ray.get(reference)
                place.starting = None
            except ray.exceptions.RayError:  # its node left before it had its place there
                self._cluster.remove(place)

    def _receive_snapshot(self, place: Place, snapshot: Snapshot | None) -> None:
        if snapshot is not None and snapshot.job == place.job and (copy := self._copies.get(snapshot.job)):
            copy.receive(snapshot.packed, snapshot.output)
            place.known = copy.known()

    def _receive_end(self, place: Place, reference: Any) -> None:
        ray, i = self._cluster.ray, place.job
        assert i is not None
        place.job = None
        copy = self._copies.pop(i, None)
        try:
            end: JobEnd = ray.get(reference)
            if copy is not None and end.packed is not None:
                copy.receive(end.packed, end.output)
        except ray.exceptions.RayTaskError as error:
            end = JobEnd(EXIT_FAILED, {"error": f"{place.host}: {error.cause}"})
        except ray.exceptions.RayError:
            self._cluster.remove(place)
            end = JobEnd(EXIT_FAILED, {"error": f"{place.host} was lost"}, cause=NODE_LOST)
        except RunnerError as error:
            end = JobEnd(error.exit_code, {"error": str(error)})
        finally:
            if copy is not None:
                copy.directory.unlock()
        # A signal that this process did not send comes from whoever takes the node away.
        self._settle(i, end.code, end.reply, PREEMPTED if end.code > 128 else end.cause)

    def _settle(self, i: int, code: int, reply: dict[str, Any], cause: str | None = None) -> None:
        """Record how a job ended, or put it back among those that wait."""
        if not self._stopping and self._is_to_wait(i, code):
            self._waiting.append(i)
            return
        text = self._tracked.next_start(i, cause) if cause and not self._stopping else None
        if text is not None:
            self._waiting.insert(0, i)
        else:
            text = self._tracked.finish(i, code, reply)
            if self._fail_fast and self._tracked.has_failed(i):
                self._waiting.clear()
        self._lines.print(text)

    def _is_to_wait(self, i: int, code: int) -> bool:
        """Return whether another process holds the directory of a job, which may be about to end."""
        if code != EXIT_IN_USE:
            return False
        now = time.monotonic()
        self._not_before[i] = now + _IN_USE_RETRY
        return now - self._in_use_since.setdefault(i, now) < _IN_USE_SECONDS


@dataclass
class LentRun:
    """The directory of a job that trains in a folder of its node. It is locked here, so that nobody else trains in it,
    and holds what was last copied from there."""

    path: Path
    log: Path

    def __post_init__(self) -> None:
        self.path.mkdir(exist_ok=True)
        stored = stored_run(self.path)
        self._has_begun = stored is not None
        self.directory = stored or RunDirectory(self.path)
        self.directory.lock()
        self._earlier_output = self.log.read_bytes() if self.log.is_file() else b""

    def pack(self) -> PackedRun:
        """Return what the node needs to continue the run."""
        return pack(self.directory, {}) if self._has_begun else PackedRun({})

    def known(self) -> dict[str, str]:
        """Return the checkpoints that are here."""
        return checkpoint_hashes(self.directory)

    def receive(self, packed: PackedRun, output: bytes) -> None:
        """Take over what the run on the node holds now, and what it has printed there."""
        self.directory.checkpoints = self.path / packed.checkpoint_dir
        unpack(packed, self.directory)
        self.log.write_bytes(self._earlier_output + output)
