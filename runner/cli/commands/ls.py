"""`runner ls`: list the runs and sweeps below a folder, with the settings that differ between them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.cli.commands import COMMANDS, CommandParser
from runner.common.errors import ConfigError
from runner.common.text import format_bytes, relative_path, single_line
from runner.reports import settings_text
from runner.reports.cells import (
    STATE_STYLES,
    format_age,
    format_best,
    format_progress,
    format_states,
    run_fields,
    run_notes,
    sweep_fields,
    sweep_style,
)
from runner.reports.screen import Screen, json_document
from runner.reports.tables import Column, TableRow, column_widths
from runner.runs.find import SweepInfo, find_runs
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.objective import VALID_LOSS

DEFAULT = "outputs"
SORT_KEYS: dict[str, Callable[[RunInfo | SweepInfo], float]] = {
    "age": lambda entry: -entry.updated,
    "best": lambda entry: float("inf") if entry.best_loss is None else entry.best_loss,
    "size": lambda entry: -entry.size_bytes,
    "step": lambda entry: -(entry.step or 0),
}
"""Choice of --sort to sort key, in ascending order: newest, best, largest and furthest first."""
_COLUMNS = (
    Column("run", keep_end=True),
    Column("state"),
    Column("step", right=True),
    Column("valid_loss", right=True),
    Column("age", right=True),
    Column("size", right=True),
    Column("settings that differ", cut=True),
)
_MIN_SETTINGS_WIDTH = 24
"""Characters of settings that must fit beside the paths; otherwise the paths are shortened."""


def run(argv: list[str]) -> int:
    """List the runs and sweeps that `argv` names.

    Raises:
        ConfigError: a wrong argument, or no such folder.
    """
    parser = CommandParser(prog="runner ls", description=COMMANDS["ls"])
    parser.add_argument("path", metavar="PATH", nargs="?", help=f"folder to look below (default: {DEFAULT})")
    parser.add_argument("--runs", action="store_true", help="also the runs of each sweep")
    parser.add_argument(
        "--sort", choices=tuple(SORT_KEYS), default="age", help="newest (default), best, largest, furthest"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N runs and sweeps only")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"runner ls: --limit {options.limit} is invalid: must be 1 or more.")
    root = Path(options.path or DEFAULT).expanduser()
    if not root.is_dir() and (options.path is not None or root.exists()):
        raise ConfigError(f"{root}: {'not a folder' if root.exists() else 'there is no such folder'}.")
    found = find_runs(root)
    sort_key = SORT_KEYS[options.sort]
    shown = sorted(found, key=sort_key)[: options.limit]
    for entry in shown:
        if isinstance(entry, SweepInfo) and options.sort != "age":  # by age the runs keep the order of their numbers
            entry.runs.sort(key=sort_key)
    names = settings_text.by_importance(differing_settings([run for entry in shown for run in _runs_of(entry)]))
    if options.json:
        entries = [_to_dict(entry, names, options.runs) for entry in shown]
        print(json_document({"root": root, "differing": names, "entries": entries}))
        return 0
    screen = Screen()
    if not shown:
        screen.line(f"No runs below {relative_path(root)}. The first one: python -m runner experiment=first_run")
        return 0
    _print_table(screen, root, shown, names, options.runs)
    if len(found) > len(shown):
        screen.line((f"{len(found) - len(shown)} more; --limit {len(found)} shows all.", "dim"))
    return 0


def _print_table(
    screen: Screen, root: Path, entries: list[RunInfo | SweepInfo], names: list[str], with_runs: bool
) -> None:
    """Print a row for each entry, and for the runs of each sweep if `with_runs`; `names` are the settings to show."""
    runs_by_row = [runs for entry in entries for runs in _runs_by_row(entry, with_runs)]
    settings = iter(settings_text.pairs(runs_by_row, names))
    now = time.time()
    rows: list[TableRow] = []
    paths: list[tuple[TableRow, Path]] = []
    for entry in entries:
        if isinstance(entry, RunInfo):
            rows.append(_run_row(entry, next(settings), now))
        else:
            rows.append(_sweep_row(entry, next(settings), now))
        paths.append((rows[-1], entry.path))
        for run in entry.runs if with_runs and isinstance(entry, SweepInfo) else []:
            rows.append(_run_row(run, next(settings), now))
            rows[-1].cells[0] = f"  {run.path.name}"
    for row, path in paths:
        row.cells[0] = relative_path(path)
    columns = list(_COLUMNS if names else _COLUMNS[:-1])
    widths = column_widths(columns, [[single_line(cell) for cell in row.cells] for row in rows])
    needed = sum(widths) + 2 * (len(widths) - 1)
    if names:
        needed += min(0, _MIN_SETTINGS_WIDTH - widths[-1])
    if screen.width is not None and needed > screen.width:
        # A path that can be copied is best; without room for it, the part below `root` is enough.
        for row, path in paths:
            row.cells[0] = os.path.relpath(path, root)
        columns[0] = Column(f"below {relative_path(root)}", keep_end=True)
    for row in rows:
        row.cells = row.cells[: len(columns)]
    screen.table(columns, rows)


def _run_row(run: RunInfo, settings: str, now: float) -> TableRow:
    cells = ["", run.state, format_progress(run), format_best(run)]
    cells += [format_age(now - run.updated), format_bytes(run.size_bytes), settings]
    return TableRow(cells, {1: STATE_STYLES.get(run.state, "")}, run_notes(run))


def _sweep_row(sweep: SweepInfo, settings: str, now: float) -> TableRow:
    has_one_state = len(sweep.states) < 2
    best = "-"
    if (run := sweep.best) is not None:
        metric = "" if sweep.objective.metric == VALID_LOSS else f"{sweep.objective.metric} "
        best = f"{metric}{sweep.objective.value(run):.4f} in {run.path.name}"
    cells = ["", format_states(sweep) if has_one_state else f"{sum(sweep.states.values())} jobs", "", best]
    cells += [format_age(now - sweep.updated), format_bytes(sweep.size_bytes), settings]
    notes = [] if has_one_state else [format_states(sweep)]
    notes += [f"damaged: {sweep.problem}"] if sweep.problem else []
    return TableRow(cells, {0: "bold", 1: sweep_style(sweep)}, notes)


def _runs_of(entry: RunInfo | SweepInfo) -> list[RunInfo]:
    return [entry] if isinstance(entry, RunInfo) else entry.runs


def _runs_by_row(entry: RunInfo | SweepInfo, with_runs: bool) -> list[list[RunInfo]]:
    """Return the runs whose settings each row of the entry shows."""
    runs = _runs_of(entry)
    return [runs, *([run] for run in runs if with_runs and isinstance(entry, SweepInfo))]


def _to_dict(entry: RunInfo | SweepInfo, names: list[str], with_runs: bool) -> dict[str, Any]:
    if isinstance(entry, RunInfo):
        settings = {name: entry.settings[name] for name in names if name in entry.settings}
        return {"kind": "run", **run_fields(entry), "settings": settings}
    fields: dict[str, Any] = {"kind": "sweep", **sweep_fields(entry)}
    if with_runs:
        fields["runs"] = [_to_dict(run, names, False) for run in entry.runs]
    return fields
