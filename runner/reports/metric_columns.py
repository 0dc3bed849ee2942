"""The metrics of an objective as columns of a table; where there are several, a mark for jobs of the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from runner.reports.tables import Column
from runner.runs.inspect import RunInfo
from runner.runs.objective import Objective

DECIMALS = {
    "valid_loss": 4,
    "train_loss": 4,
    "test_loss": 4,
    "score": 4,
    "reward_accuracy": 4,
    "tokens_per_second": 1,
    "peak_memory_gb": 2,
}
"""Digits that are shown of a metric."""
FRONT_MARK = "*"


def metric_text(metric: str, value: float) -> str:
    """Return a value of a metric as tables show it."""
    return format(value, f".{DECIMALS.get(metric, 4)}f")


def objective_columns(
    objective: Objective, runs: Sequence[RunInfo], *, without: str = "", missing: str = ""
) -> tuple[list[Column], list[list[str]]]:
    """Return the columns of the metrics and their cells for each run; of several, also one for the Pareto front.

    Args:
        objective: that of the sweep.
        runs: those of the table.
        without: a metric that the table has already.
        missing: what a run without a value has.
    """
    singles = [single for single in objective.each if single.metric != without]
    columns = [Column(single.metric, right=True) for single in singles]
    values = [[single.value(run) for single in singles] for run in runs]
    cells = [
        [missing if v is None else metric_text(single.metric, v) for single, v in zip(singles, row, strict=True)]
        for row in values
    ]
    if objective.others:
        columns.append(Column("front"))
        front = {id(run) for run in objective.front(runs)}
        for row, run in zip(cells, runs, strict=True):
            row.append(FRONT_MARK if id(run) in front else "")
    return columns, cells


def front_note(objective: Objective) -> str:
    """Return the sentence that explains the mark of the Pareto front; empty where there is one metric."""
    if not objective.others:
        return ""
    listed = ", ".join(objective.metrics)
    return f"{FRONT_MARK} Pareto front: no other job is better in one of {listed} without being worse in another"
