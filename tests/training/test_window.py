"""`data.window`: the same batches on every backend, and runs that were stored with null keep their order of batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_edits import edit_json

from runner.cli.commands.replay import replay
from runner.common.errors import ConfigError
from runner.config.schema import DataConfig

cpu_engine = pytest.mark.cpu("runs of the CPU engine, the second backend")


def position(run: Path, step: int) -> dict[str, int]:
    return json.loads((run / f"checkpoints/step-{step:07d}/train_state.json").read_text())["position"]


def store_null(run: Path, window: int) -> None:
    """Make `run` one of an earlier version: its settings leave the window to the backend."""
    file = run / "config.yaml"
    assert file.read_text().count(f"window: {window}") == 1
    file.write_text(file.read_text().replace(f"window: {window}", "window: null"))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        edit_json(checkpoint, "train_state.json", lambda state: state["hyperparameters"].update({"data.window": None}))


def forget_window(run: Path) -> None:
    """Make the checkpoints of `run` such as were written before positions recorded the window."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        edit_json(checkpoint, "train_state.json", lambda state: state["position"].pop("window"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora.dropout": 0.1},
        {"train.cpu_engine": False},
        {"train.head": "all"},
        {"data.window": 5},
    ],
    ids=str,
)
def test_every_backend_uses_the_window_of_the_settings(tiny, train, tmp_path, settings):
    run = train(tiny(**{"train.iters": 1, "train.eval_every": 1}, **settings), tmp_path / "run")
    assert position(run, 1) == {"epoch": 0, "batch": 1, "window": settings.get("data.window", DataConfig.window)}


@cpu_engine
def test_a_resume_on_another_backend_keeps_the_order_of_batches(tiny, train, tmp_path, rows):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=5)
    train(tiny(**{"train.cpu_engine": False}), run, resume=run)
    assert position(run, 12) == position(whole, 12)
    counts = [[(row["step"], row["tokens"]) for row in rows(each) if row["split"] == "train"] for each in (whole, run)]
    assert counts[0] == counts[1]
    other = train(tiny(**{"data.window": 8}), tmp_path / "other")
    assert counts[0] != [(row["step"], row["tokens"]) for row in rows(other) if row["split"] == "train"]
    log = (run / "run.log").read_text()
    assert "may differ in the last digits from an uninterrupted run: CPU engine was" in log


def test_a_checkpoint_whose_position_has_no_window_resumes_with_that_of_its_settings(
    tiny, train, tmp_path, assert_equal_runs
):
    settings = {"data.window": 3}
    whole = train(tiny(**settings), tmp_path / "whole")
    run = train(tiny(**settings), tmp_path / "run", stop_at=5)
    forget_window(run)
    train(tiny(**settings), run, resume=run)
    assert "resumed from" in (run / "run.log").read_text()
    assert_equal_runs(whole, run)


@pytest.mark.parametrize("typed", [None, 3])
def test_a_run_stored_with_null_resumes_with_the_window_of_its_checkpoint(
    tiny, train, tmp_path, assert_equal_runs, typed
):
    whole = train(tiny(**{"data.window": 3}), tmp_path / "whole")
    run = train(tiny(**{"data.window": 3}), tmp_path / "run", stop_at=5)
    store_null(run, 3)
    train(tiny(**{"data.window": typed}), run, resume=run)
    assert "resumed from" in (run / "run.log").read_text()
    assert_equal_runs(whole, run)


def test_a_run_stored_with_null_refuses_another_window_than_its_checkpoint(tiny, train, tmp_path):
    run = train(tiny(**{"data.window": 3}), tmp_path / "run", stop_at=5)
    store_null(run, 3)
    with pytest.raises(ConfigError, match=r"data\.window was 3 and cannot become 4"):
        train(tiny(**{"data.window": 4}), run, resume=run)


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        pytest.param({}, 1, marks=cpu_engine),
        pytest.param({"lora.dropout": 0.1}, 1, marks=cpu_engine),
        ({"train.cpu_engine": False}, 64),
        ({"train.cpu_engine": False, "lora.dropout": 0.1}, 64),
        ({"train.head": "all"}, 64),
    ],
    ids=str,
)
def test_null_without_a_recorded_window_means_what_it_meant_then(
    tiny, train, tmp_path, assert_equal_runs, settings, window
):
    whole = train(tiny(**{"data.window": window}, **settings), tmp_path / "whole")
    run = train(tiny(**{"data.window": window}, **settings), tmp_path / "run", stop_at=5)
    store_null(run, window)
    forget_window(run)
    train(tiny(**{"data.window": None}, **settings), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_replay_from_the_beginning_uses_the_recorded_window(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    run = train(tiny(**{"data.window": 3, "train.iters": 4, "train.eval_every": 4}), tmp_path / "run")
    store_null(run, 3)
    assert replay(run, [4]).reproduced
