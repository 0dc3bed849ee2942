"""The parts of a page, as data: each function returns one that `assets/` draws.

Parts that show the same things (a row of a table, a curve, a line of the parallel coordinates) give them the same id:
where one of them is pointed at, the others light up. Texts are shown as they are, never as HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from statistics import median
from typing import Any
from urllib.parse import quote

from runner.reports.curves import LOG_SCALE_FACTOR
from runner.reports.html.downsample import rounded, thinned

Part = dict[str, Any]
"""A part of a page: a JSON object with its `kind`."""
Cell = Any
"""A number, a text, None, or what `link`, `state` and `shown` return."""

CHART_POINTS = 1000
"""Points that a chart draws of a curve at most, where it has the chart for itself."""
_ALL_POINTS = 8_000
"""Points of all curves of a chart."""
_MIN_POINTS = 40
_CUT_FACTOR = 2.0
"""Values above the median of the curves' first values times this are cut off on a linear axis."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve of a chart."""

    name: str
    x: Mapping[str, Sequence[float]]
    """Position of each point on each axis that the chart offers, such as step and tokens; all of one length."""
    y: Sequence[float | None]
    id: str | None = None
    """That of its row in a table."""
    total: int | None = None
    """How many points it had, where it has been thinned out already."""
    rank: float | None = None
    """From 0, the best, to 1: its place among curves that are coloured by their result."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a chart that is marked, such as a checkpoint."""

    text: str
    x: Mapping[str, float]
    y: float
    strong: bool = False
    """Whether it is drawn larger than the others, as the best of them."""
    kind: str = "checkpoint"
    """checkpoint, or stop: where a search stopped a trial."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    number: bool = False
    """Whether its cells are aligned to the right."""
    code: bool = False
    digits: int | None = None
    """Digits behind the point of its numbers; None for as many as each needs."""
    help: str = ""
    wide: bool = False
    """Whether it holds phrases, which need some width."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    cells: Sequence[Cell]
    id: str | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    """Lines below the row."""


def points_of_a_curve(curves: int) -> int:
    """Return how many points each curve of a chart with that many curves has at most."""
    return max(_MIN_POINTS, min(CHART_POINTS, _ALL_POINTS // max(1, curves)))


def facts(items: Iterable[tuple[str, str, str]]) -> Part:
    """Return the figures at the top of a page: label, value and a remark; those with an empty value are left out."""
    return {"kind": "facts", "items": [{"label": a, "value": b, "remark": c} for a, b, c in items if b]}


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    y: str,
    marks: Sequence[Mark] = (),
    lower_is_better: bool | None = None,
    ranked: bool = False,
    rungs: Sequence[int] = (),
) -> Part:
    """Return one chart for `charts`; long curves are thinned out, and the chart says so.

    Args:
        y: title of the axis, with the unit.
        lower_is_better: which end of a curve its summary names; None for neither. Where it is one, the axis can be
            made logarithmic, and is at first where the values span a large factor.
        ranked: whether curves are coloured by `Curve.rank`, and named where they are pointed at, not in a legend.
        rungs: steps at which a search compared trials, drawn as lines.
    """
    drawn = [curve for curve in curves if any(value is not None for value in curve.y)]
    limit = points_of_a_curve(len(drawn))
    total, shown, fields = 0, 0, []
    for curve in drawn:
        keep = thinned(curve.y, limit)
        total, shown = total + (curve.total or len(curve.y)), shown + len(keep)
        fields.append(
            {
                "name": curve.name,
                "id": curve.id,
                "rank": curve.rank,
                "x": {axis: [rounded(values[i]) for i in keep] for axis, values in curve.x.items()},
                "y": [rounded(curve.y[i]) for i in keep],
            }
        )
    top, above = _cut(drawn) if ranked and lower_is_better else (None, 0)
    return {
        "title": title,
        "y": y,
        "log": lower_is_better is not None and _spans_large_factor(drawn, top),
        "top": rounded(top),
        "above": above,
        "lowerIsBetter": lower_is_better,
        "ranked": ranked,
        "curves": fields,
        "marks": [
            {"text": m.text, "x": dict(m.x), "y": rounded(m.y), "strong": m.strong, "kind": m.kind} for m in marks
        ],
        "rungs": list(rungs),
        "thinned": [shown, total] if shown < total else None,
    }


def _cut(curves: Sequence[Curve]) -> tuple[float | None, int]:
    """Return the highest value that a linear axis shows, and how many curves go above it; None where none does.

    A few runs that blow up would leave the others a line at the bottom.
    """
    values = [[value for value in curve.y if value is not None] for curve in curves]
    limit = _CUT_FACTOR * median([of_curve[0] for of_curve in values]) if values else 0.0
    below = [value for of_curve in values for value in of_curve if value <= limit]
    above = sum(max(of_curve) > limit for of_curve in values)
    return (max(below), above) if above and below and limit > 0 else (None, 0)


def _spans_large_factor(curves: Sequence[Curve], top: float | None) -> bool:
    values = [v for curve in curves for v in curve.y if v is not None and (top is None or v <= top)]
    return bool(values) and min(values) > 0 and max(values) >= LOG_SCALE_FACTOR * min(values)


def charts(title: str, items: Sequence[Part], *, id: str, note: str = "") -> Part:
    """Return a group of charts that share the cursor: the first over the whole width, the others beside each other."""
    return {"kind": "charts", "id": id, "title": title, "charts": [c for c in items if c["curves"]], "note": note}


def table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    id: str,
    note: str = "",
    sortable: bool = True,
    sorted_by: tuple[int, bool] | None = None,
    closed: bool = False,
) -> Part:
    """Return a table. `sorted_by` names the column by which its rows are sorted already, and whether the highest comes
    first; a `closed` one is folded away until it is asked for."""
    return {
        "kind": "table",
        "id": id,
        "title": title,
        "note": note,
        "sortable": sortable,
        "sorted": None if sorted_by is None else {"column": sorted_by[0], "down": sorted_by[1]},
        "closed": closed,
        "columns": [vars(column) for column in columns],
        "rows": [{"id": row.id, "cells": list(row.cells), "notes": list(row.notes)} for row in rows],
    }


