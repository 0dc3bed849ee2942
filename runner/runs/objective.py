"""The objective of a sweep: the metric that ranks its jobs, and whether a higher value of it is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.runs.inspect import RunInfo, higher_is_better, objective_value

VALID_LOSS = "valid_loss"
Value = Callable[[RunInfo], float | None]


@dataclass(frozen=True)
class Objective:
    """What ranks the jobs of a sweep, everywhere the same."""

    metric: str = VALID_LOSS
    maximize: bool = False
    """Whether a higher value is better."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Objective:
        """Return the objective in the settings (by dotted name) of a run."""
        metric = settings.get("objective.metric")
        return cls(metric, higher_is_better(settings)) if isinstance(metric, str) else cls()

    def value(self, run: RunInfo) -> float | None:
        """Return the value of a run: its best validation loss, or its last test loss or score; None if it diverged."""
        if run.state == "diverged":
            return None
        rows = [] if self.metric == VALID_LOSS else run.rows  # read from the disk only where they are needed
        return objective_value(rows, run.best_loss, self.metric)

    def rank(self, runs: Iterable[RunInfo], value: Value | None = None) -> list[RunInfo]:
        """Return the runs, the best first and those without a value last; equal ones keep their order.

        Args:
            value: returns the metric of a run, where it is none that `value` of the objective knows.
        """
        values = [(run, (value or self.value)(run)) for run in runs]
        measured = [pair for pair in values if pair[1] is not None]
        measured.sort(key=lambda pair: (-1.0 if self.maximize else 1.0) * (pair[1] or 0.0))
        return [run for run, _ in measured] + [run for run, found in values if found is None]

    def best(self, runs: Iterable[RunInfo], value: Value | None = None) -> RunInfo | None:
        """Return the best run; None where no run has a value, which is as for `rank`."""
        first = next(iter(self.rank(runs, value)), None)
        return first if first is not None and (value or self.value)(first) is not None else None


def objective_of(runs: Sequence[RunInfo]) -> Objective:
    """Return the objective that the jobs of a sweep have stored: that of the first which stored one."""
    return next((Objective.of(run.settings) for run in runs if "objective.metric" in run.settings), Objective())
