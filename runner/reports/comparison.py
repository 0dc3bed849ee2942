"""Runs side by side, printed by `runner compare`: settings that differ, results, curves and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as numbers_from
from typing import Any

from runner.common.safe_json import finite_number
from runner.common.text import relative_path
from runner.reports import cells, settings_text
from runner.reports.curves import Series
from runner.reports.run_page import print_plot
from runner.reports.screen import Screen
from runner.reports.settings_columns import with_settings
from runner.reports.tables import Column, TableRow
from runner.reports.verdict import Names, Verdict, judge, verdict_fields
from runner.reports.verdict_table import duration, print_verdict
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.metric_values import metric_value, peak_memory_gb, tokens_per_second
from runner.runs.objective import VALID_LOSS, Objective
from runner.runs.timeline import Timeline

_MARKS = "abcdefgh"
_PLOT_HEIGHT = 16
_MINUTES_FROM = 600.0
"""Seconds from which an axis of time is in minutes."""
_OBJECTIVES = (Objective(VALID_LOSS), Objective("test_loss"), Objective("score", maximize=True))


@dataclass(frozen=True)
class Results:
    """What a run reached, and what it took; None where its files do not say."""

    last_loss: float | None
    """Last validation loss; the best one is that of the run."""
    test_loss: float | None
    score: float | None
    """Last score after training."""
    tokens: int | None
    """Tokens trained on."""
    tokens_per_second: float | None
    """In updates."""
    seconds_in_updates: float | None
    seconds: float | None
    """Wall time of the whole run, over all its resumes."""
    peak_memory_gb: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs, what they are called, and the verdicts on the metrics that at least two of them have."""

    runs: list[RunInfo]
    names: Names
    differing: list[str]
    """Settings that differ."""
    results: list[Results]
    verdicts: list[Verdict]


def compare(runs: Sequence[RunInfo]) -> Comparison:
    """Compare runs, in their order."""
    names = name_runs(runs)
    measured = [o for o in _OBJECTIVES if sum(_has_value(o, run) for run in runs) > 1]
    return Comparison(
        runs=list(runs),
        names=names,
        differing=settings_text.by_importance(differing_settings(runs)),
        results=[results_of(run) for run in runs],
        verdicts=[judge(runs, objective, names) for objective in measured],
    )


def name_runs(runs: Sequence[RunInfo]) -> Names:
    """Return the numbers of jobs where all are of one sweep, else A, B, C and so on."""
    if len({run.path.parent for run in runs}) == 1 and all(run.path.name.isdecimal() for run in runs):
        return Names.of_jobs(runs)
    return Names({run.path: _letters(i) for i, run in enumerate(runs)})


def results_of(run: RunInfo) -> Results:
    """Return what the run reached and took."""
    timeline, losses = Timeline.of(run.rows), run.losses("valid")
    last = timeline.tokens[-1][1] if len(timeline.tokens) > 1 else None
    seconds = timeline.seconds[-1][1]
    return Results(
        last_loss=losses[-1][1] if losses else None,
        test_loss=metric_value(run.rows, None, "test_loss"),
        score=metric_value(run.rows, None, "score"),
        tokens=None if last is None else int(last),
        tokens_per_second=tokens_per_second(run.rows),
        seconds_in_updates=seconds if seconds > 0 else None,
        seconds=finite_number(run.status.get("seconds")),
        peak_memory_gb=peak_memory_gb(run.rows),
    )


