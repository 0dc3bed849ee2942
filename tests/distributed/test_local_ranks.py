"""ranks=N: a run that starts its other ranks itself, alone and as a job of a sweep."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from distributed.conftest import assert_one_curve

from runner.common.cores import usable_cores
from runner.common.free_ports import free_ports
from runner.common.text import count

WORDS = ("model=tiny", "data=tiny", "train.batch_size=8", "train.iters=20", "train.report_every=1")
WORDS += ("train.eval_every=10", "checkpoint.every=5", "optimizer.learning_rate=1e-3")


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())


def test_a_run_starts_its_ranks_and_a_supervised_one_again(make_cli, tmp_path):
    cli = make_cli(tmp_path)
    cli(*WORDS, "hydra.run.dir=alone")
    output = cli(*WORDS, "hydra.run.dir=two", "ranks=2")
    assert "ranks  2" in output
    assert_one_curve(tmp_path / "alone", tmp_path / "two")
    process = cli.start(*WORDS, "hydra.run.dir=killed", "ranks=2", "supervise=true")
    os.kill(cli.wait_for(tmp_path / "killed", 8, process), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and output.count("ranks  2") == 2, output
    assert_one_curve(tmp_path / "alone", tmp_path / "killed")


KILLED = """
import os, signal, subprocess, sys
from runner.backends import blas
blas.load_blas(2)
from runner.training import local_ranks

class Killed(subprocess.Popen):
    def __new__(cls, *arguments, **options):
        process = start(*arguments, **options)
        if options["env"]["MLX_RANK"] == "2":
            os.kill(process.pid if sys.argv.pop() == "2" else os.getpid(), signal.SIGKILL)
        return process

start, local_ranks.subprocess.Popen = subprocess.Popen, Killed
from runner.cli.main import main
sys.exit(main(sys.argv[1:-1]))
"""


@pytest.mark.parametrize("victim", [2, 0])
def test_a_rank_that_dies_before_it_joins_ends_all_at_once(make_cli, tmp_path, victim):
    cli = make_cli(tmp_path)
    start = time.monotonic()
    process = cli.start(*WORDS, "hydra.run.dir=run", "ranks=3", str(victim), words=("-c", KILLED))
    output, _ = process.communicate(timeout=60)  # of all ranks: each has its end of the pipe
    assert time.monotonic() - start < 10, output
    if victim == 0:
        assert process.returncode == -signal.SIGKILL and not output
    else:
        assert process.returncode == 9 and output.count("runner:") == 1 and not (tmp_path / "run").exists(), output
        assert re.search(r"rank 2 \(pid \d+\) was killed by SIGKILL before it joined the run", output)


@pytest.mark.long
def test_ctrl_c_in_a_terminal_saves_and_stops_all(make_cli, tmp_path):
    """It is sent to all processes of the terminal; the other ranks have a session of their own, and hear it once."""
    cli = make_cli(tmp_path)
    words = [*WORDS, "train.iters=100000", "train.eval_every=100000", "hydra.run.dir=run", "ranks=2"]
    process = cli.start(*words, start_new_session=True)
    cli.wait_for(tmp_path / "run", 8, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    found = status(tmp_path / "run")
    assert process.returncode == 130 and output.count("stopped (SIGINT)") == 1, output
    assert (found["state"], found["last_checkpoint"]) == ("stopped", found["step"])


@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=process", "hydra.launcher.jobs=1"),
        pytest.param(("hydra/launcher=submitit", "hydra.launcher.cluster=local"), marks=pytest.mark.long),
        pytest.param(("hydra/launcher=ray",), marks=pytest.mark.long),
    ],
    ids=["process", "submitit", "ray"],
)
def test_the_jobs_of_a_sweep_have_ranks(make_cli, tmp_path, launcher):
    cli = make_cli(tmp_path)
    sweep = [*WORDS, "lora.rank=4,8"]
    output = cli("-m", *sweep, *launcher, "ranks=2", "hydra.sweep.dir=sweep")
    if "hydra/launcher=ray" in launcher:
        assert f"{count(max(1, usable_cores() // 2), 'job')} at once" in output, "each takes two CPUs of the node"
    for number, rank in enumerate((4, 8)):
        cli(*WORDS, f"lora.rank={rank}", f"hydra.run.dir=alone{rank}")
        assert status(tmp_path / "sweep" / str(number)).get("ranks") == 2, output
        assert_one_curve(tmp_path / f"alone{rank}", tmp_path / "sweep" / str(number))


@pytest.mark.long
def test_the_trials_of_a_search_have_ranks_and_go_on_from_rung_to_rung(make_cli, tmp_path):
    """A trial is paused and continued: each time by a process of its own, with new ranks."""
    cli = make_cli(tmp_path)
    words = ["-m", *WORDS, "hydra/sweeper=search", "lora.rank=4,8,16", "hydra/launcher=process"]
    words += ["hydra.launcher.jobs=1", "hydra.sweep.dir=search", "hydra.sweeper.trials=3"]
    output = cli(*words, "ranks=2")
    runs = sorted(path.parent for path in (tmp_path / "search").glob("*/status.json"))
    assert runs and all(status(run).get("ranks") == 2 for run in runs), output


def test_ranks_where_jobs_share_a_process_are_refused(inline, tmp_path):
    assert "a process for each job" in inline("-m", *WORDS, "lora.rank=4,8", "ranks=2", expect=2)
    assert "ranks=0 is invalid" in inline(*WORDS, "ranks=0", expect=2)
    port = free_ports(1)[0]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], ["127.0.0.1:1"]]))
    environment = {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    assert "leave it out" in inline(*WORDS, "ranks=2", expect=2, env=environment)
