"""Which checkpoints stay, by table and by property."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoints.manifest import CheckpointManifest, FileRecord
from runner.checkpoints.retention import (
    RetentionPolicy,
    RetentionReason,
    best_checkpoint,
    select_mirrored,
    select_retained,
)

NAN, INF = math.nan, math.inf


def _manifest(step: int, metric: float | None = None, scheduled: bool = True) -> CheckpointManifest:
    reason = "every 100 updates" if scheduled else "best"
    metrics = {} if metric is None else {"valid_loss": metric}
    return CheckpointManifest("run", step, "", (reason,), metrics, {"a": FileRecord(0, "0" * 64)})


def _saved(*rows: tuple[int, float | None] | tuple[int, float | None, bool]) -> list[CheckpointManifest]:
    return [_manifest(*row) for row in rows]


def _metric(checkpoint: CheckpointManifest) -> float | None:
    return checkpoint.metrics.get("valid_loss")


def _is_scheduled(checkpoint: CheckpointManifest) -> bool:
    return checkpoint.save_reasons == ("every 100 updates",)


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
        (HUNDREDS, RetentionPolicy(0, 0, 200), {}, {200: ["every"], 400: ["every"], 500: ["newest"]}),
        (HUNDREDS[:2], RetentionPolicy(9, 0), {}, {100: ["last"], 200: ["newest", "last"]}),
        (
            HUNDREDS,
            RetentionPolicy(0, 0),
            {"source": 100},
            {100: ["resumed from"], 500: ["newest"]},
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
    ],
)  # fmt: skip
def test_the_policy_retains_these_steps_for_these_reasons(
    saved: list[CheckpointManifest], policy: RetentionPolicy, more: dict, stays: dict[int, list[str]]
) -> None:
    retained = select_retained(saved, policy, **more)
    assert {step: [reason.value for reason in reasons] for step, reasons in retained.items()} == stays
    assert list(select_retained(saved, policy, **more)) == sorted(stays)


@pytest.mark.parametrize("invalid", [(-1, 0, None), (0, -1, None), (0, 0, 0), (0, 0, -5)])
def test_a_policy_with_negative_numbers_is_refused(invalid: tuple) -> None:
    with pytest.raises(AssertionError):
        RetentionPolicy(*invalid)


def test_a_step_that_appears_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        select_retained(_saved((1, 1.0), (1, 2.0)), RetentionPolicy(1, 1))


def test_the_best_checkpoint_has_the_lowest_finite_loss_and_of_equal_ones_the_lowest_step() -> None:
    records = _saved((5, 1.0), (3, 1.0), (1, NAN), (2, None))
    assert best_checkpoint(records).step == 3
    assert best_checkpoint(records[2:]) is None
    assert best_checkpoint([]) is None


def test_a_backup_holds_the_best_the_regular_and_the_end_or_else_the_newest() -> None:
    retained = select_retained(HUNDREDS, RetentionPolicy(2, 1, 300))
    assert select_mirrored(retained, {500}) == [200, 300, 500]
    assert select_mirrored(retained, set()) == [200, 300]
    assert select_mirrored(select_retained(HUNDREDS, RetentionPolicy(2, 0)), set()) == [500]
    assert select_mirrored({}, set()) == []


_METRICS = st.none() | st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 2.0]) | st.floats()
_SAVED = st.lists(
    st.builds(_manifest, step=st.integers(1, 60), scheduled=st.booleans(), metric=_METRICS),
    unique_by=lambda one: one.step,
    max_size=20,
)
_POLICY = st.builds(RetentionPolicy, st.integers(0, 6), st.integers(0, 6), st.none() | st.integers(1, 12))
_MORE = st.fixed_dictionaries({"source": st.none() | st.integers(1, 60)})


@given(_SAVED, _POLICY, _MORE)
def test_only_saved_steps_are_retained_each_with_a_reason_and_always_the_newest(saved, policy, more) -> None:
    stays = select_retained(saved, policy, **more)
    steps = {one.step for one in saved}
    assert stays.keys() <= steps
    assert all(stays.values())
    assert not steps or RetentionReason.NEWEST in stays[max(steps)]
    assert {more["source"]} & steps <= stays.keys()


@given(_SAVED, _POLICY, _MORE)
def test_no_more_steps_are_retained_for_a_reason_than_the_policy_says(saved, policy, more) -> None:
    reasons = [reason for chosen in select_retained(saved, policy, **more).values() for reason in chosen]
    finite = sum(loss is not None and math.isfinite(loss) for loss in map(_metric, saved))
    assert reasons.count(RetentionReason.LAST) == min(policy.keep_last, sum(map(_is_scheduled, saved)))
    assert reasons.count(RetentionReason.BEST) == min(policy.keep_best, finite)


@given(_SAVED, _POLICY, _MORE)
def test_no_removed_step_is_better_than_a_step_retained_as_best(saved, policy, more) -> None:
    stays = select_retained(saved, policy, **more)
    best = [_metric(one) for one in saved if RetentionReason.BEST in stays.get(one.step, [])]
    gone = [_metric(one) for one in saved if one.step not in stays and _metric(one) is not None]
    gone = [metric for metric in gone if math.isfinite(metric)]
    if best and gone:
        assert max(best) <= min(gone)


@given(_SAVED, _POLICY, _MORE, st.integers(0, 3), st.integers(0, 3), st.integers(1, 60))
def test_a_more_generous_policy_removes_nothing_more(saved, policy, more, last, best, every) -> None:
    wider = dataclasses.replace(policy, keep_last=policy.keep_last + last, keep_best=policy.keep_best + best)
    before = select_retained(saved, policy, **more).keys()
    assert before <= select_retained(saved, wider, **more).keys()
    if policy.keep_every is None:
        assert before <= select_retained(saved, dataclasses.replace(policy, keep_every=every), **more).keys()


@given(_SAVED.flatmap(lambda saved: st.tuples(st.just(saved), st.permutations(saved))), _POLICY, _MORE)
def test_the_order_of_the_list_does_not_matter(both, policy, more) -> None:
    assert select_retained(both[0], policy, **more) == select_retained(both[1], policy, **more)


@given(_SAVED, _POLICY, _MORE)
def test_the_retained_steps_are_retained_when_asked_again(saved, policy, more) -> None:
    stays = select_retained(saved, policy, **more)
    left = [one for one in saved if one.step in stays]
    assert select_retained(left, policy, **more) == stays
