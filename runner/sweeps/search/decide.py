"""What a search does next: how many trials to ask for, which ones continue, which ones to train with other seeds.

A decision depends on the trials so far, the options and the time that is left, so that a search which is resumed
decides as one that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runner.sweeps.search import rungs as rung_rules
from runner.sweeps.search.state import Clock, Continuation, SearchState, Targets, Trial, Wave


def next_wave(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    """Return what to launch next; None where the search is complete, or what is left does not fit its budget."""
    decide = {"none": _train_all, "halving": _halve, "asha": _promote}[state.pruner]
    return decide(state, targets, clock) or _finish(state, targets, clock)


def missing_trials(state: SearchState, most: int) -> int:
    """Return how many trials can still be asked for, up to `most` in all."""
    if state.exhausted or state.only_repeats:
        return 0
    return max(0, most - len(state.counted))


def finalist_count(targets: Targets) -> int:
    """Return how many of the best trials are trained to their end."""
    return targets.finalists if targets.seeds > 1 else 1


def _asks(state: SearchState, most: int) -> int:
    """Return how many trials to ask for at once, up to `most` in all."""
    missing = missing_trials(state, most)
    return min(missing, state.at_once) if state.learns else missing


def updates_of_best(state: SearchState) -> int:
    """Return the updates that the best trial still needs to its end."""
    best = state.best_first()
    step = best[0].result.step if best and best[0].result else 0
    return 0 if best and best[0].is_finished else state.end - step


def _train_all(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    asked = _asks(state, targets.trials)
    if clock.seconds_left is not None:  # a few at a time, and measured before more is begun
        asked = min(asked, state.at_once) if clock.rounds(state.end) >= 1 else 0
    return Wave(asked) if asked else None


def _halve(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    asked = _asks(state, targets.trials if state.affordable is None else state.affordable)
    if asked:
        return Wave(asked if clock.seconds_left is None else min(asked, state.at_once))
    for step, following in zip(state.rungs[:-1], state.rungs[1:], strict=True):
        values = state.at_rung(step)
        ranked = rung_rules.rank(values)
        chosen = rung_rules.survivors(ranked, state.eta)
        waiting = [number for number in chosen if _waits(state.trials[number], step)]
        fitting = waiting[: _fitting(state, clock, following - step, waiting)]
        if fitting:
            reason = "" if len(fitting) == len(waiting) else "the budget holds no more"
            cut = values[fitting[-1]]
            return Wave(continued=(Continuation(tuple(fitting), step, following, len(ranked), cut, reason),))
    return None


def _fitting(state: SearchState, clock: Clock, updates: int, continued: Sequence[int] = ()) -> int:
    """Return how many jobs of so many updates fit beside what the best trial needs to its end.

    Args:
        continued: the trials that would make them; none of them where they are new.
    """
    best = state.best_first()
    made_by_best = updates if best and best[0].number in continued else 0
    left_for_best = max(0, updates_of_best(state) - made_by_best)
    rounds = clock.rounds(updates, reserve=left_for_best)
    return len(state.trials) + state.at_once if math.isinf(rounds) else int(rounds) * state.at_once


def _promote(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    """Fill the places with trials that may continue, those of the latest rungs first, and then with new ones."""
    continued: list[Continuation] = []
    sent: set[int] = set()
    for i in range(len(state.rungs) - 2, -1, -1):
        step, following = state.rungs[i], state.rungs[i + 1]
        values = state.at_rung(step)
        ranked = rung_rules.rank(values)
        for number in ranked[: len(ranked) // state.eta]:
            free = state.at_once - len(sent)
            if free and _waits(state.trials[number], step) and _fitting(state, clock, following - step, [number]):
                continued.append(Continuation((number,), step, following, len(ranked), values[number]))
                sent.add(number)
    asked = min(_asks(state, targets.trials), state.at_once - len(sent))
    if asked and state.trials and _fitting(state, clock, state.first_rung) < 1:
        asked = 0
    return Wave(asked, tuple(continued)) if asked or continued else None


def _waits(trial: Trial, step: int) -> bool:
    return trial.is_paused and trial.stop_at == step


def _finish(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    """Train the best trials to their end, then the finalists with other seeds."""
    ranked = state.best_first()
    finalists = ranked[: finalist_count(targets)]
    reason = "the best is trained to its end" if len(finalists) == 1 else "a finalist"
    paused: dict[int, list[int]] = {}
    for place, trial in enumerate(finalists):
        assert trial.result is not None
        step = trial.result.step
        if trial.is_paused and (place == 0 or _fitting(state, clock, state.end - step) > place):
            paused.setdefault(step, []).append(trial.number)
    if paused:
        return Wave(
            continued=tuple(
                Continuation(tuple(numbers), step, state.end, len(state.at_rung(step)), None, reason)
                for step, numbers in paused.items()
            )
        )
    missing = [
        (trial.number, state.seed + i)
        for i in range(1, targets.seeds)
        for trial in finalists
        if trial.is_finished and state.seed + i not in trial.replicates
    ]
    rounds = clock.rounds(state.end)
    fitting = missing if math.isinf(rounds) else missing[: int(rounds) * state.at_once]
    return Wave(replicates=tuple(fitting)) if fitting else None
