"""What is due after an update is a pure function of the step and the plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runner.training import plan as events
from runner.training.plan import TrainingPlan


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 50))
def test_the_last_step_is_always_reported_and_evaluated(iters, report, every):
    plan = TrainingPlan(iters, report, every, evaluates=True)
    assert events.is_report_due(iters, plan) and events.is_evaluation_due(iters, plan)
    assert [s for s in range(1, iters + 1) if events.is_evaluation_due(s, plan)] == sorted(
        {*range(every, iters + 1, every), iters}
    )
    assert not any(
        events.is_evaluation_due(s, TrainingPlan(iters, report, every, evaluates=False)) for s in range(1, iters + 1)
    )


def test_where_a_run_stops_decides_nothing_of_what_is_due():
    plans = [TrainingPlan(100, 10, 20, evaluates=True, stop_at=stop) for stop in (None, 15, 50)]
    for step in range(1, 101):
        assert len({(events.is_report_due(step, p), events.is_evaluation_due(step, p)) for p in plans}) == 1


def test_better_needs_more_than_min_delta_and_patience_counts():
    assert events.is_better(1.0, None, 0.5)
    assert not events.is_better(0.6, 1.0, 0.5)
    assert events.is_better(0.4, 1.0, 0.5)
    plan = TrainingPlan(100, 10, 20, evaluates=True, patience=2)
    assert [events.is_out_of_patience(n, plan) for n in range(4)] == [False, False, True, True]
    assert not events.is_out_of_patience(99, TrainingPlan(100, 10, 20, evaluates=True))
