"""The verdict on a page: the candidates as a table, and below it what follows."""

from __future__ import annotations

from runner.common.text import count
from runner.reports import settings_text
from runner.reports.html import sections
from runner.reports.html.sections import Column, Part, Row
from runner.reports.verdict import Candidate, Names, Verdict
from runner.reports.verdict_table import duration, interval, left_out_lines, metric_text, outcome, summary
from runner.runs.inspect import differing_settings

_DIGITS = 4


def verdict_part(verdict: Verdict, names: Names) -> Part:
    """Return the part of a page that shows the verdict."""
    title = f"Verdict: {metric_text(verdict.metric)}"
    if not verdict.candidates:
        return sections.text(title, [f"None: {verdict.problem}.", *left_out_lines(verdict, names)])
    varied = settings_text.by_importance(differing_settings([run for c in verdict.candidates for run in c.runs]))
    labels = settings_text.pairs([c.runs for c in verdict.candidates], [name for name in varied if name != "seed"])
    columns = [
        Column(title=f"{names.noun}s"),
        Column(title="outcome"),
        Column(title="difference", number=True, digits=_DIGITS, help="how much worse than the best"),
        Column(title="95 % interval", number=True),
        Column(title="in updates", number=True, help="time in updates until the result"),
        Column(title="settings that differ", code=True),
    ]
    rows = [
        Row(cells=[*_cells(c, verdict, names), label], id=_id(c, names))
        for c, label in zip(verdict.candidates, labels, strict=True)
    ]
    sentences = [*summary(verdict, names), *left_out_lines(verdict, names)]
    note = " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)
    same = f"{title} of the same {count(verdict.rows, 'row')}"
    return sections.table(same, columns, rows, id=f"verdict-{verdict.metric}", note=note, sortable=len(rows) > 2)


def row_id(name: str, names: Names) -> str:
    """Return the id by which the parts of a page know the run `name`."""
    return name if names.noun == "run" else f"{names.noun} {name}"


def _cells(candidate: Candidate, verdict: Verdict, names: Names) -> list[sections.Cell]:
    seconds = candidate.seconds
    best = candidate is verdict.candidates[0]
    return [
        names.listed(candidate.runs),
        outcome(candidate, verdict),
        None if best else candidate.difference,
        None if best else sections.shown(interval(candidate), candidate.low),
        None if seconds is None else sections.shown(duration(seconds), seconds),
    ]


def _id(candidate: Candidate, names: Names) -> str | None:
    """Return the id of a single run, which lights up with its curve; several have none."""
    return row_id(names.listed(candidate.runs), names) if len(candidate.runs) == 1 else None
