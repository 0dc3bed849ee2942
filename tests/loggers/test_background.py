"""A logger that fails is reported once and completed at the end; one that hangs does not keep the run from ending."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from runner.loggers import background
from runner.loggers.background import BackgroundLogger
from runner.loggers.logged_run import LoggedRow, LoggedRun, pair_rows


class Memory:
    """A logger that holds what it was given, and raises where a `fault` says so."""

    def __init__(self, *faults: str) -> None:
        self.faults = list(faults)
        self.steps: list[int] = []
        self.states: list[str] = []

    def load(self, run: LoggedRun) -> None:
        self._raise("load")

    def open(self, run: LoggedRun) -> None:
        self._raise("open")
        self.steps = [row.step for row in run.rows]

    def log(self, row: LoggedRow) -> None:
        self._raise(f"log {row.step}")
        self.steps.append(row.step)

    def close(self, state: str) -> None:
        self._raise("close")
        self.states.append(state)

    def _raise(self, call: str) -> None:
        if call in self.faults:
            self.faults.remove(call)
            raise SystemExit("its library\ngives up") if call == "close" else OSError("no route to host")


def write_rows(folder: Path, steps: range) -> None:
    lines = [json.dumps({"step": step, "split": "train", "loss": 1.0}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))


def run_in(folder: Path) -> LoggedRun:
    return LoggedRun(folder, "0123", "run", None, (), {}).with_rows()


@pytest.mark.parametrize("fault", ["load", "open", "log 3", "log 5"])
def test_what_a_failed_logger_missed_is_logged_at_the_end(tmp_path, fault):
    write_rows(tmp_path, range(1, 3))
    failing, other = Memory(fault), Memory()
    loggers = background.build_background({"failing": failing, "other": other})
    for logger in loggers:
        logger.open(run_in(tmp_path))
        for step in range(3, 6):
            logger.log(LoggedRow({"step": step}))
    write_rows(tmp_path, range(1, 6))
    messages = background.finish(loggers, "finished", 10)
    assert messages == [
        "loggers.failing failed and is left out: OSError: no route to host; metrics.jsonl has every row, "
        "and the end of the run, or a resume, tries again.",
        "loggers.failing has all rows now.",
    ]
    assert failing.steps == other.steps == [1, 2, 3, 4, 5]
    assert failing.states == other.states == ["finished"]
    assert background.finish(loggers, "failed", 10) == []  # closed already


def test_a_logger_that_fails_for_good_is_reported_once(tmp_path):
    logger = BackgroundLogger("memory", Memory("open", "open", "close"))
    logger.open(run_in(tmp_path))
    logger.log(LoggedRow({"step": 1}))
    (message,) = background.finish([logger], "stopped", 10)
    assert message.startswith("loggers.memory failed") and logger.new_messages() == []


def test_whatever_a_library_raises_where_it_is_closed_is_a_message(tmp_path):
    logger = BackgroundLogger("memory", Memory("close"))
    logger.open(run_in(tmp_path))
    (message,) = background.finish([logger], "finished", 10)
    assert "SystemExit: its library gives up" in message


def test_a_logger_that_hangs_is_left_behind(tmp_path):
    released = threading.Event()

    class Hanging(Memory):
        def log(self, row: LoggedRow) -> None:
            released.wait(60)

    loggers = background.build_background({"hanging": Hanging(), "other": Memory()})
    for logger in loggers:
        logger.open(run_in(tmp_path))
        logger.log(LoggedRow({"step": 1}))
    start = time.monotonic()
    messages = background.finish(loggers, "stopped", 0.3)
    released.set()
    assert messages == ["loggers.hanging did not end within 0 seconds; metrics.jsonl has every row."]
    assert time.monotonic() - start < 5


def test_samples_come_with_the_row_that_scores_them():
    metrics = [
        {"step": 0, "split": "valid", "loss": 2.0},
        {"step": 0, "split": "valid", "score": 0.5, "metric": "exact_match", "time": "2026-11-24T10:00:00Z"},
    ]
    samples = [{"step": 0, "row": 0}, {"step": 0, "row": 1}, {"step": 9, "row": 0}]
    loss, score = pair_rows(metrics, samples)
    assert (loss.samples, score.samples) == ((), samples[:2])
    assert (loss.key, score.key) == ("0-valid-loss", "0-valid-score")
    assert score.values() == {"valid/score": 0.5}
    assert (loss.seconds, score.seconds) == (0.0, 1795514400.0)
