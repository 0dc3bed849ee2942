"""A search as it is printed: its rungs as a table, and how a trial ended as a column of the table of jobs."""

from __future__ import annotations

from collections.abc import Sequence

from runner.reports.screen import Screen
from runner.reports.search_summary import Rung, SearchSummary, header_lines, tried_text
from runner.reports.tables import Column, TableRow

_LABEL_WIDTH = 11


def print_search(summary: SearchSummary, screen: Screen) -> None:
    """Print what was searched, and what was decided at each rung."""
    screen.heading(f"search: {tried_text(summary)}")
    for label, text in header_lines(summary):
        screen.line(f"{label:<{_LABEL_WIDTH}} {text}")
    if any(rung.reached or rung.lost for rung in summary.rungs):
        screen.line("")
        screen.table(
            [
                Column("rung", right=True),
                Column("trials", right=True),
                Column("continued", right=True),
                Column("up to", right=True),
                Column(f"best {summary.judged_by}", right=True),
                Column("diverged or failed", right=True),
            ],
            [TableRow(_cells(rung)) for rung in summary.rungs],
        )


def endings(summary: SearchSummary, jobs: Sequence[int | None]) -> list[str]:
    """Return for each of the jobs, by number, how its trial ended, or which trial it trains with another seed."""
    trials, replicates = summary.by_job, summary.replicates
    texts = []
    for job in jobs:
        trial = None if job is None else trials.get(job)
        if trial is None:
            found = None if job is None else replicates.get(job)
            texts.append("" if found is None else f"trial {found[0].number} with seed {found[1]}")
        else:
            named = f"trial {trial.number}: " if trial.number != job and trial.short else ""
            texts.append(named + trial.short)
    return texts


def _cells(rung: Rung) -> list[str]:
    return [
        f"{rung.step:,}" + (" (end)" if rung.is_end else ""),
        str(rung.reached),
        "" if rung.is_end else str(rung.continued),
        "" if rung.cut is None else f"{rung.cut:.4f}",
        "" if rung.best is None else f"{rung.best:.4f}",
        str(rung.lost) if rung.lost else "",
    ]
