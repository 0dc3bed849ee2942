"""The page about one sweep: its jobs by what they reached, their curves in one plot, how to go on."""

from __future__ import annotations

import time
from typing import Any

from runner.common.text import relative_path
from runner.reports import next_commands, settings_text
from runner.reports.cells import (
    age_text,
    best_fields,
    loss_text,
    notes_of,
    run_fields,
    state_of,
    states_text,
    step_text,
    time_text,
)
from runner.reports.curves import Series
from runner.reports.run_page import command_fields, heading, show_commands, show_plot
from runner.reports.tables import STATE_STYLES, Column, Screen, TableRow, natural_widths, table
from runner.runs.inspect import RunInfo, SweepInfo, differing_settings

CURVES = 8
_MARKS = "abcdefgh"
_HEIGHT = 16


def ranked(sweep: SweepInfo) -> list[RunInfo]:
    """The runs by their best validation loss, those without one last, in the order of their numbers."""
    return sorted(sweep.runs, key=lambda run: (run.best_loss is None, run.best_loss or 0.0))


def fields(sweep: SweepInfo) -> dict[str, Any]:
    """The page as data, for a JSON document."""
    names = settings_text.by_importance(differing_settings(sweep.runs))
    best = sweep.best
    return {
        "kind": "sweep",
        "path": sweep.path,
        "problem": sweep.problem,
        "states": sweep.states,
        "best": None if best is None else {"run": best.path.name, **best_fields(best)},
        "updated": time_text(sweep.updated),
        "size_bytes": sweep.size_bytes,
        "differing": names,
        "runs": [
            {
                "run": run.path.name,
                **run_fields(run),
                "settings": {name: run.settings[name] for name in names if name in run.settings},
                "valid": run.losses("valid"),
            }
            for run in ranked(sweep)
        ],
        "commands": command_fields(next_commands.for_sweep(sweep)),
    }


def show(sweep: SweepInfo, screen: Screen) -> None:
    """Print the page."""
    runs = ranked(sweep)
    screen.line((relative_path(sweep.path), "bold"))
    age = f"  (last update {age_text(time.time() - sweep.updated)} ago)" if sweep.runs else ""
    screen.line("sweep: ", (states_text(sweep), STATE_STYLES.get(state_of(sweep), "")), (age, "dim"))
    if sweep.problem:
        screen.line(f"damaged  {sweep.problem}")
    drawn = {id(run): mark for run, mark in zip([run for run in runs if run.losses("valid")], _MARKS, strict=False)}
    if runs:
        heading("jobs, best first", screen)
        _show_jobs(runs, drawn, screen)
    if drawn:
        heading("valid loss", screen)
        shown = [run for run in runs if id(run) in drawn]
        series = [Series(run.path.name, run.losses("valid"), mark=drawn[id(run)]) for run in shown]
        show_plot(series, screen, _HEIGHT, y_label="loss of job")
    show_commands(next_commands.for_sweep(sweep), screen)


def _show_jobs(runs: list[RunInfo], marks: dict[int, str], screen: Screen) -> None:
    """A column for each setting that differs where they fit, else one column for all of them."""
    names = settings_text.by_importance(differing_settings(runs))
    columns = [
        Column("job", right=True),
        Column("curve"),
        Column("state"),
        Column("step", right=True),
        Column("valid_loss", right=True),
    ]
    rows = [
        TableRow(
            [
                run.path.name,
                marks.get(id(run), ""),
                run.state,
                step_text(run),
                loss_text(run.best_loss, run.best_step),
            ],
            {2: STATE_STYLES.get(run.state, "")},
            notes_of(run),
        )
        for run in runs
    ]
    wide = [*columns, *[Column(name, right=True) for name in names]]
    values = [settings_text.texts_of(name, [run.settings.get(name) for run in runs]) for name in names]
    cells = [[*row.cells, *[column[i] for column in values]] for i, row in enumerate(rows)]
    if screen.width is None or sum(natural_widths(wide, cells)) + 2 * (len(wide) - 1) <= screen.width:
        columns = wide
        for row, own in zip(rows, cells, strict=True):
            row.cells = own
    elif names:
        columns.append(Column("settings that differ", cut=True))
        for row, text in zip(rows, settings_text.pairs([[run] for run in runs], names), strict=True):
            row.cells.append(text)
    screen.lines(table(columns, rows, screen.width))
