"""When a save is due, and that no clock can spoil it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoints.save_policy import SavePolicy, SaveTimer, is_scheduled

YEAR = 365 * 24 * 3600.0


@pytest.mark.parametrize(
    ("schedule", "step", "more", "why"),
    [
        (SavePolicy(100), 100, {}, ("every 100",)),
        (SavePolicy(100), 99, {}, ()),
        (SavePolicy(100), 0, {"best": True, "stopping": "finished"}, ()),
        (SavePolicy(None, 10), 7, {"minutes_since_save": 10.0}, ("every 10 minutes",)),
        (SavePolicy(None, 10), 7, {"minutes_since_save": 9.99}, ()),
        (SavePolicy(None, 0.5), 7, {"minutes_since_save": 3.0}, ("every 0.5 minutes",)),
        (SavePolicy(5, 10), 5, {"minutes_since_save": 12.0}, ("every 5", "every 10 minutes")),
        (SavePolicy(100), 7, {"best": True}, ("best",)),
        (SavePolicy(100), 7, {"stopping": "SIGTERM"}, ("SIGTERM",)),
        (SavePolicy(7), 7, {"best": True, "stopping": "finished"}, ("every 7", "best", "finished")),
        (SavePolicy(None), 100, {"minutes_since_save": YEAR}, ()),
        (SavePolicy(None, 10), 7, {"minutes_since_save": math.nan}, ()),
    ],
)
def test_the_table(schedule: SavePolicy, step: int, more: dict, why: tuple[str, ...]) -> None:
    assert schedule.due(step, **{"minutes_since_save": 0.0} | more) == why


@pytest.mark.parametrize("wrong", [(0, None), (-1, None), (None, 0), (None, -1.0), (None, math.nan)])
def test_an_interval_that_is_not_positive_is_refused(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="interval"):
        SavePolicy(*wrong)


def test_only_saves_that_a_schedule_asked_for_count_as_scheduled() -> None:
    assert is_scheduled(SavePolicy(100).due(100, minutes_since_save=0, best=True))
    assert is_scheduled(SavePolicy(None, 1).due(7, minutes_since_save=2))
    assert not is_scheduled(SavePolicy(100).due(7, minutes_since_save=0, best=True, stopping="finished"))
    assert not is_scheduled(())


class _Clock:
    def __init__(self) -> None:
        self.now = 5 * YEAR

    def __call__(self) -> float:
        return self.now


def test_minutes_count_from_the_last_save() -> None:
    clock = _Clock()
    since = SaveTimer(clock)
    clock.now += 90
    assert since.minutes() == 1.5
    since.restart()
    assert since.minutes() == 0


def test_a_clock_that_jumps_forward_a_year_costs_one_save() -> None:
    clock, schedule = _Clock(), SavePolicy(None, 10)
    since = SaveTimer(clock)
    clock.now += YEAR
    assert schedule.due(1, minutes_since_save=since.minutes())
    since.restart()
    clock.now += 60
    assert not schedule.due(2, minutes_since_save=since.minutes())


def test_a_clock_that_jumps_back_a_year_delays_a_save_by_one_interval_at_most() -> None:
    clock, schedule = _Clock(), SavePolicy(None, 10)
    since = SaveTimer(clock)
    clock.now -= YEAR
    assert not schedule.due(1, minutes_since_save=since.minutes())
    clock.now += 601
    assert schedule.due(2, minutes_since_save=since.minutes())


@given(st.integers(1, 50), st.integers(1, 400))
def test_saves_by_step_fall_on_the_multiples_and_nowhere_else(every: int, steps: int) -> None:
    due = [step for step in range(steps + 1) if SavePolicy(every).due(step, minutes_since_save=YEAR)]
    assert due == list(range(every, steps + 1, every))
