"""Tables as lines of text: aligned, and fitted to the width of a terminal.

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
"""The least width of a path that is cut, and of a text that is wrapped inside its column."""
_INDENT = 4
_MAX_LINES = 12
"""Lines that a wrapped cell takes at most; the end of a longer one is cut."""


@dataclass(frozen=True)
class Column:
    """A column of a table. If the table is too wide, the `wrap` column takes several lines; if that is not enough, the
    `keep_end` one is cut."""

    title: str
    right: bool = False
    """Whether the cells are aligned to the right, as numbers are."""
    wrap: bool = False
    keep_end: bool = False
    """Whether the end of a cell says more than its start, as with paths."""


@dataclass
class TableRow:
    """The cells of a row, the styles of some columns by index, and notes printed below the row."""

    cells: list[str]
    styles: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def table(columns: Sequence[Column], rows: Sequence[TableRow], width: int | None) -> list[Line]:
    """Return the lines of a table, titles first, none longer than `width`. Only `keep_end` columns and notes are cut.

    The cells of the `wrap` column take several lines where they are too long: in their column, or below their row where
    that takes fewer lines. Without a width a row with its notes is one line.
    """
    cells = [[single_line(cell) for cell in row.cells] for row in rows]
    widths = column_widths(columns, cells)
    visible = list(range(len(columns)))
    wrapped = next((i for i, column in enumerate(columns) if column.wrap), None)
    below: list[list[str]] = [[] for _ in rows]
    if width is not None and wrapped is not None and _total(widths, visible) > width:
        texts = [row[wrapped] for row in cells]
        left = width - (_total(widths, visible) - widths[wrapped])
        if display_width(columns[wrapped].title) <= left and _is_better_in_column(texts, left, width):
            widths[wrapped] = left
        else:
            below = [wrap(text, width - _INDENT) if text else [] for text in texts]
            visible.remove(wrapped)
    path = next((i for i, column in enumerate(columns) if column.keep_end), None)
    if width is not None and path is not None:
        excess = max(0, _total(widths, visible) - width)
        widths[path] = max(min(widths[path], _MIN_WIDTH), widths[path] - excess)
    titles = [column.title for column in columns]
    lines = [_line(columns, titles, widths, visible, dict.fromkeys(visible, "bold"))]
    for row, texts, moved in zip(rows, cells, below, strict=True):
        notes = [single_line(note) for note in row.notes]
        if width is None:
            line = _line(columns, texts, widths, visible, row.styles)
            lines.append([*line, *[(f"{' ' * _GAP}{note}", "") for note in notes]])
            continue
        for part in _wrapped_row(texts, wrapped if wrapped in visible else None, widths):
            lines.append(_line(columns, part, widths, visible, row.styles))
        lines += [[(" " * _INDENT + text, "dim")] for text in moved]
        lines += [[(" " * _INDENT + cut(note, width - _INDENT), "dim")] for note in notes]
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


def wrap(text: str, width: int) -> list[str]:
    """Return `text` as lines of at most `width` columns, broken at blanks, or inside a word that is wider than a line.

    The end of a text of more than 12 lines is replaced by ….
    """
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if display_width(joined) <= width:
            lines[-1] = joined
            continue
        lines += [] if not lines[-1] else [""]
        while display_width(word) > width and (part := _start_of(word, width)):
            lines[-1:] = [part, ""]
            word = word[len(part) :]
        lines[-1] = word if display_width(word) <= width else ""
    lines = [line for line in lines if line] or [""]
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], cut(f"{lines[_MAX_LINES - 1]}…", width)]
    return lines


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, its end replaced by … where it is longer."""
    if display_width(text) <= width:
        return text
    return _start_of(text, width - 1).rstrip() + "…" if width > 0 else ""


def cut_start(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, its start replaced by … where it is longer."""
    return cut(text[::-1], width)[::-1]


def _is_better_in_column(texts: Sequence[str], left: int, width: int) -> bool:
    """Return whether the texts, wrapped to the `left` columns beside their rows, take no more lines than below them."""
    words = (word for text in texts for word in text.split(" "))
    if left < _MIN_WIDTH or max(map(display_width, words), default=0) > left:
        return False
    beside = sum(len(wrap(text, left)) for text in texts)
    return beside <= len(texts) + sum(len(wrap(text, width - _INDENT)) for text in texts if text)


def _wrapped_row(cells: Sequence[str], wrapped: int | None, widths: Sequence[int]) -> list[list[str]]:
    """Return the cells of the lines that a row takes."""
    if wrapped is None:
        return [list(cells)]
    first, *rest = wrap(cells[wrapped], widths[wrapped])
    lines = [[*cells[:wrapped], first, *cells[wrapped + 1 :]]]
    return lines + [["" if i != wrapped else text for i in range(len(cells))] for text in rest]


def _start_of(text: str, width: int) -> str:
    """Return as much of the start of `text` as `width` columns hold."""
    end = used = 0
    for end, character in enumerate(text):
        used += _character_width(character)
        if used > width:
            return text[:end]
    return text


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
