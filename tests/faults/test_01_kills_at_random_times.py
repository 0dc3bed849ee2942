"""A run killed by SIGKILL at a random time resumes and ends equal, whatever it was doing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

pytestmark = [pytest.mark.fault(1), pytest.mark.slow]

OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "schedule=cosine",
    "lora.dropout=0.2",
    "optimizer.learning_rate=1e-3",
    "train.iters=16",
    "train.grad_accumulation=2",
    "train.report_every=5",
    "train.eval_every=6",
    "checkpoint.every=4",
    "hydra.run.dir=run",
)


def wait_for_training(run, process):
    """Wait until the first evaluation runs or the process has ended."""
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_cli):
    """The uninterrupted run, the seconds that its process took, and the seconds from its first evaluation on."""
    cli = make_cli(tmp_path_factory.mktemp("whole"))
    begun = time.monotonic()
    process = cli.start(*OVERRIDES)
    wait_for_training(cli.folder / "run", process)
    training = time.monotonic()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return cli.folder / "run", time.monotonic() - begun, time.monotonic() - training


def was_killed(cli, seconds, in_training):
    """Kill the run `seconds` after its start, or after its training began; return whether it was still running."""
    process = cli.start(*OVERRIDES, start_new_session=True)
    if in_training:
        wait_for_training(cli.folder / "run", process)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("chunk", range(5))
def test_a_run_killed_at_a_random_time_resumes_and_ends_equal(
    make_cli, tmp_path, whole, assert_ended_equal, cases, chunk
):
    uninterrupted, total_seconds, training_seconds = whole
    moments = random.Random(f"kills {chunk}")
    for number in range(cases.of(full=40, quick=1)):
        cli = make_cli(tmp_path / str(number))
        run = cli.folder / "run"
        in_training = (number + chunk) % 2 == 0
        seconds = moments.uniform(0, training_seconds if in_training else total_seconds)
        while not was_killed(cli, seconds, in_training):  # it was faster than the timed run
            shutil.rmtree(run)
            seconds *= 0.8
        # A run killed before its config was written is started again by the same command.
        cli(*(["resume=run"] if (run / "config.yaml").exists() else OVERRIDES))
        assert_ended_equal(uninterrupted, run)
        shutil.rmtree(cli.folder)
        cases.done()


@pytest.mark.parametrize(
    "name", ["samples.jsonl", pytest.param("status.json", marks=pytest.mark.long), "/checkpoints/"]
)
def test_a_run_killed_at_its_last_system_calls_resumes_and_ends_equal(
    make_cli, tmp_path, run_with_calls, fault_environment, assert_ended_equal, name
):
    """Random times seldom fall between the last row and the end."""
    whole, calls = run_with_calls(*OVERRIDES[:-1])
    cli = make_cli(tmp_path)
    run = cli.folder / "run"
    last = sum(name in f"/{path}" for _, path in calls) - 1
    cli(*OVERRIDES, env=fault_environment(run, name=name, at=last, do="kill"), expect=-signal.SIGKILL)
    cli("resume=run")
    assert_ended_equal(whole, run)
