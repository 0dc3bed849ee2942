"""Which runs are not distinguishable from the best on the rows of their evaluations, and the cheapest of these."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runner.common import layout
from runner.common.text import count, shorten
from runner.reports import significance
from runner.reports.seed_groups import seed_groups
from runner.runs.inspect import RunInfo, count_or_none
from runner.runs.objective import VALID_LOSS, Objective
from runner.runs.row_values import ROW_METRICS, NoRowValues, RowValues, row_values
from runner.runs.timeline import Timeline

_EQUAL_TIMES = 1.1


@dataclass(frozen=True)
class Names:
    """What runs are called in a report."""

    by_path: Mapping[Path, str]
    """In the order in which they are listed."""
    noun: str = "run"
    """`run`, or `job` where the names are numbers, which need a noun in a sentence."""

    @property
    def are_jobs(self) -> bool:
        """Whether they are the numbers of a sweep's jobs."""
        return self.noun == "job"

    @classmethod
    def of_jobs(cls, runs: Iterable[RunInfo]) -> Names:
        """Return the names of a sweep's jobs: those of their folders."""
        paths = sorted((run.path for run in runs), key=lambda path: (len(path.name), path.name))
        return cls({path: path.name for path in paths}, "job")

    def listed(self, runs: Sequence[RunInfo]) -> str:
        """Return the names, as a table has them: `0, 1`."""
        return ", ".join(self.by_path[run.path] for run in runs)

    def phrase(self, runs: Sequence[RunInfo]) -> str:
        """Return the names, as a sentence has them: `jobs 0, 1`, or `A, B`."""
        noun = "" if self.noun == "run" else f"{self.noun}{'s' if len(runs) > 1 else ''} "
        return noun + self.listed(runs)


@dataclass(frozen=True)
class Candidate:
    """A run, or runs that differ by their seed alone, beside the best one."""

    runs: list[RunInfo]
    steps: list[int]
    """The evaluation of each run that was compared."""
    evaluations: list[int]
    """Of how many evaluations that one is the best, for each run."""
    value: float
    """The metric on the compared rows, the mean over the runs."""
    difference: float
    """How much worse the metric is than that of the best."""
    low: float
    high: float
    is_worse: bool
    """Whether it is worse by more than noise."""
    seconds: float | None
    """Time in updates until the result, the mean over the runs; None where it is not known."""
    adapter_bytes: int
    """Size of the result of its first run; 0 where there is none."""


@dataclass(frozen=True)
class Verdict:
    """The comparison of runs on the same rows."""

    metric: str
    rows: int = 0
    """How many rows were compared."""
    candidates: list[Candidate] = field(default_factory=list)
    """The best first."""
    left_out: list[tuple[RunInfo, str]] = field(default_factory=list)
    """Runs that were not compared, each with the reason."""
    problem: str | None = None
    """Why there are no candidates."""

    @property
    def equals(self) -> list[Candidate]:
        """Those that are not distinguishable from the best, without it."""
        return [candidate for candidate in self.candidates[1:] if not candidate.is_worse]

    @property
    def cheapest(self) -> Candidate | None:
        """Of the best and those that are not distinguishable from it, the one that trained the shortest.

        Times are measured: of those within a tenth of the shortest, it is the one with the smallest adapter.
        """
        known = [(c.seconds, c) for c in (*self.candidates[:1], *self.equals) if c.seconds is not None]
        limit = min((seconds for seconds, _ in known), default=0.0) * _EQUAL_TIMES
        shortest = [(c.adapter_bytes, seconds, i) for i, (seconds, c) in enumerate(known) if seconds <= limit]
        return known[min(shortest)[2]][1] if known else None

    @property
    def has_seeds(self) -> bool:
        """Whether a candidate has several seeds, so that their spread is part of the intervals."""
        return any(len(candidate.runs) > 1 for candidate in self.candidates)


