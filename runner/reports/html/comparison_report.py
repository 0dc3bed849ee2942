"""The page of a comparison: the verdicts, the runs with their settings and results, and their curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runner.common.text import count, format_duration, relative_path
from runner.reports import settings_text
from runner.reports.comparison import Comparison, Results
from runner.reports.html import sections
from runner.reports.html.page import Page
from runner.reports.html.run_report import LOSS_DIGITS
from runner.reports.html.sections import Column, Curve, Part, Row
from runner.reports.html.sweep_jobs import setting_cell, setting_columns
from runner.reports.html.verdict_part import row_id, verdict_part
from runner.runs.inspect import RunInfo
from runner.runs.timeline import Timeline

_AXES = {"step": ("step", 1.0), "tokens": ("tokens", 1.0), "minutes in updates": ("time", 60.0)}
"""Axis of the chart to that of the timeline, and its unit there."""
_COLUMN_GAP, _MOST_CHARACTERS = 5, 90
"""Characters between two columns, and of all settings, that fit on a page beside the name and the state."""
_MOST_NAMED_CURVES = 6
"""More curves than this are coloured by their result instead of having a colour each."""


def comparison_report(comparison: Comparison) -> Page:
    """Return the page of a comparison."""
    runs, names = comparison.runs, comparison.names
    return Page(
        kind="comparison",
        title=f"{count(len(runs), names.noun)} compared",
        lines=[f"of {relative_path(runs[0].path.parent)}"] if names.are_jobs else [],
        folder=Path(os.path.commonpath([run.path.absolute() for run in runs])),
        hosts=[run.status.get("host") for run in runs],
        parts=[
            *(verdict_part(verdict, names) for verdict in comparison.verdicts),
            _results(comparison),
            _settings(comparison),
            sections.charts("Curves", [_chart(comparison)], id="charts"),
        ],
    )


def _settings(comparison: Comparison) -> Part:
    """Return the table of what was run; its settings have a column each where these fit beside each other."""
    names, runs = comparison.differing, comparison.runs
    texts = {name: settings_text.texts_of(name, [run.settings.get(name) for run in runs]) for name in names}
    columns = [Column(title=comparison.names.noun), Column(title="directory", code=True), Column(title="name")]
    columns.append(Column(title="state"))
    rows: list[list[sections.Cell]] = []
    for run in runs:
        directory = None if comparison.names.are_jobs else relative_path(run.path)
        rows.append([comparison.names.by_path[run.path], directory, run.labels.name, sections.state(run.state)])
    titles = settings_text.short_names(names)
    if sum(max(map(len, [titles[name], *texts[name]])) + _COLUMN_GAP for name in names) <= _MOST_CHARACTERS:
        columns += setting_columns(names)
        for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
            row += [setting_cell(texts[name][i], run.settings.get(name)) for name in names]
    else:
        columns.append(Column(title="settings that differ", code=True))
        for row, text in zip(rows, settings_text.pairs([[run] for run in runs], names), strict=True):
            row.append(text)
    return _without_empty_columns("Settings", columns, rows, comparison, id="runs")


def _results(comparison: Comparison) -> Part:
    columns = [Column(title=comparison.names.noun), *_RESULT_COLUMNS]
    rows = [
        [comparison.names.by_path[run.path], *_result_cells(run, results)]
        for run, results in zip(comparison.runs, comparison.results, strict=True)
    ]
    return _without_empty_columns("Results", columns, rows, comparison, id="results")


def _without_empty_columns(
    title: str, columns: Sequence[Column], rows: Sequence[Sequence[sections.Cell]], comparison: Comparison, *, id: str
) -> Part:
    shown = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    names = comparison.names
    found = [
        Row(cells=[row[i] for i in shown], id=row_id(names.by_path[run.path], names))
        for run, row in zip(comparison.runs, rows, strict=True)
    ]
    return sections.table(title, [columns[i] for i in shown], found, id=id)


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
