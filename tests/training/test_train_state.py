"""The best loss and the count of bad evaluations follow from the validation losses alone, and survive storing."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.training.train_state import Progress, ReportWindow, UpdateResult

LOSSES = st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=20)


def evaluated(losses: list[float], min_delta: float = 0.0) -> tuple[Progress, list[bool]]:
    """Progress after the validation `losses` of steps 0, 1, 2, …, and for each whether it was the best."""
    progress, best = Progress(), []
    for step, loss in enumerate(losses):
        progress.step = step
        best.append(progress.add_validation(loss, min_delta))
    return progress, best


def test_the_baseline_is_never_the_best() -> None:
    progress, best = evaluated([1.0, 2.0, 3.0])
    assert best == [False, True, False]
    assert (progress.baseline_loss, progress.best) == (1.0, {"step": 1, "valid_loss": 2.0})


@given(LOSSES)
def test_the_best_is_the_lowest_loss_and_of_equal_ones_the_first(losses: list[float]) -> None:
    progress, best = evaluated([9.0, *losses])
    lowest = losses.index(min(losses)) + 1
    assert progress.best == {"step": lowest, "valid_loss": min(losses)}
    assert best[lowest] and not any(best[lowest + 1 :])


def test_an_evaluation_is_bad_unless_the_loss_falls_by_more_than_min_delta() -> None:
    progress, best = evaluated([9.0, 1.0, 0.6, 0.5])  # two steps of less than 0.5, each a new best
    assert (best, progress.bad_evaluations) == ([False, True, True, True], 0)
    progress, best = evaluated([9.0, 1.0, 0.6, 0.5], min_delta=0.5)
    assert (best, progress.bad_evaluations) == ([False, True, True, True], 2)
    assert evaluated([9.0, 1.0, 1.5, 0.4], min_delta=0.5)[0].bad_evaluations == 0


def test_the_current_validation_loss_is_that_of_this_step_only() -> None:
    progress, _ = evaluated([9.0, 1.0])
    assert progress.current_valid_loss == 1.0
    progress.step += 1
    assert progress.current_valid_loss is None and progress.valid_loss == 1.0


def test_stored_progress_is_read_back_exactly() -> None:
    progress, _ = evaluated([9.0, math.pi, 3.0])
    result = UpdateResult(1 / 3, supervised=7, tokens=9, examples=2, measures={"reward": (0.5, 2)}, grad_norm=0.1)
    progress.since_report.add(result)
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress
    assert progress.since_report == ReportWindow(1 / 3, 7, 9, 1, 0.1, 2, {"reward": [0.5, 2]})
    assert progress.since_report.loss == 1 / 6 and progress.since_report.means() == {"reward": 0.25}
    assert "window" in progress.to_dict() and "since_report" not in progress.to_dict()  # as earlier versions store it


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": 1 << 63},
        {"step": True},
        {"step": 1.5},
        {"tokens": "1"},
        {"best_loss": [1]},
        {"more": 1},
        {"since_report": {}},
    ],
    ids=str,
)
def test_stored_progress_of_a_wrong_type_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        Progress.from_dict({**Progress().to_dict(), **changes})
