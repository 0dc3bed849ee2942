"""What a search does next: how many trials to ask for, which ones continue, which ones to train with other seeds.

A decision depends on the trials so far, the options and the time that is left, so that a search which is resumed
decides as one that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.common.errors import ConfigError
from runner.common.text import count, format_duration
from runner.runs.search_record import DIVERGED, FINISHED, PAUSED, Result
from runner.sweeps.search import rungs as rung_rules
from runner.sweeps.search.dimensions import Value

_MAX_REPEATS = 20
"""Suggestions in a row that were tried before, after which no more are asked for."""


@dataclass
class Trial:
    """One trial and how far it is."""

    number: int
    job: int | None
    """Number of its job; None where no run can have its settings."""
    params: dict[str, Value]
    repeats: int | None = None
    """The earlier trial of equal settings, whose job it shares; it counts for nothing else."""
    results: list[Result] = field(default_factory=list)
    """In the order of their steps."""
    target: int = 0
    """The step that it was last sent to."""
    replicates: dict[int, int] = field(default_factory=dict)
    """Seed to the number of the job with these settings and that seed."""

    @property
    def result(self) -> Result | None:
        """Its last result."""
        return self.results[-1] if self.results else None

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.result is not None and self.result.state == FINISHED

    @property
    def is_paused(self) -> bool:
        """Whether it waits at a rung."""
        return self.result is not None and self.result.state == PAUSED

    def judged_at(self, step: int) -> float | None:
        """Return what compares it with others at a rung: None where it has not reached it, or failed on the way.

        One that ended before the rung, as by early stopping, has what it had at its end; one that diverged on the way
        to it is worse than any other.
        """
        for result in self.results:
            if result.state == DIVERGED and self.target == step:
                return math.inf
            if result.step == step or (result.state == FINISHED and result.step <= step):
                return result.judged
        return None


@dataclass(frozen=True)
class Continuation:
    """Trials of one rung that continue to a later one."""

    trials: tuple[int, ...]
    start: int
    """The rung that they wait at, in updates."""
    end: int
    of: int
    """How many trials the rung has."""
    cut: float | None = None
    """The value of the last one that continues."""
    reason: str = ""
    """Why these, where it is not their place in the rung."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as the record has it."""
        line: dict[str, Any] = {"trials": list(self.trials), "from": self.start, "to": self.end, "of": self.of}
        return line | ({} if self.cut is None else {"cut": self.cut}) | ({"reason": self.reason} if self.reason else {})


@dataclass(frozen=True)
class Wave:
    """What is launched together."""

    asked: int = 0
    """How many trials the sampler is asked for."""
    continued: tuple[Continuation, ...] = ()
    replicates: tuple[tuple[int, int], ...] = ()
    """Trials and the seeds that they are trained with, too."""


@dataclass(frozen=True)
class Targets:
    """What a search aims at, which a resume may raise."""

    trials: int
    budget_seconds: float | None
    seeds: int
    finalists: int


