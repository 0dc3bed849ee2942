"""The settings by which the rows of a table differ: a column each where these fit, else one for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from runner.common.text import single_line
from runner.reports import settings_text
from runner.reports.tables import Column, TableRow, table_width
from runner.runs.inspect import RunInfo

TITLE = "settings that differ"


def with_settings(
    columns: Sequence[Column],
    rows: Sequence[TableRow],
    runs: Sequence[RunInfo],
    names: Sequence[str],
    width: int | None,
) -> list[Column]:
    """Append the settings `names` of each run to its row, and return the columns with theirs.

    They have a column each, with whole names or else short ones, where the table then is no wider than `width`.
    """
    if not names:
        return list(columns)
    texts = [settings_text.texts_of(name, [run.settings.get(name) for run in runs]) for name in names]
    wide = [[*row.cells, *values] for row, values in zip(rows, zip(*texts, strict=True), strict=True)]
    printed = [[single_line(cell) for cell in cells] for cells in wide]
    for titles in (names, list(settings_text.short_names(names).values())):
        titled = [*columns, *[Column(title, right=True) for title in titles]]
        if width is None or table_width(titled, printed) <= width:
            for row, cells in zip(rows, wide, strict=True):
                row.cells = cells
            return titled
    for row, text in zip(rows, settings_text.pairs([[run] for run in runs], names), strict=True):
        row.cells.append(text)
    return [*columns, Column(TITLE, wrap=True)]
