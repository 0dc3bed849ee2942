"""The jobs of a sweep on its page: the table of all, that of those which did not finish, and what a job is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common import layout
from runner.common.safe_json import finite_number
from runner.common.text import format_duration
from runner.reports import cells, settings_text
from runner.reports.html import sections
from runner.reports.html.run_report import LOSS_DIGITS
from runner.reports.html.sections import Column, Part, Row
from runner.reports.metric_columns import DECIMALS, FRONT_MARK, front_note
from runner.reports.search_summary import SearchSummary
from runner.reports.search_table import endings
from runner.runs.inspect import RunInfo
from runner.runs.objective import VALID_LOSS, Objective

_MAX_REASON_LINES = 12


@dataclass(frozen=True, kw_only=True)
class PageJob:
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
        """What its row, its curve and its line have in common."""
        return f"job {self.name}"


def page_jobs(
    ranked: Sequence[RunInfo],
    objective: Objective,
    settings: Mapping[Path, Mapping[str, Any]],
    numbers: Mapping[str, int],
) -> list[PageJob]:
    """Return the jobs of the page, in the order of `ranked`.

    Args:
        ranked: their runs, the best first.
        objective: that of the sweep.
        settings: what each varies, by path.
        numbers: folder to the number in the manifest.
    """
    values = [objective.value(run) for run in ranked]
    last = max(1, sum(value is not None for value in values) - 1)
    return [
        PageJob(
            name=run.path.name,
            run=run,
            value=value,
            settings=settings[run.path],
            rank=None if value is None else min(1.0, place / last),
            number=numbers.get(run.path.name),
        )
        for place, (run, value) in enumerate(zip(ranked, values, strict=True))
    ]


def metric_name(objective: Objective) -> str:
    """Return what a page calls the metric of an objective."""
    return objective.metric.replace("_", " ")


def job_label(job: PageJob, names: Sequence[str]) -> str:
    """Return the settings `names` of a job in short."""
    short = settings_text.short_names(names)
    texts = [f"{short[name]}={settings_text.value_text(job.settings.get(name))}" for name in names]
    return " ".join(texts)


def jobs_table(
    jobs: Sequence[PageJob], names: Sequence[str], objective: Objective, search: SearchSummary | None
) -> Part:
    """Return the table of all jobs, the best first, with the settings `names` and how each ended in the `search`."""
    front = {id(run) for run in objective.front(job.run for job in jobs)} if objective.others else set()
    has_loss = VALID_LOSS in objective.metrics
    columns = [
        Column(title="job", number=True),
        *map(_metric_column, objective.each),
        *([Column(title="front", help=front_note(objective))] if objective.others else []),
        *setting_columns(names),
        *([] if has_loss else [Column(title="valid loss", number=True, digits=LOSS_DIGITS)]),
        Column(title="best at step", number=True),
        Column(title="state"),
        Column(title="steps", number=True),
        Column(title="time", number=True),
        *([Column(title="in the search", wide=True)] if search else []),
    ]
    texts = {name: settings_text.texts_of(name, [job.settings.get(name) for job in jobs]) for name in names}
    ended = endings(search, [job.number for job in jobs]) if search else []
    rows = []
    for i, job in enumerate(jobs):
        run, seconds = job.run, finite_number(job.run.status.get("seconds"))
        row: list[sections.Cell] = [
            _link(job),
            *objective.values(run),
            *([FRONT_MARK if id(run) in front else None] if objective.others else []),
            *(setting_cell(texts[name][i], job.settings.get(name)) for name in names),
            *([] if has_loss else [run.best_loss]),
            run.best_step,
            sections.state(run.state),
            None if run.step is None else sections.shown(cells.format_progress(run), run.step),
            None if seconds is None else sections.shown(format_duration(seconds), seconds),
            *([ended[i]] if search else []),
        ]
        rows.append(Row(cells=row, id=job.id, notes=[note for note in cells.run_notes(run) if "restarts" in note]))
    note = "Point at a row or a curve to highlight the job; click, or press Enter, to keep it highlighted."
    if objective.others:
        note = f"{front_note(objective)}. {note}"
    by_value = None if search or objective.others else (1, objective.maximize)  # else in the order of their rank
    return sections.table("Jobs", columns, rows, id="jobs", note=note, sorted_by=by_value)


def _metric_column(objective: Objective) -> Column:
    return Column(title=metric_name(objective), number=True, digits=DECIMALS.get(objective.metric, LOSS_DIGITS))


def link_to_job(jobs: Sequence[PageJob]) -> Callable[[int | None], sections.Cell]:
    """Return what gives the cell that names a job and leads to its page, by its number."""
    known = {job.number: job for job in jobs if job.number is not None}

    def cell(number: int | None) -> sections.Cell:
        job = None if number is None else known.get(number)
        return None if job is None else _link(job)

    return cell


def _link(job: PageJob) -> sections.Cell:
    return sections.link(job.name, report_path(job.run.path, job.name), _number(job.name))


def lines_of(jobs: Sequence[PageJob]) -> Callable[[int | None], dict[str, Any]]:
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


def unfinished_part(jobs: Sequence[PageJob]) -> list[Part]:
    """Return the table of jobs that did not finish, with the reasons; nothing where there are none."""
    failed = [job for job in jobs if job.run.state in ("failed", "diverged", "unknown", "interrupted")]
    if not failed:
        return []
    rows = []
    for job in sorted(failed, key=lambda job: (len(job.name), job.name)):
        lines = (job.run.reason or job.run.problem or "no reason was recorded").split("\n")
        reason = "\n".join(lines[:_MAX_REASON_LINES])
        link = _link(job)
        rows.append(Row(cells=[link, sections.state(job.run.state), job.run.step, reason], id=job.id))
    columns = [Column(title="job", number=True), Column(title="state"), Column(title="step", number=True)]
    columns.append(Column(title="reason", code=True))
    return [sections.table("Jobs that did not finish", columns, rows, id="failed", sortable=False)]
