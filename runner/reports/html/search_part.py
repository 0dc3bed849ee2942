"""A search on the page of its sweep: what was searched, the rungs, where each trial was stopped and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from runner.common.text import count, format_duration
from runner.reports import settings_text
from runner.reports.html import sections
from runner.reports.html.importance_part import importance_part
from runner.reports.html.sections import Column, Mark, Part, Row
from runner.reports.search_summary import Rung, SearchSummary, finite_value_at, header_lines, tried_text
from runner.runs.inspect import RunInfo
from runner.runs.timeline import Timeline

_DIGITS = 4
_MOST_AXES = 7


def search_facts(search: SearchSummary) -> list[tuple[str, str, str]]:
    """Return the figures at the top of the page."""
    tried, _, states = tried_text(search).partition(": ")
    spent = search.record.spent_seconds
    facts = [("searched", tried, states)]
    return [*facts, ("time of the search", format_duration(spent), "")] if spent else facts


def rungs_part(search: SearchSummary) -> list[Part]:
    """Return the table of rungs, with the options, the plans and the time below it."""
    metric = search.judged_by.replace("_", " ")
    columns = [
        Column(title="rung", number=True, help="the step at which trials were compared"),
        Column(title="trials", number=True, help="how many were compared there"),
        Column(title="continued", number=True),
        Column(title="up to", number=True, digits=_DIGITS, help=f"the highest {metric} that continued for its place"),
        Column(title=f"best {metric}", number=True, digits=_DIGITS),
        Column(title="diverged or failed", number=True, help="since the rung before"),
    ]
    rows = [Row(cells=_rung_cells(rung)) for rung in search.rungs]
    lines = [f"{label}: {text}" for label, text in header_lines(search)]
    return [
        sections.table("Rungs of the search", columns, rows, id="rungs", sortable=False),
        sections.text("How it searched", lines),
    ]


def trials_part(search: SearchSummary, link_of: Callable[[int | None], sections.Cell]) -> list[Part]:
    """Return the table of all trials, folded away: what each had at each rung, how it ended and why.

    `link_of` returns the cell of a job by its number.
    """
    metric = search.judged_by.replace("_", " ")
    columns = [Column(title="trial", number=True), Column(title="job", number=True)]
    columns += [Column(title=f"at {rung.step:,}", number=True, digits=_DIGITS, help=metric) for rung in search.rungs]
    columns.append(Column(title="how it ended", wide=True))
    rows = []
    for trial, recorded in zip(search.trials, search.record.trials, strict=True):
        values = [finite_value_at(recorded, rung.step) for rung in search.rungs]
        rows.append(Row(cells=[trial.number, link_of(trial.job), *values, trial.text]))
    note = f"The {metric} at each rung, by which trials are compared there."
    return [sections.table("Trials of the search", columns, rows, id="trials", note=note, closed=True)]


def stop_marks(search: SearchSummary, runs: Mapping[int, RunInfo]) -> list[Mark]:
    """Return a mark on the curve of each trial that was stopped, where it was; `runs` are those of jobs, by number."""
    marks = []
    for trial in search.trials:
        run = None if trial.job is None else runs.get(trial.job)
        loss = None if run is None else dict(run.losses("valid")).get(trial.step)
        if run is None or loss is None or trial.state != "stopped":
            continue
        timeline = Timeline.of(run.rows)
        x = {"step": float(trial.step)}
        for axis, name, unit in (("tokens", "tokens", 1), ("time", "minutes", 60)):
            if (value := timeline.at(trial.step, axis)) is not None:
                x[name] = value / unit
        marks.append(Mark(text=f"trial {trial.number} {trial.text}", x=x, y=loss, kind="stop"))
    return marks


def search_settings_part(search: SearchSummary, job_of: Callable[[int | None], Mapping[str, Any]]) -> list[Part]:
    """Return the searched settings and how far each trial came, as parallel coordinates.

    `job_of` returns, for the number of a job, the `id`, `name` and `rank` of its line.
    """
    values = search.values_at_first_rung()
    names = list(dict.fromkeys(name for trial in search.trials for name in trial.params))
    if len(values) < 2 or not names:
        return []
    short, step = settings_text.short_names(names), search.rungs[0].step
    shown = names[:_MOST_AXES]
    axes: list[dict[str, Any]] = [{"name": short[name]} for name in shown]
    axes += [{"name": f"{search.judged_by.replace('_', ' ')} at {step:,}", "flip": True}, {"name": "trained to"}]
    lines = [
        {
            **job_of(trial.job),
            "values": [*(_axis_value(trial.params.get(n)) for n in shown), values[trial.number], trial.step],
        }
        for trial in search.trials
        if trial.number in values
    ]
    more = f" {count(len(names) - len(shown), 'further setting')} varied." if len(names) > len(shown) else ""
    note = f"Trials that have a value at the first rung; the best there are at the top of its axis.{more}"
    return [sections.parallel("Settings and result", axes, lines, note=note)]


def search_importance(search: SearchSummary) -> list[Part]:
    """Return what the searched settings explain at the first rung, where all trials are comparable."""
    values = search.values_at_first_rung()
    trials = [trial for trial in search.trials if trial.number in values]
    if not trials:
        return []
    step, sampler = search.rungs[0].step, search.record.settings.get("sampler")
    learns = "The sampler tried good values more often, so that a share says less than in a grid."
    return importance_part(
        [trial.params for trial in trials],
        [values[trial.number] for trial in trials],
        metric=search.judged_by.replace("_", " "),
        among=f"the {count(len(trials), 'trial')} that have a value at step {step:,}, the first rung,",
        remark=learns if sampler in ("tpe", "cmaes") else "",
    )


def _rung_cells(rung: Rung) -> list[sections.Cell]:
    step = f"{rung.step:,}" + (" (end)" if rung.is_end else "")
    continued = None if rung.is_end else rung.continued
    return [sections.shown(step, rung.step), rung.reached, continued, rung.cut, rung.best, rung.lost or None]


def _axis_value(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else settings_text.value_text(value)
