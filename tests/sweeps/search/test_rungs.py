"""Rungs: where trials are compared, which ones continue, and how long it takes."""

from __future__ import annotations

import pytest

from runner.common.errors import ConfigError
from runner.sweeps.search import rungs


@pytest.mark.parametrize(
    "iters, eta, min_iters, trials, expected",
    [
        (180, 3, None, 9, [20, 60, 180]),
        (180, 3, None, 30, [7, 20, 60, 180]),
        (200, 4, None, 16, [13, 50, 200]),
        (2, 4, None, 16, [1, 2]),  # half an update and an eighth both fall on the first
        (180, 3, 60, 30, [60, 180]),
        (180, 3, 15, 30, [15, 60, 180]),  # 20 is too near to 15
        (1000, 3, 100, 30, [100, 334, 1000]),
        (200, 3, 22, 30, [22, 67, 200]),
        (180, 3, 179, 30, [179, 180]),
        (1000, 2, None, 3, [500, 1000]),
        (180, 3, None, 2, [60, 180]),
        (180, 3, None, 1, [180]),
    ],
)
def test_rungs_are_a_factor_apart(iters, eta, min_iters, trials, expected):
    assert rungs.plan_rungs(iters, eta=eta, min_iters=min_iters, trials=trials) == expected


@pytest.mark.parametrize(
    "iters, min_iters, cause",
    [
        (1, None, "train.iters=1"),
        (9, 9, "hydra.sweeper.min_iters=9"),
        (9, 10, "hydra.sweeper.min_iters=10"),
    ],
)
def test_without_a_step_before_the_end_there_is_nothing_to_compare(iters, min_iters, cause):
    with pytest.raises(ConfigError, match=f"{cause} leaves no step"):
        rungs.plan_rungs(iters, eta=3, min_iters=min_iters, trials=9)


def test_the_best_part_continues_and_at_least_one():
    ranked = rungs.rank({0: 3.0, 1: 1.0, 2: 2.0, 3: 1.0})
    assert ranked == [1, 3, 2, 0]
    assert rungs.survivors(ranked, 3) == [1] and rungs.survivors(ranked, 2) == [1, 3]
    assert rungs.survivors([7], 3) == [7] and rungs.survivors([], 3) == []


def test_the_time_of_halving_counts_jobs_side_by_side_once():
    def seconds(updates: int) -> float:
        return 1 + updates

    # 9 jobs of 20 updates, 3 of 40 more, 1 of 120 more
    assert rungs.halving_seconds(9, [20, 60, 180], 3, at_once=1, seconds=seconds) == 9 * 21 + 3 * 41 + 121
    assert rungs.halving_seconds(9, [20, 60, 180], 3, at_once=2, seconds=seconds) == 5 * 21 + 2 * 41 + 121
    assert rungs.halving_seconds(1, [20, 60, 180], 3, at_once=2, seconds=seconds) == 21 + 41 + 121
