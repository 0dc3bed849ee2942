"""When a run reports, evaluates and stops is a pure function of its progress and its plan."""

from __future__ import annotations

import dataclasses
import signal

from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoints.save_policy import StopReason, is_end
from runner.config.schema import TrainConfig
from runner.training.plan import TrainingPlan, evaluation_count

PLAN = TrainingPlan(iters=100, report_every=10, eval_every=20, eval_at=frozenset(), evaluates=True)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 50), st.lists(st.integers(1, 300), max_size=4))
def test_the_last_step_is_always_reported_and_evaluated(
    iters: int, report_every: int, eval_every: int, eval_at: list[int]
) -> None:
    plan = TrainingPlan(iters, report_every, eval_every, frozenset(eval_at), evaluates=True)
    assert plan.is_report_due(iters) and plan.is_evaluation_due(iters)
    evaluated = [step for step in range(1, iters + 1) if plan.is_evaluation_due(step)]
    further = {step for step in eval_at if step <= iters}
    assert evaluated == sorted({*range(eval_every, iters + 1, eval_every), *further, iters})
    assert len(evaluated) == evaluation_count(TrainConfig(eval_every=eval_every, eval_at=eval_at), iters)
    without_data = dataclasses.replace(plan, evaluates=False)
    assert not any(without_data.is_evaluation_due(step) for step in range(1, iters + 1))


def test_stop_at_does_not_change_what_is_due() -> None:
    plans = [dataclasses.replace(PLAN, stop_at=stop_at) for stop_at in (None, 15, 50)]
    for step in range(1, 101):
        assert len({(plan.is_report_due(step), plan.is_evaluation_due(step)) for plan in plans}) == 1


def test_a_run_stops_at_its_end_at_stop_at_and_when_its_patience_is_used_up() -> None:
    plan = dataclasses.replace(PLAN, stop_at=50, patience=2)
    assert plan.stop_reason(49, 1) is None
    assert plan.stop_reason(50, 1) is StopReason.STOP_AT
    assert plan.stop_reason(49, 2) is plan.stop_reason(50, 2) is StopReason.EARLY_STOPPING
    assert plan.stop_reason(100, 2) is StopReason.FINISHED
    assert PLAN.stop_reason(99, 99) is None


def test_a_signal_takes_precedence_and_leaves_the_run_to_be_resumed() -> None:
    for received in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        stop = PLAN.stop_reason(100, 0, received)
        assert stop is not None and stop.value == received.name and not stop.is_completion
    assert [reason for reason in StopReason if reason.is_completion] == [
        StopReason.FINISHED,
        StopReason.EARLY_STOPPING,
    ]


def test_every_stop_reason_is_a_reason_to_save_the_last_state() -> None:
    assert all(is_end([reason.value]) for reason in StopReason)
