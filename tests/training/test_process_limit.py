"""The process of a supervised run is replaced after its updates, or where its memory grows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.common.errors import EXIT_REPLACE
from runner.config import serialize
from runner.config.invocation import Supervision
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import ResumeSource, RunSpec
from runner.training import process_limit
from runner.training.process_limit import ProcessLimit, has_leaked


def updates_until_reached(limit: ProcessLimit, at_most: int) -> int | None:
    for made in range(1, at_most + 1):
        limit.count_update()
        if limit.is_reached():
            return made
    return None


def test_the_typed_number_counts_on_every_device_and_nothing_counts_without_a_supervisor():
    assert updates_until_reached(ProcessLimit(Supervision(7)), 20) == 7
    assert updates_until_reached(ProcessLimit(None), 2 * process_limit.UPDATES) is None


@pytest.mark.parametrize(("on_cpu", "reached"), [(True, None), (False, process_limit.UPDATES)])
def test_by_default_a_process_is_replaced_on_a_gpu_alone(monkeypatch, on_cpu, reached):
    monkeypatch.setattr(process_limit, "on_cpu", lambda: on_cpu)  # there is no GPU here
    assert updates_until_reached(ProcessLimit(Supervision()), 2 * process_limit.UPDATES) == reached


def test_memory_that_doubles_between_updates_replaces_the_process_on_a_gpu(monkeypatch):
    active = iter([2e9] * 50 + [4.1e9] * 50)
    monkeypatch.setattr(process_limit, "on_cpu", lambda: False)  # there is no GPU here
    monkeypatch.setattr(process_limit.mx, "get_active_memory", lambda: next(active))
    assert updates_until_reached(ProcessLimit(Supervision()), 90) in range(45, 61)


def test_growth_counts_from_a_gigabyte():
    assert not has_leaked(settled=1_000_000, active=900_000_000)
    assert has_leaked(settled=1_000_000, active=1_200_000_000)
    assert not has_leaked(settled=10_000_000_000, active=19_000_000_000)
    assert has_leaked(settled=10_000_000_000, active=21_000_000_000)


def test_a_replaced_process_has_saved_and_the_next_one_makes_the_run_equal(tiny, train, tmp_path, assert_equal_runs):
    from runner.training.run import train_run

    config = tiny(**{"lora.dropout": 0.2, "train.iters": 10, "checkpoint.every": 4})
    whole = train(config, tmp_path / "whole")
    directory = RunDirectory(tmp_path / "run")
    directory.claim()
    spec = RunSpec(config, serialize.to_dict(config), directory, None, "0" * 16, supervise=Supervision(7))
    with pytest.raises(SystemExit) as ended:
        train_run(spec)
    assert ended.value.code == EXIT_REPLACE
    assert (
        directory.read_status() | {"state": "interrupted", "step": 7, "last_checkpoint": 7} == directory.read_status()
    )
    train_run(replace(spec, source=ResumeSource(directory.path)))
    assert_equal_runs(whole, directory.path)
