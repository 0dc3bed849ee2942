"""One job of a sweep fails, diverges or is killed: the others finish, the results say why, the exit code is not 0."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault(26), pytest.mark.slow]

SMALL = ("experiment=smoke", "train.iters=6", "train.eval_every=3", "checkpoint.every=2", "lora.dropout=0.1")


def alone(cli, name: str, *overrides: str) -> Path:
    cli(*overrides, f"hydra.run.dir={name}")
    return cli.folder / name


def test_failed_and_diverged_jobs_do_not_stop_the_sweep_and_set_the_exit_code(inline, assert_equal_runs):
    keys = "lora.keys=[self_attn.q_proj,self_attn.k_proj]"
    grid = (f"{keys},[nonsense]", "optimizer.learning_rate=1e-3,1e30")
    overrides = ("-m", *SMALL, "optimizer=sgd", *grid, "train.iters=20", "hydra.sweep.dir=s")
    out = inline(*overrides, expect=1)
    assert "Traceback" not in out
    states = {n: r["state"] for n, r in inline.results(inline.folder / "s").items()}
    assert [states[n] for n in range(4)] == ["finished", "diverged", "failed", "failed"]
    reasons = {n: r["reason"] for n, r in inline.results(inline.folder / "s").items()}
    assert "nonsense" in reasons[2] and "not finite" in reasons[1]
    # Failed ones are tried again, the diverged one is not, the finished one stays.
    out = inline("resume=s", expect=1)
    assert "2 to resume, 2 done" in out or "2 to start, 2 done" in out
    overrides = (*SMALL, "optimizer=sgd", keys, "train.iters=20", "optimizer.learning_rate=1e-3")
    twin = alone(inline, "twin", *overrides)
    assert_equal_runs(inline.folder / "s/0", twin)


@pytest.mark.long
def test_the_process_launcher_survives_a_killed_job_and_resume_finishes_it(inline, assert_equal_runs):
    overrides = (*SMALL, "train.iters=100", "train.eval_every=50", "checkpoint.every=10", "lora.rank=2,4,6")
    process = inline.start("-m", *overrides, "hydra/launcher=process", "hydra.launcher.jobs=2", "hydra.sweep.dir=s")
    victim = inline.wait_for(inline.folder / "s/1", 40, process)
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1, out
    rows = inline.results(inline.folder / "s")
    assert [rows[n]["state"] for n in (0, 1, 2)] == ["finished", "failed", "finished"]
    assert "SIGKILL" in rows[1]["reason"]
    out = inline("resume=s")
    assert "1 to resume, 2 done" in out
    assert_equal_runs(inline.folder / "s/1", alone(inline, "alone", *overrides[:-1], "lora.rank=4"))