@dataclass(frozen=True)
class Clock:
    """The time that is left, and how long jobs take."""

    seconds_left: float | None = None
    """None without a budget."""
    per_update: float | None = None
    """Seconds of an update with the evaluations between updates; None before anything was measured."""
    per_start: float = 0.0
    """Seconds that a job takes beside its updates each time it is started."""

    def seconds(self, updates: int) -> float:
        """Return how long a job takes for so many updates, others beside it included."""
        return self.per_start + updates * (self.per_update or 0.0)

    def rounds(self, updates: int, reserve: int = 0) -> float:
        """Return how many times, one after the other, jobs of so many updates fit.

        Args:
            reserve: updates of a job for which there has to be time afterwards.
        """
        if self.seconds_left is None or self.per_update is None:
            return math.inf
        left = self.seconds_left - (self.seconds(reserve) if reserve else 0.0)
        return max(0.0, left // self.seconds(updates))


@dataclass
class SearchState:
    """The trials of a search, and the rules by which it decides."""

    pruner: str
    eta: int
    rungs: list[int]
    """Steps at which trials are compared; the last is their end."""
    maximize: bool
    """Whether a higher value of the first metric is better; at a rung a lower validation loss is."""
    learns: bool
    """Whether the sampler learns from results, so that trials are asked for as late as possible."""
    at_once: int
    """How many jobs run side by side."""
    seed: int
    """That of the trials' config."""
    trials: list[Trial] = field(default_factory=list)
    planned: int | None = None
    """How many trials the budget holds; None without a budget."""
    exhausted: bool = False
    """Whether the sampler has no further combination."""

    @property
    def counted(self) -> list[Trial]:
        """The trials without those that repeat another."""
        return [trial for trial in self.trials if trial.repeats is None]

    @property
    def end(self) -> int:
        """The step at which a trial ends."""
        return self.rungs[-1]

    @property
    def first_rung(self) -> int:
        """The step that a new trial is sent to."""
        return self.end if self.pruner == "none" else self.rungs[0]

    def at_rung(self, step: int) -> dict[int, float]:
        """Return the trials that have a value at a rung, with it."""
        values = {trial.number: trial.judged_at(step) for trial in self.counted}
        return {number: value for number, value in values.items() if value is not None}

    def best_first(self) -> list[Trial]:
        """Return the trials that have a value, the best first: those at their end, then those of later rungs."""

        def key(trial: Trial) -> tuple[bool, int, float, int]:
            result = trial.result
            assert result is not None
            if trial.is_finished:
                value = result.values[0]
                return (False, 0, -value if self.maximize else value, trial.number)
            return (True, -result.step, result.values[0], trial.number)

        return sorted((t for t in self.counted if t.is_finished or t.is_paused), key=key)


def next_wave(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    """Return what to launch next; None where the search is complete, or what is left does not fit its budget."""
    decide = {"none": _train_all, "halving": _halve, "asha": _promote}[state.pruner]
    return decide(state, targets, clock) or _finish(state, targets, clock)


def affordable_trials(state: SearchState, targets: Targets, clock: Clock) -> int:
    """Return how many trials in all successive halving can have within the budget.

    Raises:
        ConfigError: not even one.
    """
    if clock.seconds_left is None or clock.per_update is None:
        return targets.trials
    made = math.ceil(len(state.counted) / state.at_once) * clock.seconds(state.rungs[0])

    def fits(trials: int) -> bool:
        whole = rung_rules.halving_seconds(trials, state.rungs, state.eta, at_once=state.at_once, seconds=clock.seconds)
        assert clock.seconds_left is not None
        return whole - made <= clock.seconds_left

    affordable = next((trials for trials in range(targets.trials, 0, -1) if fits(trials)), 0)
    if not affordable and not any(trial.is_finished for trial in state.trials):
        raise ConfigError(
            f"The budget does not hold one trial of {state.end} updates: the one that was begun would need "
            f"{format_duration(clock.seconds(_reserve(state)))} more. Nothing is lost: a resume with a larger "
            "hydra.sweeper.budget continues."
        )
    return affordable


def missed_targets(state: SearchState, targets: Targets) -> list[str]:
    """Return what a search that ends lacks of its targets, as phrases: ``2 of 9 trials``, ``seeds 1, 2 of trial 4``."""
    missed = []
    if missing := _missing_trials(state, targets.trials):
        missed.append(f"{missing} of {count(targets.trials, 'trial')}")
    finalists = state.best_first()[: _finalists(targets)]
    for trial in finalists:
        seeds = [str(state.seed + i) for i in range(1, targets.seeds) if state.seed + i not in trial.replicates]
        named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
        if trial.is_paused and trial.result is not None:
            more = f", and its {named}" if seeds else ""
            missed.append(f"trial {trial.number} from {trial.result.step} to its end{more}")
        elif seeds:
            missed.append(f"{named} of trial {trial.number}")
    return missed


def _missing_trials(state: SearchState, most: int) -> int:
    """Return how many trials can still be asked for, up to `most` in all."""
    last = state.trials[-_MAX_REPEATS:]
    if state.exhausted or (len(last) == _MAX_REPEATS and all(trial.repeats is not None for trial in last)):
        return 0
    return max(0, most - len(state.counted))


def _finalists(targets: Targets) -> int:
    """Return how many of the best trials are trained to their end."""
    return targets.finalists if targets.seeds > 1 else 1


def _asks(state: SearchState, most: int) -> int:
    """Return how many trials to ask for at once, up to `most` in all."""
    missing = _missing_trials(state, most)
    return min(missing, state.at_once) if state.learns else missing


def _reserve(state: SearchState) -> int:
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
    asked = _asks(state, targets.trials if state.planned is None else state.planned)
    if asked:
        return Wave(asked if clock.seconds_left is None else min(asked, state.at_once))
    for step, following in zip(state.rungs[:-1], state.rungs[1:], strict=True):
        values = state.at_rung(step)
        ranked = rung_rules.rank(values, maximize=False)
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
    brings_best = bool(best) and best[0].number in continued
    rounds = clock.rounds(updates, max(0, _reserve(state) - updates * brings_best))
    return len(state.trials) + state.at_once if math.isinf(rounds) else int(rounds) * state.at_once


def _promote(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    """Fill the places with trials that may continue, those of the latest rungs first, and then with new ones."""
    continued: list[Continuation] = []
    sent: set[int] = set()
    for i in range(len(state.rungs) - 2, -1, -1):
        step, following = state.rungs[i], state.rungs[i + 1]
        values = state.at_rung(step)
        ranked = rung_rules.rank(values, maximize=False)
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
    return trial.is_paused and trial.target == step


def _finish(state: SearchState, targets: Targets, clock: Clock) -> Wave | None:
    """Train the best trials to their end, then the finalists with other seeds."""
    ranked = state.best_first()
    finalists = ranked[: _finalists(targets)]
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
