"""TensorBoard, MLflow, Weights & Biases and Trackio hold every row once, as their own files show."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

import logger_records as records
import numpy as np
import pytest

RUN = (
    "model=tiny",
    "data=tiny",
    "data.metric=exact_match",
    "data.metric_rows=2",
    "data.max_new_tokens=2",
    "lora.num_layers=1",
    "train.batch_size=1",
    "train.iters=3000",
    "train.report_every=20",
    "train.eval_every=100",
    "train.eval_batches=1",
    "train.cache_baseline=false",
    "checkpoint.every=100",
)
LOGGERS = "loggers=[csv,tensorboard,mlflow,wandb,trackio]"
VOLATILE = ("/tokens_per_second", "_memory_gb")
"""Numbers that differ where a row is made again; stores that take nothing back keep the first."""
KEYS = {"WANDB_API_KEY": "0123456789abcdef" * 2, "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery-staple"}


@pytest.fixture
def environment():
    """What libraries set in the environment, such as WANDB_SERVICE, is gone after the test."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def read_all(place: Path, run: Path) -> dict[str, records.Record]:
    run_id = json.loads((run / "status.json").read_text())["run_id"]
    return {
        "tensorboard": records.tensorboard(run),
        "mlflow": records.mlflow(f"sqlite:///{place}/outputs/mlflow.db", run_id),
        "wandb": records.wandb(run),
        "trackio": records.trackio(place / "outputs/trackio", run_id),
    }


def assert_complete(
    place: Path, run: Path, group: str | None = None, last_step: int | None = None
) -> dict[str, records.Record]:
    """Each logger holds each number of the run once, its samples, its settings and its group.

    MLflow and Trackio may have rows beyond `last_step`, which a killed process logged and the run will make again.
    """
    wanted = records.expected(run)
    found = read_all(place, run)
    for name, record in found.items():
        if last_step is not None and name in ("mlflow", "trackio"):
            record.numbers = [number for number in record.numbers if number[1] <= last_step]
        assert [number[:2] for number in record.numbers] == [number[:2] for number in wanted.numbers], name
        values = [number[2] for number in wanted.numbers if not number[0].endswith(VOLATILE)]
        assert [n[2] for n in record.numbers if not n[0].endswith(VOLATILE)] == pytest.approx(values, rel=1e-6), name
        assert record.samples == wanted.samples, name
        assert name == "tensorboard" or record.group in ((group,) if group else (None, "")), name
    assert "| lora.rank | 8 |" in found["tensorboard"].config
    assert found["mlflow"].config["lora.rank"] == "8"
    assert found["wandb"].config["lora"]["rank"] == 8 == found["trackio"].config["lora"]["rank"]
    return found


def logged_steps(place: Path) -> list[int]:
    """The last step of any run in each database."""
    steps = []
    if not (place / "outputs/mlflow.db").exists():
        return [0]
    for path in (place / "outputs/mlflow.db", place / "outputs/trackio/runner.db"):
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database:
            steps.append(database.execute("SELECT max(step) FROM metrics").fetchone()[0] or 0)
    return steps or [0]


def logged_step(place: Path) -> int:
    """The last step of any run that both databases have."""
    return min(logged_steps(place))


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
def test_each_row_is_there_once_after_a_kill_a_stop_and_resumes(inline, rows, assert_equal_runs, environment):
    place, run = inline.folder, inline.folder / "run"
    inline("-m", *RUN, "train.iters=2", "seed=1,2", LOGGERS, "hydra.sweep.dir=sweep")
    for job in ("0", "1"):
        found = assert_complete(place, place / "sweep" / job, group="sweep")
        assert (found["mlflow"].state, found["wandb"].state) == ("FINISHED", "0")
        assert set(found["mlflow"].samples) == {0, 2}

    process = inline.start(*RUN, LOGGERS, "hydra.run.dir=run", env=KEYS)
    try:
        deadline = time.monotonic() + 120
        while logged_step(place) <= max(100, saved_step(run)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    saved, logged = saved_step(run), max(logged_steps(place))  # on a busy machine one of them may be far ahead
    assert logged > saved, "the kill came too early: nothing was logged beyond the checkpoint"

    random_state = random.getstate(), np.random.get_state()[1].tolist()
    for stop in (saved + 10, logged + 10):
        inline("resume=run", f"train.stop_at={stop}")
        found = assert_complete(place, run, last_step=stop)
        assert (found["mlflow"].state, found["wandb"].state) == ("KILLED", "0")
    assert_complete(place, run)
    assert random_state == (random.getstate(), np.random.get_state()[1].tolist())

    inline(*RUN, f"train.stop_at={logged + 10}", "hydra.run.dir=plain")
    assert_equal_runs(place / "plain", run)

    for path in place.rglob("*"):
        assert not path.is_file() or not any(key.encode() in path.read_bytes() for key in KEYS.values()), path

    # Loggers that cannot write are reported once, and the run finishes.
    (place / "file").touch()
    out = inline(
        *RUN,
        "train.iters=2",
        "train.report_every=1",
        "loggers=[csv,mlflow,trackio]",
        "loggers.mlflow.tracking_uri=sqlite:///file/mlflow.db",
        "loggers.trackio.dir=file/trackio",
        "hydra.run.dir=failing",
    )
    assert "finished at step 2" in out
    for name in ("mlflow", "trackio"):
        assert out.count(f"loggers.{name} failed and is left out: ") == 1
    assert (place / "failing/metrics.csv").read_text().count("\n") == 1 + len(rows(place / "failing"))


@pytest.mark.long
def test_jobs_in_processes_of_their_own_share_the_databases(cli):
    """Both make the tables of a new database at the same time."""
    jobs = ("seed=1,2", "hydra/launcher=process", "hydra.launcher.jobs=2", "hydra.sweep.dir=sweep")
    out = cli("-m", *RUN, "train.iters=2", LOGGERS, *jobs)
    assert "2 of 2" in out
    for job in ("0", "1"):
        assert "failed" not in (cli.folder / "sweep" / job / "run.log").read_text()
        assert_complete(cli.folder, cli.folder / "sweep" / job, group="sweep")


@pytest.mark.long
def test_ctrl_c_stops_a_run_with_loggers_as_any_other(cli):
    run = cli.folder / "run"
    process = cli.start(*RUN, LOGGERS, "hydra.run.dir=run")
    cli.wait_for(run, 20, process)
    while logged_step(cli.folder) < 20:
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "stopped (SIGINT)" in out
    assert time.monotonic() - start < 10  # the checkpoint and what Python needs to end included
    assert_complete(cli.folder, run)


@pytest.mark.long
def test_labels_reach_every_logger_and_a_new_name_continues_the_record(cli):
    """The name is that of the record; what is changed between a stop and the resume is passed on."""
    place, run = cli.folder, cli.folder / "run"
    names = ("name=first try", "tags=sql", "note=why: a, b")
    cli(*RUN, "train.iters=2", "train.report_every=1", LOGGERS, *names, "train.stop_at=1", "hydra.run.dir=run")
    cli("label", "run", "--name", "second", "--tag", "kept", "--note", "better")
    cli("resume=run")
    found = assert_complete(place, run)
    assert "| name | second |" in found["tensorboard"].config and "| tags | sql, kept |" in found["tensorboard"].config
    run_id = json.loads((run / "status.json").read_text())["run_id"]
    labels = records.labels(place, run, run_id)
    assert labels["wandb"] == ("second", ["sql", "kept"], "better")
    assert labels["mlflow"] == ("second", ["sql", "kept"], "better")
    assert labels["trackio"] == ("first try", ["sql", "kept"], "better")  # it keys rows by the name
