"""SIGKILL at random times, wherever it falls: start-up, stepping, saving, evaluating, rotating, ending."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

pytestmark = [pytest.mark.fault(1), pytest.mark.slow]

WORDS = (
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
    """Until the first evaluation is under way, or the process has ended."""
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_cli):
    """The run that nothing stopped, the seconds that it lived, and those of them from its first evaluation on."""
    cli = make_cli(tmp_path_factory.mktemp("whole"))
    begun = time.monotonic()
    process = cli.start(*WORDS)
    wait_for_training(cli.folder / "run", process)
    training = time.monotonic()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return cli.folder / "run", time.monotonic() - begun, time.monotonic() - training


def killed(cli, seconds, aimed):
    """Kill the run after `seconds` of its life (`aimed`: of its training); whether it was still alive."""
    process = cli.start(*WORDS, start_new_session=True)
    if aimed:
        wait_for_training(cli.folder / "run", process)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("chunk", range(5))
def test_a_run_killed_at_a_random_time_goes_on_and_ends_equal(make_cli, tmp_path, whole, ended_equal, cases, chunk):
    undisturbed, life, training = whole
    moments = random.Random(f"kills {chunk}")
    for number in range(cases.of(full=40, quick=1)):
        cli = make_cli(tmp_path / str(number))
        run = cli.folder / "run"
        aimed = (number + chunk) % 2 == 0
        seconds = moments.uniform(0, training if aimed else life)
        while not killed(cli, seconds, aimed):  # it was quicker than the one that was timed
            shutil.rmtree(run)
            seconds *= 0.8
        # Killed before its settings were written, there is nothing to go on with: the same overrides begin it again.
        cli(*(["resume=run"] if (run / "config.yaml").exists() else WORDS))
        ended_equal(undisturbed, run)
        shutil.rmtree(cli.folder)
        cases.done()


@pytest.mark.parametrize(
    "name", ["samples.jsonl", pytest.param("status.json", marks=pytest.mark.long), "/checkpoints/"]
)
def test_a_run_killed_at_its_last_calls_goes_on_and_ends_equal(make_cli, tmp_path, logged, faulty, ended_equal, name):
    """Random moments seldom fall between the last row and the end."""
    whole, calls = logged(*WORDS[:-1])
    cli = make_cli(tmp_path)
    run = cli.folder / "run"
    last = sum(name in f"/{path}" for _, path in calls) - 1
    cli(*WORDS, env=faulty(run, name=name, at=last, do="kill"), expect=-signal.SIGKILL)
    cli("resume=run")
    ended_equal(whole, run)
