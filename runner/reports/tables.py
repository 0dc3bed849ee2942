"""Tables and lines for a person: styled and cut to the width on a terminal, plain aligned text anywhere else.

The layout is a pure function of the cells and the width; rich only colours what a terminal gets.
"""

from __future__ import annotations

import json
import math
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from runner.common.text import single_line

Piece = tuple[str, str]
"""Text and its style (rich's words; empty for none)."""
Line = list[Piece]

STATE_STYLES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "diverged": "red",
    "unknown": "red",
}
_GAP = 2
_LEAST = 16
"""Columns below which a cell that may be cut says too little: it then gets a line of its own."""
_INDENT = 4


@dataclass(frozen=True)
class Column:
    """A column: `right` aligns numbers; where the table does not fit, the one with `cut` is shortened first, then the
    one with `keep_end`, of which the end says most."""

    title: str
    right: bool = False
    cut: bool = False
    keep_end: bool = False


@dataclass
class TableRow:
    """The cells of a row, the styles of some (column to style), and notes that belong below it."""

    cells: list[str]
    styles: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Screen:
    """Where a verb prints: a terminal with a width, or a file or pipe without."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream` is the standard output where it is not given."""
        self._stream = stream or sys.stdout
        self._console: Any = None
        self.width: int | None = None
        """Columns of the terminal; None where there is no terminal, and so nothing to fit into."""
        if self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
            self.width = max(20, self._console.width)
        encoding = getattr(self._stream, "encoding", None) or "ascii"
        self.draws_braille = _can_encode("⠿", encoding)
        if not self.draws_braille and hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def line(self, *pieces: Piece | str) -> None:
        """One line, of texts with or without a style; what could steer a terminal is taken out."""
        styled = [(piece, "") if isinstance(piece, str) else piece for piece in pieces]
        if self._console is None:
            print("".join(single_line(text) for text, _ in styled).rstrip(), file=self._stream)
            return
        from rich.text import Text

        self._console.print(Text.assemble(*[(single_line(text), style) for text, style in styled]))

    def lines(self, lines: Sequence[Line]) -> None:
        """Several lines."""
        for line in lines:
            self.line(*line)

    def fit(self, text: str) -> str:
        """`text` cut to the terminal's width, whole elsewhere."""
        return text if self.width is None else cut(single_line(text), self.width)


def table(columns: Sequence[Column], rows: Sequence[TableRow], width: int | None) -> list[Line]:
    """The lines of a table, its titles first; none is longer than `width` as far as only cells are cut that may be.

    Where little is left for the column with `cut`, its text goes on a line below the row. Without a width nothing is
    cut and a row is one line, with its notes at the end.
    """
    cells = [[single_line(cell) for cell in row.cells] for row in rows]
    widths = natural_widths(columns, cells)
    shown = list(range(len(columns)))
    moved = None
    flexible = next((i for i, column in enumerate(columns) if column.cut), None)
    if width is not None and flexible is not None and _total(widths, shown) > width:
        left = width - (_total(widths, shown) - widths[flexible])
        if left >= min(_LEAST, widths[flexible]):
            widths[flexible] = left
        else:
            moved = flexible
            shown.remove(flexible)
    path = next((i for i, column in enumerate(columns) if column.keep_end), None)
    if width is not None and path is not None:
        widths[path] = max(min(widths[path], _LEAST), widths[path] - max(0, _total(widths, shown) - width))
    out = [_line(columns, [column.title for column in columns], widths, shown, dict.fromkeys(shown, "bold"))]
    for row, texts in zip(rows, cells, strict=True):
        line = _line(columns, texts, widths, shown, row.styles)
        if width is None:
            out.append([*line, *[(f"{' ' * _GAP}{single_line(note)}", "") for note in row.notes]])
            continue
        out.append(line)
        below = ([texts[moved]] if moved is not None and texts[moved] else []) + [single_line(n) for n in row.notes]
        out += [[(" " * _INDENT + cut(text, width - _INDENT), "dim")] for text in below]
    return out


def natural_widths(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[int]:
    """What each column needs where nothing is cut."""
    return [max(columns_of(c.title), *(columns_of(row[i]) for row in cells), 0) for i, c in enumerate(columns)]


def columns_of(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_columns_of_character(character) for character in text)


def cut(text: str, width: int) -> str:
    """`text` in at most `width` columns, with … where something was cut."""
    if columns_of(text) <= width:
        return text
    kept, used = [], 1
    for character in text:
        used += _columns_of_character(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept).rstrip() + "…" if width > 0 else ""


def cut_start(text: str, width: int) -> str:
    """The end of `text` in at most `width` columns, after … where something was cut."""
    return cut(text[::-1], width)[::-1]


def document(data: Any) -> str:
    """`data` as one JSON document; what JSON has no number for is null, what it has no type for is text."""
    return json.dumps(_plain(data), indent=1, allow_nan=False)


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if data is None or isinstance(data, (str, int)):
        return data
    return os.fspath(data) if isinstance(data, os.PathLike) else str(data)


def _line(
    columns: Sequence[Column],
    texts: Sequence[str],
    widths: Sequence[int],
    shown: Sequence[int],
    styles: Mapping[int, str],
) -> Line:
    line: Line = []
    for i in shown:
        text = (cut_start if columns[i].keep_end else cut)(texts[i], widths[i])
        space = " " * (widths[i] - columns_of(text))
        last = i == shown[-1]
        text = space + text if columns[i].right else text + ("" if last else space)
        line.append((text, styles.get(i, "")))
        if not last:
            line.append((" " * _GAP, ""))
    return line


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + _GAP * (len(shown) - 1)


def _columns_of_character(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
