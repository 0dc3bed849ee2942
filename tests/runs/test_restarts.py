"""Which ends of a process count as deaths, when a run is given up, and what is recorded of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from runner.common.errors import EXIT_CONFIG, EXIT_GPU, EXIT_MEMORY, EXIT_REPLACE, GaveUp
from runner.runs.directory import RunDirectory
from runner.runs.restarts import Deaths, RestartPolicy, find_death, restart_summary


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose process has ended: its config, its status and one checkpoint, by name."""
    folder = tmp_path / "run"
    (folder / "points/step-0000004").mkdir(parents=True)
    (folder / "config.yaml").write_text("checkpoint: {dir: points}\ntrain: {grad_checkpoint: false}\n")
    (folder / "status.json").write_text('{"state": "running", "step": 5}')
    (folder / "metrics.jsonl").write_text('{"step": 6, "split": "train"}\n{"step": 9, "spl')
    (folder / "run.log").write_text("first\n\x1b[2Klast\n")
    return folder


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (-signal.SIGKILL, "SIGKILL"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-signal.SIGABRT, "SIGABRT"),
        (-signal.SIGBUS, "SIGBUS"),
        (EXIT_MEMORY, "out of memory"),
        (EXIT_GPU, "GPU error"),
        (EXIT_REPLACE, "process replaced"),
        *[(code, None) for code in (0, 1, 2, 3, 4, 5, 74, 130, 143)],
        *[(-number, None) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)],
    ],
)
def test_crashes_kills_and_failures_of_memory_or_gpu_are_deaths_and_stops_and_other_errors_are_not(code, cause):
    assert find_death(code) == cause


@pytest.mark.parametrize(
    ("checkpoints", "counts"),
    [
        ([None, None, None], [1, 2, 3]),
        ([None, 5, 5, 5], [1, 1, 2, 3]),
        ([5, 10, 15, 20], [1, 1, 1, 1]),
        ([5, 5, 10, 10, 10], [1, 2, 1, 2, 3]),
        ([10, 5, 5], [1, 2, 3]),  # the newest was damaged and removed
    ],
)
def test_deaths_are_counted_from_the_last_new_checkpoint(checkpoints, counts):
    deaths, found = Deaths(), []
    for checkpoint in checkpoints:
        deaths = deaths.add("SIGKILL", checkpoint)
        found.append(deaths.in_a_row)
    assert found == counts
    assert deaths.are_too_many == (counts[-1] == 3)


def test_replacing_a_process_is_no_death_unless_it_gets_nowhere():
    deaths = Deaths().add("process replaced", 100).add("process replaced", 200).add("SIGKILL", 200)
    assert deaths.in_a_row == 1
    assert deaths.add("process replaced", 200).add("process replaced", 200).are_too_many


def test_a_death_is_recorded_and_its_line_says_where_the_run_continues(run):
    line = RestartPolicy().next_start(-signal.SIGKILL, run)
    assert line == "SIGKILL after step 6: starting again from step 4"
    status = json.loads((run / "status.json").read_text())
    [entry] = status["restarts"]
    assert (entry["cause"], entry["step"], entry["checkpoint"]) == ("SIGKILL", 6, 4)
    assert (run / "run.log").read_text().endswith(f" {line}\n")
    assert not RunDirectory(run).is_locked()


def test_the_third_death_without_a_new_checkpoint_gives_the_run_up_with_the_end_of_its_log(run):
    policy = RestartPolicy()
    assert policy.next_start(-signal.SIGKILL, run) and policy.next_start(EXIT_GPU, run)
    with pytest.raises(GaveUp) as raised:
        policy.next_start(-signal.SIGABRT, run)
    assert "SIGABRT after step 6: 3 times in a row without a new checkpoint" in str(raised.value)
    assert "last" in str(raised.value) and "\x1b" not in str(raised.value) and "resume=" in str(raised.value)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], len(status["restarts"])) == ("interrupted", 3)
    assert status["reason"] == "SIGABRT after step 6: 3 times in a row without a new checkpoint"
    assert restart_summary(status) == "3 (1 SIGKILL, 1 GPU error, 1 SIGABRT)"


@pytest.mark.parametrize("codes", [[EXIT_MEMORY], [-signal.SIGKILL, -signal.SIGKILL], [-signal.SIGSEGV, EXIT_GPU]])
def test_out_of_memory_or_a_second_death_at_one_place_switches_gradient_checkpointing_on(run, codes):
    policy = RestartPolicy()
    lines = [policy.next_start(code, run) for code in codes]
    assert policy.changes == {"train.grad_checkpoint": True}
    assert ["grad_checkpoint=true" in str(line) for line in lines] == [False] * (len(codes) - 1) + [True]


def test_gradient_checkpointing_is_left_alone_where_it_is_on_and_switched_off_where_it_is_refused(run):
    policy = RestartPolicy()
    assert policy.next_start(EXIT_CONFIG, run) is None
    policy.next_start(EXIT_MEMORY, run)
    assert "starting again without it" in str(policy.next_start(EXIT_CONFIG, run))
    assert policy.changes == {"train.grad_checkpoint": False}
    assert policy.next_start(EXIT_CONFIG, run) is None
    policy.next_start(EXIT_MEMORY, run)
    assert policy.changes == {"train.grad_checkpoint": False}
    (run / "config.yaml").write_text("train: {grad_checkpoint: true}\n")
    policy = RestartPolicy()
    policy.next_start(EXIT_MEMORY, run)
    assert policy.changes == {}


@pytest.mark.parametrize("status", ["", "[]", '{"state": "running", "step": -1, "restarts": "x"}'])
def test_a_damaged_status_does_not_end_the_supervision(run, status):
    (run / "status.json").write_text(status)
    assert RestartPolicy().next_start(-signal.SIGKILL, run) == "SIGKILL after step 6: starting again from step 4"


def test_a_directory_that_another_process_holds_is_left_as_it_is(run):
    before = (run / "status.json").read_text()
    holder = RunDirectory(run)
    holder.lock()
    assert RestartPolicy().next_start(-signal.SIGKILL, run)
    assert (run / "status.json").read_text() == before
    holder.unlock()


def test_a_process_that_claimed_nothing_is_started_again_twice(tmp_path):
    policy = RestartPolicy()
    for run in (None, tmp_path):  # nothing is known, or nothing is stored
        assert policy.next_start(-signal.SIGBUS, run) == "SIGBUS before the run had stored anything: starting again"
    with pytest.raises(GaveUp, match="3 times in a row"):
        policy.next_start(-signal.SIGBUS, None)
    assert list(tmp_path.iterdir()) == []
