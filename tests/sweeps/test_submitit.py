"""hydra/launcher=submitit with submitit's local executor: real processes, and the signals of a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import pickletools
import signal
import time
from pathlib import Path

import fake_slurm
import pytest
import system

from runner.runs.search_record import read_search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed"),
    pytest.mark.skipif(system.SIMULATED, reason="submitit's own processes run outside the simulation"),
]

SMALL = ("experiment=smoke", "train.iters=90", "train.eval_every=30", "checkpoint.every=30", "lora.dropout=0.1")
LOCAL = ("hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.cpus=1", "hydra.sweep.dir=s")


def task_of(run: Path) -> int:
    """The pid of submitit's process for a run, which is the parent of the one that trains."""
    return system.parents()[json.loads((run / "status.json").read_text())["pid"]]


def check_jobs(inline, assert_equal_runs, *ranks: int) -> None:
    for number, rank in enumerate(ranks):
        inline(*SMALL, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(inline.folder / f"s/{number}", inline.folder / f"alone{rank}")


@pytest.mark.parametrize("number", [signal.SIGUSR2, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_preempted_job_saves_and_is_put_into_the_queue_again_and_continues(cli, inline, assert_equal_runs, number):
    secret = "+hydra.job.env_set.TOKEN=${oc.env:MY_TOKEN}"
    process = cli.start("-m", *SMALL, "lora.rank=2", secret, *LOCAL, env={"MY_TOKEN": "hunter2"})
    cli.wait_for(cli.folder / "s/0", 20, process)
    os.kill(task_of(cli.folder / "s/0"), number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert ("preempted after step" in out) == (number == signal.SIGTERM)  # else submitit puts it back itself
    assert (cli.folder / "s/0/run.log").read_text().count("resumed from") == 1
    check_jobs(inline, assert_equal_runs, 2)
    assert not [path for path in (cli.folder / "s").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    for path in (cli.folder / "s/logs/submitit").glob("*_submitted.pkl"):
        texts = {arg for _, arg, _ in pickletools.genops(path.read_bytes()) if isinstance(arg, str)}
        assert str(cli.folder / "s/logs/requests/0.json") in texts and path.stat().st_size < 1000


@pytest.mark.long
def test_a_sweep_whose_process_was_killed_waits_for_the_jobs_that_go_on_without_it(cli, inline, assert_equal_runs):
    process = cli.start("-m", *SMALL, "lora.rank=2,4", *LOCAL, "hydra.launcher.jobs=1")
    cli.wait_for(cli.folder / "s/0", 20, process)
    process.kill()
    process.communicate()
    pid = json.loads((cli.folder / "s/0/status.json").read_text())["pid"]
    out = cli("resume=s")
    assert "2 jobs" in out and not system.is_running(pid)
    assert "resumed" not in (cli.folder / "s/0/run.log").read_text()  # it went on to its end
    check_jobs(inline, assert_equal_runs, 2, 4)


@pytest.mark.long
def test_ctrl_c_saves_the_jobs_and_a_resume_finishes_them(cli, inline, assert_equal_runs):
    process = cli.start("-m", *SMALL, "lora.rank=2,4", *LOCAL, "hydra.launcher.jobs=2")
    for job in ("0", "1"):
        cli.wait_for(cli.folder / "s" / job, 2, process)  # before the other is at its end
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert {row["state"] for row in cli.results(cli.folder / "s").values()} == {"stopped"}
    assert "2 to resume" in cli("resume=s")
    check_jobs(inline, assert_equal_runs, 2, 4)


@pytest.mark.long
def test_a_job_that_fails_by_its_own_error_is_not_started_again(cli):
    overrides = ("lora.keys=[self_attn.q_proj],[nonsense]", "train.iters=10", "train.eval_every=5")
    out = cli("-m", *SMALL, *overrides, *LOCAL, expect=1)
    rows = cli.results(cli.folder / "s")
    assert [rows[n]["state"] for n in (0, 1)] == ["finished", "failed"] and "nonsense" in rows[1]["reason"], out
    assert len([*(cli.folder / "s/logs/submitit").glob("*_submitted.pkl")]) == 2


def test_options_that_submitit_cannot_take_are_refused_before_the_sweep_begins(inline):
    for option, problem in (
        ("cpus=0", "must be 1 or more"),
        ("mem_gb=much", "must be 0 or more"),
        ("setup=[1]", "must be a list of texts"),
        ("partition=1", "must be a plain name"),
        ("partition='a b'", "must be a plain name"),
        ("cluster=none", "must be one of slurm, local, debug"),
        ("cluster=slurm", "srun is not found"),
    ):
        out = inline("-m", *SMALL, "lora.rank=2,4", *LOCAL, f"hydra.launcher.{option}", expect=2)
        assert problem in out
    assert not (inline.folder / "s").exists()


@pytest.mark.long
def test_a_search_submits_its_rounds_and_its_survivor_equals_the_run_that_never_stopped(cli, inline, assert_equal_runs):
    search = ("hydra/sweeper=search", "hydra.sweeper.pruner=asha", "hydra.sweeper.trials=4", "hydra.launcher.jobs=2")
    rate = "optimizer.learning_rate=tag(log,interval(1e-4,1e-2))"
    process = cli.start("-m", *search, *SMALL, rate, *LOCAL)
    cli.wait_for(cli.folder / "s/1", 20, process)
    process.kill()
    process.communicate()
    out = cli("resume=s")
    found = read_search(cli.folder / "s")
    assert found is not None and len(found.trials) == 4, out
    ends = [trial for trial in found.trials if trial.results[-1].state == "finished"]
    assert ends and len(ends) < 4
    for trial in ends:
        value = trial.params["optimizer.learning_rate"]
        inline(*SMALL, f"optimizer.learning_rate={value}", f"hydra.run.dir=alone{trial.number}")
        assert_equal_runs(cli.folder / f"s/{trial.job}", cli.folder / f"alone{trial.number}")


SLURM = ("hydra/launcher=submitit", "hydra.launcher.cpus=1", "hydra.launcher.partition=gpu", "hydra.sweep.dir=s")


@pytest.mark.long
def test_on_slurm_a_killed_sweep_finds_its_jobs_and_preempted_ones_and_those_of_failed_nodes_continue(
    cli, inline, assert_equal_runs, tmp_path
):
    slurm = tmp_path / "slurm"
    cli.environment |= fake_slurm.install(slurm)
    long = ("train.iters=240", "train.eval_every=60")
    process = cli.start("-m", *SMALL, *long, "lora.rank=2,4,6", *SLURM, fork=False)
    for job in ("2", "0", "1"):
        cli.wait_for(cli.folder / "s" / job, 35, process)
    process.kill()
    process.communicate()
    assert "--partition=gpu" in (slurm / "100.sh").read_text()
    os.kill(task_of(cli.folder / "s/1"), signal.SIGUSR2)  # preempted: it saves, and goes back into the queue
    fake_slurm.fail_node(slurm, "100_2")
    process = cli.start("resume=s", fork=False)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    for job in (0, 1):
        assert f"job {job}   was submitted as 100_{job} and has not ended: waiting" in out
    logs = [(cli.folder / f"s/{job}/run.log").read_text().count("resumed from") for job in (0, 1, 2)]
    assert logs == [0, 1, 1]
    for number, rank in enumerate((2, 4, 6)):
        inline(*SMALL, *long, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(inline.folder / f"s/{number}", inline.folder / f"alone{rank}")


@pytest.mark.long
def test_on_slurm_a_failed_node_is_noticed_and_ctrl_c_cancels_jobs_which_save(cli, inline, assert_equal_runs, tmp_path):
    slurm = tmp_path / "slurm"
    cli.environment |= fake_slurm.install(slurm)
    process = cli.start("-m", *SMALL, "lora.rank=2,4", *SLURM, fork=False)
    cli.wait_for(cli.folder / "s/1", 40, process)
    fake_slurm.fail_node(slurm, "100_1")
    while "restarts" not in (cli.folder / "s/1/status.json").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    before = json.loads((cli.folder / "s/1/status.json").read_text())["restarts"][0]
    assert before["cause"] == "node lost" and before["checkpoint"] == 30
    cli.wait_for(cli.folder / "s/1", 50, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "job 1   node lost after step" in out
    assert cli.results(cli.folder / "s")[1]["state"] == "stopped"
    cli("resume=s")
    check_jobs(inline, assert_equal_runs, 2, 4)
