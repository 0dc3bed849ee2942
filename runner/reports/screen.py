"""Output of a command: styled on a terminal, plain text in a file or pipe, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from runner.common import safe_json
from runner.common.text import single_line
from runner.reports import tables
from runner.reports.tables import Column, Segment, TableRow


class Screen:
    """Where a command prints: a terminal with a width, or a file or pipe without one."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream` defaults to the standard output."""
        self._stream = stream or sys.stdout
        self._console: Any = None
        self.width: int | None = None
        """Columns of the terminal; None where the stream is no terminal."""
        if self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
            self.width = max(20, self._console.width)
        encoding = getattr(self._stream, "encoding", None) or "ascii"
        self.draws_braille = _can_encode("⠿", encoding)
        if not self.draws_braille and hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def line(self, *parts: Segment | str) -> None:
        """Print one line of texts with or without a style; control characters are replaced."""
        segments = [(part, "") if isinstance(part, str) else part for part in parts]
        if self._console is None:
            print("".join(single_line(text) for text, _ in segments).rstrip(), file=self._stream)
            return
        from rich.text import Text

        self._console.print(Text.assemble(*[(single_line(text), style) for text, style in segments]))

    def heading(self, text: str) -> None:
        """Print the title of a section, with a blank line above it."""
        self.line("")
        self.line((text, "bold"))

    def table(self, columns: Sequence[Column], rows: Sequence[TableRow]) -> None:
        """Print a table, fitted to the width of the terminal: see `tables.table`."""
        for line in tables.table(columns, rows, self.width):
            self.line(*line)


def json_document(data: Any) -> str:
    """Return `data` as one JSON document, converted by `safe_json.to_json_values`."""
    return json.dumps(safe_json.to_json_values(data), indent=1, allow_nan=False)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
