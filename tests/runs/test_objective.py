"""One objective ranks the jobs of a sweep everywhere, and a metric knows its direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_several_metrics_have_a_direction_each():
    objective = Objective.of({"objective.metric": ["valid_loss", "tokens_per_second", "peak_memory_gb"]})
    assert objective.metrics == ("valid_loss", "tokens_per_second", "peak_memory_gb")
    assert [single.maximize for single in objective.each] == [False, True, False]
    settings = {"objective.metric": ["valid_loss", "score"], "objective.direction": ["maximize", "minimize"]}
    assert [single.maximize for single in Objective.of(settings).each] == [True, False]
    assert Objective.of({"objective.metric": ["score"]}) == Objective("score", True)  # a list of one is that one
    assert Objective.of({"objective.metric": 3, "objective.direction": {"a": 1}}) == Objective()  # edited by hand


def measured(number: int, loss: float | None, memory: float | None, **fields: object) -> RunInfo:
    found = run(number, loss, **fields)  # type: ignore[arg-type]
    found.rows = [] if memory is None else [{"step": 1, "split": "train", "peak_memory_gb": memory}]
    return found


def names(runs: list[RunInfo]) -> list[str]:
    return [found.path.name for found in runs]


def test_of_several_metrics_the_pareto_front_comes_first():
    objective = Objective.of({"objective.metric": ["valid_loss", "peak_memory_gb"]})
    runs = [
        measured(0, 1.0, 9.0),
        measured(1, 2.0, 5.0),
        measured(2, 2.0, 6.0),  # surpassed by 1, equal in the first
        measured(3, 1.5, 9.5),  # surpassed by 0 in both
        measured(4, 3.0, 1.0),
        measured(5, 0.5, None),  # not known in both
        measured(6, None, 0.5),
        measured(7, 1.0, 9.0),  # equal to 0: neither surpasses the other
        measured(8, 0.1, 0.1, state="diverged"),
    ]
    assert names(objective.front(runs)) == ["0", "7", "1", "4"]
    assert names(objective.rank(runs)) == ["0", "7", "1", "4", "5", "3", "2", "6", "8"]
    best = objective.best(runs)
    assert best is not None and best.path.name == "0"
    assert objective.values(runs[5]) == (0.5, None)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_no_run_of_the_front_is_surpassed_and_every_other_run_is(values):
    runs = [measured(i, float(loss), float(memory)) for i, (loss, memory, _) in enumerate(values)]
    for found, (_, _, score) in zip(runs, values, strict=True):
        found.rows.append({"step": 1, "score": float(score)})
    costs = [(loss, memory, -score) for loss, memory, score in values]
    objective = Objective.of({"objective.metric": ["valid_loss", "peak_memory_gb", "score"]})
    front = {int(name) for name in names(objective.front(runs))}

    def is_surpassed(cost: tuple[int, int, int]) -> bool:
        return any(other != cost and all(map(int.__le__, other, cost)) for other in costs)

    assert front == {i for i, cost in enumerate(costs) if not is_surpassed(cost)}


def test_jobs_of_a_search_rank_by_the_rung_that_they_reached_and_then_by_their_value():
    runs = [run(0, 0.2), run(1, 0.9), run(2, 1.0), run(3, 0.1), run(4, 0.05, "failed"), run(5, 0.3)]
    for found, rung in zip(runs, [50, None, None, 25, 100, 50], strict=True):
        found.rung = rung
    assert names(Objective().rank(runs)) == ["1", "2", "0", "5", "3", "4"]
    several = Objective.of({"objective.metric": ["valid_loss", "peak_memory_gb"]})
    for found in runs:
        found.rows = [{"step": 1, "peak_memory_gb": 10.0 - found.path.name.count("2")}]
    assert names(several.front(runs)) == ["1", "2"]
