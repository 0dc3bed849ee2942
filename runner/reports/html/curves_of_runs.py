"""Curves of what runs recorded, over steps, tokens and the time in updates, for the charts of pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.common.safe_json import finite_number
from runner.reports.html.downsample import rounded, thinned
from runner.reports.html.sections import Curve, points_of_a_curve
from runner.runs.inspect import RunInfo
from runner.runs.timeline import Timeline

_MINUTE = 60


class RunCurves:
    """Makes curves of one run. Long ones are thinned out before anything else is computed of their points."""

    def __init__(self, run: RunInfo, curves: int = 1) -> None:
        """`curves`: how many curves the charts have, which share a number of points."""
        self._run = run
        self._limit = points_of_a_curve(curves)
        self._timeline = Timeline.of(run.rows)
        self._known = dict(self._timeline.tokens), dict(self._timeline.seconds)

    def of(
        self, split: str, name: str, field: str = "loss", *, id: str | None = None, rank: float | None = None
    ) -> Curve:
        """Return the curve of a field of the rows of a split: of those that have it, as that of a score has no loss."""
        rows = [row for row in self._run.rows if row.get("split") == split and field in row]
        values = [finite_number(row.get(field)) for row in rows]
        keep = thinned(values, self._limit)
        axes = self._axes([rows[i] for i in keep])
        return Curve(name=name, x=axes, y=[values[i] for i in keep], id=id, rank=rank, total=len(values))

    def _axes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """Return the positions of rows on each axis: steps, and tokens and minutes where they are recorded."""
        steps: list[int] = [row["step"] for row in rows]
        axes: dict[str, list[float]] = {"step": [*steps]}
        for (name, axis, unit), known in zip(
            (("tokens", "tokens", 1), ("minutes", "time", _MINUTE)), self._known, strict=True
        ):
            values = [known[step] if step in known else self._timeline.at(step, axis) for step in steps]
            if all(value is not None for value in values):
                axes[name] = [rounded((value or 0.0) / unit) or 0.0 for value in values]
        return axes
