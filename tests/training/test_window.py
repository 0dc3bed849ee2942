"""`data.window: null`: what it chooses, and that a run which goes on keeps what was chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.checkpoints.manifest import write
from runner.checkpoints.store import manifest_of
from runner.checkpoints.verify import load_checkpoint
from runner.cli.commands.replay import replay
from runner.common.filesystem import FileSystem
from runner.training.feeding import NEAR_LENGTHS


def position(run: Path, step: int) -> dict[str, int]:
    return json.loads((run / f"checkpoints/step-{step:07d}/train_state.json").read_text())["position"]


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({}, 1),
        ({"lora.dropout": 0.1}, 1),
        ({"train.cpu_engine": False}, NEAR_LENGTHS),
        ({"train.cpu_engine": False, "lora.dropout": 0.1}, NEAR_LENGTHS),
        ({"train.head": "all"}, NEAR_LENGTHS),
        ({"data.window": 5}, 5),
    ],
    ids=str,
)
def test_near_lengths_are_sought_where_padding_is_computed(tiny, train, tmp_path, settings, window):
    run = train(tiny(**{"train.iters": 1, "train.eval_every": 1}, **settings), tmp_path / "run")
    assert position(run, 1) == {"epoch": 0, "batch": 1, "window": window}


def test_a_run_that_goes_on_without_the_engine_keeps_its_order(tiny, train, tmp_path, rows):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=5)
    train(tiny(**{"train.cpu_engine": False}), run, resume=run)
    assert position(run, 12) == position(whole, 12)
    counts = [[(row["step"], row["tokens"]) for row in rows(each) if row["split"] == "train"] for each in (whole, run)]
    assert counts[0] == counts[1]
    other = train(tiny(**{"data.window": 32}), tmp_path / "other")
    assert counts[0] != [(row["step"], row["tokens"]) for row in rows(other) if row["split"] == "train"]
    assert (
        "results may differ in the last digits from an uninterrupted run: engine was" in (run / "run.log").read_text()
    )


def test_an_older_checkpoint_whose_position_has_no_window_goes_on_by_its_settings(
    tiny, train, tmp_path, assert_equal_runs
):
    settings = {"data.window": 3}
    whole = train(tiny(**settings), tmp_path / "whole")
    run = train(tiny(**settings), tmp_path / "run", stop_at=5)
    step = run / "checkpoints/step-0000005"
    loaded = load_checkpoint(step, FileSystem())
    state = json.loads(loaded.files["train_state.json"])
    assert state["position"].pop("window") == 3
    loaded.files["train_state.json"] = json.dumps(state).encode()
    (step / "train_state.json").write_bytes(loaded.files["train_state.json"])
    (step / "manifest.json").write_bytes(write(manifest_of(loaded.checkpoint, loaded.files)))
    train(tiny(**settings), run, resume=run)
    assert "resumed from" in (run / "run.log").read_text()
    assert_equal_runs(whole, run)


def test_a_replay_from_the_beginning_uses_the_window_that_was_chosen_then(tiny, train, tmp_path, monkeypatch):
    """As on another machine, where null chooses otherwise: the settings stand at null, and the run sorted by 3."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    run = train(tiny(**{"data.window": 3, "train.iters": 4, "train.eval_every": 4}), tmp_path / "run")
    file = run / "config.yaml"
    assert file.read_text().count("window: 3") == 1
    file.write_text(file.read_text().replace("window: 3", "window: null"))
    assert replay(run, [4])["reproduced"]
