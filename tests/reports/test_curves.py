"""Curves in a terminal: every point lies where its axes say, for any points."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runner.reports import curves
from runner.reports.curves import Series

POINTS = st.lists(st.tuples(st.integers(0, 10**9), st.floats(-1e300, 1e300)), max_size=30)
BODY = slice(1, -2)
"""The lines of the plot itself: without the legend and the x axis."""


def plot(series: list[Series], **options: Any) -> list[str]:
    """The curves as lines of plain text."""
    return ["".join(text for text, _ in line).rstrip() for line in curves.plot(series, **options)]


def area(lines: list[str]) -> list[str]:
    """The plot without its labels."""
    return [line[line.index(next(c for c in line if c in "│┤|+")) + 1 :] for line in lines[BODY]]


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right() -> None:
    lines = plot(
        [Series("valid", [(0, 2.0), (10, 1.5), (20, 1.0)], mark="o")], width=40, height=9
    )  # 35 columns of plot
    rows = area(lines)
    assert [row.find("o") for row in (rows[0], rows[4], rows[8])] == [0, 17, 34]
    assert lines[0].split() == ["loss:", "o", "valid"]
    assert lines[1].startswith("  2 ┤") and lines[5].startswith("1.5 ┤") and lines[9].startswith("  1 ┤")
    assert lines[-1].split() == ["0", "step", "20"]


def test_a_small_plot_is_drawn_exactly() -> None:
    assert plot([Series("a", [(0, 1.0), (4, 0.0)])], width=20, height=3) == [
        "     loss:  ⠤⠤ a",
        "  1 ┤⠉⠒⠤⢄⣀",
        "0.5 ┤     ⠉⠒⠢⠤⣀",
        "  0 ┤          ⠉⠑⠒⠤⣀",
        "    └───────────────",
        "     0    step     4",
    ]


def test_the_axis_is_logarithmic_where_the_loss_falls_tenfold() -> None:
    points = [(0, 100.0), (1, 10.0), (2, 1.0)]
    lines = plot([Series("a", points, mark="x")], width=30, height=9)
    assert "log scale" in lines[0]
    assert "10" in lines[5].split()
    assert area(lines)[4].count("x") == 1  # the middle of a logarithmic axis
    assert "log scale" not in plot([Series("a", [(0, 5.0), (1, 1.0)])])[0]
    assert "log scale" not in plot([Series("a", [(0, 5.0), (1, 0.0)])])[0]


def test_a_single_point_is_one_mark_with_its_values() -> None:
    lines = plot([Series("valid", [(7, 0.25)], mark="o")], width=40, height=5)
    assert "".join(area(lines)).count("o") == 1
    assert lines[3].startswith("0.25 ┤") and lines[-1].split() == ["step", "7"]


def test_a_constant_curve_is_a_horizontal_line() -> None:
    rows = area(plot([Series("a", [(0, 3.0), (5, 3.0), (9, 3.0)], mark="x")], width=40, height=5))
    assert [row.count("x") for row in rows] == [0, 0, 3, 0, 0]


def test_points_that_are_not_finite_are_left_out() -> None:
    clean = [(0, 2.0), (2, 1.0)]
    dirty = [clean[0], (1, math.nan), (1, math.inf), (math.nan, 1.0), clean[1]]
    assert plot([Series("a", dirty)]) == plot([Series("a", clean)])
    assert plot([Series("a", [(0, math.nan)])]) == [] and plot([]) == []


def test_points_may_come_in_any_order() -> None:
    assert plot([Series("a", [(2, 1.0), (0, 2.0), (1, 3.0)])]) == plot([Series("a", [(0, 2.0), (1, 3.0), (2, 1.0)])])


def test_the_first_series_lies_on_top() -> None:
    same = [(0, 2.0), (2, 1.0)]
    lines = plot([Series("", same, mark="a"), Series("", same, mark="b")], y_label="")
    assert "b" not in "".join(area(lines)) and "".join(area(lines)).count("a") == 2


def test_ascii_only_plots_contain_only_ascii() -> None:
    lines = plot([Series("a", [(0, 2.0), (5, 1.0)]), Series("b", [(0, 1.0), (5, 2.0)], mark="o")], ascii_only=True)
    assert all(line.isascii() for line in lines) and any("." in row for row in area(lines))


@given(first=POINTS, second=POINTS, width=st.integers(30, 200), height=st.integers(3, 30), ascii_only=st.booleans())
def test_any_points_fit_into_the_requested_size(
    first: list[tuple[int, float]], second: list[tuple[int, float]], width: int, height: int, ascii_only: bool
) -> None:
    series = [Series("a", first), Series("b", second, mark="o")]
    lines = plot(series, width=width, height=height, ascii_only=ascii_only)
    assert len(lines) == (height + 3 if first or second else 0)
    assert all(len(line) <= width for line in lines)
    assert bool(second) == ("o" in "".join(area(lines)))
