"""Which checkpoints stay, by table and by property."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoints.retention import RetentionPolicy, SavedStep, select_retained

NAN, INF = math.nan, math.inf


def _saved(*rows: tuple[int, float | None] | tuple[int, float | None, bool]) -> list[SavedStep]:
    return [SavedStep(step, *(rest or [True]), metric=metric) for step, metric, *rest in rows]


HUNDREDS = _saved((100, 3.0), (200, 1.0), (300, 2.0), (400, 1.0), (500, 4.0))


@pytest.mark.parametrize(
    ("saved", "policy", "more", "stays"),
    [
        ([], RetentionPolicy(3, 1), {}, {}),
        (HUNDREDS, RetentionPolicy(0, 0), {}, {500: ["newest"]}),
        (HUNDREDS, RetentionPolicy(2, 0), {}, {400: ["last"], 500: ["newest", "last"]}),
        # The best lies outside the last ones; of two equal ones the earlier is the best.
        (HUNDREDS, RetentionPolicy(1, 1), {}, {200: ["best"], 500: ["newest", "last"]}),
        (HUNDREDS, RetentionPolicy(1, 2), {}, {200: ["best"], 400: ["best"], 500: ["newest", "last"]}),
        (HUNDREDS, RetentionPolicy(1, 1), {"direction": "maximize"}, {500: ["newest", "last", "best"]}),
        (HUNDREDS, RetentionPolicy(0, 0, 200), {}, {200: ["every 200"], 400: ["every 200"], 500: ["newest"]}),
        (HUNDREDS[:2], RetentionPolicy(9, 0), {}, {100: ["last"], 200: ["newest", "last"]}),
        (
            HUNDREDS,
            RetentionPolicy(0, 0),
            {"pinned": frozenset({300, 7}), "source": 100},
            {100: ["resumed from"], 300: ["pinned"], 500: ["newest"]},
        ),
        (HUNDREDS, RetentionPolicy(0, 0), {"source": 999}, {500: ["newest"]}),
        # Saves that were made for being the best do not push scheduled ones out of the last ones.
        (
            _saved((100, 3.0), (200, 3.0), (210, 1.0, False), (220, 0.5, False)),
            RetentionPolicy(2, 1),
            {},
            {100: ["last"], 200: ["last"], 220: ["newest", "best"]},
        ),
        # What was not measured, or is not finite, is never the best.
        (
            _saved((1, NAN), (2, None), (3, -INF), (4, 5.0), (5, INF)),
            RetentionPolicy(0, 3),
            {},
            {4: ["best"], 5: ["newest"]},
        ),
        (_saved((1, INF), (2, NAN), (3, 1.0), (4, None)), RetentionPolicy(0, 1), {"direction": "maximize"},
         {3: ["best"], 4: ["newest"]}),
    ],
)  # fmt: skip
def test_the_table(saved: list[SavedStep], policy: RetentionPolicy, more: dict, stays: dict[int, list[str]]) -> None:
    assert select_retained(saved, policy, **more) == stays
    assert list(select_retained(saved, policy, **more)) == sorted(stays)


@pytest.mark.parametrize("wrong", [(-1, 0, None), (0, -1, None), (0, 0, 0), (0, 0, -5)])
def test_a_policy_of_negative_numbers_is_refused(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="or more"):
        RetentionPolicy(*wrong)


def test_a_step_twice_and_an_unknown_direction_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        select_retained(_saved((1, 1.0), (1, 2.0)), RetentionPolicy(1, 1))
    with pytest.raises(ValueError, match="'up'"):
        select_retained([], RetentionPolicy(1, 1), direction="up")  # type: ignore[arg-type]


_METRICS = st.none() | st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 2.0]) | st.floats()
_SAVED = st.lists(
    st.builds(SavedStep, step=st.integers(1, 60), scheduled=st.booleans(), metric=_METRICS),
    unique_by=lambda one: one.step,
    max_size=20,
)
_POLICY = st.builds(RetentionPolicy, st.integers(0, 6), st.integers(0, 6), st.none() | st.integers(1, 12))
_MORE = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["minimize", "maximize"]),
        "pinned": st.frozensets(st.integers(1, 60), max_size=4),
        "source": st.none() | st.integers(1, 60),
    }
)


@given(_SAVED, _POLICY, _MORE)
def test_only_saved_steps_stay_each_with_a_reason_and_the_newest_among_them(saved, policy, more) -> None:
    stays = select_retained(saved, policy, **more)
    steps = {one.step for one in saved}
    assert stays.keys() <= steps
    assert all(stays.values())
    assert not steps or "newest" in stays[max(steps)]
    assert (more["pinned"] | {more["source"]}) & steps <= stays.keys()


@given(_SAVED, _POLICY, _MORE)
def test_no_more_stay_for_a_reason_than_the_policy_says(saved, policy, more) -> None:
    reasons = [reason for why in select_retained(saved, policy, **more).values() for reason in why]
    finite = sum(one.metric is not None and math.isfinite(one.metric) for one in saved)
    assert reasons.count("last") == min(policy.keep_last, sum(one.scheduled for one in saved))
    assert reasons.count("best") == min(policy.keep_best, finite)


@given(_SAVED, _POLICY, _MORE)
def test_nothing_better_goes_while_a_best_stays(saved, policy, more) -> None:
    stays = select_retained(saved, policy, **more)
    best = [one.metric for one in saved if "best" in stays.get(one.step, [])]
    gone = [one.metric for one in saved if one.step not in stays and one.metric is not None]
    gone = [metric for metric in gone if math.isfinite(metric)]
    if best and gone:
        assert max(best) <= min(gone) if more["direction"] == "minimize" else min(best) >= max(gone)


@given(_SAVED, _POLICY, _MORE, st.integers(0, 3), st.integers(0, 3), st.integers(1, 60))
def test_a_more_generous_policy_removes_nothing_more(saved, policy, more, last, best, pin) -> None:
    wider = dataclasses.replace(policy, keep_last=policy.keep_last + last, keep_best=policy.keep_best + best)
    before = select_retained(saved, policy, **more).keys()
    assert before <= select_retained(saved, wider, **more).keys()
    assert before <= select_retained(saved, policy, **more | {"pinned": more["pinned"] | {pin}}).keys()
    if policy.keep_every is None:
        assert before <= select_retained(saved, dataclasses.replace(policy, keep_every=pin), **more).keys()


@given(_SAVED.flatmap(lambda saved: st.tuples(st.just(saved), st.permutations(saved))), _POLICY, _MORE)
def test_the_order_of_the_list_does_not_matter(both, policy, more) -> None:
    assert select_retained(both[0], policy, **more) == select_retained(both[1], policy, **more)


@given(_SAVED, _POLICY, _MORE)
def test_what_stayed_stays_when_asked_again(saved, policy, more) -> None:
    stays = select_retained(saved, policy, **more)
    left = [one for one in saved if one.step in stays]
    assert select_retained(left, policy, **more) == stays
