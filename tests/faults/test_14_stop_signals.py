"""SIGTERM, Ctrl-C or a hang-up at any point: the run saves and its resume ends equal; a second signal ends at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.runs.directory import RunDirectory

pytestmark = [pytest.mark.fault(14), pytest.mark.slow]

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
SAVED_STEPS = {
    ("micro-batch", 9): 5,
    ("update", 3): 3,
    ("evaluation", 5): 5,
    ("save", 2): 5,  # at step 4 the loop had already decided to continue: it stops after the next update
    ("save decision", 3): 4,  # the same at step 3, which is not saved
}
"""The step saved after a signal at a point of driver.py. Step 0 and step 5 are evaluated, in three batches each."""


def read_status(run):
    return json.loads((run / "status.json").read_text())


def last_step(run):
    return max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def assert_stopped(run, out, number):
    """The run saved its last step and printed how to resume."""
    assert f"resume={run.name}" in out and "Traceback" not in out, out
    status = read_status(run)
    assert (status["state"], status["reason"]) == ("stopped", number)
    assert status["step"] == status["last_checkpoint"] == last_step(run)


@pytest.mark.parametrize("chunk", range(2))
def test_a_signal_saves_within_one_update_and_the_resumed_run_ends_equal(
    make_cli, tmp_path, overrides, driven, undisturbed, assert_ended_equal, cases, chunk
):
    whole = undisturbed(*overrides, "checkpoint.keep_last=9")
    faults = [(point, number) for number in EXIT_CODES for point in SAVED_STEPS]
    for (point, at), number in cases.some(faults, quick=2)[chunk::2]:
        cli = make_cli(tmp_path / f"{point}-{number}")
        run = cli.folder / "run"
        process = driven(cli, point, at, *overrides, "checkpoint.keep_last=9", "hydra.run.dir=run", number=number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == EXIT_CODES[number], out
        assert_stopped(run, out, number)
        assert last_step(run) == SAVED_STEPS[point, at], (point, number)
        saved = json.loads((run / f"checkpoints/step-{last_step(run):07d}/train_state.json").read_text())
        # The evaluation of step 5 that the signal prevented is left to the resume.
        assert saved["progress"]["pending_evaluation"] == (SAVED_STEPS[point, at] == 5)
        cli("resume=run")
        assert_ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()


def test_a_signal_during_the_final_evaluation_stops_the_run_and_its_resume_evaluates(
    make_cli, tmp_path, overrides, driven, undisturbed, assert_ended_equal, cases
):
    overrides = (
        *overrides,
        "train.test=true",
        "data.metric=exact_match",
        "data.metric_rows=2",
        "data.max_new_tokens=4",
    )
    whole = undisturbed(*overrides)
    # The third batch of three of the test split, after the evaluations of steps 0, 5 and 8; the answers of the result.
    points = [("evaluation", 12), ("answers", 2)]
    for (point, at), number in cases.some([(point, number) for number in EXIT_CODES for point in points], quick=2):
        cli = make_cli(tmp_path / f"{point}-{number}")
        run = cli.folder / "run"
        process = driven(cli, point, at, *overrides, "hydra.run.dir=run", number=number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == EXIT_CODES[number], out
        assert_stopped(run, out, number)
        assert last_step(run) == 8
        assert "test loss" not in out and "held-out rows" not in out  # printed where the resume finishes
        cli("resume=run")
        assert_ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_a_save_completes_after_a_signal_and_is_whole_or_absent_after_a_second(
    make_cli,
    tmp_path,
    overrides,
    run_with_calls,
    fault_environment,
    newest_checkpoint,
    assert_same_state,
    assert_ended_equal,
    cases,
    again,
):
    overrides = (*overrides, "checkpoint.keep_last=9")
    whole, calls = run_with_calls(*overrides)
    calls = [(call, path) for call, path in calls if path.startswith("checkpoints")]
    saving = [i for i, (_, path) in enumerate(calls) if "/.tmp-step-0000004-" in path]
    faults = [(at, number) for at in saving for number in ("SIGTERM", "SIGINT")]
    faults = faults[::3]  # of each two calls and each signal some
    for at, number in cases.some(faults, quick=1):
        cli = make_cli(tmp_path / f"{at}-{number}")
        run = cli.folder / "run"
        # With `again`, a signal comes at each later call of the same save and of the save that the stop makes.
        fault = fault_environment(run / "checkpoints", at=at, do=f"+{getattr(signal, number):d}", for_good=again)
        out = cli(*overrides, "hydra.run.dir=run", expect=EXIT_CODES[number], env=fault)
        if again:
            assert RunDirectory(run).read_status()["state"] == "interrupted"
            found = newest_checkpoint(run)
            assert 2 <= found.checkpoint.step <= 7
            if (whole / "checkpoints" / found.checkpoint.path.name).exists():
                assert_same_state(found, whole)
        else:
            assert_stopped(run, out, number)
            # Training continued during the save, at most to the next save, which waits for it, and one more update.
            assert 4 <= last_step(run) <= 7
        cli("resume=run")
        assert_ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_resumes_equal(
    make_cli, tmp_path, overrides, driven, undisturbed, newest_checkpoint, assert_same_state, assert_ended_equal, cases
):
    whole = undisturbed(*overrides, "checkpoint.keep_last=9")
    # All during or after update 5: the save of step 2 is complete, since that of step 4 waited for it.
    points = [("micro-batch", 9), ("update", 5), ("evaluation", 5), ("save decision", 5), ("save", 3)]
    faults = [(point, two) for two in ("SIGTERM,SIGTERM", "SIGTERM,SIGINT", "SIGINT,SIGHUP") for point in points]
    for (point, at), two in cases.some(faults, quick=1):
        cli = make_cli(tmp_path / f"{point}-{two}")
        run = cli.folder / "run"
        process = driven(cli, point, at, *overrides, "checkpoint.keep_last=9", "hydra.run.dir=run", number=two)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == EXIT_CODES[two.split(",")[1]], out
        assert RunDirectory(run).read_status()["state"] == "interrupted"
        found = newest_checkpoint(run)
        assert found.checkpoint.step in (2, 4)
        assert_same_state(found, whole)
        cli("resume=run")
        assert_ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()


def wait_for_step(run, step, process):
    """Wait until the run has reported `step` or its process has ended."""
    while process.poll() is None:
        try:
            if read_status(run)["step"] >= step:
                return
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.002)


LONG = (
    "model=tiny",
    "data=tiny",
    "lora.dropout=0.1",
    "train.iters=100",
    "train.report_every=5",
    "train.eval_every=50",
    "checkpoint.every=40",
)


def test_a_second_signal_does_not_wait_for_a_long_update(cli):
    run = cli.folder / "run"
    process = cli.start(*LONG, "train.grad_accumulation=2000", "hydra.run.dir=run")
    wait_for_step(run, 0, process)
    rows = run / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.01)
    time.sleep(0.5)  # step 0 is evaluated: the first update is in progress
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert time.monotonic() - begun < 3


@pytest.mark.long
def test_a_signal_without_a_terminal_and_under_make_saves_and_the_resumed_run_ends_equal(
    cli, undisturbed, assert_ended_equal
):
    run = cli.folder / "run"
    process = cli.start(*LONG, "hydra.run.dir=run", start_new_session=True, stdin=subprocess.DEVNULL)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert_stopped(run, out, "SIGTERM")
    stopped_at = last_step(run)
    (cli.folder / "Makefile").write_text("train:\n\t@python -m runner resume=run\n")
    process = subprocess.Popen(
        ["make", "train"],
        cwd=cli.folder,
        env={**cli.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_step(run, stopped_at + 5, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    out, _ = process.communicate(timeout=60)  # the run holds the pipe: make may end before it
    assert_stopped(run, out, "SIGINT")
    assert last_step(run) > stopped_at
    cli("resume=run")
    assert_ended_equal(undisturbed(*LONG), run)


def test_a_stopped_sweep_saves_its_job_and_every_resumed_job_ends_equal(
    make_cli, tmp_path, overrides, driven, undisturbed, assert_ended_equal, cases
):
    sweep = [*overrides, "checkpoint.keep_last=9", "-m", "seed=0,1", "hydra.sweep.dir=sweep"]
    for number, update in cases.some([("SIGTERM", 3), ("SIGINT", 8 + 3)], quick=1):  # in the first job, in the second
        cli = make_cli(tmp_path / number)
        process = driven(cli, "update", update, *sweep, number=number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == EXIT_CODES[number], out
        stopped = cli.folder / "sweep" / str((update - 1) // 8)
        assert read_status(stopped)["state"] == "stopped"
        assert read_status(stopped)["step"] == last_step(stopped) == 3
        cli("resume=sweep")
        for seed in (0, 1):
            whole = undisturbed(*overrides, "checkpoint.keep_last=9", *([f"seed={seed}"] if seed else []))
            assert_ended_equal(whole, cli.folder / "sweep" / str(seed))
        cases.done()
