"""Curves in a terminal: from points to lines of text, in braille (two by four dots a character) or ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LOG_FROM = 10.0
"""A loss that falls by this factor or more is drawn on a logarithmic axis."""
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""

Point = tuple[float, float]
Piece = tuple[str, int | None]
"""Text, and the index of the series that it shows."""


@dataclass(frozen=True)
class Series:
    """A curve: its points (x, y) in any order, and the character that marks each point; without one only the line."""

    name: str
    points: Sequence[Point]
    mark: str = ""


def plot(
    series: Sequence[Series],
    *,
    width: int = 72,
    height: int = 12,
    x_label: str = "step",
    y_label: str = "loss",
    ascii_only: bool = False,
) -> list[str]:
    """The curves as lines of text; see `draw`."""
    lines = draw(series, width=width, height=height, x_label=x_label, y_label=y_label, ascii_only=ascii_only)
    return ["".join(text for text, _ in line).rstrip() for line in lines]


def draw(
    series: Sequence[Series],
    *,
    width: int = 72,
    height: int = 12,
    x_label: str = "step",
    y_label: str = "loss",
    ascii_only: bool = False,
) -> list[list[Piece]]:
    """The curves as lines of pieces, none longer than `width`: a legend, `height` lines of plot, and the x axis.

    Points that are not finite are left out; without any point there are no lines. Marks lie on top of
    lines, earlier series on top of later ones. The y axis
    is logarithmic where all values are positive and the largest is ten times the smallest.
    """
    clean = [sorted(p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])) for one in series]
    points = [point for one in clean for point in one]
    if not points:
        return []
    height = max(3, height)
    across = _Axis(min(x for x, _ in points), max(x for x, _ in points))
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    up = _Axis(lowest, highest, log=lowest > 0 and highest / lowest >= _LOG_FROM)
    middle = height // 2
    labels = {middle: number(up.at(1 - middle / (height - 1)))}
    if lowest < highest:
        labels |= {0: number(highest), height - 1: number(lowest)}
    margin = max(len(text) for text in labels.values())
    columns = max(8, width - margin - 2)
    canvas = _Canvas(columns, height, ascii_only)
    for index in reversed(range(len(series))):
        canvas.curve(index, [(across.share(x), up.share(y)) for x, y in clean[index]], series[index].mark)
    wall, tick, corner, floor = "|++-" if ascii_only else "│┤└─"
    lines = [_legend(series, clean, y_label + (", log scale" if up.log else ""), margin, width, ascii_only)]
    for row in range(height):
        label = labels.get(row, "")
        lines.append([(f"{label:>{margin}} {tick if label else wall}", None), *canvas.row(row)])
    lines.append([(" " * (margin + 1) + corner + floor * columns, None)])
    lines.append([(" " * (margin + 2) + _below(across, columns, x_label), None)])
    return lines


def number(value: float) -> str:
    """A number in few characters: ``0.688``, ``12.5``, ``1,200``, ``3e-05``."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


class _Axis:
    """From values to shares of an axis, 0 to 1, and back."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.low, self.high, self.log = low, high, log
        self._from, self._to = (math.log(low), math.log(high)) if log else (low, high)

    def share(self, value: float) -> float:
        if self._from == self._to:
            return 0.5
        place = math.log(value) if self.log else value
        # Halves first: the difference of two huge numbers may not be finite.
        return (place / 2 - self._from / 2) / (self._to / 2 - self._from / 2)

    def at(self, share: float) -> float:
        place = self._from * (1 - share) + self._to * share
        return math.exp(place) if self.log else place


class _Canvas:
    """Characters of dots, each of which belongs to the series that drew into it last."""

    def __init__(self, columns: int, rows: int, ascii_only: bool) -> None:
        self._columns, self._rows = columns, rows
        self._ascii = ascii_only
        self._per_column, self._per_row = (1, 1) if ascii_only else (2, 4)
        self._dots: dict[tuple[int, int], int] = {}
        self._owner: dict[tuple[int, int], int] = {}
        self._marks: dict[tuple[int, int], Piece] = {}

    def curve(self, index: int, points: Sequence[Point], mark: str) -> None:
        """Draw the line through `points`, given in shares of the axes, and mark them."""
        wide, high = self._columns * self._per_column - 1, self._rows * self._per_row - 1
        dots = [(round(x * wide), round((1 - y) * high)) for x, y in points]
        before = dots[:1]
        for dot in dots:
            for x, y in _straight(before[0], dot):
                cell = (x // self._per_column, y // self._per_row)
                bit = 1 if self._ascii else _BRAILLE[y % 4][x % 2]
                self._dots[cell] = self._dots.get(cell, 0) | bit
                self._owner[cell] = index
            before = [dot]
        for x, y in dots if mark else []:
            self._marks[(x // self._per_column, y // self._per_row)] = (mark, index)

    def row(self, row: int) -> list[Piece]:
        """One line of it, from top to bottom; neighbours of one series are one piece."""
        pieces: list[Piece] = []
        for column in range(self._columns):
            cell = (column, row)
            text, owner = self._marks.get(cell) or (self._character(cell), self._owner.get(cell))
            if pieces and pieces[-1][1] == owner:
                pieces[-1] = (pieces[-1][0] + text, owner)
            else:
                pieces.append((text, owner))
        return pieces

    def _character(self, cell: tuple[int, int]) -> str:
        bits = self._dots.get(cell, 0)
        if self._ascii:
            return "." if bits else " "
        return chr(0x2800 + bits) if bits else " "


def _straight(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line, both ends included."""
    (x, y), (x_end, y_end) = start, end
    count = max(abs(x_end - x), abs(y_end - y))
    if count == 0:
        return [start]
    return [(x + round((x_end - x) * i / count), y + round((y_end - y) * i / count)) for i in range(count + 1)]


def _legend(
    series: Sequence[Series],
    clean: Sequence[Sequence[Point]],
    y_label: str,
    margin: int,
    width: int,
    ascii_only: bool,
) -> list[Piece]:
    """The y axis's name and the series, as many as fit."""
    pieces: list[Piece] = [(f"{'':>{margin}}  {y_label}:"[:width], None)]
    used = len(pieces[0][0])
    for index, (one, known) in enumerate(zip(series, clean, strict=True)):
        text = f"{one.mark or ('.' if ascii_only else '⠤⠤')} {one.name}"
        used += 2 + len(text)
        if known and used <= width:
            pieces += [("  ", None), (text, index)]
    return pieces


def _below(axis: _Axis, columns: int, label: str) -> str:
    """What stands below the x axis: its ends, and its name between them."""
    low, high = number(axis.low), number(axis.high)
    if axis.low == axis.high:
        return f"{label} {low}".center(columns).rstrip()
    space = columns - len(low) - len(high)
    return f"{low}{label:^{space}}{high}" if space > len(label) + 1 else f"{low} {high}"
