"""The lengths that batches are padded to: few, sufficient for every row, and optimal."""

from __future__ import annotations

import statistics
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.length_buckets import LengthBuckets, minimize_padding
from runner.data.order import BatchOrder, DataPosition


def positions(counts: list[int], padded: tuple[int, ...]) -> int:
    return sum(min(length for length in padded if length >= count) for count in counts)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_no_other_set_of_as_many_lengths_pads_less(counts: list[int], max_buckets: int) -> None:
    padded = minimize_padding(np.array(counts), max_buckets)
    assert list(padded) == sorted(set(padded)) and len(padded) <= max_buckets and padded[-1] == max(1, *counts)
    top = max(1, *counts)
    others = ((*few, top) for n in range(min(max_buckets, top)) for few in combinations(range(1, top), n))
    assert positions(counts, padded) == min(positions(counts, other) for other in others)


@given(st.lists(st.integers(2, 100_000), min_size=1, max_size=300), st.integers(1, 200_000))
def test_every_row_fits_and_so_does_a_longer_one(lengths: list[int], count: int) -> None:
    buckets = LengthBuckets.from_lengths(np.array(lengths), None)
    assert all(length - 1 <= buckets.padded_length(length - 1) <= max(lengths) - 1 for length in lengths)
    assert buckets.padded_length(count) >= count and len(buckets.lengths) <= 32
    if count > max(lengths) - 1:
        assert buckets.padded_length(count) - count < 32 and buckets.padded_length(count) % 32 == 0


def test_an_empty_split_and_a_configured_multiple_use_multiples() -> None:
    assert LengthBuckets.from_lengths(np.zeros(0, np.int64), None).padded_length(5) == 32
    assert [LengthBuckets.from_lengths(np.array([50]), 16).padded_length(n) for n in (0, 1, 16, 17)] == [16, 16, 16, 32]


@pytest.mark.parametrize(("median", "ninetieth"), [(60, 500), (85, 115)])
def test_at_least_93_percent_of_the_positions_hold_a_token(median: int, ninetieth: int) -> None:
    normal = statistics.NormalDist()
    sigma = np.log(ninetieth / median) / normal.inv_cdf(0.9)
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, 1000)
    lengths = np.clip(drawn.astype(int), 2, 512)
    order, buckets = BatchOrder(lengths, 4, 0, 64), LengthBuckets.from_lengths(lengths, None)
    batches = [lengths[rows] - 1 for rows in order.next_batches(DataPosition(0), order.batches_per_epoch)[0]]
    real = sum(int(counts.sum()) for counts in batches)
    assert real >= 0.93 * sum(len(counts) * buckets.padded_length(int(counts.max())) for counts in batches)
