"""The batch order is a function of (lengths, batch size, seed, epoch), with every row once per epoch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.order import BatchOrder, DataPosition, evaluation_batches

WINDOW = 32
lengths = st.lists(st.integers(2, 50), min_size=1, max_size=60).map(np.array)
orders = st.builds(BatchOrder, lengths, st.integers(1, 9), st.integers(0, 2**70), st.integers(1, 4))


def as_lists(batches):
    return [batch.tolist() for batch in batches]


def epoch_batches(order: BatchOrder, epoch: int) -> list[np.ndarray]:
    return order.next_batches(DataPosition(epoch), order.batches_per_epoch)[0]


@given(orders, st.integers(0, 2**40))
def test_every_row_occurs_exactly_once_per_epoch(order, epoch):
    batches = epoch_batches(order, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(order.lengths)))
    assert len(batches) == order.batches_per_epoch


@given(orders, st.integers(0, 5))
def test_all_batches_but_the_last_are_full(order, epoch):
    *full, last = epoch_batches(order, epoch)
    assert all(len(batch) == order.batch_size for batch in full)
    assert 1 <= len(last) <= order.batch_size


@given(orders, st.integers(0, 9), st.integers(0, 9))
def test_the_order_depends_on_seed_and_epoch_alone(order, epoch, other):
    epoch_batches(order, other)
    again = BatchOrder(order.lengths.copy(), order.batch_size, order.seed, order.window_batches)
    assert as_lists(epoch_batches(order, epoch)) == as_lists(epoch_batches(again, epoch))


def test_the_global_random_state_is_neither_used_nor_changed():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first = as_lists(epoch_batches(BatchOrder(np.arange(2, 60), 4, 0, WINDOW), 0))
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(4)
    assert as_lists(epoch_batches(BatchOrder(np.arange(2, 60), 4, 0, WINDOW), 0)) == first


def test_different_epochs_and_seeds_give_different_orders():
    drawn = {
        str(as_lists(epoch_batches(BatchOrder(np.full(64, 9), 4, seed, WINDOW), epoch)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(drawn) == 25


def test_the_order_is_the_same_on_every_machine_and_numpy_version():
    order = BatchOrder(np.arange(1000) % 97 + 2, 4, seed=1, window_batches=32)
    rows = np.concatenate(epoch_batches(order, 3)).astype("<i8")
    assert rows[:8].tolist() == [809, 907, 616, 908, 239, 45, 530, 921]
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "c343ecbec707597b"


@given(orders, st.integers(0, 30), st.integers(0, 30), st.integers(0, 3))
def test_resuming_from_any_position_gives_the_same_remaining_batches(order, done, more, first_epoch):
    start = DataPosition(first_epoch, 0)
    whole, end = order.next_batches(start, done + more)
    _, middle = order.next_batches(start, done)
    fresh = BatchOrder(order.lengths, order.batch_size, order.seed, order.window_batches)
    tail, end_again = fresh.next_batches(middle, more)
    assert as_lists(tail) == as_lists(whole[done:])
    assert end_again == end


@given(orders)
def test_next_batches_continues_across_epochs(order):
    count = order.batches_per_epoch
    batches, after = order.next_batches(DataPosition(0, 0), 2 * count + 1)
    assert as_lists(batches[:count]) == as_lists(epoch_batches(order, 0))
    assert as_lists(batches[count : 2 * count]) == as_lists(epoch_batches(order, 1))
    assert after == (DataPosition(3, 0) if count == 1 else DataPosition(2, 1))


@given(orders)
def test_zero_batches_leave_the_position_unchanged(order):
    assert order.next_batches(DataPosition(4, 0), 0) == ([], DataPosition(4, 0))


@pytest.mark.parametrize("position", [DataPosition(0, 3), DataPosition(0, -1), DataPosition(-1, 0)])
def test_a_position_outside_an_epoch_is_refused(position):
    with pytest.raises(ValueError, match="outside an epoch of 3 batches"):
        BatchOrder(np.full(9, 5), 4, 0, WINDOW).next_batches(position, 1)


@pytest.mark.parametrize(("rows", "batch_size", "window"), [(0, 4, 32), (4, 0, 32), (4, 4, 0)])
def test_invalid_arguments_are_refused(rows, batch_size, window):
    with pytest.raises(AssertionError):
        BatchOrder(np.full(rows, 5), batch_size, 0, window)


def padded(batches, sizes):
    return sum(len(batch) * sizes[batch].max() for batch in batches)


def test_sorting_within_windows_reduces_padding():
    sizes = np.clip(np.random.default_rng(0).lognormal(4, 0.8, 4000), 2, 512).astype(int)
    batches = epoch_batches(BatchOrder(sizes, 8, seed=0, window_batches=WINDOW), 0)
    assert 1 - sizes.sum() / padded(batches, sizes) < 0.12
    unsorted = epoch_batches(BatchOrder(sizes, 8, seed=0, window_batches=1), 0)
    assert 1 - sizes.sum() / padded(unsorted, sizes) > 0.5


def test_batches_are_not_ordered_by_length():
    sizes = np.arange(2, 4002)
    means = [sizes[batch].mean() for batch in epoch_batches(BatchOrder(sizes, 8, seed=0, window_batches=WINDOW), 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_a_row_takes_different_positions_in_different_epochs():
    order = BatchOrder(np.full(1000, 9), 4, seed=0, window_batches=WINDOW)
    positions = [np.concatenate(epoch_batches(order, epoch)).tolist().index(0) for epoch in range(200)]
    assert 400 < np.mean(positions) < 600
    assert np.std(positions) > 200


@given(lengths, st.integers(1, 9))
def test_evaluation_covers_all_rows_sorted_by_length(sizes, batch_size):
    batches = evaluation_batches(sizes, batch_size)
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(len(sizes)))
    assert (np.diff(sizes[rows]) >= 0).all()
    assert as_lists(batches) == as_lists(evaluation_batches(sizes.copy(), batch_size))


@given(lengths, st.integers(1, 9), st.integers(0, 70))
def test_a_limit_selects_that_many_batches_in_order(sizes, batch_size, limit):
    everything = as_lists(evaluation_batches(sizes, batch_size))
    chosen = as_lists(evaluation_batches(sizes, batch_size, limit))
    assert len(chosen) == min(limit, len(everything))
    indices = [everything.index(batch) for batch in chosen]
    assert indices == sorted(set(indices))


def test_a_limit_selects_evenly_spaced_batches():
    chosen = evaluation_batches(np.arange(2, 102), 1, limit=4)
    assert as_lists(chosen) == [[12], [37], [62], [87]]


def test_equal_lengths_keep_their_order_in_evaluation():
    assert as_lists(evaluation_batches(np.array([5, 3, 5, 3, 5]), 2)) == [[1, 3], [0, 2], [4]]
