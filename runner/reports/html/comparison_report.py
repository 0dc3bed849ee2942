"""The page of a comparison: the verdicts, the runs with their settings and results, and their curves."""

from __future__ import annotations

import os
from pathlib import Path

from runner.common.text import count, format_duration, relative_path
from runner.reports import settings_text
from runner.reports.comparison import Comparison, Results
from runner.reports.html import sections
from runner.reports.html.page import Page
from runner.reports.html.run_report import LOSS_DIGITS
from runner.reports.html.sections import Column, Curve, Part, Row
from runner.reports.html.sweep_report import setting_cell, setting_columns
from runner.reports.html.verdict_part import row_id, verdict_part
from runner.runs.inspect import RunInfo
from runner.runs.timeline import Timeline

_AXES = {"step": ("step", 1.0), "tokens": ("tokens", 1.0), "minutes in updates": ("time", 60.0)}
"""Axis of the chart to that of the timeline, and its unit there."""
_MOST_NAMED_CURVES = 6
"""More curves than this are coloured by their result instead of having a colour each."""


def comparison_report(comparison: Comparison) -> Page:
    """Return the page of a comparison."""
    runs, names = comparison.runs, comparison.names
    return Page(
        kind="comparison",
        title=f"{count(len(runs), names.noun)} compared",
        folder=Path(os.path.commonpath([run.path.absolute() for run in runs])),
        hosts=[run.status.get("host") for run in runs],
        parts=[
            *(verdict_part(verdict, names) for verdict in comparison.verdicts),
            _table(comparison),
            sections.charts("Curves", [_chart(comparison)], id="charts"),
        ],
    )


def _table(comparison: Comparison) -> Part:
    names, runs = comparison.differing, comparison.runs
    texts = {name: settings_text.texts_of(name, [run.settings.get(name) for run in runs]) for name in names}
    columns = [Column(title=title, code=title == "directory") for title in (comparison.names.noun, "directory", "name")]
    columns.append(Column(title="state"))
    columns += [*setting_columns(names), *_RESULT_COLUMNS]
    rows = []
    for i, (run, results) in enumerate(zip(runs, comparison.results, strict=True)):
        name = comparison.names.by_path[run.path]
        row: list[sections.Cell] = [name, relative_path(run.path), run.labels.name, sections.state(run.state)]
        row += [setting_cell(texts[setting][i], run.settings.get(setting)) for setting in names]
        rows.append(Row(cells=[*row, *_result_cells(run, results)], id=row_id(name, comparison.names)))
    shown = [i for i in range(len(columns)) if any(row.cells[i] is not None for row in rows)]
    columns = [columns[i] for i in shown]
    rows = [Row(cells=[row.cells[i] for i in shown], id=row.id) for row in rows]
    return sections.table("Settings and results", columns, rows, id="runs")


_RESULT_COLUMNS = (
    Column(title="valid loss", number=True, digits=LOSS_DIGITS, help="the lowest"),
    Column(title="at step", number=True),
    Column(title="last", number=True, digits=LOSS_DIGITS, help="the last validation loss"),
    Column(title="test loss", number=True, digits=LOSS_DIGITS),
    Column(title="score", number=True, digits=LOSS_DIGITS),
    Column(title="tokens", number=True),
    Column(title="tokens a second", number=True, help="in updates"),
    Column(title="in updates", number=True, help="time in updates, without evaluations and saves"),
    Column(title="in all", number=True, help="time of the whole run"),
    Column(title="GB", number=True, digits=2, help="peak memory"),
)


def _result_cells(run: RunInfo, results: Results) -> list[sections.Cell]:
    times = (results.seconds_in_updates, results.seconds)
    return [
        run.best_loss,
        run.best_step,
        results.last_loss,
        results.test_loss,
        results.score,
        results.tokens,
        None if results.tokens_per_second is None else round(results.tokens_per_second),
        *(None if seconds is None else sections.shown(format_duration(seconds), seconds) for seconds in times),
        results.peak_memory_gb,
    ]


def _chart(comparison: Comparison) -> Part:
    runs = [run for run in comparison.runs if run.losses("valid")]
    positions = [_positions(run) for run in runs]
    axes = [axis for axis in _AXES if all(axis in found for found in positions)]
    by_loss = sorted(range(len(runs)), key=lambda i: min(loss for _, loss in runs[i].losses("valid")))
    rank = {index: place / max(1, len(runs) - 1) for place, index in enumerate(by_loss)}
    curves = []
    for i, (run, found) in enumerate(zip(runs, positions, strict=True)):
        name = comparison.names.by_path[run.path]
        losses = [loss for _, loss in run.losses("valid")]
        curve_id = row_id(name, comparison.names)
        x = {axis: found[axis] for axis in axes}
        curves.append(Curve(name=comparison.names.phrase([run]), x=x, y=losses, id=curve_id, rank=rank[i]))
    ranked = len(curves) > _MOST_NAMED_CURVES
    return sections.chart("Validation loss", curves, y="mean loss of a token", ranked=ranked, lower_is_better=True)


def _positions(run: RunInfo) -> dict[str, list[float]]:
    """Return the positions of the run's evaluations on each axis for which its rows have them."""
    timeline, steps = Timeline.of(run.rows), [step for step, _ in run.losses("valid")]
    found = {}
    for axis, (kind, unit) in _AXES.items():
        at = [timeline.at(step, kind) for step in steps]
        if None not in at:
            found[axis] = [value / unit for value in at if value is not None]
    return found
