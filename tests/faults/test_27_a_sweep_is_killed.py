"""A sweep is killed at random times and resumed: finished and diverged jobs are not run again, interrupted ones resume,
failed ones are tried again; the results equal single runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import system

pytestmark = [pytest.mark.fault(27), pytest.mark.slow]

SMALL = ("experiment=smoke", "optimizer=sgd", "lora.dropout=0.1", "train.iters=100", "train.eval_every=50")
SMALL = (*SMALL, "checkpoint.every=10")
KEYS = "[self_attn.q_proj,self_attn.k_proj]"
GRID = (f"lora.keys={KEYS},[nonsense]", "optimizer.learning_rate=1e-3,1e30,2e-3")
# Jobs 0 and 2 can finish, 1 diverges at once, 3 to 5 fail while the model is prepared.
FINE, DIVERGED, FAILED = (0, 2), 1, (3, 4, 5)


def state(job: Path) -> str | None:
    try:
        return json.loads((job / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        return None


def modified_times(job: Path) -> dict[str, int]:
    """When each file of a job was last written."""
    return {str(p): p.stat().st_mtime_ns for p in job.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_cli):
    """The two jobs that finish, each run by itself."""
    cli = make_cli(tmp_path_factory.mktemp("alone"), in_process=True)
    for number, rate in zip(FINE, ("1e-3", "2e-3"), strict=True):
        cli(*SMALL, f"lora.keys={KEYS}", f"optimizer.learning_rate={rate}", f"hydra.run.dir={number}")
    return cli.folder


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_a_sweep_killed_at_any_time_resumes_to_the_results_of_single_runs(
    inline, alone, launcher, cases, assert_equal_runs
):
    moments = random.Random(f"27 {launcher}")
    for number in range(cases.of(full=12, quick=1)):
        sweep = inline.folder / f"s{number}"
        overrides = ("-m", *SMALL, *GRID, f"hydra/launcher={launcher}", f"hydra.sweep.dir=s{number}")
        before: dict[int, dict[str, int]] = {}
        kills = 0
        while kills < 3:
            # The workers of a process launcher are found as its children, which those of a fork are not.
            process = inline.start(*overrides, start_new_session=True, fork=launcher == "serial")
            time.sleep(moments.uniform(0.2, 3) if launcher == "serial" else moments.uniform(1.5, 4.5))
            if process.poll() is not None:
                process.communicate()
                break
            kill_tree(process)
            kills += 1
            if (sweep / "sweep.jsonl").exists():
                overrides = (f"resume=s{number}",)
            for job in FINE:
                if state(sweep / str(job)) == "finished":
                    before.setdefault(job, modified_times(sweep / str(job)))
            if state(sweep / str(DIVERGED)) == "diverged":
                before.setdefault(DIVERGED, modified_times(sweep / str(DIVERGED)))
        failed = {job: modified_times(sweep / str(job)) for job in FAILED if state(sweep / str(job)) == "failed"}
        out = inline(*overrides, expect=1)
        assert "Traceback" not in out
        rows = inline.results(sweep)
        assert [rows[n]["state"] for n in range(6)] == ["finished", "diverged", "finished", *["failed"] * 3]
        assert "nonsense" in rows[3]["reason"] and "not finite" in rows[1]["reason"]
        for job, then in before.items():
            assert modified_times(sweep / str(job)) == then, f"job {job} was done and was touched again"
        for job, then in failed.items():
            assert modified_times(sweep / str(job)) != then, f"job {job} had failed and was not tried again"
        for job in FINE:
            assert_equal_runs(alone / str(job), sweep / str(job))
        cases.done()


def test_the_same_command_restarts_a_sweep_killed_before_it_recorded_a_job(inline):
    """A kill between the lock and the first line of sweep.jsonl, as a loaded machine shows it now and then."""
    sweep = inline.folder / "s"
    process = inline.start("-m", *SMALL, "lora.rank=2", "hydra.sweep.dir=s", start_new_session=True, fork=False)
    while not sweep.exists():
        assert process.poll() is None
        time.sleep(0.001)
    kill_tree(process)
    assert not (sweep / "sweep.jsonl").exists(), "the kill came too late to show anything"
    out = inline("-m", *SMALL, "train.iters=2", "lora.rank=2", "hydra.sweep.dir=s")
    assert "finished" in out and state(sweep / "0") == "finished"


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and all of its descendants, in whatever session they are."""
    found, pids = {process.pid}, system.parents()
    while True:
        more = {pid for pid, parent in pids.items() if parent in found} - found
        if not more:
            break
        found |= more
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()
