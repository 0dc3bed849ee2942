"""A failed background save ends the run at its next update, with a message and exit code 74."""

from __future__ import annotations

import errno
import json
import threading
import time

import pytest

from runner.common.errors import StorageError
from runner.training.async_saver import AsyncSaver

pytestmark = pytest.mark.fault(25)

OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "lora.dropout=0.1",
    "train.iters=400",
    "train.eval_every=1000",
    "checkpoint.every=20",
    "hydra.run.dir=run",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_cli):
    cli = make_cli(tmp_path_factory.mktemp("whole"))
    cli(*OVERRIDES, "train.iters=60")
    return cli.folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [pytest.param(errno.EIO, marks=pytest.mark.long), errno.ENOSPC], ids=errno.errorcode.get
)
def test_a_failed_save_stops_the_run_and_the_checkpoint_before_it_resumes_equal(
    cli, fault_environment, whole, assert_equal_runs, error
):
    run = cli.folder / "run"
    # The fault occurs on the saver thread, in the third save, at step 60 of 400.
    env = fault_environment(run, name="step-0000060", calls="fsync", at=0, do=error, for_good=True)
    out = cli(*OVERRIDES, expect=74, env=env)
    assert "step 60 was not saved" in out and errno.errorcode[error] in out and "Traceback" not in out
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "step 60 was not saved" in status["reason"]
    assert status["last_checkpoint"] == 40
    assert 60 <= json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 100
    cli("resume=run", "train.iters=60")
    assert_equal_runs(whole, run)


@pytest.mark.slow
def test_a_failed_last_save_fails_the_run(cli, fault_environment):
    env = fault_environment(cli.folder / "run", name="step-0000060", calls="write", at=2, do=errno.EIO, for_good=True)
    out = cli(*OVERRIDES, "train.iters=60", expect=74, env=env)
    assert "step 60 was not saved" in out
    assert not (cli.folder / "run/adapters").exists()


@pytest.mark.slow
def test_a_signal_waits_for_the_save_in_progress(cli, fault_environment, whole, assert_equal_runs):
    env = fault_environment(cli.folder / "run", name="step-0000040", calls="fsync", at=0, do="+15")
    cli(*OVERRIDES, "train.iters=60", expect=143, env=env)
    cli("resume=run")
    assert_equal_runs(whole, cli.folder / "run")


def test_a_failure_is_raised_once_by_the_next_check():
    saver = AsyncSaver()

    def fail() -> None:
        raise StorageError("the disk is gone")

    saver.start(fail)
    with pytest.raises(StorageError, match="the disk is gone"):
        for _ in range(1000):
            saver.check()
            time.sleep(0.001)
    saver.check()
    assert saver.close() is None


def test_training_continues_during_a_save_and_the_next_save_waits_for_it():
    saver, written, order = AsyncSaver(), threading.Event(), []

    def slow() -> None:
        written.wait(10)
        order.append("first")

    saver.start(slow)
    saver.check()  # does not wait
    assert order == []
    threading.Timer(0.05, written.set).start()
    saver.start(lambda: order.append("second"))
    saver.wait()
    assert order == ["first", "second"]
    saver.close()


def test_closing_returns_a_failure_that_was_not_raised():
    saver = AsyncSaver()

    def fail() -> None:
        raise StorageError("the disk is gone")

    saver.start(fail)
    assert str(saver.close()) == "the disk is gone"


def test_without_a_background_thread_a_save_fails_in_the_caller():
    saver = AsyncSaver(background=False)
    with pytest.raises(ZeroDivisionError):
        saver.start(lambda: 1 / 0)
