"""How long a search takes, how many trials its budget holds, and what that leaves out."""

from __future__ import annotations

import math

from runner.common.errors import ConfigError
from runner.common.text import count, format_duration
from runner.sweeps.search import rungs as rung_rules
from runner.sweeps.search.decide import finalist_count, missing_trials, updates_of_best
from runner.sweeps.search.state import Clock, SearchState, Targets


def seconds_to_come(state: SearchState, targets: Targets, clock: Clock) -> float:
    """Return about how long a search without a budget takes from here, after its trials so far were measured once."""
    trials = len(state.counted) + missing_trials(state, targets.trials)
    finalists = min(finalist_count(targets), trials)
    further = finalists * (targets.seeds - 1)
    seconds = math.ceil(further / state.at_once) * clock.seconds(state.end)
    if state.pruner == "none":
        return seconds + math.ceil((trials - len(state.counted)) / state.at_once) * clock.seconds(state.end)
    before = state.rungs[-2] if len(state.rungs) > 1 else 0
    seconds += math.ceil((finalists - 1) / state.at_once) * clock.seconds(state.end - before)
    return seconds + _halving_seconds_left(state, clock, trials)


def _halving_seconds_left(state: SearchState, clock: Clock, trials: int) -> float:
    """Return how long halving takes with so many trials in all, those that were made at the first rung left out."""
    whole = rung_rules.halving_seconds(trials, state.rungs, state.eta, at_once=state.at_once, seconds=clock.seconds)
    return whole - math.ceil(len(state.counted) / state.at_once) * clock.seconds(state.rungs[0])


def affordable_trials(state: SearchState, targets: Targets, clock: Clock) -> int:
    """Return how many trials in all successive halving can have within the budget.

    Raises:
        ConfigError: not even one.
    """
    if clock.seconds_left is None or clock.per_update is None:
        return targets.trials
    affordable = next(
        (n for n in range(targets.trials, 0, -1) if _halving_seconds_left(state, clock, n) <= clock.seconds_left), 0
    )
    if not affordable and not any(trial.is_finished for trial in state.trials):
        raise ConfigError(
            f"The budget does not hold one trial of {state.end} updates: the one that was begun would need "
            f"{format_duration(clock.seconds(updates_of_best(state)))} more. Nothing is lost: a resume with a larger "
            "hydra.sweeper.budget continues."
        )
    return affordable


def missed_targets(state: SearchState, targets: Targets) -> list[str]:
    """Return what a search that ends lacks of its targets, as phrases: ``2 of 9 trials``, ``seeds 1, 2 of trial 4``."""
    missed = []
    if missing := missing_trials(state, targets.trials):
        missed.append(f"{missing} of {count(targets.trials, 'trial')}")
    finalists = state.best_first()[: finalist_count(targets)]
    for trial in finalists:
        seeds = [str(state.seed + i) for i in range(1, targets.seeds) if state.seed + i not in trial.replicates]
        named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
        if trial.is_paused and trial.result is not None:
            more = f", and its {named}" if seeds else ""
            missed.append(f"trial {trial.number} from {trial.result.step} to its end{more}")
        elif seeds:
            missed.append(f"{named} of trial {trial.number}")
    return missed
