"""The page of one sweep: its best job, the curves and the table of all jobs, what the settings did, failed jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common import layout
from runner.common.safe_json import finite_number
from runner.common.text import count, format_duration
from runner.reports import cells, settings_text
from runner.reports.cells import parent_lines
from runner.reports.html import sections
from runner.reports.html.curves_of_runs import RunCurves
from runner.reports.html.importance_part import importance_part
from runner.reports.html.page import Page
from runner.reports.html.run_report import LOSS_DIGITS, label_fields, next_steps, path_title, time_text
from runner.reports.html.search_part import (
    rungs_part,
    search_facts,
    search_importance,
    search_settings_part,
    stop_marks,
    trial_cell,
)
from runner.reports.html.sections import Column, Part, Row
from runner.reports.html.verdict_part import verdict_part
from runner.reports.metric_columns import DECIMALS, FRONT_MARK, front_note, metric_text
from runner.reports.next_commands import command_fields, for_sweep
from runner.reports.search_summary import SearchSummary, read_summary
from runner.reports.seed_groups import seed_groups
from runner.reports.sweep_results import read_sweep_results
from runner.reports.verdict import Names, judge
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.lineage import parents
from runner.runs.objective import VALID_LOSS, Objective

_MAX_REASON_LINES = 12
_MAX_AXES = 8


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One job on the page."""

    name: str
    run: RunInfo
    value: float | None
    """Its objective."""
    settings: Mapping[str, Any]
    """Its values of the settings that tell the jobs apart."""
    rank: float | None
    """From 0, the best, to 1, the worst; None without a value."""
    number: int | None
    """Its number in the manifest of the sweep."""

    @property
    def id(self) -> str:
        return f"job {self.name}"


def sweep_report(sweep: SweepInfo, errors: Mapping[int, str] | None = None) -> Page:
    """Return the page of a sweep. `errors` are what jobs raised that ended before they had a status, by number."""
    runs, settings = _runs_and_settings(sweep, errors or {})
    objective = sweep.objective
    ranked = objective.rank(runs)
    numbers = sweep.manifest.numbers if sweep.manifest else {}
    search, search_problem = read_summary(sweep.path, {numbers[r.path.name]: r for r in runs if r.path.name in numbers})
    jobs = _jobs(ranked, objective, settings, numbers)
    names = list(dict.fromkeys(name for job in jobs for name in job.settings))
    started = f" · started {time_text(min(times))}" if (times := _started(runs)) else ""
    states = f"{count(len(jobs), 'job')}: {_states(runs)}{started}"
    problems = [problem for problem in (sweep.problem, search_problem) if problem]
    labels = label_fields(sweep.labels, sweep.labels.tags, path_title(sweep.path))
    return Page(
        kind="sweep",
        title=labels["title"],
        tags=labels["tags"],
        folder=sweep.path,
        state=_state(runs, search),
        lines=[*labels["lines"], states, *parent_lines(parents(sweep)).splitlines()],
        hosts=[run.status.get("host") for run in runs],
        parts=[
            sections.facts([*_facts(jobs, names, objective), *(search_facts(search) if search else [])]),
            *([sections.text("Damaged files", problems, tone="bad")] if problems else []),
            sections.charts("Curves", _charts(jobs, names, search), id="charts"),
            *(rungs_part(search) if search else []),
            _table(jobs, names, objective, search),
            *_seeds(runs, objective, settings),
            *_verdict(ranked, objective),
            *(search_settings_part(search, _lines_of(jobs)) if search else _parallel(jobs, names, objective)),
            *(search_importance(search) if search else _importance(jobs, objective)),
            *_failed(jobs),
            *next_steps(command_fields(for_sweep(sweep, search))),
        ],
    )  # fmt: skip


def _runs_and_settings(
    sweep: SweepInfo, errors: Mapping[int, str]
) -> tuple[list[RunInfo], dict[Path, Mapping[str, Any]]]:
    """Return the runs of all recorded jobs, those that have not begun included, and what each varies, by path."""
    if sweep.manifest is not None and sweep.manifest.jobs:
        results = read_sweep_results(sweep.manifest, errors, {run.path: run for run in sweep.runs})
        jobs = sorted(results.jobs, key=lambda result: result.job.number)
        return [result.run for result in jobs], {result.run.path: result.varied for result in jobs}
    names = settings_text.by_importance(differing_settings(sweep.runs))
    return sweep.runs, {run.path: {name: run.settings.get(name) for name in names} for run in sweep.runs}


def _jobs(
    ranked: Sequence[RunInfo],
    objective: Objective,
    settings: Mapping[Path, Mapping[str, Any]],
    numbers: Mapping[str, int],
) -> list[_Job]:
    values = [objective.value(run) for run in ranked]
    last = max(1, sum(value is not None for value in values) - 1)
    return [
        _Job(
            name=run.path.name,
            run=run,
            value=value,
            settings=settings[run.path],
            rank=None if value is None else min(1.0, place / last),
            number=numbers.get(run.path.name),
        )
        for place, (run, value) in enumerate(zip(ranked, values, strict=True))
    ]