def comparison_fields(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as data for a JSON document."""
    names = comparison.names
    return {
        "kind": "comparison",
        "differing": comparison.differing,
        "runs": [
            {
                "run": names.by_path[run.path],
                **cells.run_fields(run),
                "settings": {name: run.settings[name] for name in comparison.differing if name in run.settings},
                **vars(results),
                "valid": curve_points(run),
            }
            for run, results in zip(comparison.runs, comparison.results, strict=True)
        ],
        "verdicts": [verdict_fields(verdict, names) for verdict in comparison.verdicts],
    }


def curve_points(run: RunInfo) -> list[dict[str, float | None]]:
    """Return the validation losses of a run by step, tokens and seconds in updates."""
    timeline = Timeline.of(run.rows)
    return [
        {"step": step, "tokens": timeline.at(step, "tokens"), "seconds": timeline.at(step, "time"), "loss": loss}
        for step, loss in run.losses("valid")
    ]


def print_comparison(comparison: Comparison, screen: Screen, x: str = "step") -> None:
    """Print the comparison; `x` is what the curves are drawn over, one of `timeline.AXES`."""
    measured = [run for run in comparison.runs if run.losses("valid")]
    best = {run.path for run in Objective(VALID_LOSS).rank(measured)[: len(_MARKS)]}
    plotted = [run for run in measured if run.path in best]
    _print_settings(comparison, screen)
    screen.heading("results")
    _print_results(comparison, screen)
    if plotted:
        which = f", the best {len(plotted)} of {len(measured)}" if len(plotted) < len(measured) else ""
        screen.heading(f"valid loss{which}")
        _print_curves(plotted, comparison.names, x, screen)
    for verdict in comparison.verdicts:
        print_verdict(verdict, comparison.names, screen)
    if not comparison.verdicts:
        screen.heading("verdict")
        screen.line("none: fewer than two of the runs have a validation loss, a test loss or a score")


def _print_settings(comparison: Comparison, screen: Screen) -> None:
    """Print the runs with the settings that differ; jobs of one sweep below its path, others each with its own."""
    runs, names = comparison.runs, comparison.names
    rows = [TableRow([names.by_path[run.path]], {}, cells.run_notes(run)) for run in runs]
    columns = [Column(names.noun, right=True)]
    if names.are_jobs:
        screen.line((f"jobs of {relative_path(runs[0].path.parent)}", "bold"))
    else:
        columns.append(Column("directory", keep_end=True))
        for row, run in zip(rows, runs, strict=True):
            row.cells.append(relative_path(run.path))
    columns.append(Column("state"))
    for row, run in zip(rows, runs, strict=True):
        row.styles[len(row.cells)] = cells.STATE_STYLES.get(run.state, "")
        row.cells.append(run.state)
    if any(run.labels.name for run in runs):
        columns.append(Column("name"))
        for row, run in zip(rows, runs, strict=True):
            row.cells.append(run.labels.name or "")
    screen.table(with_settings(columns, rows, runs, comparison.differing, screen.width), rows)


def _print_results(comparison: Comparison, screen: Screen) -> None:
    """Print a row for each run; columns in which no run has a value are left out."""
    found = comparison.results
    texts = {
        comparison.names.noun: [comparison.names.by_path[run.path] for run in comparison.runs],
        "valid_loss": [cells.format_best(run) for run in comparison.runs],
        "last": [_text(r.last_loss, ".4f") for r in found],
        "test_loss": [_text(r.test_loss, ".4f") for r in found],
        "score": [_text(r.score, ".4f") for r in found],
        "tokens": [_text(r.tokens, ",d") for r in found],
        "tok/s": [_text(r.tokens_per_second, ",.0f") for r in found],
        "in updates": ["" if r.seconds_in_updates is None else duration(r.seconds_in_updates) for r in found],
        "in all": ["" if r.seconds is None else duration(r.seconds) for r in found],
        "GB": [_text(r.peak_memory_gb, ".2f") for r in found],
    }
    texts = {title: column for title, column in texts.items() if any(column)}
    columns = [Column(title, right=True) for title in texts]
    screen.table(columns, [TableRow(list(row)) for row in zip(*texts.values(), strict=True)])


def _print_curves(runs: Sequence[RunInfo], names: Names, x: str, screen: Screen) -> None:
    curves: list[list[tuple[float, float]]] = []
    for run in runs:
        timeline = Timeline.of(run.rows)
        points = [(timeline.at(step, x), loss) for step, loss in run.losses("valid")]
        curves.append([(at, loss) for at, loss in points if at is not None])
    longest, label, unit = max((at for curve in curves for at, _ in curve), default=0.0), x, 1.0
    if x == "time":
        unit, label = (60.0, "minutes in updates") if longest >= _MINUTES_FROM else (1.0, "seconds in updates")
    series = [
        Series(names.by_path[run.path], [(at / unit, loss) for at, loss in curve], mark=mark)
        for run, curve, mark in zip(runs, curves, _MARKS, strict=False)
    ]
    print_plot(series, screen, _PLOT_HEIGHT, y_label="loss of", x_label=label)


def _has_value(objective: Objective, run: RunInfo) -> bool:
    return objective.value(run) is not None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _letters(index: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    letters = ""
    for _ in numbers_from():
        letters = chr(ord("A") + index % 26) + letters
        index = index // 26 - 1
        if index < 0:
            break
    return letters
