"""Rungs: the steps at which trials are compared, and which of them continue. Pure functions.

Successive halving: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization"
(2016); its asynchronous form: Li et al., "A system for massively parallel hyperparameter tuning" (2020), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from runner.common.errors import ConfigError


def plan_rungs(iters: int, *, eta: int, min_iters: int | None, trials: int) -> list[int]:
    """Return the steps at which trials are compared, ascending; the last is `iters`.

    They are `iters`, `iters` / eta, `iters` / eta², … rounded up: as many as bring `trials` down to one. Where
    `min_iters` is set, it is the first one, whatever the trials, and those within a factor of sqrt(eta) are left out.

    Raises:
        ConfigError: there is no step to compare trials at before their end.
    """
    halvings = min(1, trials - 1)
    while eta ** (halvings + 1) <= trials:
        halvings += 1
    if min_iters is None:
        steps = {math.ceil(iters / eta**power) for power in range(halvings + 1)}
    else:
        # A comparison soon after the first would stop trials by the noise of a few updates.
        least = min_iters * math.sqrt(eta)
        steps = {iters, min_iters, *(s for power in range(64) if (s := math.ceil(iters / eta**power)) > least)}
    rungs = sorted(step for step in steps if step <= iters)
    if len(rungs) == 1 and trials > 1:
        cause = f"train.iters={iters}" if min_iters is None else f"hydra.sweeper.min_iters={min_iters}"
        raise ConfigError(
            f"A pruner compares trials before their end, and {cause} leaves no step for it: train longer"
            f"{'' if min_iters is None else ', take a lower min_iters'}, or type hydra.sweeper.pruner=none."
        )
    return rungs


def rank(values: Mapping[int, float]) -> list[int]:
    """Return the trials with these values, the lowest first, which is the best; equal ones by number."""
    return sorted(values, key=lambda number: (values[number], number))


def survivors(ranked: Sequence[int], eta: int) -> list[int]:
    """Return the trials of a rung that continue, the best 1/eta but at least one, in the order of their rank."""
    return list(ranked[: max(1, len(ranked) // eta)]) if ranked else []


def halving_seconds(
    trials: int, rungs: Sequence[int], eta: int, *, at_once: int, seconds: Callable[[int], float]
) -> float:
    """Return how long halving takes with so many trials, `at_once` of them side by side.

    Args:
        seconds: how long a job takes for a number of updates.
    """
    total, before, count = 0.0, 0, trials
    for step in rungs:
        total += math.ceil(count / at_once) * seconds(step - before)
        before, count = step, max(1, count // eta)
    return total
