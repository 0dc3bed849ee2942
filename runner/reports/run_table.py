"""The table of `runner ls`: a row for each run and each sweep, and for jobs of sweeps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.common.text import format_bytes, relative_path, single_line
from runner.reports import settings_text
from runner.reports.cells import (
    STATE_STYLES,
    format_age,
    format_best,
    format_labels,
    format_progress,
    format_states,
    run_notes,
    sweep_style,
)
from runner.reports.fields import Field
from runner.reports.metric_columns import metric_text
from runner.reports.screen import Screen
from runner.reports.tables import Column, TableRow, display_width, table_width
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo
from runner.runs.objective import VALID_LOSS

_LABELS = Column("name, tags")
_SETTINGS_TITLE = "settings that differ"
_MIN_SETTINGS_WIDTH = 24
"""Characters of settings that must fit beside the paths; otherwise the paths are shortened."""
Entry = RunInfo | SweepInfo


@dataclass
class ListedRow:
    """One row: a run, a sweep or a job, what stands in front of its path, and its text in the last column."""

    entry: Entry
    last: str
    prefix: str = ""
    short: str | None = None
    """What names it where the row above names its folder, such as a job's number."""
    total: int | None = None
    """Of a sweep that is listed in part: the number of its jobs."""
    cells: list[str] = field(default_factory=list)


def settings_rows(
    entries: Sequence[Entry], names: Sequence[str], totals: Mapping[Path, int], with_runs: bool
) -> list[ListedRow]:
    """Return the rows of a listing with the settings `names` behind each; the jobs of a sweep follow it if it is
    listed in part, or if `with_runs`.

    Args:
        totals: path to the number of jobs of those sweeps of which not all are listed.
    """

    def rows() -> Iterator[tuple[ListedRow, list[RunInfo]]]:
        for entry in entries:
            total = totals.get(entry.path)
            yield ListedRow(entry, "", total=total), runs_of(entry)
            if isinstance(entry, SweepInfo) and (with_runs or total is not None):
                for run in entry.runs:
                    yield ListedRow(run, "", short=f"  {run.path.name}"), [run]

    listed, groups = zip(*rows(), strict=True) if entries else ((), ())
    for row, text in zip(listed, settings_text.pairs(groups, names), strict=True):
        row.last = text
    return list(listed)


def print_runs(
    screen: Screen,
    root: Path,
    rows: Sequence[ListedRow],
    fields: Sequence[Field] = (),
    last_title: str = _SETTINGS_TITLE,
) -> None:
    """Print the table.

    Args:
        root: the folder below which the runs were looked for: paths are shown below it where the screen is narrow.
        fields: further columns.
        last_title: title of the last column.
    """
    columns = [Column("run", keep_end=True), Column("state"), Column("step", right=True)]
    columns += [Column("valid_loss", right=True), *(Column(f.name, right=True) for f in fields)]
    columns += [Column("age", right=True), Column("size", right=True)]
    now = time.time()
    table = [_table_row(row, fields, now) for row in rows]
    for row, printed in zip(rows, table, strict=True):
        printed.cells[0] = row.prefix + (row.short or relative_path(row.entry.path))
    labels = [format_labels(row.entry.labels) for row in rows]
    last = [row.last for row in rows]
    if any(labels):
        last_width = max(map(display_width, last))
        beside = [*columns, _LABELS, Column("", wrap=True)]
        cells = [
            [*row.cells, text, "x" * min(last_width, _MIN_SETTINGS_WIDTH)]
            for row, text in zip(table, labels, strict=True)
        ]
        if screen.width is None or table_width(beside, _printable(cells)) <= screen.width:
            columns.append(_LABELS)
            for printed, text in zip(table, labels, strict=True):
                printed.cells.append(text)
        else:
            last = ["  ".join(filter(None, pair)) for pair in zip(labels, last, strict=True)]
            last_title = f"{_LABELS.title}, {last_title}" if any(row.last for row in rows) else _LABELS.title
    if any(last):
        columns.append(Column(last_title, wrap=True))
        for printed, text in zip(table, last, strict=True):
            printed.cells.append(text)
    _shorten_paths(screen, root, rows, table, columns)
    screen.table(columns, table)


def runs_of(entry: Entry) -> list[RunInfo]:
    """Return the run, or the jobs of the sweep."""
    return [entry] if isinstance(entry, RunInfo) else entry.runs


def _shorten_paths(
    screen: Screen, root: Path, rows: Sequence[ListedRow], table: Sequence[TableRow], columns: list[Column]
) -> None:
    """Show paths below `root` where whole ones leave no room: a path that can be copied is best."""
    if screen.width is None:
        return
    least = [[*row.cells] for row in table]
    if columns[-1].wrap:
        for cells in least:
            cells[-1] = cells[-1][:_MIN_SETTINGS_WIDTH]
    if (
        table_width([*columns[:-1], Column("", wrap=True)] if columns[-1].wrap else columns, _printable(least))
        > screen.width
    ):
        for row, printed in zip(rows, table, strict=True):
            printed.cells[0] = row.prefix + (row.short or os.path.relpath(row.entry.path, root))
        columns[0] = Column(f"below {relative_path(root)}", keep_end=True)


def _printable(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[single_line(cell) for cell in row] for row in cells]


def _table_row(row: ListedRow, fields: Sequence[Field], now: float) -> TableRow:
    return (
        _run_row(row.entry, fields, now)
        if isinstance(row.entry, RunInfo)
        else _sweep_row(row.entry, row.total, fields, now)
    )


def _run_row(run: RunInfo, fields: Sequence[Field], now: float) -> TableRow:
    cells = ["", run.state, format_progress(run), format_best(run), *(f.text(run) for f in fields)]
    cells += [format_age(now - run.updated), format_bytes(run.size_bytes)] if run.updated else ["-", "-"]
    return TableRow(cells, {1: STATE_STYLES.get(run.state, "")}, run_notes(run))


def _sweep_row(sweep: SweepInfo, total: int | None, fields: Sequence[Field], now: float) -> TableRow:
    has_one_state = len(sweep.states) < 2
    best = "-"
    if (run := sweep.best) is not None:
        metric = "" if sweep.objective.metric == VALID_LOSS else f"{sweep.objective.metric} "
        best = f"{metric}{metric_text(sweep.objective.metric, sweep.objective.value(run) or 0.0)} in {run.path.name}"
    count = sum(sweep.states.values())
    state = format_states(sweep) if has_one_state else f"{count} jobs"
    if total is not None:
        state = f"{count} of {total} jobs"
    cells = [
        "",
        state,
        "",
        best,
        *("" for _ in fields),
        format_age(now - sweep.updated),
        format_bytes(sweep.size_bytes),
    ]
    notes = [] if has_one_state else [format_states(sweep)]
    notes += [f"damaged: {sweep.problem}"] if sweep.problem else []
    return TableRow(cells, {0: "bold", 1: sweep_style(sweep)}, notes)
