"""Learning rates have the promised values, exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import schema
from runner.training.lr_schedule import SHAPES, learning_rate


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential"])
@given(iters=st.integers(2, 5000), warmup=st.integers(0, 50), peak=st.floats(1e-7, 1), end=st.floats(1e-12, 1e-7))
def test_the_first_update_after_warmup_has_the_peak_and_the_last_the_end_value(name, iters, warmup, peak, end):
    warmup = min(warmup, iters - 2)
    rate = {u: learning_rate(u, name=name, peak=peak, iters=iters, warmup=warmup, end=end) for u in (iters, warmup + 1)}
    assert rate[iters] == end
    assert rate[warmup + 1] == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize("name", list(SHAPES))
@given(iters=st.integers(1, 300), warmup=st.integers(0, 40))
def test_rates_rise_during_warmup_and_never_after_it(name, iters, warmup):
    warmup = min(warmup, iters - 1)
    end = 1e-6 if name == "exponential" else 0.0
    rates = [learning_rate(u, name=name, peak=1.0, iters=iters, warmup=warmup, end=end) for u in range(1, iters + 5)]
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert all(0 <= r <= 1 for r in rates)
    assert rates[0] > 0


def test_a_cosine_is_halfway_at_the_middle():
    assert learning_rate(51, name="cosine", peak=1.0, iters=101) == pytest.approx(0.5)
    quarter = learning_rate(26, name="cosine", peak=1.0, iters=101)
    assert quarter == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_exponential_falls_by_the_same_factor_with_every_update():
    rates = [learning_rate(u, name="exponential", peak=1e-3, iters=11, warmup=2, end=1e-5) for u in range(3, 12)]
    factors = [b / a for a, b in pairwise(rates)]
    assert rates[0] == 1e-3 and rates[-1] == 1e-5
    assert factors == pytest.approx([0.01 ** (1 / 8)] * 8)


def test_every_schedule_of_the_schema_has_a_shape():
    assert list(SHAPES) == list(schema.metadata()["schedule.name"].choices)


def test_warmup_has_no_update_at_rate_zero():
    assert [learning_rate(u, name="constant", peak=1.0, iters=9, warmup=3) for u in (1, 2, 3, 4, 5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
