"""Learning rates have the promised values, exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import mlx.optimizers as optim
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import schema
from runner.training.lr_schedule import SHAPES, learning_rate

OPTIONS = {
    "constant": {},
    "linear": {"end": 0.0},
    "cosine": {"end": 0.0},
    "exponential": {"end": 1e-6},
    "cosine_with_restarts": {"end": 0.0, "cycles": 3},
    "wsd": {"end": 0.0, "decay": 0.2, "decay_shape": "sqrt"},
    "step": {"step_size": 7, "gamma": 0.5},
    "inverse_sqrt": {"timescale": None},
}


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "end" in options])
@given(iters=st.integers(2, 5000), warmup=st.integers(0, 50), peak=st.floats(1e-7, 1), end=st.floats(1e-12, 1e-7))
def test_the_first_update_after_warmup_has_the_peak_and_the_last_the_end_value(name, iters, warmup, peak, end):
    warmup = min(warmup, iters - 2)
    options = OPTIONS[name] | {"end": end}
    rate = {
        u: learning_rate(u, name=name, peak=peak, iters=iters, warmup=warmup, **options) for u in (iters, warmup + 1)
    }
    assert rate[iters] == end
    assert rate[warmup + 1] == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "cosine_with_restarts"])
@given(iters=st.integers(1, 300), warmup=st.integers(0, 40))
def test_rates_rise_during_warmup_and_never_after_it(name, iters, warmup):
    warmup = min(warmup, iters - 1)
    rates = [
        learning_rate(u, name=name, peak=1.0, iters=iters, warmup=warmup, **OPTIONS[name]) for u in range(1, iters + 5)
    ]
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert all(0 <= r <= 1 for r in rates)
    assert rates[0] > 0


def test_a_cosine_is_halfway_at_the_middle():
    assert learning_rate(51, name="cosine", peak=1.0, iters=101, end=0.0) == pytest.approx(0.5)
    quarter = learning_rate(26, name="cosine", peak=1.0, iters=101, end=0.0)
    assert quarter == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_exponential_falls_by_the_same_factor_with_every_update():
    rates = [learning_rate(u, name="exponential", peak=1e-3, iters=11, warmup=2, end=1e-5) for u in range(3, 12)]
    factors = [b / a for a, b in pairwise(rates)]
    assert rates[0] == 1e-3 and rates[-1] == 1e-5
    assert factors == pytest.approx([0.01 ** (1 / 8)] * 8)


def test_every_schedule_of_the_schema_has_a_shape():
    assert list(SHAPES) == list(schema.metadata()["schedule.name"].choices) == list(OPTIONS)
    for name, options in OPTIONS.items():
        assert set(schema.choice_options("schedule", name)) == set(options)


def test_warmup_has_no_update_at_rate_zero():
    assert [learning_rate(u, name="constant", peak=1.0, iters=9, warmup=3) for u in (1, 2, 3, 4, 5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


# Of transformers 5.23: get_scheduler with a peak of 1, a warmup of 2 and 12 training steps, from the peak on; of
# inverse_sqrt with a warmup of 3, and without.
THEIRS = [
    (
        {"name": "cosine_with_restarts", "cycles": 2, "end": 0.0},
        [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915, 1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915, 0.0],
    ),
    (
        {"name": "wsd", "decay": 4, "decay_shape": "linear", "end": 0.1},
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1],
    ),
    (
        {"name": "wsd", "decay": 4, "decay_shape": "cosine", "end": 0.1},
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.86819805, 0.55, 0.23180195, 0.1],
    ),
    (
        {"name": "wsd", "decay": 4, "decay_shape": "sqrt", "end": 0.1},
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.3636039, 0.22057714, 0.1],
    ),
    (
        {"name": "inverse_sqrt", "timescale": None, "warmup": 3},
        [1.0, 0.8660254, 0.77459667, 0.70710678, 0.65465367, 0.61237244, 0.57735027, 0.54772256, 0.52223297],
    ),
    ({"name": "inverse_sqrt", "timescale": None, "warmup": 0}, [1.0, 0.99995, 0.99990001, 0.99985003]),
]


@pytest.mark.parametrize(("given_", "expected"), THEIRS)
def test_rates_from_the_peak_on_are_those_of_transformers(given_, expected):
    """There the warmup of W updates begins at zero, so that its peak is at update W + 1, as here."""
    settings = {"warmup": 2} | given_
    first = settings["warmup"] + 1
    rates = [learning_rate(u, peak=1.0, iters=13, **settings) for u in range(first, first + len(expected))]
    assert rates == pytest.approx(expected, abs=1e-7)


def test_a_step_schedule_has_the_rates_of_mlx():
    theirs = optim.step_decay(0.1, 0.9, 10)
    rates = [learning_rate(u, name="step", peak=0.1, iters=5, step_size=10, gamma=0.9) for u in range(1, 36)]
    assert rates == pytest.approx([theirs(u) for u in range(35)], rel=1e-12)
    assert rates[9] == 0.1 and rates[10] == 0.1 * 0.9


@pytest.mark.parametrize(
    ("cycles", "iters", "at_peak"), [(1, 101, [1]), (2, 101, [1, 51]), (3, 11, [1]), (4, 13, [1, 4, 7, 10])]
)
def test_a_cycle_begins_at_the_peak_wherever_its_beginning_is_an_update(cycles, iters, at_peak):
    """Of three cycles in ten updates, the second begins between two."""
    rates = [
        learning_rate(u, name="cosine_with_restarts", peak=1.0, iters=iters, end=0.0, cycles=cycles)
        for u in range(1, iters + 1)
    ]
    assert [u for u, rate in enumerate(rates, 1) if rate == 1.0] == at_peak
    assert sum(b > a for a, b in pairwise(rates)) == cycles - 1
    assert rates[-1] == 0.0


@pytest.mark.parametrize(("decay", "last_at_peak"), [(0.2, 80), (10.0, 90), (1.0, 99), (0.001, 99), (0.99, 4)])
def test_the_last_updates_of_wsd_decay_and_all_others_have_the_peak(decay, last_at_peak):
    options = {"end": 0.0, "decay": decay, "decay_shape": "linear"}
    rates = [learning_rate(u, name="wsd", peak=1.0, iters=100, warmup=3, **options) for u in range(4, 101)]
    assert rates.index(next(rate for rate in rates if rate < 1)) + 3 == last_at_peak
    assert rates[-1] == 0.0 and all(a > b for a, b in pairwise(rates[last_at_peak - 4 :]))
