"""The page of one sweep: its best job, the curves and the table of all jobs, what the settings did, failed jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.common.safe_json import finite_number
from runner.common.text import count, format_duration
from runner.reports import settings_text
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
    trials_part,
)
from runner.reports.html.sections import Column, Part, Row
from runner.reports.html.sweep_jobs import (
    PageJob,
    job_label,
    jobs_table,
    lines_of,
    link_to_job,
    metric_name,
    page_jobs,
    setting_cell,
    setting_columns,
    unfinished_part,
)
from runner.reports.html.verdict_part import verdict_part
from runner.reports.metric_columns import metric_text
from runner.reports.next_commands import command_fields, for_sweep
from runner.reports.search_summary import SearchSummary, read_summary
from runner.reports.seed_groups import seed_groups
from runner.reports.sweep_results import read_sweep_results
from runner.reports.verdict import Names, judge
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.lineage import parents
from runner.runs.objective import Objective

_MAX_AXES = 8


def sweep_report(sweep: SweepInfo, errors: Mapping[int, str] | None = None) -> Page:
    """Return the page of a sweep. `errors` are what jobs raised that ended before they had a status, by number."""
    runs, settings = _runs_and_settings(sweep, errors or {})
    objective = sweep.objective
    ranked = objective.rank(runs)
    numbers = sweep.manifest.numbers if sweep.manifest else {}
    search, search_problem = read_summary(sweep.path, {numbers[r.path.name]: r for r in runs if r.path.name in numbers})
    jobs = page_jobs(ranked, objective, settings, numbers)
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
            jobs_table(jobs, names, objective, search),
            *(trials_part(search, link_to_job(jobs)) if search else []),
            *_seeds(runs, objective, settings),
            *_verdict(ranked, objective),
            *(search_settings_part(search, lines_of(jobs)) if search else _parallel(jobs, names, objective)),
            *(search_importance(search) if search else _importance(jobs, objective)),
            *unfinished_part(jobs),
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


def _facts(jobs: Sequence[PageJob], names: Sequence[str], objective: Objective) -> list[tuple[str, str, str]]:
    items = []
    if jobs and jobs[0].value is not None:
        best = jobs[0]
        text = metric_text(objective.metric, best.value or 0.0)
        items.append((f"best {metric_name(objective)}", text, f"job {best.name}"))
        for other in objective.others:
            value = other.value(best.run)
            items.append((f"its {metric_name(other)}", "" if value is None else metric_text(other.metric, value), ""))
        items.append(("with", job_label(best, names), ""))
    seconds = [value for job in jobs if (value := finite_number(job.run.status.get("seconds"))) is not None]
    items.append(("time of all jobs", format_duration(sum(seconds)) if seconds else "", ""))
    return items


def _charts(jobs: Sequence[PageJob], names: Sequence[str], search: SearchSummary | None) -> list[Part]:
    curves = [RunCurves(job.run, len(jobs)) for job in jobs]
    labels = [f"job {job.name}: {job_label(job, names)}" for job in jobs]
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


def _seeds(runs: Sequence[RunInfo], objective: Objective, settings: Mapping[Path, Mapping[str, Any]]) -> list[Part]:
    groups = seed_groups(runs, objective, settings)
    if not groups:
        return []
    names = list(groups[0].settings)
    columns = setting_columns(names)
    columns += [
        Column(title="seeds", number=True),
        Column(title=f"{metric_name(objective)}, mean", number=True, digits=LOSS_DIGITS),
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


def _parallel(jobs: Sequence[PageJob], names: Sequence[str], objective: Objective) -> list[Part]:
    measured = [job for job in jobs if job.value is not None]
    if len(measured) < 2 or not names:
        return []
    shown = list(names)[:_MAX_AXES]
    short = settings_text.short_names(names)
    axes: list[dict[str, Any]] = [{"name": short[name]} for name in shown]
    axes.append({"name": metric_name(objective), "flip": not objective.maximize})
    lines = []
    for job in measured:
        values = [_axis_value(job.settings.get(name)) for name in shown]
        line = {"id": job.id, "name": f"job {job.name}", "rank": job.rank, "values": [*values, job.value]}
        lines.append(line)
    note = f"The best {metric_name(objective)} is at the top of the last axis."
    note += f" {len(names) - len(shown)} more settings vary." if len(names) > len(shown) else ""
    return [sections.parallel("Settings and result", axes, lines, note=note)]


def _axis_value(value: Any) -> Any:
    number = finite_number(value)
    return number if number is not None else settings_text.value_text(value)


def _importance(jobs: Sequence[PageJob], objective: Objective) -> list[Part]:
    measured = [job for job in jobs if job.value is not None]
    left_out = len(jobs) - len(measured)
    remark = f"{count(left_out, 'job')} without a result {'is' if left_out == 1 else 'are'} left out."
    return importance_part(
        [job.settings for job in measured],
        [job.value or 0.0 for job in measured],
        metric=metric_name(objective),
        among=f"{len(measured)} jobs",
        remark=remark if left_out else "",
    )
