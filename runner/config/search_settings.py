"""The options of hydra/sweeper=search, with their defaults, bounds and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.units import SECONDS, parse_quantity

SAMPLERS = ("tpe", "random", "grid", "cmaes", "qmc")
PRUNERS = ("halving", "asha", "none")
DEFAULT_TRIALS = 30
MAX_TRIALS = 10_000
"""As many as the jobs of a grid."""


@dataclass(frozen=True)
class SearchSettings:
    """hydra.sweeper.* of a search."""

    sampler: str = "tpe"
    """How values are suggested: tpe (tree-structured Parzen estimator), random, grid (every combination), cmaes (with
    pruner=none), or qmc (a quasi-random sequence)."""
    trials: int | None = None
    """How many trials there are, at most; null means 30, or all combinations where there are fewer or sampler=grid."""
    pruner: str = "halving"
    """Which trials continue at a rung: halving waits for all trials of the rung, asha decides with those that are
    there, and none trains every trial to its end."""
    eta: int = 3
    """The best 1/eta of the trials of a rung continue; the next rung is eta times as far."""
    min_iters: int | None = None
    """The first rung, in updates; null means as many rungs as the trials need to come down to one."""
    budget: str | None = None
    """Time that the search may take, such as 8h or 90m, all its processes together; null is no limit."""
    seeds: int = 1
    """Seeds that the finalists are trained with; with more than 1 the verdict has a spread."""
    finalists: int = 3
    """How many of the best trials are trained with all seeds, where there is more than one."""
    seed: int = 0
    """Seed of the suggestions."""
    warm_from: str | None = None
    """An earlier sweep or search, whose results the sampler knows from the start."""

    @property
    def budget_seconds(self) -> float | None:
        """The budget in seconds."""
        return None if self.budget is None else parse_quantity(str(self.budget), SECONDS)


CHANGEABLE_ON_RESUME = ("trials", "budget", "seeds", "finalists")
"""Options that may have another value when the search is resumed."""


def make_settings(options: Mapping[str, Any]) -> SearchSettings:
    """Return the validated options.

    Raises:
        ConfigError: an unknown option or an invalid value.
    """
    names = [field.name for field in dataclasses.fields(SearchSettings)]
    for name in options:
        if name not in names:
            raise ConfigError(f"hydra.sweeper.{name} is no option of a search.{did_you_mean(name, names)}")
    settings = SearchSettings(**options)
    _require_choice("sampler", settings.sampler, SAMPLERS)
    _require_choice("pruner", settings.pruner, PRUNERS)
    for name, least in (("trials", 1), ("eta", 2), ("min_iters", 1), ("seeds", 1), ("finalists", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is None and name in ("trials", "min_iters"):
            continue
        if type(value) is not int or value < least:
            raise ConfigError(f"hydra.sweeper.{name}={value} is invalid: must be a whole number, {least} or more.")
    if (settings.trials or 0) > MAX_TRIALS:
        raise ConfigError(f"hydra.sweeper.trials={settings.trials} is invalid: must be {MAX_TRIALS:,} or less.")
    if settings.budget is not None and not (settings.budget_seconds or 0) > 0:
        raise ConfigError(f"hydra.sweeper.budget={settings.budget} is invalid: must be a duration such as 90m or 8h.")
    return settings


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"hydra.sweeper.{name}={value} is not a choice: {', '.join(choices)}.{hint}")
