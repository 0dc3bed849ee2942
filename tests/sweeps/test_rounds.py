"""A search launches jobs of one sweep in rounds: each trains to where its record says now, and later on from there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import system
from hydra.core.plugins import Plugins

from runner.runs.sweep_manifest import read_manifest

SMALL = ("experiment=smoke", "train.iters=9", "train.eval_every=3", "checkpoint.every=2", "lora.dropout=0.1")
ROUNDS = ({0: 3, 1: 3}, {0: 6, 1: 6}, {1: None}, {0: None})
"""Job to the step that it trains to in this round."""


@pytest.fixture
def in_rounds(monkeypatch):
    """Make a launch of two jobs one in rounds, as a search does, and return what each round left: states by job."""
    Plugins.instance()  # imports the module anew where it looks for plugins
    from hydra_plugins.mlx_runner import plugins

    return launch_in_rounds(monkeypatch, plugins._Launcher)


def launch_in_rounds(monkeypatch, launcher_class):
    launch, seen = launcher_class.launch, []

    def launch_rounds(self, job_overrides, initial_job_idx):
        sweep = Path(self.config.hydra.sweep.dir)
        for stops in ROUNDS:
            read_manifest(sweep).record(stops=stops)
            launch(self, [job_overrides[job] for job in sorted(stops)], initial_job_idx)
            states = [json.loads((sweep / f"{job}/status.json").read_text()) for job in (0, 1)]
            seen.append({"at_once": self.at_once() if hasattr(self, "at_once") else None, "states": states})
        return []

    monkeypatch.setattr(launcher_class, "launch", launch_rounds)
    return seen


@pytest.fixture
def base_loads(monkeypatch):
    """The base models that were loaded in this process, one entry a load."""
    from runner.training import component_loader

    load, loads = component_loader.load_base_model, []
    monkeypatch.setattr(component_loader, "load_base_model", lambda config: loads.append(config.path) or load(config))
    return loads


def test_rounds_continue_jobs_with_what_the_serial_launcher_has_loaded(
    inline, in_rounds, base_loads, assert_equal_runs
):
    inline("-m", *SMALL, "lora.rank=2,4", "hydra.sweep.dir=s")
    assert len(base_loads) == 1
    check_rounds(in_rounds, at_once=1)
    check_jobs(inline, assert_equal_runs)


@pytest.mark.slow
def test_rounds_continue_jobs_in_the_same_worker_processes(inline, in_rounds, assert_equal_runs):
    arguments = ("hydra/launcher=process", "hydra.launcher.jobs=2")
    out = inline("-m", *SMALL, "lora.rank=2,4", *arguments, "hydra.sweep.dir=s")
    assert out.count("processes: 2 at once") == 1
    check_rounds(in_rounds, at_once=2)
    workers = {status["pid"] for round_ in in_rounds for status in round_["states"]}
    assert len(workers) == 2
    check_jobs(inline, assert_equal_runs)


@pytest.mark.slow
@pytest.mark.skipif(system.SIMULATED, reason="Ray's own processes run outside the simulation")
def test_rounds_continue_jobs_in_the_same_worker_of_a_ray_cluster(inline, in_rounds, assert_equal_runs, monkeypatch):
    pytest.importorskip("ray")
    from ray._private import ray_constants

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # on loopback
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    arguments = ("hydra/launcher=ray", "hydra.launcher.address=local", "hydra.launcher.jobs=1")
    inline("-m", *SMALL, "lora.rank=2,4", *arguments, "hydra.sweep.dir=s")
    check_rounds(in_rounds, at_once=1)
    assert len({status["pid"] for round_ in in_rounds for status in round_["states"]}) == 1
    check_jobs(inline, assert_equal_runs)


@pytest.mark.slow
@pytest.mark.long
def test_rounds_work_with_the_launcher_of_another_package(inline, monkeypatch, assert_equal_runs):
    Plugins.instance()
    joblib = pytest.importorskip("hydra_plugins.hydra_joblib_launcher.joblib_launcher")
    rounds = launch_in_rounds(monkeypatch, joblib.JoblibLauncher)
    arguments = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=s")
    inline("-m", *SMALL, "lora.rank=2,4", *arguments)
    check_rounds(rounds, at_once=None)
    check_jobs(inline, assert_equal_runs)


def check_rounds(rounds, at_once):
    steps = [[status["step"] for status in round_["states"]] for round_ in rounds]
    assert steps == [[3, 3], [6, 6], [6, 9], [9, 9]]
    assert [status["state"] for status in rounds[2]["states"]] == ["stopped", "finished"]
    assert {round_["at_once"] for round_ in rounds} == {at_once}


def check_jobs(inline, assert_equal_runs):
    """Both jobs equal single runs that never stopped."""
    assert {row["state"] for row in inline.results(inline.folder / "s").values()} == {"finished"}
    for number, rank in enumerate((2, 4)):
        inline(*SMALL, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(inline.folder / f"s/{number}", inline.folder / f"alone{rank}")


def test_a_worker_that_is_stopped_before_its_first_job_ends_without_a_traceback():
    code = "from runner.sweeps.launchers import worker; worker._receive_signals(); print(flush=True); input()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT
