"""The page of a folder: the runs and sweeps below it, as `runner ls` lists them, with links to their pages."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runner.common.text import count, format_bytes, relative_path
from runner.reports import cells, settings_text
from runner.reports.cells import parent_lines
from runner.reports.html import sections
from runner.reports.html.curves_of_runs import RunCurves
from runner.reports.html.page import Page
from runner.reports.html.run_report import LOSS_DIGITS, time_text
from runner.reports.html.sections import Column, Part, Row
from runner.reports.html.sweep_jobs import report_path
from runner.reports.run_table import runs_of
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.lineage import parents

_MAX_CURVES = 200


def folder_report(folder: Path, entries: Sequence[RunInfo | SweepInfo]) -> Page:
    """Return the page of the runs and sweeps below `folder`, which `find_runs` found."""
    runs = [run for entry in entries for run in runs_of(entry)]
    states = Counter(run.state for run in runs)
    sweeps = sum(isinstance(entry, SweepInfo) for entry in entries)
    alone = len(entries) - sweeps
    lines = [f"{count(alone, 'run')} and {count(sweeps, 'sweep')}, newest first"]
    size = sum(entry.size_bytes for entry in entries)
    facts = [(state, str(number), "") for state, number in states.most_common()]
    return Page(
        kind="folder",
        title=relative_path(folder.absolute()) if folder.absolute() != Path.cwd() else folder.absolute().name,
        folder=folder,
        lines=lines,
        hosts=[run.status.get("host") for run in runs],
        parts=[
            sections.facts([*facts, ("size on disk", format_bytes(size), "")]),
            _table(folder, entries),
            *_curves(folder, entries),
        ],
    )


def _table(folder: Path, entries: Sequence[RunInfo | SweepInfo]) -> Part:
    names = settings_text.by_importance(differing_settings([run for entry in entries for run in runs_of(entry)]))
    labels = settings_text.pairs([runs_of(entry) for entry in entries], names)
    named = [
        " ".join([entry.labels.name or "", *(f"#{tag}" for tag in entry.labels.tags)]).strip() for entry in entries
    ]
    origins = [parent_lines(parents(entry)) for entry in entries]
    columns = [Column(title="run"), Column(title="name"), Column(title="state"), Column(title="steps", number=True)]
    columns += [
        Column(title="valid loss", number=True, digits=LOSS_DIGITS),
        Column(title="last update"),
        Column(title="size", number=True),
    ]
    columns += [Column(title="from", code=True), Column(title="settings that differ", code=True)]
    rows = []
    for entry, name, origin, label in zip(entries, named, origins, labels, strict=True):
        path = os.path.relpath(entry.path, folder)
        is_run = isinstance(entry, RunInfo)
        row: list[sections.Cell] = [sections.link(path, report_path(entry.path, path), path), name]
        if isinstance(entry, RunInfo):
            row += [sections.state(entry.state), sections.shown(cells.format_progress(entry), entry.step)]
        else:
            row += [f"sweep: {cells.format_states(entry)}", None]
        updated = time_text(cells.format_time(entry.updated) or "")
        row += [entry.best_loss, sections.shown(updated, entry.updated)]
        row += [sections.shown(format_bytes(entry.size_bytes), entry.size_bytes), origin, label]
        notes = cells.run_notes(entry) if isinstance(entry, RunInfo) else [entry.problem or ""]
        rows.append(Row(cells=row, id=f"run {path}" if is_run else None, notes=[note for note in notes if note]))
    shown = [
        i for i in range(len(columns)) if columns[i].title not in ("name", "from") or any(r.cells[i] for r in rows)
    ]
    columns = [columns[i] for i in shown]
    rows = [Row(cells=[row.cells[i] for i in shown], id=row.id, notes=row.notes) for row in rows]
    place = next(i for i, column in enumerate(columns) if column.title == "last update")
    return sections.table("Runs and sweeps", columns, rows, id="runs", sorted_by=(place, True))


def _curves(folder: Path, entries: Sequence[RunInfo | SweepInfo]) -> list[Part]:
    """Return the validation curves of the runs that are no jobs of sweeps."""
    runs = [entry for entry in entries if isinstance(entry, RunInfo)][:_MAX_CURVES]
    order = {run.path: i for i, run in enumerate(sorted(runs, key=lambda r: (r.best_loss is None, r.best_loss)))}
    last = max(1, sum(run.best_loss is not None for run in runs) - 1)
    curves = []
    for run in runs:
        path = os.path.relpath(run.path, folder)
        rank = None if run.best_loss is None else order[run.path] / last
        curves.append(RunCurves(run, len(runs)).of("valid", path, id=f"run {path}", rank=rank))
    chart = sections.chart("Validation loss", curves, y="mean loss of a token", ranked=True, lower_is_better=True)
    return [sections.charts("Curves of the runs", [chart], id="charts")] if len(chart["curves"]) > 1 else []
