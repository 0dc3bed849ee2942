"""Charts as data: what a linear axis cuts off, and where an axis is logarithmic."""

from __future__ import annotations

from typing import Any

import pytest

from runner.reports.html import sections
from runner.reports.html.sections import Curve


def chart(*curves: list[float | None], ranked: bool = True, lower_is_better: bool | None = True) -> dict[str, Any]:
    drawn = [Curve(name=str(i), x={"step": list(range(len(y)))}, y=y) for i, y in enumerate(curves)]
    return sections.chart("loss", drawn, y="loss", ranked=ranked, lower_is_better=lower_is_better)


@pytest.mark.parametrize(
    ("curves", "top", "above", "log"),
    [
        ([[2.0, 1.0], [2.0, 0.8], [2.0, 30.0]], 2.0, 1, False),
        ([[2.0, 1.0], [2.1, 0.1], [2.0, 30.0], [None, 2.0, 3.0, 9.0]], 3.0, 2, True),  # 0.1 to 3.0
        ([[2.0, 1.0], [2.0, 3.9]], None, 0, False),
        ([[2.0, 0.1]], None, 0, True),
        ([[20.0, 30.0], [20.0, 39.0]], None, 0, False),  # all of them are that high
        ([[-2.0, 1.0], [-2.0, 30.0]], None, 0, False),
        ([[None, None]], None, 0, False),
        ([], None, 0, False),
    ],
)
def test_curves_that_blow_up_do_not_flatten_the_others(curves, top, above, log) -> None:
    drawn = chart(*curves)
    assert (drawn["top"], drawn["above"], drawn["log"]) == (top, above, log)


def test_only_charts_of_many_runs_are_cut() -> None:
    curves = [[2.0, 1.0], [2.0, 30.0]]
    assert chart(*curves, ranked=False)["top"] is None and chart(*curves, lower_is_better=None)["top"] is None
