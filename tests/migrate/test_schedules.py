"""Imported schedules give mlx-lm's learning rates."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.utils import build_schedule

from runner.config import schema
from runner.migrate.convert import CannotImport
from runner.migrate.schedules import scheduled
from runner.training.lr_schedule import learning_rate


def ours(given_: dict, updates: int) -> list[float]:
    groups, values, _ = scheduled(given_, updates)
    return [
        learning_rate(
            update,
            name=groups["schedule"],
            peak=values["optimizer.learning_rate"],
            iters=values.get("schedule.iters", updates),
            warmup=values.get("schedule.warmup", 0),
            **{
                option: values.get(f"schedule.{option}", default)
                for option, default in schema.choice_options("schedule", groups["schedule"]).items()
            },
        )
        for update in range(1, updates + 1)
    ]


def theirs(given_: dict, updates: int) -> list[float]:
    built = build_schedule(given_)
    # The optimizer asks before it counts: update 1 gets the rate of step 0.
    return [float(built(mx.array(step))) for step in range(updates)]


ARGUMENTS = st.one_of(
    st.tuples(st.just("cosine_decay"), st.floats(1e-6, 1e-2), st.integers(1, 60), st.floats(0, 1e-2)),
    st.tuples(st.just("linear_schedule"), st.floats(1e-6, 1e-2), st.integers(1, 60), st.floats(0, 1e-2)),
)


@settings(deadline=None, max_examples=40)
@given(drawn=ARGUMENTS, warmup=st.integers(0, 20))
def test_rates_are_equal_from_the_end_of_the_warmup_on_and_sum_to_the_same_before(drawn, warmup):
    name, peak, steps, end = drawn
    arguments = [peak, steps, end] if name == "cosine_decay" else [peak, end, steps]
    old = {"name": name, "arguments": arguments, "warmup": warmup}
    updates = warmup + steps + 10
    there, here = theirs(old, updates), ours(old, updates)
    first = warmup + 1 if warmup else 0
    assert here[first:] == pytest.approx(there[first:], rel=1e-4, abs=1e-8)
    assert sum(here[:first]) == pytest.approx(sum(there[:first]), rel=1e-4, abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(peak=st.floats(1e-6, 1e-2), factor=st.floats(0.5, 1.1), warmup=st.integers(0, 20), updates=st.integers(1, 60))
def test_an_exponential_decay_has_equal_rates_until_the_end_of_the_run(peak, factor, warmup, updates):
    old = {"name": "exponential_decay", "arguments": [peak, factor], "warmup": warmup}
    updates += warmup + 2
    there, here = theirs(old, updates), ours(old, updates)
    first = warmup + 1 if warmup else 0
    assert here[first:] == pytest.approx(there[first:], rel=1e-4)
    assert sum(here[:first]) == pytest.approx(sum(there[:first]), rel=1e-4, abs=1e-8)


@settings(deadline=None, max_examples=20)
@given(factor=st.floats(0.1, 0.99), size=st.integers(1, 9), warmup=st.integers(0, 5), updates=st.integers(1, 40))
def test_a_step_decay_has_equal_rates(factor, size, warmup, updates):
    old = {"name": "step_decay", "arguments": [1e-3, factor, size], "warmup": warmup}
    updates += warmup + 2
    there, here = theirs(old, updates), ours(old, updates)
    first = warmup + 1 if warmup else 0
    assert here[first:] == pytest.approx(there[first:], rel=1e-4)


@pytest.mark.parametrize("factor", [0.0, -0.5, 1e-300, 1e300])
def test_an_exponential_decay_that_leaves_the_positive_numbers_is_refused_with_the_reason(factor):
    with pytest.raises(CannotImport, match="does not reach a positive rate"):
        scheduled({"name": "exponential_decay", "arguments": [1e-4, factor]}, 100)


def test_a_constant_rate_after_a_warmup_is_found_in_a_decay_that_does_not_decay():
    old = {"name": "exponential_decay", "arguments": [1e-3, 1.0], "warmup": 4}
    assert ours(old, 20)[5:] == pytest.approx(theirs(old, 20)[5:], rel=1e-5)


def test_a_rise_from_zero_becomes_a_warmup_that_ends_at_the_same_update():
    old = {"name": "linear_schedule", "arguments": [0, 1e-3, 10]}
    there, here = theirs(old, 15), ours(old, 15)
    assert here[10:] == pytest.approx(there[10:], rel=1e-5)
    assert here[9] < 1e-3 and there[0] == 0 < here[0]
