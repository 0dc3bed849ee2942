"""`runner ls`: the runs and sweeps below a folder, a line each, with the settings that differ between them."""

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
from runner.reports.tables import Column, TableRow, column_widths, table
from runner.runs.find import SweepInfo, find_runs
from runner.runs.inspect import RunInfo, differing_settings

DEFAULT = "outputs"
SORTS: dict[str, Callable[[RunInfo | SweepInfo], float]] = {
    "age": lambda one: -one.updated,
    "best": lambda one: float("inf") if one.best_loss is None else one.best_loss,
    "size": lambda one: -one.size_bytes,
    "step": lambda one: -(one.step or 0),
}
"""What --sort may be; the order is by the value, smallest first: newest, best, largest and furthest."""
_COLUMNS = (
    Column("run", keep_end=True),
    Column("state"),
    Column("step", right=True),
    Column("valid_loss", right=True),
    Column("age", right=True),
    Column("size", right=True),
    Column("settings that differ", cut=True),
)
_LEAST_SETTINGS = 24  # columns that the settings need before a path is shown whole


def run(argv: list[str]) -> int:
    """List what `argv` names; 0 also where there is nothing.

    Raises:
        ConfigError: a word that is not understood, or no such folder.
    """
    parser = CommandParser(prog="runner ls", description=COMMANDS["ls"])
    parser.add_argument("path", metavar="PATH", nargs="?", help=f"folder to look below (default: {DEFAULT})")
    parser.add_argument("--runs", action="store_true", help="below each sweep also its runs")
    parser.add_argument("--sort", choices=tuple(SORTS), default="age", help="newest (default), best, largest, furthest")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N runs and sweeps only")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    words = parser.parse_args(argv)
    if words.limit is not None and words.limit < 1:
        raise ConfigError(f"runner ls: --limit {words.limit} cannot be: it has to be 1 or more.")
    root = Path(words.path or DEFAULT).expanduser()
    if not root.is_dir() and (words.path is not None or root.exists()):
        raise ConfigError(f"{root}: {'not a folder' if root.exists() else 'there is no such folder'}.")
    found = find_runs(root)
    order = SORTS[words.sort]
    shown = sorted(found, key=order)[: words.limit]
    if words.runs:
        for one in shown:
            if isinstance(one, SweepInfo) and words.sort != "age":
                one.runs.sort(key=order)
    names = settings_text.by_importance(differing_settings([run for one in shown for run in _group(one)]))
    if words.json:
        entries = [_entry(one, names, words.runs) for one in shown]
        print(json_document({"root": root, "differing": names, "entries": entries}))
        return 0
    screen = Screen()
    if not shown:
        screen.line(f"No runs below {relative_path(root)}. The first one: python -m runner experiment=first_run")
        return 0
    _print(screen, root, shown, names, words.runs)
    if len(found) > len(shown):
        screen.line((f"{len(found) - len(shown)} more; --limit {len(found)} shows all.", "dim"))
    return 0


def _print(screen: Screen, root: Path, shown: list[RunInfo | SweepInfo], names: list[str], members: bool) -> None:
    texts = iter(settings_text.pairs([group for one in shown for group in _lines(one, members)], names))
    now = time.time()
    rows: list[TableRow] = []
    paths: list[tuple[int, Path]] = []
    for one in shown:
        paths.append((len(rows), one.path))
        if isinstance(one, RunInfo):
            rows.append(_run_row(one, next(texts), now))
            continue
        rows.append(_sweep_row(one, next(texts), now))
        for member in one.runs if members else []:
            rows.append(_run_row(member, next(texts), now))
            rows[-1].cells[0] = f"  {member.path.name}"
    for i, path in paths:
        rows[i].cells[0] = relative_path(path)
    columns = list(_COLUMNS if names else _COLUMNS[:-1])
    cells = [[single_line(cell) for cell in row.cells] for row in rows]
    widths = column_widths(columns, cells)
    needed = sum(widths) + 2 * (len(widths) - 1)
    if names:
        needed += min(0, _LEAST_SETTINGS - widths[-1])
    if screen.width is not None and needed > screen.width:
        # A whole path can be copied; where that leaves no room, what lies below the folder that was named is enough.
        for i, path in paths:
            rows[i].cells[0] = os.path.relpath(path, root)
        columns[0] = Column(f"below {relative_path(root)}", keep_end=True)
    for row in rows:
        row.cells = row.cells[: len(columns)]
    screen.lines(table(columns, rows, screen.width))


def _run_row(run: RunInfo, differ: str, now: float) -> TableRow:
    cells = [
        "",
        run.state,
        format_progress(run),
        format_best(run),
        format_age(now - run.updated),
        format_bytes(run.size_bytes),
        differ,
    ]
    return TableRow(cells, {1: STATE_STYLES.get(run.state, "")}, run_notes(run))


def _sweep_row(sweep: SweepInfo, differ: str, now: float) -> TableRow:
    best = sweep.best
    loss = "-" if best is None else f"{best.best_loss:.4f} in {best.path.name}"
    alike = len(sweep.states) < 2
    cells = [
        "",
        format_states(sweep) if alike else f"{sum(sweep.states.values())} jobs",
        "",
        loss,
        format_age(now - sweep.updated),
        format_bytes(sweep.size_bytes),
        differ,
    ]
    styles = {0: "bold", 1: sweep_style(sweep)}
    notes = [] if alike else [format_states(sweep)]
    return TableRow(cells, styles, notes + ([f"damaged: {sweep.problem}"] if sweep.problem else []))


def _group(one: RunInfo | SweepInfo) -> list[RunInfo]:
    return [one] if isinstance(one, RunInfo) else one.runs


def _lines(one: RunInfo | SweepInfo, members: bool) -> list[list[RunInfo]]:
    """The runs behind each line of the table."""
    return [_group(one), *([run] for run in _group(one) if members and isinstance(one, SweepInfo))]


def _entry(one: RunInfo | SweepInfo, names: list[str], members: bool) -> dict[str, Any]:
    if isinstance(one, RunInfo):
        return {
            "kind": "run",
            **run_fields(one),
            "settings": {name: one.settings[name] for name in names if name in one.settings},
        }
    entry = {"kind": "sweep", **sweep_fields(one)}
    if members:
        entry["runs"] = [_entry(run, names, False) for run in one.runs]
    return entry
