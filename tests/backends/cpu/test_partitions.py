"""The division of work among threads, and the addresses of arrays."""

from __future__ import annotations

from threading import Barrier

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backends.cpu import array_address
from runner.backends.cpu.partitions import PackedRows, Partition
from runner.backends.cpu.workspace import Workspace


def partitions(lengths: list[int], count: int) -> list[Partition]:
    rows = PackedRows(lengths)
    return [Partition(index, count, rows, Workspace(), Workspace(), Barrier(count)) for index in range(count)]


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=12), parts=st.integers(1, 9), count=st.integers(1, 8))
def test_each_head_of_each_row_belongs_to_one_partition_and_no_share_is_much_larger_than_the_others(
    lengths, parts, count
):
    shares = [part.attention_shares(parts) for part in partitions(lengths, count)]
    done = sorted(
        (start, part) for share in shares for s in share for start, part in ((s.start, part) for part in s.heads)
    )
    starts = PackedRows(lengths).starts
    assert done == sorted((start, part) for start in starts for part in range(parts))
    assert all(lengths[starts.index(s.start)] == s.length for share in shares for s in share)
    costs = [sum(s.length**2 * len(s.heads) for s in share) for share in shares]
    assert max(costs) <= sum(length**2 for length in lengths) * parts / count + max(lengths) ** 2


def test_at_most_one_row_is_divided_between_neighbouring_partitions():
    shares = [part.attention_shares(3) for part in partitions([50, 60, 70, 80], 2)]
    rows = [{s.start for s in share} for share in shares]
    assert len(rows[0] & rows[1]) <= 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.float32).reshape(3, 4)[1:, 2:],
        np.zeros((0, 4), np.float32),
        np.frombuffer(b"\x00" * 16, np.float32),
    ],
    ids=["line", "transposed", "part", "empty", "read-only"],
)
def test_the_fast_address_of_an_array_is_the_documented_one(array):
    assert array_address.fast_address(array) == array_address.documented_address(array)
    assert array_address.address is array_address.fast_address
