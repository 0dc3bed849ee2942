"""metrics.csv holds the rows of metrics.jsonl: in a new run, after a resume, and in a branch."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from runner.common.errors import StorageError
from runner.loggers.csv import COLUMNS, CsvLogger
from runner.loggers.logged_run import LoggedRow, LoggedRun

RUN = (
    "model=tiny",
    "data=tiny",
    "lora.num_layers=1",
    "train.report_every=2",
    "train.eval_every=2",
    "checkpoint.every=2",
    "train.cache_baseline=false",
    "train.test=true",
    "loggers=csv",
)


def run_in(folder: Path, *rows: dict[str, Any]) -> LoggedRun:
    return LoggedRun(folder, "0123", "run", None, (), {}, [LoggedRow(row) for row in rows])


def steps(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as lines:
        return [(row["step"], row["split"]) for row in csv.DictReader(lines)]


def rows(run: Path) -> list[tuple[str, str]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(str(row["step"]), row["split"]) for row in map(json.loads, lines)]


def test_the_file_is_made_anew_from_the_rows_that_stay(tmp_path: Path) -> None:
    first = CsvLogger("metrics.csv")
    first.open(run_in(tmp_path))
    for step in (2, 4):
        first.log(LoggedRow({"step": step, "split": "train", "loss": 1.5, "unknown": 1}))
    first.close("stopped")
    again = CsvLogger("metrics.csv")
    again.open(run_in(tmp_path, {"step": 2, "split": "train", "loss": 1.5}))
    again.log(LoggedRow({"step": 3, "split": "valid"}))
    again.close("finished")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == [",".join(COLUMNS), "2,train,1.5,,,,,,", "3,valid,,,,,,,"]


def test_scores_and_skipped_updates_have_columns_where_there_are_any(cli, tmp_path: Path) -> None:
    settings = ("data.metric=exact_match", "data.metric_rows=1", "data.max_new_tokens=2", "train.on_nonfinite=skip")
    cli(*RUN, *settings, "train.iters=2", "hydra.run.dir=run")
    with (cli.folder / "run/metrics.csv").open(newline="") as lines:
        written = list(csv.DictReader(lines))
    assert [row["score"] for row in written if row["split"] == "test"].count("0.0") >= 2
    assert [row["skipped_updates"] for row in written if row["split"] == "train"] == ["0"]

    logger = CsvLogger("metrics.csv")
    logger.open(run_in(tmp_path, {"step": 2, "split": "test", "score": 0.5}))
    logger.close("finished")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [f"{','.join(COLUMNS)},score", "2,test,,,,,,,,0.5"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CsvLogger("metrics.csv")
    logger.open(run_in(tmp_path, {"step": 2}))
    logger.close("stopped")
    before = (tmp_path / "metrics.csv").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("runner.common.filesystem._write", full)
    with pytest.raises(StorageError, match="metrics.csv"):
        CsvLogger("metrics.csv").open(run_in(tmp_path))
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_a_resume_takes_back_the_rows_that_metrics_jsonl_takes_back(cli) -> None:
    cli(*RUN, "train.iters=4", "hydra.run.dir=run")
    run = cli.folder / "run"
    assert ("4", "test") in steps(run / "metrics.csv")
    cli("resume=run", "train.iters=6")
    assert steps(run / "metrics.csv") == rows(run)
    assert [step for step, split in steps(run / "metrics.csv") if split == "test"] == ["6"]


@pytest.mark.slow
def test_a_branch_has_the_rows_before_the_branch(cli) -> None:
    cli(*RUN, "train.iters=6", "hydra.run.dir=run")
    cli("resume=run/checkpoints/step-0000004", "hydra.run.dir=branch", "train.iters=6")
    branch = cli.folder / "branch"
    assert steps(branch / "metrics.csv") == rows(branch)
    assert ("2", "valid") in steps(branch / "metrics.csv")
