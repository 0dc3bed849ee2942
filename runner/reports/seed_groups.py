"""Runs of a sweep that differ by their seed alone, as one row: the mean of the objective and its spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.reports import settings_text
from runner.reports.screen import Screen
from runner.reports.tables import Column, TableRow, table_width
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.objective import Objective

_SEED = "seed"


@dataclass(frozen=True)
class SeedGroup:
    """The runs of equal settings but the seed."""

    settings: dict[str, Any]
    """The settings in which the groups differ."""
    runs: list[RunInfo]
    values: list[float]
    """The objective of those runs that have one."""

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation (n - 1) of the values; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """The values as ``0.3671 ± 0.0042``; a dash where there are none."""
        if not self.values:
            return "-"
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


def seed_groups(
    runs: Sequence[RunInfo], objective: Objective, varied: Mapping[Path, Mapping[str, Any]] | None = None
) -> list[SeedGroup]:
    """Return the runs grouped by everything but the seed, the best mean first; none where no seed differs.

    Jobs of a search that were not trained to their end are in none.

    `varied` are the settings to show of each run, by its path; by default all that differ.
    """
    names = differing_settings(runs)
    if _SEED not in names:
        return []
    names = settings_text.by_importance([name for name in names if name != _SEED])
    groups: dict[str, list[RunInfo]] = {}
    for run in runs:
        if run.settings and run.rung is None:
            groups.setdefault(repr([run.settings.get(name) for name in names]), []).append(run)
    if all(len(group) == 1 for group in groups.values()):
        return []
    found = []
    for group in groups.values():
        values = [value for run in group if (value := objective.value(run)) is not None]
        settings = {name: group[0].settings.get(name) for name in names} if varied is None else varied[group[0].path]
        found.append(SeedGroup({name: value for name, value in settings.items() if name != _SEED}, group, values))
    sign = -1.0 if objective.maximize else 1.0
    return sorted(found, key=lambda group: (not group.values, sign * group.mean if group.values else 0.0))


def print_seed_groups(groups: Sequence[SeedGroup], metric: str, screen: Screen) -> None:
    """Print a table of the groups: their settings, how many seeds have a value, mean ± standard deviation."""
    names = list(groups[0].settings)
    columns = [*[Column(name, right=True) for name in names], Column("seeds", right=True), Column(metric, right=True)]
    texts = [settings_text.texts_of(name, [group.settings[name] for group in groups]) for name in names]
    results = [[f"{len(group.values)} of {len(group.runs)}", group.text()] for group in groups]
    cells = [[*[column[i] for column in texts], *result] for i, result in enumerate(results)]
    if screen.width is not None and table_width(columns, cells) > screen.width:
        columns = [*columns[-2:], Column("settings that differ", wrap=True)]
        labels = settings_text.pairs([group.runs[:1] for group in groups], names)
        cells = [[*result, label] for result, label in zip(results, labels, strict=True)]
    rows = [TableRow(row) for row in cells]
    screen.heading("over seeds, mean ± standard deviation")
    screen.table(columns, rows)
