"""The bootstrap against exact enumeration, tables of Student's t and of the studentized range, and simulations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from runner.reports import significance
from runner.reports.significance import Difference, best_of, differences


def width(found: Difference) -> float:
    return found.high - found.value


def normal_rows(rows: int, candidates: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Candidates of one seed whose rows are independent, of equal weight, mean zero and standard deviation one; the
    weights; and the standard error of a difference of two."""
    values = np.random.default_rng(seed).standard_normal((candidates, rows))
    values -= values.mean(axis=1, keepdims=True)
    # Uncorrelated to the last digit, so that the tables hold.
    values = np.linalg.qr(values.T)[0].T * np.sqrt(rows - 1)
    values -= values.mean(axis=1, keepdims=True)
    return list(values[:, None, :]), np.ones(rows), float(np.sqrt(2 / rows))


def test_the_spread_is_that_of_all_resamples_of_five_rows() -> None:
    weights = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    first, second = np.array([2.0, 1.5, 4.0, 0.1, 6.0]), np.array([3.0, 1.0, 5.5, 0.5, 5.0])
    resamples = np.array(list(itertools.product(range(5), repeat=5)))
    totals = weights[resamples].sum(axis=1)
    exact = np.std((second[resamples].sum(axis=1) - first[resamples].sum(axis=1)) / totals)
    found = differences([first[None], second[None]], weights)[1]
    assert found.value == pytest.approx((second.sum() - first.sum()) / weights.sum())
    # Kish's number of rows is 3.77: Student's t with 2.77 degrees of freedom, at 97.5 %, is 3.33.
    assert width(found) == pytest.approx(3.33 * np.sqrt(5 / 4) * exact, rel=0.12)


@pytest.mark.parametrize(("rows", "student"), [(10, 2.262), (20, 2.093), (200, 1.972), (5000, 1.960)])
def test_two_runs_have_the_interval_of_a_paired_t_test(rows: int, student: float) -> None:
    candidates, weights, error = normal_rows(rows, 2)
    error *= np.sqrt((rows - 1) / rows) if rows <= 500 else 1.0
    found = differences([candidates[0], candidates[1] + 0.1], weights)[1]
    assert found.value == pytest.approx(0.1)
    assert width(found) == pytest.approx(student * error, rel=0.06)
    assert found.low == pytest.approx(found.value - width(found))


@pytest.mark.parametrize(("candidates", "studentized_range"), [(3, 3.314), (6, 4.030), (10, 4.474)])
def test_several_runs_have_the_simultaneous_intervals_of_tukey(candidates: int, studentized_range: float) -> None:
    values, weights, error = normal_rows(400, candidates)
    assert width(differences(values, weights)[1]) == pytest.approx(studentized_range / np.sqrt(2) * error, rel=0.05)


@pytest.mark.parametrize(
    ("candidates", "seeds", "quantile"), [(2, 2, 4.303), (2, 5, 2.306), (4, 2, 5.757 / 2**0.5), (3, 3, 4.339 / 2**0.5)]
)
def test_seeds_count_with_their_own_degrees_of_freedom(candidates: int, seeds: int, quantile: float) -> None:
    """Where the rows say the same of all, what remains is the analysis of variance of the seeds (Tukey)."""
    effects = np.random.default_rng(1).standard_normal((candidates, seeds))
    effects -= effects.mean(axis=1, keepdims=True)
    effects *= 1e-3 / np.sqrt(np.square(effects).sum() / (candidates * (seeds - 1)))
    effects += 1e-9 * np.arange(candidates)[:, None]  # the first is the best
    values = [1.0 + effect[:, None] + np.zeros((seeds, 50)) for effect in effects]
    found = differences(values, np.ones(50))
    assert [width(f) for f in found[1:]] == pytest.approx(
        [quantile * 1e-3 * np.sqrt(2 / seeds)] * (candidates - 1), rel=0.08
    )


def test_a_difference_far_beyond_noise_is_found_and_all_intervals_have_the_limit_of_all_pairs() -> None:
    candidates, weights, error = normal_rows(200, 8)
    shifts = [0.02, 0.0, 0.7 * 2.1 * error, *(3.0 + k for k in range(5))]
    found = differences([c + shift for c, shift in zip(candidates, shifts, strict=True)], weights)
    assert [f.is_worse for f in found] == [False, False, False, True, True, True, True, True]
    # Tukey's studentized range of 8 is 4.286 at 95 %, and would be 3.314 for the three that are left.
    assert [width(f) for i, f in enumerate(found) if i != 1] == pytest.approx([4.286 / 2**0.5 * error] * 7, rel=0.05)
    assert found[3].low > 0 > found[2].low


def test_equal_runs_differ_by_nothing_and_the_first_is_the_best() -> None:
    values = np.random.default_rng(0).random((1, 30))
    found = differences([values, values, values], np.ones(30))
    assert found == [Difference(0.0, 0.0, 0.0, False)] * 3
    assert best_of([values, values]) == 0


def test_the_result_depends_on_the_arguments_alone() -> None:
    candidates, weights, _ = normal_rows(50, 4)
    assert differences(candidates, weights) == differences(candidates, weights)


def test_rows_in_groups_have_the_spread_of_the_rows() -> None:
    """More rows than are resampled one by one, of unequal weights and correlated between the runs."""
    random = np.random.default_rng(3)
    weights = random.integers(1, 40, 3000).astype(float)
    shared = random.gamma(2, 1, 3000) * weights
    first, second = (shared + random.normal(0, 0.5, 3000) * weights for _ in range(2))
    gap = (second - first) - weights * ((second - first).sum() / weights.sum())
    error = np.sqrt(np.square(gap).sum()) / weights.sum()
    found = differences([first[None], second[None]], weights)
    assert max(map(width, found)) == pytest.approx(1.965 * error, rel=0.08)


