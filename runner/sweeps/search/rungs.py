"""Rungs: the steps at which trials are compared, and which of them continue. Pure functions.

Successive halving: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization"
(2016); its asynchronous form: Li et al., "A system for massively parallel hyperparameter tuning" (2020), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from runner.common.errors import ConfigError


def plan_rungs(iters: int, eval_every: int, *, eta: int, min_iters: int | None, trials: int) -> list[int]:
    """Return the steps at which trials are compared, ascending; the last is `iters`.

    Each is a step after which a run evaluates anyway, so that a trial that pauses there equals one that does not. They
    are `iters`, `iters` / eta, `iters` / eta², … rounded up to a multiple of `eval_every`, down to `min_iters` or as
    many as bring `trials` down to one.

    Raises:
        ConfigError: there is no step to compare trials at before their end.
    """
    halvings = min(1, trials - 1)
    while eta ** (halvings + 1) <= trials:
        halvings += 1
    least = max(min_iters or 1, 1)
    steps = {iters}
    for power in range(1, (halvings if min_iters is None else 64) + 1):
        if iters / eta**power < least:
            break
        steps.add(math.ceil(iters / eta**power / eval_every) * eval_every)
    if min_iters is not None:
        steps.add(math.ceil(min_iters / eval_every) * eval_every)
    rungs = sorted(step for step in steps if step <= iters)
    if len(rungs) == 1 and trials > 1:
        raise ConfigError(
            f"A pruner compares trials where they evaluate, and with train.eval_every={eval_every} of {iters} updates "
            f"there is no such step before their end: type train.eval_every={max(1, iters // eta**2)}, or "
            "hydra.sweeper.pruner=none."
        )
    return rungs


def rank(values: Mapping[int, float], *, maximize: bool) -> list[int]:
    """Return the trials with these values, the best first; equal ones by number."""
    return sorted(values, key=lambda number: (-values[number] if maximize else values[number], number))


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
