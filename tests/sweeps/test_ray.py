"""hydra/launcher=ray on a real cluster of several nodes on this machine, on loopback."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import system

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("experiment=smoke", "train.iters=150", "train.eval_every=50", "checkpoint.every=10", "lora.dropout=0.1")
STORE_BYTES = 80_000_000
FAST_DETECTION = {"period_ms": "300", "timeout_ms": "300", "initial_delay_ms": "300", "failure_threshold": "3"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps a cluster on 127.0.0.1, on Linux too."""
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
    print(out)
    assert process.returncode == 0, out
    assert "node lost after step" in out and "starting again from step" in out
    assert ("is not shared" in out) == (not shared)
    status = json.loads((cli.folder / "s/1/status.json").read_text())
    assert [entry["cause"] for entry in status["restarts"]] == ["node lost"]
    for number, rank in enumerate((2, 4, 6)):
        inline(*SMALL, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(cli.folder / f"s/{number}", cli.folder / f"alone{rank}")