def experiments(shifts: Sequence[float], seeds: int, rows: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yield candidates and weights of data with skewed losses and rows of different lengths, without end; a candidate
    is worse by its shift."""
    random = np.random.default_rng(5)
    while True:
        weights = random.integers(3, 30, rows).astype(float)
        difficulty = random.gamma(2, 0.5, rows)
        data = []
        for shift in shifts:
            effect = random.gamma(1, 0.15, rows) - 0.15 + shift
            noise = random.normal(0, 0.1, (seeds, rows)) + random.normal(0, 0.03, (seeds, 1)) * (seeds > 1)
            data.append((difficulty + effect + noise) * weights)
        yield data, weights


@pytest.mark.parametrize(("seeds", "spread"), [((12, 8), 0.03), ((20, 20), 0.05), ((12, 8), 0.0)])
def test_rows_and_seeds_together_have_the_spread_of_resampling_both(seeds: tuple[int, int], spread: float) -> None:
    """The pigeonhole bootstrap (Owen, 2007) resamples seeds as well as rows, which many seeds allow."""
    random, rows, draws = np.random.default_rng(11), 300, 2000
    weights = random.integers(3, 30, rows).astype(float)
    difficulty = random.gamma(2, 0.5, rows)
    data = []
    for count in seeds:
        effect = random.gamma(1, 0.15, rows) - 0.15
        noise = random.normal(0, 0.1, (count, rows)) + random.normal(0, spread, (count, 1))
        data.append((difficulty + effect + noise) * weights)
    means = np.zeros((draws, 2))
    for draw in range(draws):
        drawn = random.integers(0, rows, rows)
        for i, values in enumerate(data):
            some = values[random.integers(0, len(values), len(values))][:, drawn]
            means[draw, i] = some.sum(axis=1).mean() / weights[drawn].sum()
    gaps = means[:, 1] - means[:, 0]
    expected = np.quantile(np.abs(gaps - gaps.mean()), 0.95)
    assert max(map(width, differences(data, weights))) == pytest.approx(expected, rel=0.13)


@pytest.mark.usefixtures("fewer_resamples")
def test_candidates_with_other_numbers_of_seeds_keep_the_error_rate() -> None:
    """As after a search, whose finalists have several seeds and the others one."""
    found = 0
    for data, weights in itertools.islice(experiments([0.0] * 4, 3, 60), 200):
        found += any(one.is_worse for one in differences([data[0], data[1], data[2][:1], data[3][:1]], weights))
    assert found / 200 <= 0.1


def simulate(count: int, candidates: int, seeds: int, rows: int, shift: float = 0.0) -> float:
    """Return how often something is found to be worse, where the last candidate is worse by `shift`."""
    shifts = [0.0] * (candidates - 1) + [shift]
    drawn = itertools.islice(experiments(shifts, seeds, rows), count)
    return sum(any(found.is_worse for found in differences(data, weights)) for data, weights in drawn) / count


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "_RESAMPLES", 1000)


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("candidates", "seeds", "rows"), [(2, 1, 100), (5, 1, 60), (2, 2, 60), (4, 3, 60)])
def test_of_equal_settings_one_is_called_worse_in_about_5_percent_of_experiments(
    candidates: int, seeds: int, rows: int
) -> None:
    assert 0.005 <= simulate(200, candidates, seeds, rows) <= 0.1  # 0.05 ± 3 standard errors


@pytest.mark.long
@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("candidates", "seeds", "rows"),
    [(2, 1, 10), (2, 1, 25), (2, 1, 200), (6, 1, 50), (20, 1, 200), (2, 2, 200), (2, 3, 200), (4, 2, 100), (6, 2, 100)],
)
def test_the_error_rate_is_kept_from_few_rows_to_many_runs(candidates: int, seeds: int, rows: int) -> None:
    assert simulate(1000, candidates, seeds, rows) <= 0.075


@pytest.mark.long
@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("shifts", "seeds", "rows"),
    [
        ([0, 0, 0, 0], 1, 60),
        ([0, 0.01, 0.05, 0.1, 0.2, 0.4, 1, 2], 1, 100),
        ([0, 0, *range(1, 11)], 1, 100),
        ([0, 0.05, 1, 1, 2], 3, 60),
    ],
)
def test_all_intervals_of_a_sweep_hold_together_and_agree_with_what_is_called_worse(
    shifts: list[float], seeds: int, rows: int
) -> None:
    covered, count = 0, 500
    for data, weights in itertools.islice(experiments(shifts, seeds, rows), count):
        found, best = differences(data, weights), shifts[best_of(data)]
        covered += all(d.low <= shift - best <= d.high for d, shift in zip(found, shifts, strict=True))
        assert all(d.is_worse == (d.low > 0) for d in found)
    assert covered / count >= 0.92  # 0.95 - 3 standard errors


@pytest.mark.usefixtures("fewer_resamples")
def test_a_real_difference_is_found() -> None:
    assert simulate(40, 2, 1, 200, shift=0.08) >= 0.9
    assert simulate(40, 4, 1, 200, shift=0.1) >= 0.9
    assert simulate(40, 3, 4, 100, shift=0.15) >= 0.9


@pytest.mark.usefixtures("fewer_resamples")
def test_scores_of_right_and_wrong_answers_keep_the_error_rate() -> None:
    random, found = np.random.default_rng(8), 0
    for _ in range(300):
        chance = random.beta(1, 1, 60)
        scores = [(random.random((1, 60)) < chance).astype(float) for _ in range(2)]
        found += any(difference.is_worse for difference in differences([-score for score in scores], np.ones(60)))
    assert found / 300 <= 0.09
