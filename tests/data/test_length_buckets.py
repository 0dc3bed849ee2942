"""The widths that batches are padded to: few, enough for every row, and the best there are."""

from __future__ import annotations

import statistics
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.length_buckets import LengthBuckets, minimize_padding
from runner.data.order import BatchOrder


def positions(counts: list[int], widths: tuple[int, ...]) -> int:
    return sum(min(width for width in widths if width >= count) for count in counts)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_no_other_choice_of_as_many_pads_less(counts: list[int], most: int) -> None:
    found = minimize_padding(np.array(counts), most)
    assert list(found) == sorted(set(found)) and len(found) <= most and found[-1] == max(1, *counts)
    top = max(1, *counts)
    others = ((*few, top) for n in range(min(most, top)) for few in combinations(range(1, top), n))
    assert positions(counts, found) == min(positions(counts, other) for other in others)


@given(st.lists(st.integers(2, 100_000), min_size=1, max_size=300), st.integers(1, 200_000))
def test_each_row_fits_and_one_that_is_longer_too(lengths: list[int], count: int) -> None:
    widths = LengthBuckets.of(np.array(lengths), None)
    assert all(length - 1 <= widths.fit(length - 1) <= max(lengths) - 1 for length in lengths)
    assert widths.fit(count) >= count and len(widths.chosen) <= 32
    if count > max(lengths) - 1:
        assert widths.fit(count) - count < 32 and widths.fit(count) % 32 == 0


def test_a_set_without_rows_and_a_multiple_that_is_given() -> None:
    assert LengthBuckets.of(np.zeros(0, np.int64), None).fit(5) == 32
    assert [LengthBuckets.of(np.array([50]), 16).fit(n) for n in (0, 1, 16, 17)] == [16, 16, 16, 32]


@pytest.mark.parametrize(("median", "ninetieth"), [(60, 500), (85, 115)])
def test_of_the_positions_93_in_100_are_real(median: int, ninetieth: int) -> None:
    normal = statistics.NormalDist()
    sigma = np.log(ninetieth / median) / normal.inv_cdf(0.9)
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, 1000)
    lengths = np.clip(drawn.astype(int), 2, 512)
    order, widths = BatchOrder(lengths, 4, 0, 64), LengthBuckets.of(lengths, None)
    batches = [lengths[rows] - 1 for rows in order.epoch(0)]
    real = sum(int(counts.sum()) for counts in batches)
    assert real >= 0.93 * sum(len(counts) * widths.fit(int(counts.max())) for counts in batches)
