"""Loss curves drawn as lines of text, in braille (two by four dots a character) or ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_SCALE_FACTOR = 10.0
"""A loss that falls by this factor or more is drawn on a logarithmic axis."""
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""

Point = tuple[float, float]
Segment = tuple[str, int | None]
"""Text, and the index of the series that it shows."""


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y) in any order, and the character that marks each point; without one, only the line."""

    name: str
    points: Sequence[Point]
    mark: str = ""


def plot(
    series: Sequence[Series],
    *,
    width: int = 72,
    height: int = 12,
    y_label: str = "loss",
    x_label: str = "step",
    ascii_only: bool = False,
) -> list[list[Segment]]:
    """Return the curves as lines of segments, none longer than `width`: a legend, `height` lines of plot, the x axis.

    Points that are not finite are left out; without any point there are no lines. Marks lie on top of lines, earlier
    series on top of later ones. The y axis is logarithmic where all values are positive and the largest is at least
    ten times the smallest.
    """
    finite = [sorted(p for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])) for s in series]
    points = [point for curve in finite for point in curve]
    if not points:
        return []
    height = max(3, height)
    x_axis = _Axis(min(x for x, _ in points), max(x for x, _ in points))
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    y_axis = _Axis(lowest, highest, log=lowest > 0 and highest / lowest >= LOG_SCALE_FACTOR)
    middle = height // 2
    labels = {middle: format_number(y_axis.value(1 - middle / (height - 1)))}
    if lowest < highest:
        labels |= {0: format_number(highest), height - 1: format_number(lowest)}
    margin = max(len(text) for text in labels.values())
    columns = max(8, width - margin - 2)
    canvas = _Canvas(columns, height, ascii_only)
    for index in reversed(range(len(series))):
        curve = [(x_axis.fraction(x), y_axis.fraction(y)) for x, y in finite[index]]
        canvas.draw(index, curve, series[index].mark)
    vertical, tick, corner, horizontal = "|++-" if ascii_only else "│┤└─"
    y_title = y_label + (", log scale" if y_axis.log else "")
    lines = [_legend(series, finite, y_title, margin, width, ascii_only)]
    for row in range(height):
        label = labels.get(row, "")
        lines.append([(f"{label:>{margin}} {tick if label else vertical}", None), *canvas.row(row)])
    lines.append([(" " * (margin + 1) + corner + horizontal * columns, None)])
    lines.append([(" " * (margin + 2) + _x_labels(x_axis, x_label, columns), None)])
    return lines


def format_number(value: float) -> str:
    """Format a number in few characters: ``0.688``, ``12.5``, ``1,200``, ``3e-05``."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


class _Axis:
    """Maps values to fractions of an axis, 0 to 1, and back."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.low, self.high, self.log = low, high, log
        self._start, self._end = (math.log(low), math.log(high)) if log else (low, high)

    def fraction(self, value: float) -> float:
        if self._start == self._end:
            return 0.5
        position = math.log(value) if self.log else value
        # Halved first: the difference of two huge numbers may not be finite.
        return (position / 2 - self._start / 2) / (self._end / 2 - self._start / 2)

    def value(self, fraction: float) -> float:
        position = self._start * (1 - fraction) + self._end * fraction
        return math.exp(position) if self.log else position


class _Canvas:
    """A grid of characters made of dots; each character belongs to the series that drew into it last."""

    def __init__(self, columns: int, rows: int, ascii_only: bool) -> None:
        self._columns, self._rows = columns, rows
        self._ascii = ascii_only
        self._dots_across, self._dots_down = (1, 1) if ascii_only else (2, 4)
        self._dots: dict[tuple[int, int], int] = {}
        self._owner: dict[tuple[int, int], int] = {}
        self._marks: dict[tuple[int, int], Segment] = {}

    def draw(self, index: int, points: Sequence[Point], mark: str) -> None:
        """Draw the line through `points`, given as fractions of the axes, and mark them."""
        x_max, y_max = self._columns * self._dots_across - 1, self._rows * self._dots_down - 1
        dots = [(round(x * x_max), round((1 - y) * y_max)) for x, y in points]
        for start, end in zip(dots[:1] + dots, dots, strict=False):
            for x, y in _line(start, end):
                cell = (x // self._dots_across, y // self._dots_down)
                bit = 1 if self._ascii else _BRAILLE[y % 4][x % 2]
                self._dots[cell] = self._dots.get(cell, 0) | bit
                self._owner[cell] = index
        for x, y in dots if mark else []:
            self._marks[(x // self._dots_across, y // self._dots_down)] = (mark, index)

    def row(self, row: int) -> list[Segment]:
        """Return one line, counted from the top; neighbouring characters of one series are one segment."""
        segments: list[Segment] = []
        for column in range(self._columns):
            cell = (column, row)
            text, owner = self._marks.get(cell) or (self._character(cell), self._owner.get(cell))
            if segments and segments[-1][1] == owner:
                segments[-1] = (segments[-1][0] + text, owner)
            else:
                segments.append((text, owner))
        return segments

    def _character(self, cell: tuple[int, int]) -> str:
        bits = self._dots.get(cell, 0)
        if self._ascii:
            return "." if bits else " "
        return chr(0x2800 + bits) if bits else " "


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of a straight line, both ends included."""
    (x, y), (x_end, y_end) = start, end
    count = max(abs(x_end - x), abs(y_end - y))
    if count == 0:
        return [start]
    return [(x + round((x_end - x) * i / count), y + round((y_end - y) * i / count)) for i in range(count + 1)]


def _legend(
    series: Sequence[Series],
    finite: Sequence[Sequence[Point]],
    y_title: str,
    margin: int,
    width: int,
    ascii_only: bool,
) -> list[Segment]:
    """Return the title of the y axis and the names of the series, as many as fit."""
    segments: list[Segment] = [(f"{'':>{margin}}  {y_title}:"[:width], None)]
    used = len(segments[0][0])
    for index, (curve, points) in enumerate(zip(series, finite, strict=True)):
        text = f"{curve.mark or ('.' if ascii_only else '⠤⠤')} {curve.name}"
        used += 2 + len(text)
        if points and used <= width:
            segments += [("  ", None), (text, index)]
    return segments


def _x_labels(axis: _Axis, title: str, columns: int) -> str:
    """Return the line below the x axis: its ends, and its title between them."""
    low, high = format_number(axis.low), format_number(axis.high)
    if axis.low == axis.high:
        return f"{title} {low}".center(columns).rstrip()
    space = columns - len(low) - len(high)
    return f"{low}{title:^{space}}{high}" if space > len(title) else f"{low} {high}"