def judge(runs: Sequence[RunInfo], objective: Objective, names: Names) -> Verdict:
    """Compare the runs that have a value of the objective; what cannot be compared is left out with the reason.

    Of several metrics, the first counts that is a mean over rows.
    """
    metrics = [single for single in objective.each if single.metric in ROW_METRICS]
    if not metrics:
        return Verdict(objective.metric, problem="it is no mean over rows, whose resampling would say what is noise")
    objective = metrics[0]
    measured = [run for run in objective.rank(runs) if objective.value(run) is not None]
    comparable = objective.candidates(measured)
    if comparable and all(run.rung is not None for run in comparable):
        return Verdict(objective.metric, problem="the search has trained no job to its end yet")
    candidates = {id(run) for run in comparable}
    groups = [group.runs for group in seed_groups(measured, objective)] or [[run] for run in measured]
    values: dict[Path, RowValues] = {}
    left_out: list[tuple[RunInfo, str]] = []
    for run in measured:
        if run.state == "running":  # its result would count as worse, or as the spread of a seed
            left_out.append((run, "still running"))
            continue
        if id(run) not in candidates:
            left_out.append((run, "failed" if run.state == "failed" else "not trained to its end by the search"))
            continue
        try:
            values[run.path] = row_values(run, objective.metric)
        except NoRowValues as reason:
            left_out.append((run, str(reason)))
    rows, _ = next(iter(Counter(found.rows for found in values.values()).most_common(1)), ("", 0))
    for run in measured:
        if run.path in values and values[run.path].rows != rows:
            left_out.append((run, "evaluated on other rows or tokens than the rest, or with another method's loss"))
            del values[run.path]
    place = {path: i for i, path in enumerate(names.by_path)}
    groups = [sorted(group, key=lambda run: place[run.path]) for group in groups]
    compared = [[run for run in group if run.path in values] for group in groups]
    return _compare([group for group in compared if group], values, objective, left_out)


def _compare(
    groups: list[list[RunInfo]],
    values: Mapping[Path, RowValues],
    objective: Objective,
    left_out: list[tuple[RunInfo, str]],
) -> Verdict:
    metric = objective.metric
    if len(groups) < 2:
        searched = any(run.rung is not None for run, _ in left_out)
        problem = "there are no two to compare on the same rows"
        if searched:
            problem = "the search trained fewer than two settings to their end"
        return Verdict(metric, left_out=left_out, problem=problem)
    weights = values[groups[0][0].path].weights
    if len(weights) < significance.MIN_ROWS:
        few = f"{count(len(weights), 'row')} say too little, {significance.MIN_ROWS} are needed"
        return Verdict(metric, len(weights), left_out=left_out, problem=few)
    sign = -1.0 if objective.maximize else 1.0
    arrays = [sign * np.stack([values[run.path].values for run in group]) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: float(arrays[i].sum()) / len(groups[i]))
    for i in order[significance.MAX_CANDIDATES :]:
        left_out += [(run, f"not among the best {significance.MAX_CANDIDATES}") for run in groups[i]]
    order = order[: significance.MAX_CANDIDATES]
    candidates = []
    for i, found in zip(order, significance.differences([arrays[i] for i in order], weights), strict=True):
        candidates.append(
            Candidate(
                groups[i],
                [values[run.path].step for run in groups[i]],
                [_evaluations(run, metric) for run in groups[i]],
                0.0 + float(sign * arrays[i].sum() / len(groups[i]) / weights.sum()),  # a score of 0 is not -0.0
                found.value,
                found.low,
                found.high,
                found.is_worse,
                _seconds(groups[i], values),
                _adapter_bytes(groups[i][0]),
            )
        )
    return Verdict(metric, len(weights), candidates, left_out)


def _evaluations(run: RunInfo, metric: str) -> int:
    """Return of how many evaluations the metric is the best: of all after training began, or of the one result."""
    return sum(step > 0 for step, _ in run.losses("valid")) if metric == VALID_LOSS else 1


def _seconds(runs: Sequence[RunInfo], values: Mapping[Path, RowValues]) -> float | None:
    """Return the mean time in updates until the step that is the runs' result."""
    found = []
    for run in runs:
        step = count_or_none(run.status.get("result_step"))
        seconds = Timeline.of(run.rows).at(values[run.path].step if step is None else step, "time")
        if seconds is None:
            return None
        found.append(seconds)
    return statistics.fmean(found)


def _adapter_bytes(run: RunInfo) -> int:
    try:
        return os.stat(run.path / layout.RESULT / layout.ADAPTERS).st_size
    except OSError:
        return 0


def verdict_fields(verdict: Verdict, names: Names) -> dict[str, Any]:
    """Return the verdict as data for a JSON document."""

    def fields(candidate: Candidate) -> dict[str, Any]:
        return {
            "runs": [names.by_path[run.path] for run in candidate.runs],
            "steps": candidate.steps,
            "evaluations": candidate.evaluations,
            "value": candidate.value,
            "difference": candidate.difference,
            "low": candidate.low,
            "high": candidate.high,
            "worse": candidate.is_worse,
            "seconds_in_updates": candidate.seconds,
        }

    cheapest = verdict.cheapest
    return {
        "metric": verdict.metric,
        "rows": verdict.rows,
        "confidence": 0.95,
        "over_seeds": verdict.has_seeds,
        "compared": [fields(candidate) for candidate in verdict.candidates],
        "cheapest": None if cheapest is None else [names.by_path[run.path] for run in cheapest.runs],
        "left_out": {names.by_path[run.path]: shorten(reason) for run, reason in verdict.left_out},
        "problem": verdict.problem,
    }
