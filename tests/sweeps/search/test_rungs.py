"""Rungs: where trials are compared, which ones continue, and how long it takes."""

from __future__ import annotations

import pytest

from runner.common.errors import ConfigError
from runner.sweeps.search import rungs


@pytest.mark.parametrize(
    "iters, eval_every, eta, min_iters, trials, expected",
    [
        (180, 10, 3, None, 9, [20, 60, 180]),
        (180, 10, 3, None, 30, [10, 20, 60, 180]),
        (200, 25, 4, None, 16, [25, 50, 200]),
        (200, 50, 4, None, 16, [50, 200]),  # 12.5 and 50 both fall on the first evaluation
        (180, 10, 3, 60, 30, [60, 180]),
        (180, 10, 3, 15, 30, [20, 60, 180]),
        (1000, 1, 2, None, 3, [500, 1000]),
        (180, 10, 3, None, 2, [60, 180]),
        (180, 10, 3, None, 1, [180]),
    ],
)
def test_rungs_are_evaluations_a_factor_apart(iters, eval_every, eta, min_iters, trials, expected):
    assert rungs.plan_rungs(iters, eval_every, eta=eta, min_iters=min_iters, trials=trials) == expected


def test_without_an_evaluation_before_the_end_there_is_nothing_to_compare():
    with pytest.raises(ConfigError, match=r"train\.eval_every=22, or hydra\.sweeper\.pruner=none"):
        rungs.plan_rungs(200, 200, eta=3, min_iters=None, trials=9)


def test_the_best_part_continues_and_at_least_one():
    ranked = rungs.rank({0: 3.0, 1: 1.0, 2: 2.0, 3: 1.0}, maximize=False)
    assert ranked == [1, 3, 2, 0] and rungs.rank({0: 3.0, 1: 1.0}, maximize=True) == [0, 1]
    assert rungs.survivors(ranked, 3) == [1] and rungs.survivors(ranked, 2) == [1, 3]
    assert rungs.survivors([7], 3) == [7] and rungs.survivors([], 3) == []


def test_the_time_of_halving_counts_jobs_side_by_side_once():
    def seconds(updates: int) -> float:
        return 1 + updates

    # 9 jobs of 20 updates, 3 of 40 more, 1 of 120 more
    assert rungs.halving_seconds(9, [20, 60, 180], 3, at_once=1, seconds=seconds) == 9 * 21 + 3 * 41 + 121
    assert rungs.halving_seconds(9, [20, 60, 180], 3, at_once=2, seconds=seconds) == 5 * 21 + 2 * 41 + 121
    assert rungs.halving_seconds(1, [20, 60, 180], 3, at_once=2, seconds=seconds) == 21 + 41 + 121
