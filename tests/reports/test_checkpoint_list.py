"""The list of a run's checkpoints says why each is retained, which one is the result, and which cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoints.store import CheckpointStore
from runner.config.schema import Config
from runner.reports.audit import audit_run
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
        store.commit(
            step, files, save_reasons=["every 100 updates"], metrics={} if loss is None else {"valid_loss": loss}
        )


def test_each_checkpoint_has_the_reasons_why_it_is_retained(run: Callable[..., Path]) -> None:
    path = run({100: 3.0, 200: 1.0, 300: 2.0, 400: None}, "checkpoint: {keep_last: 2, keep_best: 1, keep_every: 400}\n")
    checkpoints = list_checkpoints(read_run(path))
    assert {c.step: (c.valid_loss, c.kept_for) for c in checkpoints} == {
        100: (3.0, ()),
        200: (1.0, ("best",)),
        300: (2.0, ("last",)),
        400: (None, ("newest", "last", "every 400")),
    }
    assert {checkpoint.saved_for for checkpoint in checkpoints} == {("every 100 updates",)}


def test_damaged_checkpoints_and_those_of_another_run_are_named(run: Callable[..., Path]) -> None:
    path = run({100: 3.0, 200: 2.0})
    commit(path, "other", {300: 1.0})
    (path / "checkpoints/step-0000200/manifest.json").write_text("{}")
    (path / "checkpoints/step-0000400").symlink_to(path / "checkpoints/step-0000100")
    problems = {checkpoint.step: checkpoint.problem or "" for checkpoint in list_checkpoints(read_run(path))}
    assert problems[100] == ""
    assert "manifest.json: it is cut short" in problems[200]
    assert problems[300] == "left by another run"
    assert "a symbolic link" in problems[400]


def test_the_result_step_comes_from_the_status_or_the_checkpoint_of_the_same_adapter(run: Callable[..., Path]) -> None:
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


def test_checkpoints_in_a_folder_of_another_name_are_found_although_the_config_is_lost(
    run: Callable[..., Path],
) -> None:
    path = run({100: 2.0})
    (path / "checkpoints").rename(path / "saved")
    (path / "config.yaml").unlink()
    info = read_run(path)
    assert checkpoints_folder(info) == path / "saved" and [c.step for c in list_checkpoints(info)] == [100]
    found = audit_run(info)
    assert not any("none is whole" in damage for damage in found.damage) and not found.has_settings


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", ".", "", "[1]"])
def test_a_stored_folder_name_cannot_lead_out_of_the_run(run: Callable[..., Path], name: str) -> None:
    path = run({100: 1.0}, f"checkpoint: {{dir: '{name}'}}\n" if name != "[1]" else "checkpoint: {dir: [1]}\n")
    folder = checkpoints_folder(read_run(path))
    assert folder == path / "checkpoints"


@pytest.mark.parametrize("value", ["many", "-3", "[1]", "1.5"])
def test_invalid_retention_settings_are_replaced_by_the_defaults(run: Callable[..., Path], value: str) -> None:
    path = run({100: 2.0, 200: 1.0}, f"checkpoint: {{keep_last: {value}}}\n")
    assert [checkpoint.kept_for for checkpoint in list_checkpoints(read_run(path))] == [
        ("last",),
        ("newest", "last", "best"),
    ]


def test_a_trained_run_retains_what_its_policy_says(
    tiny: Callable[..., Config], train: Callable[..., Path], tmp_path: Path
) -> None:
    settings = tiny(**{"checkpoint.every": 2, "checkpoint.keep_last": 1, "checkpoint.keep_every": 6})
    run = read_run(train(settings, tmp_path / "run"))
    checkpoints = list_checkpoints(run)
    assert {checkpoint.step: checkpoint.kept_for for checkpoint in checkpoints} == {
        6: ("every 6",),
        12: ("newest", "last", "best", "every 6"),
    }
    assert all(checkpoint.problem is None and checkpoint.size_bytes > 1000 for checkpoint in checkpoints)
    assert result_step(run, checkpoints) == 12
