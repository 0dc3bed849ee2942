"""Whether runs that were evaluated on the same rows differ by more than noise: a bootstrap over rows, paired by row.

A candidate is one or more runs that differ by their seed alone. Its value is the mean over its runs of sum(values) /
sum(weights), such as the mean loss of a token. What is estimated is how far the differences between candidates would
move with other rows of the same kind and with other seeds:

- Rows are resampled with replacement, the same ones for all candidates.
- Seeds are too few to be resampled: of two, half of the resamples have no spread at all. Their effect is drawn from a
  normal distribution with the variance between seeds, pooled over the candidates.

Both are widened to Student's t, since few rows or seeds know their own spread badly.

All pairs of candidates are compared at once: the limit is the 95 % quantile of the largest difference of any pair, in
standard errors (max-t; Westfall and Young, 1993). So all that is said holds together, although the data chose which
candidate is called the best. A candidate is worse where its interval is above zero. Setting those aside and comparing
the others again (step-down; Romano and Wolf, 2005) would find a few more, but their intervals would not hold together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MIN_ROWS = 5
"""Of fewer rows nothing is said."""
MAX_CANDIDATES = 100
_RESAMPLES = 10_000
_MAX_DEVIATIONS = 200_000
"""Resamples times candidates: where there are more than 20 of these, there are fewer resamples."""
_MAX_ROWS = 500
"""More rows are put together at random into as many groups, which are resampled like rows."""
_SEED = 2005


@dataclass(frozen=True)
class Difference:
    """How far a candidate's value is above the lowest, with its interval."""

    value: float
    low: float
    high: float
    is_worse: bool
    """Whether it is above by more than noise: whether the interval is above zero."""


def best_of(candidates: Sequence[np.ndarray]) -> int:
    """Return the index of the candidate with the lowest value, the first of equal ones; arguments as below."""
    return int(np.argmin([values.sum() / len(values) for values in candidates]))


def differences(candidates: Sequence[np.ndarray], weights: np.ndarray) -> list[Difference]:
    """Return how far each candidate is above the one with the lowest value; a function of the arguments alone.

    Args:
        candidates: (seeds, rows) for each, at most `MAX_CANDIDATES`.
        weights: (rows,), from `MIN_ROWS` rows; none is below zero, and not all are zero.
    """
    random = np.random.Generator(np.random.PCG64(_SEED))
    by_seed = [values.sum(axis=1) / weights.sum() for values in candidates]
    means = np.array([values.mean() for values in by_seed])
    rows = _row_deviations(np.stack([values.mean(axis=0) for values in candidates], axis=1), weights, random)
    limit, errors = _limit(rows, _row_count(weights), by_seed, random)
    above, widths = means - means.min(), limit * errors[:, best_of(candidates)]
    pairs = [(float(value), float(width)) for value, width in zip(above, widths, strict=True)]
    return [Difference(value, value - width, value + width, value > width) for value, width in pairs]


def _row_count(weights: np.ndarray) -> float:
    """Return the number of rows of equal weight that would know as much (Kish, 1965), as far as they are resampled."""
    return float(min(weights.sum() ** 2 / np.square(weights).sum(), _MAX_ROWS))


def _row_deviations(values: np.ndarray, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the deviations (resamples, candidates) of sum(values) / sum(weights) when rows are resampled.

    `values` is (rows, candidates).
    """
    if len(weights) > _MAX_ROWS:
        group = random.permutation(len(weights)) % _MAX_ROWS
        values = np.stack([np.bincount(group, weights=column) for column in values.T], axis=1)
        weights = np.bincount(group, weights=weights)
    resamples, count = min(_RESAMPLES, _MAX_DEVIATIONS // values.shape[1]), len(weights)
    drawn = random.integers(0, count, (resamples, count), dtype=np.int32)
    drawn += np.arange(resamples, dtype=np.int32)[:, None] * np.int32(count)
    times = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float32)
    # Deviations of the values from their own mean first: float32 holds them precisely.
    residuals = values - weights[:, None] * (values.sum(axis=0) / weights.sum())
    totals = np.maximum(times @ weights.astype(np.float32), np.float32(weights.sum() / count / 1000))[:, None]
    # A resample of n rows varies as if there were n - 1 of them.
    return (times @ residuals.astype(np.float32)) / totals * np.float32(np.sqrt(count / (count - 1)))


def _limit(
    rows: np.ndarray, row_count: float, by_seed: Sequence[np.ndarray], random: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Return how many standard errors the difference of a pair may have, and these (candidates, candidates).

    `rows` (resamples, candidates): deviations by rows; `by_seed`: the values of each candidate's seeds.
    """
    resamples, count = rows.shape
    covariance = np.cov(rows.T).reshape(count, count)
    variances = np.diag(covariance)[:, None] + np.diag(covariance) - 2 * covariance
    deviations = rows * _widening(row_count - 1, resamples, random)
    seeds = np.array([len(values) for values in by_seed])
    freedom = int((seeds - 1).sum())
    if freedom:
        pooled = sum(float(np.square(values - values.mean()).sum()) for values in by_seed) / freedom
        variances = variances + pooled / seeds[:, None] + pooled / seeds
        normal = random.standard_normal((resamples, count), dtype=np.float32) * np.sqrt(pooled / seeds)
        deviations = deviations + normal * _widening(freedom, resamples, random)
    np.fill_diagonal(variances, 0)
    errors = np.sqrt(np.maximum(variances, 0))
    largest = np.zeros(resamples)
    with np.errstate(divide="ignore"):
        scale = np.where(errors > 0, 1 / errors, 0).astype(np.float32)  # equal runs have no difference to doubt
    deviations = deviations.astype(np.float32)
    for i in range(count - 1):
        pairs = np.abs(deviations[:, i + 1 :] - deviations[:, i : i + 1]) * scale[i, i + 1 :]
        np.maximum(largest, pairs.max(axis=1), out=largest)
    return _quantile(largest, CONFIDENCE), errors


def _quantile(values: np.ndarray, share: float) -> float:
    """Return what np.quantile does, which imports numpy.ma: a tenth of the time that a sweep takes to be shown."""
    place = share * (len(values) - 1)
    below = int(place)
    pair = np.partition(values, (below, min(below + 1, len(values) - 1)))[below : below + 2]
    return float(pair[0] + (pair[-1] - pair[0]) * (place - below))


def _widening(freedom: float, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Return factors (resamples, 1) that make normal deviations those of Student's t."""
    freedom = max(1.0, freedom)
    return np.sqrt(freedom / random.chisquare(freedom, (resamples, 1)))
