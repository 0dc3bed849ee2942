"""Long curves are thinned out without losing a peak."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runner.reports.html.downsample import rounded, thinned

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=300)


@given(VALUES, st.integers(4, 40))
def test_the_ends_and_the_extremes_stay_and_no_more_than_the_limit(values: list[float | None], limit: int) -> None:
    kept = thinned(values, limit)
    assert kept == sorted(set(kept)) and len(kept) <= max(limit, 0)
    present = [value for value in values if value is not None]
    if values:
        assert kept[0] == 0 and kept[-1] == len(values) - 1
    if present:
        shown = [value for i in kept if (value := values[i]) is not None]
        assert min(shown) == min(present) and max(shown) == max(present)


def test_numbers_are_short() -> None:
    assert [rounded(value) for value in (1.23456789, 12345678, 0.5, None)] == [1.23457, 12345678, 0.5, None]
    assert rounded(float("nan")) is None
