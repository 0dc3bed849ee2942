"""Tables as lines of text: aligned, and cut to the width of a terminal.

The layout is a pure function of the cells and the width; `screen` prints the lines.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runner.common.text import single_line

Segment = tuple[str, str]
"""Text and its style, as rich names styles; an empty style is none."""
Line = list[Segment]

_GAP = 2
"""Spaces between two columns."""
_MIN_WIDTH = 16
"""A cell that would be cut below this width gets a line of its own."""
_INDENT = 4


@dataclass(frozen=True)
class Column:
    """A column of a table. If the table is too wide, the `cut` column is shortened first, then the `keep_end` one."""

    title: str
    right: bool = False
    """Whether the cells are aligned to the right, as numbers are."""
    cut: bool = False
    keep_end: bool = False
    """Whether the end of a cell says more than its start, as with paths."""


@dataclass
class TableRow:
    """The cells of a row, the styles of some columns by index, and notes printed below the row."""

    cells: list[str]
    styles: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def table(columns: Sequence[Column], rows: Sequence[TableRow], width: int | None) -> list[Line]:
    """Return the lines of a table, titles first. Only cells of `cut` and `keep_end` columns are shortened to `width`.

    Where little is left for the `cut` column, its text goes on a line below the row. Without a width nothing is cut,
    and a row with its notes is one line.
    """
    cells = [[single_line(cell) for cell in row.cells] for row in rows]
    widths = column_widths(columns, cells)
    visible = list(range(len(columns)))
    moved = None
    flexible = next((i for i, column in enumerate(columns) if column.cut), None)
    if width is not None and flexible is not None and _total(widths, visible) > width:
        left = width - (_total(widths, visible) - widths[flexible])
        if left >= min(_MIN_WIDTH, widths[flexible]):
            widths[flexible] = left
        else:
            moved = flexible
            visible.remove(flexible)
    path = next((i for i, column in enumerate(columns) if column.keep_end), None)
    if width is not None and path is not None:
        excess = max(0, _total(widths, visible) - width)
        widths[path] = max(min(widths[path], _MIN_WIDTH), widths[path] - excess)
    titles = [column.title for column in columns]
    lines = [_line(columns, titles, widths, visible, dict.fromkeys(visible, "bold"))]
    for row, texts in zip(rows, cells, strict=True):
        line = _line(columns, texts, widths, visible, row.styles)
        notes = [single_line(note) for note in row.notes]
        if width is None:
            lines.append([*line, *[(f"{' ' * _GAP}{note}", "") for note in notes]])
            continue
        lines.append(line)
        below = ([texts[moved]] if moved is not None and texts[moved] else []) + notes
        lines += [[(" " * _INDENT + cut(text, width - _INDENT), "dim")] for text in below]
    return lines


def column_widths(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the width that each column needs to show every cell whole."""
    return [
        max(display_width(column.title), *(display_width(row[i]) for row in cells), 0)
        for i, column in enumerate(columns)
    ]


def table_width(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> int:
    """Return the width of a table in which every cell is whole."""
    return _total(column_widths(columns, cells), range(len(columns)))


def display_width(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, its end replaced by … where it is longer."""
    if display_width(text) <= width:
        return text
    characters, used = [], 1
    for character in text:
        used += _character_width(character)
        if used > width:
            break
        characters.append(character)
    return "".join(characters).rstrip() + "…" if width > 0 else ""


def cut_start(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, its start replaced by … where it is longer."""
    return cut(text[::-1], width)[::-1]


def _line(
    columns: Sequence[Column],
    texts: Sequence[str],
    widths: Sequence[int],
    visible: Sequence[int],
    styles: Mapping[int, str],
) -> Line:
    line: Line = []
    for i in visible:
        text = (cut_start if columns[i].keep_end else cut)(texts[i], widths[i])
        padding = " " * (widths[i] - display_width(text))
        last = i == visible[-1]
        text = padding + text if columns[i].right else text + ("" if last else padding)
        line.append((text, styles.get(i, "")))
        if not last:
            line.append((" " * _GAP, ""))
    return line


def _total(widths: Sequence[int], visible: Sequence[int]) -> int:
    return sum(widths[i] for i in visible) + _GAP * (len(visible) - 1)


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
