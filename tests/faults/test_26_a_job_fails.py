"""One job of a sweep fails, diverges or is killed: the others finish, the summary says which and why, not 0."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault(26), pytest.mark.slow]

SMALL = ("experiment=smoke", "train.iters=6", "train.eval_every=3", "checkpoint.every=2", "lora.dropout=0.1")


def alone(door, name: str, *words: str) -> Path:
    door(*words, f"hydra.run.dir={name}")
    return door.folder / name


def test_one_failed_and_one_diverged_job_stop_nobody_and_the_exit_code_tells(door, assert_equal_runs):
    keys = "lora.keys=[self_attn.q_proj,self_attn.k_proj]"
    grid = (f"{keys},[nonsense]", "optimizer.learning_rate=1e-3,1e30")
    words = ("-m", *SMALL, "optimizer=sgd", *grid, "train.iters=20", "hydra.sweep.dir=s")
    out = door(*words, expect=1)
    assert "Traceback" not in out
    states = {n: r["state"] for n, r in door.results(door.folder / "s").items()}
    assert [states[n] for n in range(4)] == ["finished", "diverged", "failed", "failed"]
    reasons = {n: r["reason"] for n, r in door.results(door.folder / "s").items()}
    assert "nonsense" in reasons[2] and "not finite" in reasons[1]
    # Failed ones are tried again, the diverged one is not, the finished one stays.
    out = door("resume=s", expect=1)
    assert "2 to go on, 2 done" in out or "2 to start, 2 done" in out
    words = (*SMALL, "optimizer=sgd", keys, "train.iters=20", "optimizer.learning_rate=1e-3")
    twin = alone(door, "twin", *words)
    assert_equal_runs(door.folder / "s/0", twin)


@pytest.mark.long
def test_the_process_launcher_survives_a_killed_job_and_the_resume_finishes_it(door, assert_equal_runs):
    words = (*SMALL, "train.iters=100", "train.eval_every=50", "checkpoint.every=10", "lora.rank=2,4,6")
    process = door.start("-m", *words, "hydra/launcher=process", "hydra.launcher.jobs=2", "hydra.sweep.dir=s")
    victim = door.wait_for(door.folder / "s/1", 40, process)
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1, out
    rows = door.results(door.folder / "s")
    assert [rows[n]["state"] for n in (0, 1, 2)] == ["finished", "failed", "finished"]
    assert "SIGKILL" in rows[1]["reason"]
    out = door("resume=s")
    assert "1 to go on, 2 done" in out
    assert_equal_runs(door.folder / "s/1", alone(door, "alone", *words[:-1], "lora.rank=4"))
