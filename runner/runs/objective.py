"""The objective of a sweep: the metrics that rank its jobs, and whether a higher value of each is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.objectives import directions_of, metrics_of
from runner.runs.inspect import RunInfo
from runner.runs.metric_values import VALID_LOSS, metric_value

__all__ = ["VALID_LOSS", "Objective", "objective_of"]
Value = Callable[[RunInfo], float | None]


@dataclass(frozen=True)
class Objective:
    """What ranks the jobs of a sweep, everywhere the same.

    Jobs of a search that trained to their end come first, then those that reached its last rung, and so on; those that
    failed come last. Of several metrics, the jobs of the Pareto front come first; then the first metric decides.
    """

    metric: str = VALID_LOSS
    """The first metric, or the only one."""
    maximize: bool = False
    """Whether a higher value of it is better."""
    others: tuple[Objective, ...] = ()
    """The objectives of further metrics, each with one metric."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Objective:
        """Return the objective in the settings (by dotted name) of a run."""
        metric = settings.get("objective.metric")
        directions = directions_of(metric, settings.get("objective.direction"))
        first, *others = map(cls, metrics_of(metric), directions)
        return cls(first.metric, first.maximize, tuple(others))

    @property
    def each(self) -> tuple[Objective, ...]:
        """The objective of each metric by itself, the first one first."""
        return (Objective(self.metric, self.maximize), *self.others)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, the first one first."""
        return tuple(single.metric for single in self.each)

    @property
    def text(self) -> str:
        """The metrics as they are typed: `score`, or `[valid_loss,peak_memory_gb]`."""
        return f"[{','.join(self.metrics)}]" if self.others else self.metric

    def value(self, run: RunInfo) -> float | None:
        """Return the value that a run has of the (first) metric; None if it diverged or has none."""
        return None if run.state == "diverged" else self.value_so_far(run)

    def value_so_far(self, run: RunInfo) -> float | None:
        """Return the value that a run has of the (first) metric, also of one that diverged."""
        rows = [] if self.metric == VALID_LOSS else run.rows  # read from the disk only where they are needed
        return metric_value(rows, run.best_loss, self.metric)

    def values(self, run: RunInfo) -> tuple[float | None, ...]:
        """Return the value that a run has of each metric, the first one first."""
        return tuple(single.value(run) for single in self.each)

    def rank(self, runs: Iterable[RunInfo], value: Value | None = None) -> list[RunInfo]:
        """Return the runs, the best first and those without a value last; equal ones keep their order.

        Args:
            value: returns the metric of a run, where it is none that `value` of the objective knows.
        """
        values = [(run, (value or self.value)(run)) for run in runs]
        front = {id(run) for run in self.front(run for run, _ in values)} if self.others else set()

        def place(pair: tuple[RunInfo, float | None]) -> tuple[bool, bool, float, bool, float]:
            run, found = pair
            if run.rung is not None and run.state != "diverged":  # at a rung, the validation loss compares
                found = run.best_loss
            cost = 0.0 if found is None else found if run.rung is not None else self._cost(found)
            return found is None, *_behind(run), id(run) not in front, cost

        return [run for run, _ in sorted(values, key=place)]

    def best(self, runs: Iterable[RunInfo], value: Value | None = None) -> RunInfo | None:
        """Return the best run; None where no run has a value, which is as for `rank`.

        Of a search it is a trial, not one of its further seeds. Where there are such, it is the best of the trials that
        have them by the mean over seeds: the lowest loss of a single run may be luck.
        """
        runs, value = list(runs), value or self.value
        first = next(iter(self.rank([run for run in runs if run.seed_of is None] or runs, value)), None)
        if first is None or value(first) is None:
            return None
        seeds: dict[Path, list[RunInfo]] = {}
        for run in runs:
            if run.seed_of is not None and run.seed_of.parent == first.path.parent:
                seeds.setdefault(run.seed_of, []).append(run)
        compared = []
        for trial in runs:
            values = [found for run in (trial, *seeds.get(trial.path, ())) if (found := value(run)) is not None]
            if trial.path in seeds and value(trial) is not None:
                compared.append((-len(values), self._cost(statistics.fmean(values)), trial))
        return min(compared, key=lambda entry: entry[:2])[2] if compared else first

    def candidates(self, runs: Iterable[RunInfo]) -> list[RunInfo]:
        """Return the runs that can be the best: those with a value that trained as far as any, in their order.

        In a search these are the jobs that trained to their end; until there is one, those at its last rung so far.
        """
        measured = [run for run in runs if self.value(run) is not None]
        furthest = min(map(_behind, measured), default=None)
        return [run for run in measured if _behind(run) == furthest]

    def front(self, runs: Iterable[RunInfo]) -> list[RunInfo]:
        """Return the Pareto front: the runs that no other surpasses in one metric without falling behind in another.

        Only `candidates` that have a value of each metric are compared. They are in the order of the first metric.
        """
        measured = [(run, self.values(run)) for run in self.candidates(runs)]
        costs = [
            (tuple(single._cost(value or 0.0) for single, value in zip(self.each, values, strict=True)), run)
            for run, values in measured
            if None not in values
        ]
        front: list[tuple[tuple[float, ...], RunInfo]] = []
        for cost, run in sorted(costs, key=lambda pair: pair[0]):  # what comes later surpasses none before it
            if not any(other != cost and all(map(float.__le__, other, cost)) for other, _ in front):
                front.append((cost, run))
        return [run for _, run in front]

    def _cost(self, value: float) -> float:
        return -float(value) if self.maximize else float(value)


def objective_of(runs: Sequence[RunInfo]) -> Objective:
    """Return the objective that the jobs of a sweep have stored: that of the first which stored one."""
    return next((Objective.of(run.settings) for run in runs if "objective.metric" in run.settings), Objective())


def _behind(run: RunInfo) -> tuple[bool, float]:
    """Return how far a run is from having trained to its end: a job of a search that failed, and by rungs reached."""
    return run.rung is not None and run.state == "failed", -(math.inf if run.rung is None else run.rung)
