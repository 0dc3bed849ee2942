"""How much of the difference between the jobs of a sweep each setting explains, and how sure that is.

An additive model of the objective, one effect a value of each setting (linear and quadratic where a number has many
values), is fitted by least squares. The share of a setting is the part of the variance that the model loses without it:
its main effect, as in an analysis of variance with sums of squares of type II. What two settings explain together and
cannot be told apart, because they vary together, is credited to neither. The p value is that of a permutation test of
the F statistic (Freedman and Lane, 1983), and the interval that of a bootstrap of the residuals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.common.safe_json import finite_number

MIN_SPARE = 3
"""Jobs beyond the number of effects of the model that are needed to tell effects from noise."""
CLEAR_P = 0.05
_MANY_VALUES = 6
"""A number with more distinct values than this is modelled by a line and a curve."""
_LOG_FACTOR = 10.0
"""Values that span this factor or more are compared by their logarithms."""
_DRAWS = 1000
_MAX_JOBS = 500


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What one setting explains of the variance of the objective."""

    names: tuple[str, ...]
    """Several settings where they vary together, so that no job tells them apart."""
    share: float
    """From 0 to 1."""
    interval: tuple[float, float] | None
    """Of the share, 95 %; None with too few jobs."""
    p: float | None
    """How often an effect as large as this comes about by chance."""


@dataclass(frozen=True, kw_only=True)
class ImportanceResult:
    """The importance of the settings of a sweep, the largest first."""

    settings: list[Importance]
    jobs: int
    """Jobs with a value of the objective."""
    spare: int
    """Jobs beyond the number of effects: below `MIN_SPARE`, no effect can be told from noise."""
    log: bool
    """Whether logarithms of the objective are explained."""


def measure_importance(values: Sequence[Mapping[str, Any]], objective: Sequence[float]) -> ImportanceResult | None:
    """Return the importance of each setting; None where nothing varies.

    Args:
        values: for each job the value of each setting.
        objective: the value that each job reached.
    """
    import numpy as np

    values, objective = values[:_MAX_JOBS], objective[:_MAX_JOBS]
    groups = _groups([dict(job) for job in values])
    if len(objective) < 3 or not groups or len(set(objective)) < 2:
        return None
    log = min(objective) > 0 and max(objective) >= _LOG_FACTOR * min(objective)
    y = np.array([math.log(value) if log else value for value in objective], dtype=np.float64)
    y = (y - y.mean()) / y.std()
    blocks = {names: _columns(column) for names, column in groups.items()}
    ones = np.ones((len(y), 1))
    full = _Fit(np.hstack([ones, *blocks.values()]), y)
    spare = len(y) - full.rank
    generator = np.random.default_rng(0)
    found = []
    for names in blocks:
        rest = _Fit(np.hstack([ones, *(block for other, block in blocks.items() if other != names)]), y)
        share = max(0.0, full.explained(y) - rest.explained(y))
        interval = p = None
        if spare >= MIN_SPARE and full.rank > rest.rank:
            p = _permutation_p(full, rest, y, generator)
            interval = _bootstrap_interval(full, rest, y, spare, generator)
        found.append(Importance(names=names, share=min(1.0, float(share)), interval=interval, p=p))
    found.sort(key=lambda setting: -setting.share)
    return ImportanceResult(settings=found, jobs=len(y), spare=spare, log=log)


class _Fit:
    """Least squares on the columns of a design; `y` has the shape (jobs,) or (draws, jobs)."""

    def __init__(self, design: Any, y: Any) -> None:
        import numpy as np

        left, singular, _ = np.linalg.svd(design, full_matrices=False)
        self._basis = left[:, singular > 1e-9 * singular[0]]
        self.rank = self._basis.shape[1]
        self.fitted = self.project(y)
        self.residuals = y - self.fitted

    def project(self, y: Any) -> Any:
        return (y @ self._basis) @ self._basis.T

    def explained(self, y: Any) -> Any:
        """Return the share of the variance of `y` that the fit explains; the mean is one of its columns."""
        of_mean = y.shape[-1] * y.mean(axis=-1) ** 2
        squares = ((y @ self._basis) ** 2).sum(-1) - of_mean
        return squares / ((y**2).sum(-1) - of_mean).clip(1e-300)


def _permutation_p(full: _Fit, rest: _Fit, y: Any, generator: Any) -> float:
    """Return how often permuted residuals of the model without the setting give an F statistic as large as `y`'s."""
    draws = rest.fitted + generator.permuted(_repeated(rest.residuals), axis=1)
    statistic, by_chance = (_f_statistic(full, rest, sample) for sample in (y, draws))
    return float((1 + (by_chance >= statistic * (1 - 1e-9)).sum()) / (1 + _DRAWS))


def _f_statistic(full: _Fit, rest: _Fit, y: Any) -> Any:
    """Return the F statistic of the setting, apart from the degrees of freedom, which do not change."""
    explained = full.explained(y)
    return (explained - rest.explained(y)) / (1.0 - explained).clip(1e-12)


def _bootstrap_interval(full: _Fit, rest: _Fit, y: Any, spare: int, generator: Any) -> tuple[float, float]:
    """Return the 95 % interval of the share when the residuals are drawn anew, with their spread corrected."""
    import numpy as np

    residuals = full.residuals * math.sqrt(len(y) / spare)
    draws = full.fitted + generator.choice(residuals - residuals.mean(), size=(_DRAWS, len(y)))
    low, high = np.percentile(full.explained(draws) - rest.explained(draws), [2.5, 97.5])
    return float(low.clip(0, 1)), float(high.clip(0, 1))


def _repeated(row: Any) -> Any:
    import numpy as np

    return np.repeat(row[None], _DRAWS, axis=0)


def _groups(values: list[dict[str, Any]]) -> dict[tuple[str, ...], list[Any]]:
    """Return the values of each setting that varies, by name; settings with a value for a value are one."""
    names = list(dict.fromkeys(name for job in values for name in job))
    found: dict[tuple[int, ...], tuple[list[str], list[Any]]] = {}
    for name in names:
        column = [job.get(name) for job in values]
        pattern = _pattern(column)
        if len(set(pattern)) > 1:
            found.setdefault(pattern, ([], column))[0].append(name)
    return {tuple(names): column for names, column in found.values()}


def _pattern(column: Sequence[Any]) -> tuple[int, ...]:
    """Return what two settings share that no job tells apart: which values are equal, or of many numbers the order."""
    keys: list[Any] = [repr(value) for value in column]
    order = list(dict.fromkeys(keys))
    if _is_continuous(column):
        keys = list(column)
        order = sorted(set(keys), reverse=keys[0] > keys[-1])
    places = {key: place for place, key in enumerate(order)}
    return tuple(places[key] for key in keys)


def _is_continuous(values: Sequence[Any]) -> bool:
    return len(set(map(repr, values))) > _MANY_VALUES and all(finite_number(value) is not None for value in values)


def _columns(values: Sequence[Any]) -> Any:
    """Return the columns of a setting in the design: one a value but the first, or a line and a curve."""
    import numpy as np

    if _is_continuous(values):
        positions = np.array(values, dtype=np.float64)
        if positions.min() > 0 and positions.max() >= _LOG_FACTOR * positions.min():
            positions = np.log(positions)
        positions = (positions - positions.mean()) / max(positions.std(), 1e-12)
        return np.stack([positions, positions**2], axis=1)
    distinct = list(dict.fromkeys(map(repr, values)))
    return np.array([[float(repr(value) == other) for other in distinct[1:]] for value in values])
