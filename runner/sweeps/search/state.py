"""The trials of a search as far as they are, what it aims at, and what it decides to launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from runner.runs.search_record import FINISHED, PAUSED, Result, only_repeats, value_at_rung
from runner.sweeps.search.dimensions import Value


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
    stop_at: int = 0
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

    def value_at_rung(self, step: int) -> float | None:
        """Return what compares it with others at a rung; None where it has not reached it, or failed on the way."""
        return value_at_rung(self.results, self.stop_at, step)


@dataclass(frozen=True)
class Continuation:
    """Trials of one rung that continue to a later one."""

    trials: tuple[int, ...]
    from_step: int
    """The rung that they wait at, in updates."""
    to_step: int
    of: int
    """How many trials the rung has."""
    cut: float | None = None
    """The value of the last one that continues."""
    reason: str = ""
    """Why these, where it is not their place in the rung."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as the record has it."""
        line: dict[str, Any] = {"trials": list(self.trials), "from": self.from_step, "to": self.to_step, "of": self.of}
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
    """What a search aims at, which a resume may change."""

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
    affordable: int | None = None
    """How many trials the budget holds; None without a budget."""
    exhausted: bool = False
    """Whether the sampler has no further combination."""

    @property
    def counted(self) -> list[Trial]:
        """The trials without those that repeat another."""
        return [trial for trial in self.trials if trial.repeats is None]

    @property
    def only_repeats(self) -> bool:
        """Whether the sampler suggests only what was tried before, so that no more trials are asked for."""
        return only_repeats([trial.repeats is not None for trial in self.trials])

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
        values = {trial.number: trial.value_at_rung(step) for trial in self.counted}
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
