"""Durations and sizes are read as people type them."""

from __future__ import annotations

import pytest

from runner.common.units import BYTES, SECONDS, parse_quantity


@pytest.mark.parametrize(
    ("text", "units", "default", "value"),
    [
        ("2h", SECONDS, None, 7200),
        ("30", SECONDS, 86_400, 2_592_000),
        ("1.5 GB", BYTES, 1, 1.5e9),
        ("500mb", BYTES, 1, 5e8),
        (".5", {}, 1, 0.5),
        ("1e-3", {}, 1, 0.001),
        ("30", SECONDS, None, None),
        ("2 parsecs", SECONDS, None, None),
        ("3kb", {}, 1, None),
        ("many", BYTES, 1, None),
        ("", BYTES, 1, None),
    ],
)
def test_a_quantity_is_its_number_times_its_unit(text, units, default, value) -> None:
    assert parse_quantity(text, units, default) == value
