"""The verdict as it is printed: below the table of a sweep, in `show`, and in `compare`."""

from __future__ import annotations

from collections.abc import Sequence

from runner.common.text import count, format_duration
from runner.reports import settings_text
from runner.reports.screen import Screen
from runner.reports.tables import Column, TableRow
from runner.reports.verdict import Candidate, Names, Verdict
from runner.runs.inspect import RunInfo, differing_settings

_MOST_REASONS = 5
_MOST_NAMES = 12


def print_verdict(verdict: Verdict, names: Names, screen: Screen, most: int | None = None) -> None:
    """Print the candidates, at most `most` of them, the best first, and in sentences what follows."""
    metric = metric_text(verdict.metric)
    if verdict.candidates:
        screen.heading(f"verdict: {metric} of the same {count(verdict.rows, 'row')}")
        _print_candidates(verdict, names, screen, most)
        for line in summary(verdict, names):
            screen.line(line)
    else:
        screen.heading(f"verdict: {metric}")
        screen.line(f"none: {verdict.problem}")
    for line in left_out_lines(verdict, names):
        screen.line((line, "dim"))


def metric_text(metric: str) -> str:
    """Return what a heading calls a metric."""
    return {"valid_loss": "validation loss", "test_loss": "test loss"}.get(metric, metric)


def summary(verdict: Verdict, names: Names) -> list[str]:
    """Return sentences: what is not distinguishable from the best, the cheapest of these, what the intervals cover."""
    best, equals, cheapest = verdict.candidates[0], verdict.equals, verdict.cheapest
    name, rows, others = names.phrase(best.runs), count(verdict.rows, "row"), len(verdict.candidates) - 1
    nearest = verdict.candidates[1]
    if not equals and others == 1:
        lines = [f"{_subject(nearest, names)} worse than {name} by more than noise on these {rows} ({_by(nearest)})"]
    elif not equals:
        lines = [f"{_subject(best, names)} better than all others by more than noise on these {rows}"]
        lines[0] += f"; the nearest: {names.phrase(nearest.runs)} ({_by(nearest)})"
    elif len(equals) == 1:
        lines = [f"{_subject(equals[0], names)} not distinguishable from {name} on these {rows} ({_by(equals[0])})"]
    else:
        listed = "; ".join(names.listed(candidate.runs) for candidate in equals)
        lines = [f"not distinguishable from {name} on these {rows}: {names.noun}s {listed}"]
    if equals and cheapest is not None and cheapest.seconds is not None:
        took = "" if cheapest is best or best.seconds is None else f" (the best: {duration(best.seconds)})"
        spent = duration(cheapest.seconds)
        lines.append(f"cheapest of these: {names.phrase(cheapest.runs)}, {spent} in updates{took}")
    evaluations = [number for candidate in verdict.candidates for number in candidate.evaluations]
    if min(evaluations) < max(evaluations):
        times = f"{min(evaluations)} to {max(evaluations)} times"
        lines.append(
            f"evaluated {times}, compared at the lowest loss: the more evaluations, the lower by selection alone"
        )
    intervals = f"intervals hold for all {others * (others + 1) // 2} pairs together" if others > 1 else "interval"
    covered = "rows and seeds" if verdict.has_seeds else "rows alone: another seed may change the order"
    return [*lines, f"95 % {intervals}, over {covered}"]


def left_out_lines(verdict: Verdict, names: Names) -> list[str]:
    """Return lines that name the runs that were not compared, and why."""
    reasons: dict[str, list[RunInfo]] = {}
    for run, reason in verdict.left_out:
        reasons.setdefault(reason, []).append(run)
    lines = [f"not compared: {_phrase(runs, names)} ({reason})" for reason, runs in reasons.items()]
    return lines[:_MOST_REASONS]


def _phrase(runs: Sequence[RunInfo], names: Names) -> str:
    if len(runs) <= _MOST_NAMES:
        return names.phrase(runs)
    return f"{names.phrase(runs[:_MOST_NAMES])} and {count(len(runs) - _MOST_NAMES, 'other')}"


def _print_candidates(verdict: Verdict, names: Names, screen: Screen, most: int | None) -> None:
    best, *_ = verdict.candidates
    shown = [best, *verdict.equals, *(c for c in verdict.candidates if c.is_worse)][:most]
    varied = settings_text.by_importance(differing_settings([run for c in verdict.candidates for run in c.runs]))
    labels = settings_text.pairs([c.runs for c in shown], [name for name in varied if name != "seed"])
    columns = [
        Column(f"{names.noun}s", right=True),
        Column("difference", right=True),
        Column("95 % interval"),
        Column("in updates", right=True),
        Column("outcome"),
        Column("settings that differ", wrap=True),
    ]
    with_settings = any(labels)
    rows = [
        TableRow([*_cells(candidate, verdict, names), *([label] if with_settings else [])])
        for candidate, label in zip(shown, labels, strict=True)
    ]
    screen.table(columns if with_settings else columns[:-1], rows)
    if hidden := len(verdict.candidates) - len(shown):
        screen.line((f"and {count(hidden, 'other')}; --json has all", "dim"))


def outcome(candidate: Candidate, verdict: Verdict) -> str:
    """Return the verdict on one candidate in a few words."""
    cheapest = ", cheapest" if candidate is verdict.cheapest and verdict.equals else ""
    if candidate is verdict.candidates[0]:
        return f"best: {candidate.value:.4f}{cheapest}"
    return "worse" if candidate.is_worse else f"not distinguishable{cheapest}"


def interval(candidate: Candidate) -> str:
    """Return the interval of the difference: ``-0.0041 to 0.0109``."""
    return f"{candidate.low:.4f} to {candidate.high:.4f}"


def duration(seconds: float) -> str:
    """Return a duration, also of a few seconds, as text."""
    return f"{seconds:.1f}s" if seconds < 10 else format_duration(seconds)


def _cells(candidate: Candidate, verdict: Verdict, names: Names) -> Sequence[str]:
    is_best = candidate is verdict.candidates[0]
    return [
        names.listed(candidate.runs),
        "" if is_best else f"{candidate.difference:.4f}",
        "" if is_best else interval(candidate),
        "" if candidate.seconds is None else duration(candidate.seconds),
        outcome(candidate, verdict),
    ]


def _by(candidate: Candidate) -> str:
    return f"difference {candidate.difference:.4f}, 95 % interval {interval(candidate)}"


def _subject(candidate: Candidate, names: Names) -> str:
    return f"{names.phrase(candidate.runs)} {'are' if len(candidate.runs) > 1 else 'is'}"
