"""Tokens and time of a run at any step, from its rows, without the time of evaluations and interruptions."""

from __future__ import annotations

import pytest

from runner.runs.timeline import Timeline


def train(step: int, tokens: int, rate: float) -> dict:
    return {"step": step, "split": "train", "loss": 1.0, "tokens": tokens, "tokens_per_second": rate}


ROWS = [
    {"step": 0, "split": "valid", "loss": 2.0, "tokens": 0, "tokens_per_second": 900.0},
    {"step": 2, "split": "valid", "loss": 2.0, "tokens": 180, "tokens_per_second": 900.0},
    train(4, 400, 100.0),
    train(8, 800, 50.0),
    {"step": 8, "split": "valid", "loss": 1.0, "tokens": 800, "tokens_per_second": 900.0},
    {"step": 9, "split": "valid", "loss": 1.0, "tokens": 910, "tokens_per_second": 900.0},
    {"step": 9, "split": "test", "loss": 1.0},
]


def test_tokens_are_those_of_the_rows_and_time_is_that_of_the_updates() -> None:
    timeline = Timeline.of(ROWS)
    assert [timeline.at(step, "tokens") for step in (0, 2, 3, 4, 8, 9)] == [0, 180, 290, 400, 800, 910]
    assert [timeline.at(step, "time") for step in (0, 2, 4, 6, 8)] == [0, 2, 4, 8, 12]
    assert timeline.at(9, "time") == 14  # after the last report as before it
    assert timeline.at(7, "step") == 7
    assert timeline.tokens_reported == 800


@pytest.mark.parametrize("rows", [[], ROWS[:1], [{"step": 3, "split": "train", "loss": 1.0}], [train(3, 30, 0.0)]])
def test_rows_that_do_not_say_have_no_time(rows: list[dict]) -> None:
    assert Timeline.of(rows).at(3, "time") is None
    assert Timeline.of(rows).at(0, "time") == 0


def test_rows_out_of_order_and_broken_ones_are_left_out() -> None:
    broken = [train(4, 400, 100.0), train(2, 1, 1.0), {**train(6, 0, 1.0), "tokens": "many"}, train(8, 800, 50.0)]
    assert Timeline.of(broken) == Timeline.of([broken[0], broken[3]])
