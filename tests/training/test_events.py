"""What is due after an update is a pure function of the step and the plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runner.training import events
from runner.training.events import Plan


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 50))
def test_the_last_step_is_always_reported_and_evaluated(iters, report, every):
    plan = Plan(iters, report, every, evaluates=True)
    assert events.reports(iters, plan) and events.evaluates(iters, plan)
    assert [s for s in range(1, iters + 1) if events.evaluates(s, plan)] == sorted(
        {*range(every, iters + 1, every), iters}
    )
    assert not any(events.evaluates(s, Plan(iters, report, every, evaluates=False)) for s in range(1, iters + 1))


def test_where_a_run_stops_decides_nothing_of_what_is_due():
    plans = [Plan(100, 10, 20, evaluates=True, stop_at=stop) for stop in (None, 15, 50)]
    for step in range(1, 101):
        assert len({(events.reports(step, p), events.evaluates(step, p)) for p in plans}) == 1


def test_better_needs_more_than_min_delta_and_patience_counts():
    assert events.better(1.0, None, 0.5)
    assert not events.better(0.6, 1.0, 0.5)
    assert events.better(0.4, 1.0, 0.5)
    plan = Plan(100, 10, 20, evaluates=True, patience=2)
    assert [events.stopped_early(n, plan) for n in range(4)] == [False, False, True, True]
    assert not events.stopped_early(99, Plan(100, 10, 20, evaluates=True))
