"""The importance of settings: right where it is known, unsure where there are too few jobs, fair where settings go
together."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from runner.reports.importance import MIN_SPARE, measure_importance


def grid(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def test_shares_of_a_full_grid_are_those_of_an_analysis_of_variance() -> None:
    # Effects of -3, 0, 3 and -1, 1 with a residual of one interaction: the sums of squares are known.
    jobs = grid(rate=(1, 2, 3), rank=(4, 8))
    effects = {1: -3.0, 2: 0.0, 3: 3.0}, {4: -1.0, 8: 1.0}
    noise = (0.1, -0.1, -0.2, 0.2, 0.1, -0.1)
    objective = [10 + effects[0][job["rate"]] + effects[1][job["rank"]] + e for job, e in zip(jobs, noise, strict=True)]
    mean = sum(objective) / 6
    total = sum((y - mean) ** 2 for y in objective)
    by_rate = sum(2 * (sum(objective[2 * i : 2 * i + 2]) / 2 - mean) ** 2 for i in range(3))
    by_rank = sum(3 * (sum(objective[i::2]) / 3 - mean) ** 2 for i in range(2))
    result = measure_importance(jobs, objective)
    assert result is not None and [setting.names for setting in result.settings] == [("rate",), ("rank",)]
    assert [setting.share for setting in result.settings] == pytest.approx([by_rate / total, by_rank / total])
    assert result.spare == 2 < MIN_SPARE and all(setting.p is None for setting in result.settings)


def test_an_effect_is_clear_and_noise_is_not() -> None:
    noise = random.Random(0)
    jobs = grid(rate=(1, 2, 3), rank=(4, 8, 16, 32))
    result = measure_importance(jobs, [job["rate"] + noise.gauss(0, 0.2) for job in jobs])
    assert result is not None and result.spare == 6
    rate, rank = result.settings
    assert rate.names == ("rate",) and rate.p is not None and rate.p < 0.01
    assert rank.p is not None and rank.p > 0.05
    assert rate.interval is not None and rate.interval[0] < rate.share < rate.interval[1]


def test_chance_is_called_clear_as_rarely_as_its_p_value_says() -> None:
    noise, jobs = random.Random(3), grid(rate=(1, 2, 3), rank=(4, 8))
    jobs += jobs
    found = [measure_importance(jobs, [noise.gauss(0, 1) for _ in jobs]) for _ in range(20)]
    values = [setting.p for result in found if result for setting in result.settings if setting.p is not None]
    assert len(values) == 40 and sum(p < 0.05 for p in values) <= 7  # 2 are expected


def test_settings_that_vary_together_are_one() -> None:
    jobs = [{"rank": rank, "alpha": 2 * rank, "rate": rate} for rank in (4, 8, 16) for rate in (1, 2)]
    result = measure_importance(jobs, [job["rank"] + 0.1 * job["rate"] for job in jobs])
    assert result is not None and result.settings[0].names == ("rank", "alpha")


def test_what_two_settings_explain_together_is_credited_to_neither() -> None:
    jobs = [{"a": a, "b": b} for a, b in ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (0, 1), (1, 0))]
    result = measure_importance(jobs, [float(job["a"] + job["b"]) for job in jobs])
    assert result is not None and [setting.share for setting in result.settings] == pytest.approx([0.25, 0.25])


def test_many_numbers_are_a_curve_and_stay_apart() -> None:
    noise = random.Random(1)
    jobs = [{"rate": 10 ** noise.uniform(-5, -2), "dropout": noise.random()} for _ in range(40)]
    result = measure_importance(jobs, [(job["rate"] - 1e-3) ** 2 + 1 for job in jobs])
    assert result is not None and [setting.names for setting in result.settings] == [("rate",), ("dropout",)]
    assert result.spare == 40 - 5 and result.settings[0].p == pytest.approx(0.001, abs=1e-4)


def test_a_sweep_in_which_nothing_varies_has_none() -> None:
    assert measure_importance([{"rate": 1}] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert measure_importance(grid(rate=(1, 2, 3)), [1.0, 1.0, 1.0]) is None
    assert measure_importance(grid(rate=(1, 2)), [1.0, 2.0]) is None
    assert measure_importance([], []) is None
