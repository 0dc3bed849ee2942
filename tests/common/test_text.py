"""Text that is printed cannot control the terminal, and paths can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.common.text import format_duration, printable, shell_path, shorten, single_line

HOSTILE = "a\x1b]0;title\x07b\x9b31mc\u202ed\ne"


@given(st.text(max_size=300))
def test_no_function_lets_a_control_character_through(text: str) -> None:
    assert printable(text).replace("\n", "").isprintable()
    assert single_line(text).isprintable()
    assert shorten(text).isprintable() and len(shorten(text)) <= 200


def test_line_breaks_stay_a_space_or_a_dot() -> None:
    assert printable(HOSTILE) == "a·]0;title·b·31mc·d\ne"
    assert single_line(HOSTILE) == "a·]0;title·b·31mc·d e"
    assert shorten(HOSTILE) == "a·]0;title·b·31mc·d·e"


def test_a_path_below_the_working_directory_is_relative_and_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shell_path(tmp_path / "outputs/run") == "outputs/run"
    assert shlex.split(shell_path(tmp_path / "a b's")) == ["a b's"]
    assert shell_path(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")


def test_durations_have_two_units_at_most() -> None:
    assert [format_duration(seconds) for seconds in (44.6, 200, 7500)] == ["45s", "3m20s", "2h05m"]
