"""The checkpoints of a run as a person sees them: why each stays, which is the result, what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoints.save_policy import SaveReason
from runner.checkpoints.store import CheckpointStore
from runner.config.schema import Config
from runner.reports.checkpoint_list import checkpoints_folder, list_checkpoints, result_step
from runner.runs.inspect import read_run

Losses = dict[int, float | None]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """`run({100: 2.0, 200: None})`: a directory with these checkpoints and losses; settings as YAML lines."""

    def make(losses: Losses, settings: str = "", **status: object) -> Path:
        path = tmp_path / "run"
        path.mkdir()
        (path / "config.yaml").write_text(f"seed: 0\n{settings}")
        (path / "status.json").write_text(json.dumps({"state": "finished", "run_id": "mine", "step": 1, **status}))
        commit(path, "mine", losses)
        return path

    return make


def commit(path: Path, run_id: str, losses: Losses) -> None:
    """Save a checkpoint for each step, scheduled."""
    store = CheckpointStore(path / "checkpoints", run_id)
    for step, loss in losses.items():
        files = {"adapters.safetensors": f"weights of {step}".encode()}
        store.commit(step, files, reasons=[SaveReason.UPDATES], metrics={} if loss is None else {"valid_loss": loss})


def test_each_checkpoint_is_told_with_its_reasons(run: Callable[..., Path]) -> None:
    path = run({100: 3.0, 200: 1.0, 300: 2.0, 400: None}, "checkpoint: {keep_last: 2, keep_best: 1, keep_every: 400}\n")
    told = {one.step: (one.valid_loss, one.kept_for) for one in list_checkpoints(read_run(path))}
    assert told == {
        100: (3.0, ()),
        200: (1.0, ("best",)),
        300: (2.0, ("last",)),
        400: (None, ("newest", "last", "every 400")),
    }


def test_a_damaged_one_and_one_of_another_run_are_named(run: Callable[..., Path]) -> None:
    path = run({100: 3.0, 200: 2.0})
    commit(path, "other", {300: 1.0})
    (path / "checkpoints/step-0000200/manifest.json").write_text("{}")
    (path / "checkpoints/step-0000400").symlink_to(path / "checkpoints/step-0000100")
    problems = {one.step: one.problem or "" for one in list_checkpoints(read_run(path))}
    assert problems[100] == ""
    assert "manifest.json: it is cut short" in problems[200]
    assert problems[300] == "left by another run"
    assert "a symbolic link" in problems[400]


def test_the_result_is_what_the_status_says_else_the_checkpoint_of_the_same_adapter(run: Callable[..., Path]) -> None:
    path = run({100: 3.0, 200: 2.0}, result_step=100)
    info = read_run(path)
    assert result_step(info, list_checkpoints(info)) is None  # there is no adapters/
    (path / "adapters").mkdir()
    shutil.copy(path / "checkpoints/step-0000200/adapters.safetensors", path / "adapters")
    assert result_step(info, list_checkpoints(info)) == 100
    del info.status["result_step"]
    assert result_step(info, list_checkpoints(info)) == 200
    (path / "adapters/adapters.safetensors").write_text("something else")
    assert result_step(info, list_checkpoints(info)) is None


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", ".", "", "[1]"])
def test_a_stored_folder_name_cannot_lead_out_of_the_run(run: Callable[..., Path], name: str) -> None:
    path = run({100: 1.0}, f"checkpoint: {{dir: '{name}'}}\n" if name != "[1]" else "checkpoint: {dir: [1]}\n")
    folder = checkpoints_folder(read_run(path))
    assert folder == path / "checkpoints"


@pytest.mark.parametrize("value", ["many", "-3", "[1]", "1.5"])
def test_a_policy_that_makes_no_sense_is_read_as_the_default(run: Callable[..., Path], value: str) -> None:
    path = run({100: 2.0, 200: 1.0}, f"checkpoint: {{keep_last: {value}}}\n")
    assert [one.kept_for for one in list_checkpoints(read_run(path))] == [("last",), ("newest", "last", "best")]


def test_a_real_run_keeps_what_its_own_policy_says(
    tiny: Callable[..., Config], train: Callable[..., Path], tmp_path: Path
) -> None:
    settings = tiny(**{"checkpoint.every": 2, "checkpoint.keep_last": 1, "checkpoint.keep_every": 6})
    run = read_run(train(settings, tmp_path / "run"))
    told = list_checkpoints(run)
    assert {one.step: one.kept_for for one in told} == {
        6: ("every 6",),
        12: ("newest", "last", "best", "every 6"),
    }
    assert all(one.problem is None and one.size_bytes > 1000 for one in told)
    assert result_step(run, told) == 12