def link(text: str, path: PurePath | str | None, sort: Any = None) -> Cell:
    """Return a cell that leads to `path`, relative to the page; without one it is plain text."""
    return {"text": text, "href": None if path is None else href(path), "sort": text if sort is None else sort}


def href(path: PurePath | str) -> str:
    """Return a relative `path` as the target of a link, which no name of a folder turns into another scheme."""
    return "./" + quote(str(path))


def state(name: str) -> Cell:
    """Return a cell with a state of a run, such as finished."""
    return {"state": name, "text": name, "sort": name}


def shown(text: str, sort: Any) -> Cell:
    """Return a cell with a text that is sorted by `sort`."""
    return {"text": text, "sort": sort}


def commands(title: str, items: Sequence[Mapping[str, str]], *, note: str = "") -> Part:
    """Return commands to copy: each with `what` it does and its `words`, as `next_commands.command_fields` returns."""
    return {"kind": "commands", "title": title, "items": [dict(item) for item in items], "note": note}


def samples(title: str, items: Sequence[Mapping[str, Any]], *, note: str = "") -> Part:
    """Return answers side by side: each with prompt and expected, and before and after as {text, score} or None."""
    return {"kind": "samples", "id": "samples", "title": title, "items": [dict(item) for item in items], "note": note}


def text(title: str, lines: Sequence[str], *, tone: str = "plain", code: bool = False) -> Part:
    """Return paragraphs; tone is plain, good or bad. `code` keeps blanks and line breaks, as of an error message."""
    return {"kind": "text", "title": title, "lines": list(lines), "tone": tone, "code": code}


def parallel(
    title: str, axes: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], *, note: str = ""
) -> Part:
    """Return parallel coordinates.

    Args:
        axes: from left to right, each a `name` and, where high values are drawn at the bottom, `flip`.
        lines: each with `id`, `name`, `rank` (see `Curve.rank`) and `values`, one for each axis: a number, a text or
            None; an axis with a text among its values shows categories.
    """
    return {
        "kind": "parallel",
        "id": "parallel",
        "title": title,
        "axes": [dict(axis) for axis in axes],
        "lines": [dict(line) for line in lines],
        "note": note,
    }


def bars(title: str, items: Sequence[Mapping[str, Any]], *, note: str = "") -> Part:
    """Return bars of shares from 0 to 1: each with `name`, `share`, `low`, `high` (an interval, or None) and `text`."""
    return {"kind": "bars", "id": "importance", "title": title, "items": [dict(item) for item in items], "note": note}
