"""What hydra/launcher=ray does on a node of the cluster: look at it once, and train jobs in worker processes there.

Nothing here imports Ray: a process of Ray calls it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import runner
from runner.backends.blas import thread_count
from runner.backends.mlx_build import is_gpu_build
from runner.checkpoints.transfer import PackedRun, pack, unpack
from runner.common.cache_dir import cache_dir
from runner.common.cores import usable_cores
from runner.common.errors import EXIT_CONFIG, RunnerError
from runner.runs.directory import RunDirectory
from runner.runs.restarts import ends_process, stored_run
from runner.runs.sweep_manifest import NAME
from runner.sweeps.launchers.memory import jobs_that_fit
from runner.sweeps.launchers.worker_process import WorkerProcess

_PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")
"""Packages whose versions decide what a run computes, or whether its checkpoints can be read."""
_MAX_RECORD_BYTES = 1_000_000


@dataclass(frozen=True)
class NodeFacts:
    """What a node tells of itself."""

    host: str
    versions: dict[str, str]
    shares_folder: bool
    """Whether it sees the folder of the sweep at the same path."""
    fitting: int
    """How many jobs fit into its memory and cores, and 1 on a GPU."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended on a node."""

    code: int
    reply: dict[str, Any]
    packed: PackedRun | None = None
    """Its directory, where the node does not share the folder of the sweep."""
    output: bytes = b""
    """What it printed, likewise."""
    cause: str | None = None
    """What took its process away, so that it is to be started again."""


@dataclass(frozen=True)
class Snapshot:
    """A job in progress on a node that does not share the folder of the sweep."""

    job: int
    """As it was asked for."""
    packed: PackedRun
    output: bytes


def sweep_identity(sweep: Path) -> str | None:
    """Return what tells the sweep in a folder from all others: a hash of its first record; None where there is none."""
    try:
        with open(sweep / NAME, "rb") as file:
            line = file.readline(_MAX_RECORD_BYTES)
    except OSError:
        return None
    return hashlib.blake2b(line, digest_size=16).hexdigest() if line.endswith(b"\n") else None


def package_versions() -> dict[str, str]:
    """Return the versions of this project and of what it computes with."""
    versions = {"mlx-runner": runner.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def node_facts(sweep: str, identity: str, models: Collection[str], ranks: int = 1) -> NodeFacts:
    """Look at the node that this process runs on; `ranks` is the number of processes of a job.

    Raises:
        RunnerError: another sweep lies at the path of this one.
    """
    found = sweep_identity(Path(sweep))
    if found is not None and found != identity:
        raise RunnerError(
            f"{socket.gethostname()} has another sweep in {sweep}: choose another hydra.sweep.dir, or remove that one."
        )
    return NodeFacts(socket.gethostname(), package_versions(), found is not None, jobs_that_fit(models, ranks))


class NodeWorker:
    """A worker process on a node, and the folder that it trains in. While one thread runs a job, another may ask for
    its files or for its stop."""

    def __init__(self, sweep: str, identity: str, cores: int, processes: int, environment: Mapping[str, str]) -> None:
        """
        Args:
            sweep: the folder of the sweep, as the launching process sees it.
            identity: that of the sweep there.
            cores: cores of the node that the cluster may use.
            processes: how many share them: the ranks of all jobs that run at once.
            environment: variables of the jobs.
        """
        # Ray sets it to the CPUs of an actor, which is no wish of a person.
        os.environ.pop("OMP_NUM_THREADS", None)
        threads = thread_count(processes, min(cores, usable_cores()))
        own = {} if is_gpu_build() else {"OPENBLAS_NUM_THREADS": str(threads)}
        self._environment = {**own, **environment}
        self._sweep, self._identity = Path(sweep), identity
        self._worker: WorkerProcess | None = None
        self._folder: Path | None = None
        """Where the job in progress trains, if not in the folder of the sweep."""
        self._log: Path | None = None
        self._stop: signal.Signals | None = None
        self._lock = threading.Lock()

    def ping(self) -> None:
        """Return once the worker has its place."""

    def run(self, request: dict[str, Any], packed: PackedRun | None) -> JobEnd:
        """Train the job of a request to its end.

        Args:
            packed: its directory so far, where it has begun and this node does not share the folder of the sweep.
        """
        try:
            self._check_sweep(shared=packed is None)
            if packed is not None:
                request = self._move_here(request, packed)
        except (RunnerError, OSError) as error:
            return JobEnd(getattr(error, "exit_code", EXIT_CONFIG), {"error": f"{socket.gethostname()}: {error}"})
        with self._lock:
            if self._worker is None or not self._worker.is_running():
                self._worker = WorkerProcess(self._environment)
            worker = self._worker
            worker.send(request)
            if self._stop is not None:
                worker.request_stop(self._stop)
        try:
            while (reply := worker.read_reply()) is None:
                pass
        except (OSError, ValueError):  # closed meanwhile
            reply = {}
        code: int | None = reply.get("code")
        if code is None or ends_process(code) or request.get("ranks"):  # MLX connects a process with others once
            with self._lock:
                ended, self._worker = worker.close(), None
            code = ended if code is None else code
        if self._folder is None:
            return JobEnd(code, reply)
        end = JobEnd(code, reply, pack(self._directory(), {}), self._output())
        shutil.rmtree(self._folder.parent, ignore_errors=True)
        self._folder = None
        return end

    def snapshot(self, job: int, known: dict[str, str]) -> Snapshot | None:
        """Return the job in progress without the checkpoints that are `known`; None where nothing is to be copied."""
        folder = self._folder
        if folder is None or not folder.is_dir():
            return None
        return Snapshot(job, pack(self._directory(), known, in_progress=True), self._output())

    def stop(self, number: int) -> None:
        """Ask the job in progress to save and stop."""
        with self._lock:
            self._stop = signal.Signals(number)
            if self._worker is not None:
                self._worker.request_stop(self._stop)

    def close(self) -> None:
        """End the worker process."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def _check_sweep(self, shared: bool) -> None:
        """Raise RunnerError unless the folder of the sweep is what it was when this worker was chosen."""
        found = sweep_identity(self._sweep)
        if shared and found != self._identity:
            what = "is not there any more" if found is None else "is another sweep now"
            raise RunnerError(f"{self._sweep} {what}: is the shared folder mounted?")

    def _move_here(self, request: dict[str, Any], packed: PackedRun) -> dict[str, Any]:
        """Unpack a job into a folder of this node, and return the request for it there."""
        folder = _own_folder(self._identity) / Path(request["folder"]).name
        folder.mkdir(parents=True)
        if packed.files:
            directory = RunDirectory(folder, packed.checkpoint_dir)
            directory.lock()
            try:
                unpack(packed, directory)
            finally:
                directory.unlock()
        self._folder, self._log = folder, folder.parent / "output.log"
        return {**request, "folder": str(folder), "log": str(self._log)}

    def _directory(self) -> RunDirectory:
        assert self._folder is not None
        return stored_run(self._folder) or RunDirectory(self._folder)

    def _output(self) -> bytes:
        try:
            return self._log.read_bytes() if self._log else b""
        except OSError:
            return b""


def _own_folder(identity: str) -> Path:
    """Return a new folder of this process for jobs of a sweep; those of killed processes are removed."""
    parent = cache_dir() / "sweeps"
    for path in parent.glob(f"{identity}-*"):
        pid = int(path.name.rpartition("-")[2])
        if pid == os.getpid() or not _is_running(pid):
            shutil.rmtree(path, ignore_errors=True)
    return parent / f"{identity}-{os.getpid()}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
