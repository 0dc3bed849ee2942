"""One objective ranks the jobs of a sweep everywhere, and a metric knows its direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.runs.find import read_sweep
from runner.runs.inspect import RunInfo
from runner.runs.objective import Objective, objective_of


def run(number: int, loss: float | None, state: str = "finished", **settings: object) -> RunInfo:
    return RunInfo(path=Path(str(number)), state=state, best_loss=loss, settings=settings)


@pytest.mark.parametrize(
    ("metric", "direction", "maximize"),
    [
        ("valid_loss", None, False),
        ("test_loss", None, False),
        ("score", None, True),
        ("score", "minimize", False),
        ("valid_loss", "maximize", True),
    ],
)
def test_the_metric_knows_its_direction_unless_one_is_set(metric, direction, maximize):
    assert Objective.of({"objective.metric": metric, "objective.direction": direction}).maximize is maximize


def test_the_best_comes_first_and_runs_without_a_value_last_in_their_order():
    runs = [run(0, None), run(1, 3.0), run(2, 1.0), run(3, 0.5, "diverged"), run(4, 1.0)]
    assert [found.path.name for found in Objective().rank(runs)] == ["2", "4", "1", "0", "3"]
    best, best_of_none = Objective().best(runs), Objective().best(runs[:1])
    assert best is runs[2] and best_of_none is None


def test_the_objective_of_a_sweep_is_the_one_that_its_runs_stored():
    assert objective_of([run(0, 1.0), run(1, 1.0, **{"objective.metric": "score"})]) == Objective("score", True)
    assert objective_of([run(0, 1.0)]) == Objective()


def test_a_sweep_reports_the_best_by_its_own_metric(tmp_path):
    (tmp_path / "multirun.yaml").write_text("")
    for number, (loss, score) in enumerate([(1.0, 0.25), (2.0, 0.75)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.yaml").write_text("objective: {metric: score}\n")
        (folder / "status.json").write_text(json.dumps({"state": "finished", "best": {"valid_loss": loss, "step": 5}}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "split": "test", "score": score}) + "\n")
    best = read_sweep(tmp_path).best
    assert best is not None and best.path.name == "1"
