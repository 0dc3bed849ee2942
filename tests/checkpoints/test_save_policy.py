"""When a save is due, and that no clock can spoil it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoints.save_policy import SavePolicy, SaveReason, parse_save_reasons
from runner.training.plan import StopReason

UPDATES, MINUTES, BEST = SaveReason.UPDATES, SaveReason.MINUTES, SaveReason.BEST
FINISHED, SIGTERM = SaveReason.FINISHED, SaveReason.SIGTERM
YEAR = 365 * 24 * 3600.0


@pytest.mark.parametrize(
    ("policy", "step", "more", "reasons"),
    [
        (SavePolicy(100), 100, {}, (UPDATES,)),
        (SavePolicy(100), 99, {}, ()),
        (SavePolicy(100), 0, {"best": True, "stopping": FINISHED}, ()),
        (SavePolicy(None, 10), 7, {"minutes_since_save": 10.0}, (MINUTES,)),
        (SavePolicy(None, 10), 7, {"minutes_since_save": 9.99}, ()),
        (SavePolicy(None, 0.5), 7, {"minutes_since_save": 3.0}, (MINUTES,)),
        (SavePolicy(5, 10), 5, {"minutes_since_save": 12.0}, (UPDATES, MINUTES)),
        (SavePolicy(100), 7, {"best": True}, (BEST,)),
        (SavePolicy(100), 7, {"stopping": SIGTERM}, (SIGTERM,)),
        (SavePolicy(7), 7, {"best": True, "stopping": FINISHED}, (UPDATES, BEST, FINISHED)),
        (SavePolicy(None), 100, {"minutes_since_save": YEAR}, ()),
        (SavePolicy(None, 10), 7, {"minutes_since_save": math.nan}, ()),
    ],
)
def test_a_save_is_due_for_the_reasons_that_apply(
    policy: SavePolicy, step: int, more: dict, reasons: tuple[SaveReason, ...]
) -> None:
    assert policy.due(step, **{"minutes_since_save": 0.0} | more) == reasons


def test_only_intervals_count_as_scheduled_and_only_stop_reasons_as_the_end() -> None:
    assert {reason for reason in SaveReason if reason.is_scheduled} == {UPDATES, MINUTES}
    assert {reason for reason in SaveReason if reason.is_end} == set(SaveReason) - {UPDATES, MINUTES, BEST}


def test_the_reasons_of_old_and_new_manifests_are_understood() -> None:
    assert parse_save_reasons([reason.value for reason in SaveReason]) == set(SaveReason)
    assert parse_save_reasons(["every 100", "every 0.5 minutes", "best"]) == {UPDATES, MINUTES, BEST}
    assert parse_save_reasons(["every 5 minutes"]) == {MINUTES}
    assert parse_save_reasons(["finished", "stop_at", "SIGTERM"]) == {FINISHED, SaveReason.STOP_AT, SIGTERM}
    assert parse_save_reasons(["of a later version"]) == set()


def test_every_reason_to_stop_is_a_reason_to_save() -> None:
    assert all(SaveReason(stop.value).is_end for stop in StopReason)


@given(st.integers(1, 50), st.integers(1, 400))
def test_saves_by_step_fall_on_the_multiples_and_nowhere_else(every: int, steps: int) -> None:
    due = [step for step in range(steps + 1) if SavePolicy(every).due(step, minutes_since_save=YEAR)]
    assert due == list(range(every, steps + 1, every))
