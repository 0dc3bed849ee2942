"""The page of one sweep, printed by `runner show`: its jobs with the best first, their curves, next commands."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from runner.common.text import relative_path
from runner.reports import cells, settings_text
from runner.reports.curves import Series
from runner.reports.metric_columns import front_note, objective_columns
from runner.reports.next_commands import command_fields, for_sweep
from runner.reports.run_page import print_commands, print_plot
from runner.reports.screen import Screen
from runner.reports.search_summary import SearchSummary, search_fields, summarize_sweep
from runner.reports.search_table import endings, print_search
from runner.reports.seed_groups import print_seed_groups, seed_groups
from runner.reports.settings_columns import with_settings
from runner.reports.tables import Column, TableRow
from runner.reports.verdict import Names, judge, verdict_fields
from runner.reports.verdict_table import print_verdict
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.objective import VALID_LOSS, Objective

_MARKS = "abcdefgh"
"""Marks of the curves; as many curves are drawn."""
_PLOT_HEIGHT = 16
MOST_CANDIDATES = 12
"""Rows of the verdict that are printed."""


def sweep_page_fields(sweep: SweepInfo) -> dict[str, Any]:
    """Return the page as data for a JSON document."""
    names, names_of = settings_text.by_importance(differing_settings(sweep.runs)), Names.of_jobs(sweep.runs)
    search, search_problem = summarize_sweep(sweep)
    front = {id(run) for run in sweep.objective.front(sweep.runs)}
    return {
        "kind": "sweep",
        **cells.sweep_fields(sweep),
        "objective": {
            "metric": sweep.objective.metric,
            "maximize": sweep.objective.maximize,
            "others": [{"metric": other.metric, "maximize": other.maximize} for other in sweep.objective.others],
        },
        "differing": names,
        "runs": [
            {
                "run": run.path.name,
                **cells.run_fields(run),
                "settings": {name: run.settings[name] for name in names if name in run.settings},
                "objective": sweep.objective.value(run),
                "others": {other.metric: other.value(run) for other in sweep.objective.others},
                "on_pareto_front": id(run) in front if sweep.objective.others else None,
                "rung": run.rung,
                "valid": run.losses("valid"),
            }
            for run in sweep.objective.rank(sweep.runs)
        ],
        "search": None if search is None else search_fields(search),
        "search_problem": search_problem,
        "verdict": verdict_fields(judge(sweep.runs, sweep.objective, names_of), names_of),
        "commands": command_fields(for_sweep(sweep, search)),
    }


def print_sweep_page(sweep: SweepInfo, screen: Screen) -> None:
    """Print the page."""
    runs = sweep.objective.rank(sweep.runs)
    screen.line((relative_path(sweep.path), "bold"))
    age = f"  (last update {cells.format_age(time.time() - sweep.updated)} ago)" if sweep.runs else ""
    search, search_problem = summarize_sweep(sweep)
    screen.line("sweep: ", (cells.format_states(sweep), cells.sweep_style(sweep)), (age, "dim"))
    for line in cells.label_lines(sweep.labels, sweep.labels.tags):
        screen.line(line)
    for problem in filter(None, (sweep.problem, search_problem)):
        screen.line(f"damaged  {problem}")
    if search is not None:
        print_search(search, screen)
    plotted = [run for run in runs if run.losses("valid")][: len(_MARKS)]
    marks = {run.path.name: mark for run, mark in zip(plotted, _MARKS, strict=False)}
    if runs:
        screen.heading("jobs, best first")
        _print_jobs(runs, sweep, search, marks, screen)
        if groups := seed_groups(runs, sweep.objective):
            print_seed_groups(groups, sweep.objective.metric, screen)
        print_sweep_verdict(runs, sweep.objective, screen)
    if plotted:
        screen.heading("valid loss")
        series = [Series(run.path.name, run.losses("valid"), mark=marks[run.path.name]) for run in plotted]
        print_plot(series, screen, _PLOT_HEIGHT, y_label="loss of job")
    print_commands(for_sweep(sweep, search), screen)


def print_sweep_verdict(runs: Sequence[RunInfo], objective: Objective, screen: Screen) -> None:
    """Print which jobs are not distinguishable from the best; nothing where fewer than two have a result."""
    if sum(objective.value(run) is not None for run in runs) > 1:
        names = Names.of_jobs(runs)
        print_verdict(judge(runs, objective, names), names, screen, MOST_CANDIDATES)


def _print_jobs(
    runs: Sequence[RunInfo], sweep: SweepInfo, search: SearchSummary | None, marks: Mapping[str, str], screen: Screen
) -> None:
    """Print a line for each job, with a column for each setting that differs, or one for all where these do not fit."""
    names = settings_text.by_importance(differing_settings(runs))
    columns = [
        Column("job", right=True),
        Column("curve"),
        Column("state"),
        Column("step", right=True),
        Column("valid_loss", right=True),
    ]
    rows = [_row(run, marks) for run in runs]
    further, cells_of = objective_columns(sweep.objective, runs, without=VALID_LOSS, missing="-")
    if search is not None:
        numbers = sweep.manifest.numbers if sweep.manifest else {}
        further.append(Column("in the search"))
        for row, text in zip(cells_of, endings(search, [numbers.get(run.path.name) for run in runs]), strict=True):
            row.append(text)
    for printed, texts in zip(rows, cells_of, strict=True):
        printed.cells += texts
    screen.table(with_settings([*columns, *further], rows, runs, names, screen.width), rows)
    if note := front_note(sweep.objective):
        screen.line((note, "dim"))


def _row(run: RunInfo, marks: Mapping[str, str]) -> TableRow:
    name, state = run.path.name, run.state
    return TableRow(
        [name, marks.get(name, ""), state, cells.format_progress(run), cells.format_best(run)],
        {2: cells.STATE_STYLES.get(state, "")},
        [*filter(None, [cells.format_labels(run.labels)]), *cells.run_notes(run)],
    )