def _started(runs: Sequence[RunInfo]) -> list[str]:
    return [started for run in runs if isinstance(started := run.status.get("started"), str)]


def _state(runs: Sequence[RunInfo], search: SearchSummary | None) -> str:
    """Return the state of a sweep: finished where nothing is left for a resume, which leaves diverged jobs alone."""
    if search is not None and search.is_complete and all(run.state != "running" for run in runs):
        return "finished"
    states = {run.state for run in runs}
    order = ("running", "interrupted", "stopped", "not started", "unknown", "failed")
    found = next((state for state in order if state in states), "finished")
    return "stopped" if found == "not started" else found


def _states(runs: Sequence[RunInfo]) -> str:
    counts = Counter(run.state for run in runs)
    return ", ".join(f"{number} {state}" for state, number in counts.most_common()) or "no runs"


def _facts(jobs: Sequence[_Job], names: Sequence[str], objective: Objective) -> list[tuple[str, str, str]]:
    items = []
    if jobs and jobs[0].value is not None:
        best = jobs[0]
        text = metric_text(objective.metric, best.value or 0.0)
        items.append((f"best {_metric(objective)}", text, f"job {best.name}"))
        for other in objective.others:
            value = other.value(best.run)
            items.append((f"its {_metric(other)}", "" if value is None else metric_text(other.metric, value), ""))
        items.append(("with", _label(best, names), ""))
    seconds = [value for job in jobs if (value := finite_number(job.run.status.get("seconds"))) is not None]
    items.append(("time of all jobs", format_duration(sum(seconds)) if seconds else "", ""))
    return items


def _metric(objective: Objective) -> str:
    return objective.metric.replace("_", " ")


def _label(job: _Job, names: Sequence[str]) -> str:
    short = settings_text.short_names(names)
    texts = [f"{short[name]}={settings_text.value_text(job.settings.get(name))}" for name in names]
    return " ".join(texts)


def _charts(jobs: Sequence[_Job], names: Sequence[str], search: SearchSummary | None) -> list[Part]:
    curves = [RunCurves(job.run, len(jobs)) for job in jobs]
    labels = [f"job {job.name}: {_label(job, names)}" for job in jobs]
    drawn = []
    for split, title in (("valid", "Validation loss"), ("train", "Training loss")):
        of_jobs = [
            of_job.of(split, label, id=job.id, rank=job.rank)
            for of_job, label, job in zip(curves, labels, jobs, strict=True)
        ]
        marks, rungs = [], []
        if search is not None and split == "valid":
            marks = stop_marks(search, {job.number: job.run for job in jobs if job.number is not None})
            rungs = search.record.rungs[:-1]
        y = "mean loss of a token"
        chart = sections.chart(title, of_jobs, y=y, marks=marks, rungs=rungs, ranked=True, lower_is_better=True)
        drawn.append(chart)
    return drawn


def _table(jobs: Sequence[_Job], names: Sequence[str], objective: Objective, search: SearchSummary | None) -> Part:
    columns = [Column(title="job", number=True), *map(_metric_column, objective.each)]
    columns += [Column(title="front", help=front_note(objective))] if objective.others else []
    front = {id(run) for run in objective.front(job.run for job in jobs)} if objective.others else set()
    columns += setting_columns(names)
    has_other = VALID_LOSS not in objective.metrics
    columns += [Column(title="valid loss", number=True, digits=LOSS_DIGITS)] if has_other else []
    columns += [Column(title="best at step", number=True), Column(title="state")]
    columns += [Column(title="steps", number=True), Column(title="time", number=True)]
    columns += [Column(title="in the search")] if search else []
    texts = {name: settings_text.texts_of(name, [job.settings.get(name) for job in jobs]) for name in names}
    rows = []
    for i, job in enumerate(jobs):
        run = job.run
        row: list[sections.Cell] = [sections.link(job.name, report_path(run.path, job.name), _number(job.name))]
        row += [single.value(run) for single in objective.each]
        row += [FRONT_MARK if id(run) in front else None] if objective.others else []
        row += [setting_cell(texts[name][i], job.settings.get(name)) for name in names]
        row += [run.best_loss] if has_other else []
        steps = None if run.step is None else sections.shown(cells.format_progress(run), run.step)
        row += [run.best_step, sections.state(run.state), steps]
        seconds = finite_number(run.status.get("seconds"))
        row.append(None if seconds is None else sections.shown(format_duration(seconds), seconds))
        row += [trial_cell(search, job.number)] if search else []
        rows.append(Row(cells=row, id=job.id, notes=[note for note in cells.run_notes(run) if "restarts" in note]))
    note = "Point at a row or a curve to highlight the job; click, or press Enter, to keep it highlighted."
    if objective.others:
        note = f"{front_note(objective)}. {note}"
    by_value = None if search or objective.others else (1, objective.maximize)  # else in the order of their rank
    return sections.table("Jobs", columns, rows, id="jobs", note=note, sorted_by=by_value)


