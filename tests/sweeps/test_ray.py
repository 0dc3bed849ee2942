"""hydra/launcher=ray on a real cluster of several nodes on this machine, on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import pytest
import system

from runner.runs.directory import RunDirectory
from runner.runs.restarts import read_restarts
from runner.runs.search_record import read_search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("experiment=smoke", "train.iters=150", "train.eval_every=50", "checkpoint.every=10", "lora.dropout=0.1")
STORE_BYTES = 80_000_000
FAST_DETECTION = {"period_ms": "300", "timeout_ms": "300", "initial_delay_ms": "300", "failure_threshold": "3"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
"""Keeps a cluster on 127.0.0.1, on Linux too, and Ray from writing a token into the home directory."""
NOT_SHARED = '''
import importlib.util, sys


class Finder:
    """Nodes with this file do not see the folder of the sweep."""

    def find_spec(self, name, path=None, target=None):
        if name != "runner.sweeps.launchers.ray_node":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.sweep_identity = lambda sweep: None

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


@pytest.fixture
def start_cluster(tmp_path, monkeypatch):
    """`start_cluster(nodes, shared)`: a cluster whose nodes have one CPU each, besides a head without any."""
    clusters = []

    def start(nodes: int, shared: bool = True):
        import ray.cluster_utils
        from ray._private import ray_constants

        path = [str(ROOT)]
        if not shared:
            (tmp_path / "site").mkdir()
            (tmp_path / "site/sitecustomize.py").write_text(NOT_SHARED)
            path.insert(0, str(tmp_path / "site"))
        variables = {f"RAY_health_check_{name}": value for name, value in FAST_DETECTION.items()}
        variables |= {"PYTHONPATH": os.pathsep.join(path), "RUNNER_CACHE": str(tmp_path / "node cache")}
        variables |= LOOPBACK
        variables |= {"RAY_USAGE_STATS_ENABLED": "0", "OPENBLAS_NUM_THREADS": ""}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # on loopback, for this process
            for name, value in variables.items():
                patch.setenv(name, value)
            own = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
            cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **own})
            clusters.append(cluster)
            for _ in range(nodes):
                cluster.add_node(num_cpus=1, **own)
        return cluster

    yield start
    for cluster in clusters:
        cluster.shutdown()


def kill_node_of(run: Path, cluster) -> None:
    """SIGKILL to the node on which a run is training: its raylet, its workers and what these started."""
    parents = system.parents()
    pid = json.loads((run / "status.json").read_text())["pid"]
    above = {pid}
    while (pid := parents.get(pid, 0)) > 1:
        above.add(pid)
    node = next(n for n in cluster.list_all_nodes() if n.all_processes["raylet"][0].process.pid in above)
    raylet = node.all_processes["raylet"][0].process.pid
    doomed = {raylet}
    while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in [raylet, *(doomed - {raylet})]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.parametrize("shared", [True, False])
def test_trials_of_a_node_that_is_killed_continue_on_another_from_their_checkpoints(
    cli, inline, start_cluster, assert_equal_runs, shared
):
    cluster = start_cluster(2, shared)
    arguments = ("hydra/launcher=ray", f"hydra.launcher.address={cluster.address}", "hydra.sweep.dir=s")
    process = cli.start("-m", *SMALL, "lora.rank=2,4,6", *arguments, fork=False, env=LOOPBACK)
    cli.wait_for(cli.folder / "s/1", 40 if shared else 10, process)
    kill_node_of(cli.folder / "s/1", cluster)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "node lost after step" in out and "starting again from step" in out
    assert ("is not shared" in out) == (not shared)
    status = json.loads((cli.folder / "s/1/status.json").read_text())
    assert [entry["cause"] for entry in status["restarts"]] == ["node lost"]
    for number, rank in enumerate((2, 4, 6)):
        inline(*SMALL, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(cli.folder / f"s/{number}", cli.folder / f"alone{rank}")


def test_ctrl_c_saves_all_jobs_and_so_does_the_death_of_the_sweep_and_a_resume_finishes_them(
    cli, inline, start_cluster, assert_equal_runs
):
    cluster = start_cluster(2)
    address = f"hydra.launcher.address={cluster.address}"
    overrides = ("-m", *SMALL, "lora.rank=2,4,6", "hydra/launcher=ray", "hydra.sweep.dir=s")
    for number in (signal.SIGINT, signal.SIGKILL):
        process = cli.start(*overrides, address, fork=False, env=LOOPBACK)
        for job in ("0", "1"):
            cli.wait_for(cli.folder / "s" / job, 20 if number == signal.SIGINT else 60, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        if number == signal.SIGINT:
            assert process.returncode == 130, out
            assert [row["state"] for row in cli.results(cli.folder / "s").values()] == [
                "stopped",
                "stopped",
                "not started",
            ]
        overrides = ("resume=s",)
    out = cli("resume=s", address, env=LOOPBACK)
    assert "1 to start, 2 to resume" in out
    for number, rank in enumerate((2, 4, 6)):
        inline(*SMALL, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(cli.folder / f"s/{number}", cli.folder / f"alone{rank}")


def test_a_search_goes_on_when_a_node_is_killed_and_a_job_that_fails_by_itself_is_not_started_again(
    cli, inline, start_cluster, assert_equal_runs
):
    cluster = start_cluster(2)
    overrides = ("hydra/sweeper=search", "hydra.sweeper.pruner=asha", "hydra.sweeper.trials=5", *SMALL)
    keys = "lora.keys=choice([self_attn.q_proj],[nonsense])"
    space = ("optimizer.learning_rate=tag(log,interval(1e-4,1e-2))", keys, "train.eval_every=10")
    arguments = ("hydra/launcher=ray", f"hydra.launcher.address={cluster.address}", "hydra.sweep.dir=s")
    process = cli.start("-m", *overrides, *space, *arguments, fork=False, env=LOOPBACK)
    while not (running := [run for run in (cli.folder / "s").glob("[0-9]*") if is_training(run)]):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    kill_node_of(running[0], cluster)
    out, _ = process.communicate(timeout=240)
    print(out)
    found = read_search(cli.folder / "s")
    assert found is not None and len(found.trials) == 5
    by_job = {trial.job: trial for trial in found.trials}
    finished = [job for job, trial in by_job.items() if trial.results[-1].state == "finished"]
    failed = [job for job, trial in by_job.items() if trial.results[-1].state == "failed"]
    assert finished and failed and process.returncode == 1, out
    restarts = {job: len(read_restarts(RunDirectory(cli.folder / f"s/{job}").read_status())) for job in by_job}
    assert sum(restarts.values()) == 1 and not any(restarts[job] for job in failed)
    params = [f"{name}={value}" for name, value in by_job[finished[0]].params.items()]
    params = [param.replace("'", "") for param in params]
    inline(*SMALL, "train.eval_every=10", *params, "hydra.run.dir=alone")
    assert_equal_runs(cli.folder / f"s/{finished[0]}", cli.folder / "alone")


def is_training(run: Path) -> bool:
    status = RunDirectory(run).read_status()
    return status["state"] == "running" and status["step"] > 2


def test_paused_trials_come_back_from_nodes_without_the_shared_folder_and_continue_there(
    cli, inline, start_cluster, assert_equal_runs, tmp_path
):
    cluster = start_cluster(1, shared=False)
    search = ("hydra/sweeper=search", "hydra.sweeper.trials=3", "hydra.sweeper.min_iters=50", "lora.rank=2,4,6")
    arguments = ("hydra/launcher=ray", f"hydra.launcher.address={cluster.address}", "hydra.sweep.dir=s")
    out = cli("-m", *search, *SMALL, *arguments, env=LOOPBACK)
    assert "is not shared" in out
    found = read_search(cli.folder / "s")
    assert found is not None
    (survivor,) = [trial for trial in found.trials if trial.results[-1].state == "finished"]
    assert [result.step for result in survivor.results] == [50, 150]
    inline(*SMALL, f"lora.rank={survivor.params['lora.rank']}", "hydra.run.dir=alone")
    assert_equal_runs(cli.folder / f"s/{survivor.job}", cli.folder / "alone")
    assert (cli.folder / f"s/logs/{survivor.job}.log").read_text().count("stopped") == 1
    assert not [*(tmp_path / "node cache/sweeps").glob("*/*")]
