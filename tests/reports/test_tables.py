"""Tables are aligned and within the width, one line a row without a terminal, and cannot control a terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runner.reports.screen import Screen, json_document
from runner.reports.tables import Column, TableRow, cut, display_width, table, wrap

COLUMNS = [Column("run"), Column("step", right=True), Column("settings", wrap=True)]


def text(columns: list[Column], rows: list[TableRow], width: int | None) -> list[str]:
    """The table's lines as plain text."""
    return ["".join(piece for piece, _ in line).rstrip() for line in table(columns, rows, width)]


def test_columns_are_aligned_and_nothing_is_cut_without_a_width() -> None:
    rows = [TableRow(["a", "1", "rank=8 " * 30]), TableRow(["bcd", "1000", "x"], notes=["failed: why"])]
    assert text(COLUMNS, rows, None) == [
        "run  step  settings",
        f"a       1  {('rank=8 ' * 30).rstrip()}",
        "bcd  1000  x  failed: why",
    ]


def test_the_text_of_the_flexible_column_is_wrapped_inside_its_column() -> None:
    lines = text(
        COLUMNS, [TableRow(["a", "1", "rank=16 learning_rate=0.0001 dropout=0.1"]), TableRow(["b", "2", ""])], 40
    )
    assert lines == [
        "run  step  settings",
        "a       1  rank=16 learning_rate=0.0001",
        "           dropout=0.1",
        "b       2",
    ]


def test_a_very_long_text_ends_after_twelve_lines() -> None:
    lines = text(COLUMNS, [TableRow(["a", "1", "rank=16 " * 300])], 40)
    assert len(lines) == 13 and lines[-1].endswith("…") and not any("…" in line for line in lines[:-1])


def test_the_flexible_column_goes_below_its_row_where_too_little_width_is_left() -> None:
    lines = text(COLUMNS, [TableRow(["a" * 30, "1", "rank=8 num_layers=16 dropout=0.1"], notes=["failed: why"])], 44)
    assert lines == [
        f"{'run':<30}  step",
        f"{'a' * 30}     1",
        "    rank=8 num_layers=16 dropout=0.1",
        "    failed: why",
    ]


def test_a_path_is_cut_at_its_start() -> None:
    columns = [Column("run", keep_end=True), Column("step", right=True), Column("settings", wrap=True)]
    lines = text(columns, [TableRow(["sweeps/2026-11-24/10-00-00", "1000/1000", ""])], 30)
    assert lines[1] == "…026-11-24/10-00-00  1000/1000"


@given(
    cells=st.lists(st.tuples(st.text(max_size=12), st.text(max_size=5), st.text(max_size=200)), max_size=5),
    notes=st.lists(st.text(max_size=200), max_size=2),
    width=st.integers(60, 160),
)
def test_no_line_is_wider_than_the_terminal(cells: list[tuple[str, str, str]], notes: list[str], width: int) -> None:
    lines = table(COLUMNS, [TableRow(list(row), notes=notes) for row in cells], width)
    for line in lines:
        whole = "".join(piece for piece, _ in line)
        assert display_width(whole) <= width and whole.isprintable()


@given(content=st.text(max_size=50), width=st.integers(0, 60))
def test_cut_text_fits(content: str, width: int) -> None:
    assert display_width(cut(content, width)) <= width
    if display_width(content) <= width:
        assert cut(content, width) == content


@given(words=st.lists(st.text(st.characters(exclude_characters=" "), min_size=1, max_size=30), max_size=8))
def test_wrapped_text_fits_and_nothing_of_it_is_lost(words: list[str]) -> None:
    lines = wrap(" ".join(words), 24)
    assert all(display_width(line) <= 24 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(words) or len(lines) == 12


def test_wide_characters_count_as_two_columns() -> None:
    assert display_width("模型") == 4 and display_width("é") == 1
    rows = [TableRow(["模型", "1", ""]), TableRow(["abcd", "1", ""])]
    assert [display_width(line) for line in text(COLUMNS, rows, None)][1:] == [10, 10]


def test_printed_text_cannot_control_the_terminal() -> None:
    out = io.StringIO()
    Screen(out).line("a\x1b[31m\r\nb", ("\x07", "red"))
    assert out.getvalue() == "a·[31m· b·\n"


def test_a_json_document_is_valid_for_any_values() -> None:
    data = {"a": math.nan, "b": [math.inf, 1.5, True, None], "c": Path("x/y"), 3: {"d": {1, 2}.__class__}}
    read = json.loads(json_document(data))
    assert read["a"] is None and read["b"] == [None, 1.5, True, None] and read["c"] == "x/y" and "3" in read
    assert "\x1b" not in json_document({"a": "\x1b[31m"})