def _metric_column(objective: Objective) -> Column:
    return Column(title=_metric(objective), number=True, digits=DECIMALS.get(objective.metric, LOSS_DIGITS))


def _lines_of(jobs: Sequence[_Job]) -> Callable[[int | None], dict[str, Any]]:
    """Return what gives the line of a job, by its number, its id, name and colour."""
    known = {job.number: job for job in jobs}

    def line(number: int | None) -> dict[str, Any]:
        job = known[number]
        return {"id": job.id, "name": f"job {job.name}", "rank": job.rank}

    return line


def report_path(run: Path, relative: str) -> str | None:
    """Return the path of the page of a run or sweep whose folder is `relative`; None where it has none."""
    return f"{relative}/{layout.REPORT}" if (run / layout.REPORT).is_file() else None


def setting_columns(names: Sequence[str]) -> list[Column]:
    """Return a column for each setting, under a short name."""
    short = settings_text.short_names(names)
    return [Column(title=short[name], help=name, number=True, code=True) for name in names]


def setting_cell(text: str, value: Any) -> sections.Cell:
    """Return the cell of a setting: numbers are sorted as such."""
    number = finite_number(value)
    return sections.shown("" if value is None else text, text if number is None else number)


def _number(name: str) -> Any:
    return int(name) if name.isascii() and name.isdigit() else name


def _seeds(runs: Sequence[RunInfo], objective: Objective, settings: Mapping[Path, Mapping[str, Any]]) -> list[Part]:
    groups = seed_groups(runs, objective, settings)
    if not groups:
        return []
    names = list(groups[0].settings)
    columns = setting_columns(names)
    columns += [
        Column(title="seeds", number=True),
        Column(title=f"{_metric(objective)}, mean", number=True, digits=LOSS_DIGITS),
    ]
    columns += [Column(title="± standard deviation", number=True, digits=LOSS_DIGITS)]
    rows = []
    for group in groups:
        values = [setting_cell(settings_text.value_text(group.settings[n]), group.settings[n]) for n in names]
        seeds = sections.shown(f"{len(group.values)} of {len(group.runs)}", len(group.values))
        rows.append(Row(cells=[*values, seeds, group.mean if group.values else None, group.deviation]))
    return [sections.table("Over seeds", columns, rows, id="seeds", sorted_by=(len(names) + 1, objective.maximize))]


def _verdict(ranked: Sequence[RunInfo], objective: Objective) -> list[Part]:
    """Return which jobs are not distinguishable from the best; nothing where fewer than two have a result."""
    if sum(objective.value(run) is not None for run in ranked) < 2:
        return []
    names = Names.of_jobs(ranked)
    return [verdict_part(judge(ranked, objective, names), names)]


def _parallel(jobs: Sequence[_Job], names: Sequence[str], objective: Objective) -> list[Part]:
    measured = [job for job in jobs if job.value is not None]
    if len(measured) < 2 or not names:
        return []
    shown = list(names)[:_MAX_AXES]
    short = settings_text.short_names(names)
    axes: list[dict[str, Any]] = [{"name": short[name]} for name in shown]
    axes.append({"name": _metric(objective), "flip": not objective.maximize})
    lines = []
    for job in measured:
        values = [_axis_value(job.settings.get(name)) for name in shown]
        line = {"id": job.id, "name": f"job {job.name}", "rank": job.rank, "values": [*values, job.value]}
        lines.append(line)
    note = f"The best {_metric(objective)} is at the top of the last axis."
    note += f" {len(names) - len(shown)} more settings vary." if len(names) > len(shown) else ""
    return [sections.parallel("Settings and result", axes, lines, note=note)]


def _axis_value(value: Any) -> Any:
    number = finite_number(value)
    return number if number is not None else settings_text.value_text(value)


def _importance(jobs: Sequence[_Job], objective: Objective) -> list[Part]:
    measured = [job for job in jobs if job.value is not None]
    left_out = len(jobs) - len(measured)
    remark = f"{count(left_out, 'job')} without a result {'is' if left_out == 1 else 'are'} left out."
    return importance_part(
        [job.settings for job in measured],
        [job.value or 0.0 for job in measured],
        metric=_metric(objective),
        among=f"{len(measured)} jobs",
        remark=remark if left_out else "",
    )


def _failed(jobs: Sequence[_Job]) -> list[Part]:
    failed = [job for job in jobs if job.run.state in ("failed", "diverged", "unknown", "interrupted")]
    if not failed:
        return []
    rows = []
    for job in sorted(failed, key=lambda job: (len(job.name), job.name)):
        lines = (job.run.reason or job.run.problem or "no reason was recorded").split("\n")
        reason = "\n".join(lines[:_MAX_REASON_LINES])
        link = sections.link(job.name, report_path(job.run.path, job.name), _number(job.name))
        rows.append(Row(cells=[link, sections.state(job.run.state), job.run.step, reason], id=job.id))
    columns = [Column(title="job", number=True), Column(title="state"), Column(title="step", number=True)]
    columns.append(Column(title="reason", code=True))
    return [sections.table("Jobs that did not finish", columns, rows, id="failed", sortable=False)]
