"""What hydra/launcher=ray does on a node, without Ray."""

from __future__ import annotations

import importlib.util
import signal
import socket
import threading
import time

import pytest
from omegaconf import OmegaConf

from runner.checkpoints.transfer import PackedRun, pack
from runner.common.errors import ConfigError, RunnerError
from runner.config.invocation import Invocation
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import read_manifest
from runner.sweeps.launchers import memory, ray_executor, ray_node
from runner.sweeps.launchers.ray_cluster import Cluster
from runner.sweeps.launchers.ray_node import NodeFacts, NodeWorker, node_facts, package_versions, sweep_identity
from runner.sweeps.launchers.request import job_request

SMALL = ("experiment=smoke", "train.iters=9", "train.eval_every=3", "checkpoint.every=2")


def test_a_node_with_another_sweep_at_the_same_path_is_refused_and_one_without_it_has_jobs_copied(tmp_path):
    (tmp_path / "sweep.jsonl").write_text('{"schema": 2, "lines": 1}\n{"job"')
    identity = sweep_identity(tmp_path)
    assert identity is not None and node_facts(str(tmp_path), identity, []).shares_folder
    assert not node_facts(str(tmp_path / "absent"), identity, []).shares_folder
    with pytest.raises(RunnerError, match="has another sweep in"):
        node_facts(str(tmp_path), "0" * 32, [])
    end = NodeWorker(str(tmp_path), "0" * 32, 1, 1, {}).run({}, None)
    assert end.code != 0 and "is another sweep now" in end.reply["error"]


def test_a_node_with_other_versions_is_refused():
    versions = {**package_versions(), "mlx": "0.1"}
    cluster = Cluster.__new__(Cluster)
    with pytest.raises(ConfigError, match=r"other cannot continue what this machine computes: it has mlx 0\.1, here"):
        cluster._take_up({"NodeID": "1"}, NodeFacts("other", versions, True, 1))


@pytest.mark.cpu("a GPU has no BLAS threads")
def test_the_ranks_of_a_job_share_what_it_asks_for(monkeypatch, tmp_path):
    for module in (ray_node, memory):
        monkeypatch.setattr(module, "usable_cores", lambda: 8)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**12)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    asked = []
    monkeypatch.setattr(ray_executor, "Cluster", lambda address, **options: asked.append(options))
    composed = OmegaConf.create({"hydra": {"job": {"env_set": {}}}})
    for ranks, cpus in ((None, None), (2, None), (2, 3)):
        options = ray_executor.RayOptions(cpus=cpus)
        ray_executor.RayExecutor(None, composed, Invocation(ranks=ranks), False, options)._connected()
    assert [(each["ranks"], each["cpus"]) for each in asked] == [(1, 1), (2, 2), (2, 3)]

    cluster = Cluster.__new__(Cluster)
    cluster._cpus, cluster._gpus, cluster._ranks = 2, 0, 2
    node = {"Resources": {"CPU": 6.0}}
    assert cluster._room(node) == 3, "jobs of two ranks each"
    assert [memory.jobs_that_fit([], ranks) for ranks in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert node_facts(str(tmp_path), "0" * 32, [], 2).fitting == 4
    worker = NodeWorker("/absent", "0" * 32, 6, 3 * 2, {})
    assert worker._environment["OPENBLAS_NUM_THREADS"] == "1"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_options_of_the_launcher_are_refused_before_the_sweep_begins(inline):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for option, problem in (
        ("cpus=-1", "must be 0 or more"),
        ("jobs=0", "must be 1 or more"),
        ("address=nowhere", "must be host:port"),
        (f"address='127.0.0.1:{port}'", "no cluster answers there"),
    ):
        arguments = ("hydra/launcher=ray", f"hydra.launcher.{option}", "hydra.sweep.dir=s")
        out = inline("-m", *SMALL, "lora.rank=2,4", *arguments, expect=2)
        assert problem in out
    assert not (inline.folder / "s").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_job_is_copied_to_a_folder_of_the_node_and_back_and_stops_where_it_is_asked_to(
    inline, cache, assert_equal_runs
):
    inline("-m", *SMALL, "lora.rank=2", "train.stop_at=3", "hydra.sweep.dir=s")
    sweep, job = inline.folder / "s", inline.folder / "s/0"
    request = job_request(
        read_manifest(sweep).jobs[0],
        job,
        label="",
        log=inline.folder / "log",
        invocation=Invocation(),
        record={},
        changes={"train.iters": 100_000, "checkpoint.every": 100_000},
    )
    worker = NodeWorker("/absent", "0" * 32, 1, 1, {})
    ends = []
    thread = threading.Thread(target=lambda: ends.append(worker.run(request, pack(RunDirectory(job), {}))))
    thread.start()
    deadline = time.monotonic() + 60
    while True:
        snapshot = worker.snapshot(0, {})
        if snapshot is not None and b"resumed from" in snapshot.packed.files.get("run.log", b""):
            break
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.05)
    worker.stop(signal.SIGTERM)
    thread.join()
    worker.close()
    (end,) = ends
    assert end.code == 143 and isinstance(end.packed, PackedRun) and b"stopped" in end.output
    assert b'"stopped"' in end.packed.files["status.json"] and "adapters" not in end.packed.files
    assert not [*cache.glob("sweeps/*/*")]
