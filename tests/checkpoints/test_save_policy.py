"""When a save is due, and that no clock can spoil it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoints.save_policy import SavePolicy, StopReason, is_end, is_scheduled

FINISHED, SIGTERM = StopReason.FINISHED, StopReason.SIGTERM
YEAR = 365 * 24 * 3600.0


@pytest.mark.parametrize(
    ("policy", "step", "more", "reasons"),
    [
        (SavePolicy(100), 100, {}, ("every 100 updates",)),
        (SavePolicy(100), 99, {}, ()),
        (SavePolicy(100), 0, {"best": True, "stop": FINISHED}, ()),
        (SavePolicy(None, 10), 7, {"minutes_since_save": 10.0}, ("every 10 minutes",)),
        (SavePolicy(None, 10), 7, {"minutes_since_save": 9.99}, ()),
        (SavePolicy(None, 0.5), 7, {"minutes_since_save": 3.0}, ("every 0.5 minutes",)),
        (SavePolicy(5, 10), 5, {"minutes_since_save": 12.0}, ("every 5 updates", "every 10 minutes")),
        (SavePolicy(100), 7, {"best": True}, ("best",)),
        (SavePolicy(100), 7, {"stop": SIGTERM}, ("SIGTERM",)),
        (SavePolicy(7), 7, {"best": True, "stop": FINISHED}, ("every 7 updates", "best", "finished")),
        (SavePolicy(None), 100, {"minutes_since_save": YEAR}, ()),
        (SavePolicy(None, 10), 7, {"minutes_since_save": math.nan}, ()),
    ],
)
def test_a_save_is_due_for_the_reasons_that_apply(
    policy: SavePolicy, step: int, more: dict, reasons: tuple[str, ...]
) -> None:
    assert policy.reasons_to_save(step, **{"minutes_since_save": 0.0} | more) == reasons


@pytest.mark.parametrize(
    "reason",
    # As written now, and by earlier versions.
    ["every 100 updates", "every 0.5 minutes", "every 100", "every 5 minutes", "every N updates", "every N minutes"],
)
def test_an_interval_of_any_version_is_scheduled_and_no_end(reason: str) -> None:
    assert is_scheduled([reason]) and is_scheduled(["best", reason])
    assert not is_end([reason])


@pytest.mark.parametrize("stop", StopReason)
def test_every_reason_to_stop_is_an_end_and_not_scheduled(stop: StopReason) -> None:
    assert is_end([stop.value]) and is_end(["best", stop.value])
    assert not is_scheduled([stop.value])


@pytest.mark.parametrize("reasons", [[], ["best"], ["of a later version"]])
def test_other_reasons_are_neither_scheduled_nor_an_end(reasons: list[str]) -> None:
    assert not is_scheduled(reasons) and not is_end(reasons)


@given(st.integers(1, 50), st.integers(1, 400))
def test_saves_by_step_fall_on_the_multiples_and_nowhere_else(every: int, steps: int) -> None:
    due = [step for step in range(steps + 1) if SavePolicy(every).reasons_to_save(step, minutes_since_save=YEAR)]
    assert due == list(range(every, steps + 1, every))
