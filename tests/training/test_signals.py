"""Real processes, really stopped: SIGTERM, Ctrl-C and SIGKILL, and the run goes on as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

WORDS = (
    "model=tiny",
    "data=tiny",
    "schedule=cosine",
    "lora.dropout=0.2",
    "optimizer.learning_rate=1e-3",
    "train.iters=60",
    "train.grad_accumulation=2",
    "train.report_every=7",
    "train.eval_every=9",
    "checkpoint.every=10",
    "hydra.run.dir=run",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_door) -> Path:
    """The run that nothing stopped."""
    door = make_door(tmp_path_factory.mktemp("whole"))
    door(*WORDS)
    return door.folder / "run"


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has reported `step` or ended."""
    while process.poll() is None:
        try:
            if json.loads((run / "status.json").read_text())["step"] >= step:
                return
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.002)


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_saves_within_a_step_says_how_to_go_on_and_the_resumed_run_is_equal(
    door, whole, number, code, assert_equal_runs
):
    process = door.start(*WORDS)
    run = door.folder / "run"
    for step in (7, 21):
        wait_for_step(run, step, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == code, out
        assert "resume=run" in out and "Traceback" not in out
        assert state(run) == "stopped"
        saved = sorted((run / "checkpoints").glob("step-*"))[-1]
        assert json.loads((run / "status.json").read_text())["step"] == int(saved.name[5:])
        process = door.start("resume=run")
    assert process.wait(timeout=120) == 0
    assert_equal_runs(whole, run)


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_the_run_ends_equal(door, whole, assert_equal_runs):
    """SIGKILL after a random time, wherever it falls: start-up, stepping, saving, evaluating, rotating."""
    moments = random.Random(20261124)
    run = door.folder / "run"
    kills, words = 0, WORDS
    for _ in range(10):
        process = door.start(*words, start_new_session=True)
        # Most of the time lies in start-up: begin counting once training does, or a little before.
        wait_for_step(run, -1, process) if run.exists() else None
        time.sleep(moments.uniform(0.0, 1.2) if moments.random() < 0.3 else moments.uniform(1.2, 2.6))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if (run / "config.yaml").exists():
            words = ("resume=run",)
            assert state(run) in ("running", "finished", "stopped")
    door("resume=run") if words != WORDS else door(*WORDS)
    assert kills >= 7
    assert_equal_runs(whole, run)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_safely(door, whole, assert_equal_runs):
    # An update of 400 micro-batches: the first signal waits for its end, the second does not.
    long = [w for w in WORDS if "accumulation" not in w] + ["train.grad_accumulation=4000"]
    process = door.start(*long)
    wait_for_step(door.folder / "run", 0, process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert time.monotonic() - begun < 5
    process.communicate()


@pytest.mark.slow
def test_a_second_process_in_the_directory_is_told_who_holds_it_and_a_killed_holder_lets_go(door):
    endless = [w for w in WORDS if "iters" not in w] + ["train.iters=100000"]
    process = door.start(*endless)
    run = door.folder / "run"
    wait_for_step(run, 10, process)
    out = door("resume=run", "train.iters=100000", expect=3)
    assert f"pid {process.pid}" in out and "since" in out
    process.kill()
    process.communicate()
    assert state(run) == "running"
    from runner.rundir import RunDirectory

    assert RunDirectory(run).read_status()["state"] == "interrupted"
    out = door("resume=run", "train.stop_at=35", expect=0)
    assert "resumed from" in out


@pytest.mark.slow
def test_ctrl_c_under_make_reaches_the_run_and_it_saves(door):
    (door.folder / "Makefile").write_text(f"train:\n\t@python -m runner {' '.join(WORDS)} train.iters=100000\n")
    environment = {**door.environment, "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["make", "train"],
        cwd=door.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(door.folder / "run", 7, process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the whole group
    out, _ = process.communicate(timeout=60)
    for _ in range(200):  # make may leave before its child
        if state(door.folder / "run") != "running":
            break
        time.sleep(0.05)
    assert state(door.folder / "run") == "stopped", out


@pytest.mark.slow
def test_a_signal_during_an_evaluation_leaves_it_to_the_resume(door, tmp_path, assert_equal_runs, make_door):
    """The evaluation takes most of the time here, so that the signal falls into it."""
    rows = [json.dumps({"prompt": f"twice: {i}", "completion": f"{i} {i}"}) for i in range(700)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(rows[:40]))
    (tmp_path / "data/valid.jsonl").write_text("\n".join(rows))
    words = ["model=tiny", f"data.path={tmp_path}/data", "data.max_length=64", "train.iters=4", "train.eval_every=2"]
    words += ["checkpoint.every=3", "hydra.run.dir=run"]
    other = make_door(tmp_path / "other")
    other(*words)
    process = door.start(*words)
    run = door.folder / "run"
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and '"split": "valid"' not in (run / "metrics.jsonl").read_text():
        time.sleep(0.01)  # step 0 is evaluated: two quick updates, then the next evaluation
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    saved = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert json.loads((saved / "train_state.json").read_text())["progress"]["pending_evaluation"] is True
    door("resume=run")
    assert_equal_runs(other.folder / "run", run)
