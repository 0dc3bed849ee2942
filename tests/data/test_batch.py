"""A batch equals a position-by-position construction, and its loss equals mlx-lm's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.batch import collate
from runner.data.length_buckets import LengthBuckets
from runner.data.token_set import TokenSet


def token_set(rows):
    """Build a TokenSet from (tokens, supervised) pairs."""
    return TokenSet(
        np.array([t for tokens, _ in rows for t in tokens], np.int32),
        np.array([s for _, supervised in rows for s in supervised], bool),
        np.cumsum([0, *(len(tokens) for tokens, _ in rows)]).astype(np.int64),
        np.arange(len(rows)),
    )


def collate_by_position(rows, pad_to):
    """Build a batch one position at a time, as the definition says."""
    length = pad_to
    while length < max(len(tokens) - 1 for tokens, _ in rows):
        length += pad_to
    inputs, positions, targets, real = [], [], [], 0
    for number, (tokens, supervised) in enumerate(rows):
        line = [0] * length
        for column in range(len(tokens) - 1):
            line[column] = tokens[column]
            real += 1
            if supervised[column + 1]:
                positions.append(number * length + column)
                targets.append(tokens[column + 1])
        inputs.append(line)
    return inputs, positions, targets, real


one_row = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=2, max_size=40).map(
    lambda pairs: ([token for token, _ in pairs], [flag for _, flag in pairs])
)


@given(st.lists(one_row, min_size=1, max_size=7), st.data(), st.sampled_from([1, 3, 8, 32, 64]))
def test_a_batch_equals_the_construction_by_position(rows, data, pad_to):
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    batch = collate(token_set(rows), np.array(indices), LengthBuckets(pad_to))
    inputs, positions, targets, real = collate_by_position([rows[index] for index in indices], pad_to)
    count = len(positions)
    assert batch.inputs.tolist() == inputs
    assert batch.positions[:count].tolist() == positions
    assert batch.targets[:count].tolist() == targets
    assert batch.weights[:count].tolist() == [1] * count
    for padding in (batch.positions[count:], batch.targets[count:], batch.weights[count:]):
        assert not padding.any()
    assert (batch.supervised, batch.real_tokens) == (count, real)
    assert batch.rows.tolist() == indices
    targets_of = [[token for token, flag in zip(*(part[1:] for part in rows[i]), strict=True) if flag] for i in indices]
    assert batch.supervised_by_row.tolist() == [len(found) for found in targets_of]
    sums = batch.sums_by_row(batch.targets[:count].astype(np.float64))
    assert sums.tolist() == [float(sum(found)) for found in targets_of]
    assert len(batch.positions) == len(batch.targets) == len(batch.weights)
    assert len(batch.positions) % 64 == 0
    assert len(batch.positions) - count < 64 or count == 0
    assert batch.inputs.dtype == batch.positions.dtype == batch.targets.dtype == np.int32
    assert batch.weights.dtype == np.float32


@pytest.mark.parametrize(("tokens", "pad_to", "length"), [(33, 32, 32), (34, 32, 64), (2, 32, 32), (6, 1, 5)])
def test_the_length_is_the_longest_row_rounded_up_to_the_multiple(tokens, pad_to, length):
    rows = [([1] * tokens, [True] * tokens), ([1, 2], [False, True])]
    assert collate(token_set(rows), np.array([0, 1]), LengthBuckets(pad_to)).inputs.shape == (2, length)


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        collate(token_set([([1, 2], [False, True])]), np.array([], dtype=int), LengthBuckets(32))


@pytest.fixture(scope="module")
def llama():
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=101,
    )
    model = Model(arguments)
    mx.eval(model.parameters())
    return model


def summed_loss(model, batch):
    """Return the cross-entropy summed over a batch's positions."""
    import mlx.core as mx
    import mlx.nn as nn

    logits = model(mx.array(batch.inputs))
    chosen = logits.reshape(-1, logits.shape[-1])[mx.array(batch.positions)]
    losses = nn.losses.cross_entropy(chosen, mx.array(batch.targets))
    return (losses * mx.array(batch.weights)).sum().item()


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("pad_to", [1, 32])
def test_the_summed_loss_equals_that_of_mlx_lm(offset, pad_to, llama):
    import mlx.core as mx
    from mlx_lm.tuner.trainer import default_loss

    rows = np.random.default_rng(1).integers(1, 101, (3, 21))
    supervised = [index >= max(offset, 1) for index in range(21)]
    tokens = token_set([(row.tolist(), supervised) for row in rows])
    batch = collate(tokens, np.arange(3), LengthBuckets(pad_to))
    loss, count = default_loss(llama, mx.array(rows), mx.array([[offset, 21]] * 3))
    assert count.item() == batch.supervised
    assert summed_loss(llama, batch) == pytest.approx((loss * count).item(), rel=1e-5)


def test_the_loss_of_a_row_does_not_depend_on_padding_or_other_rows(llama):
    generator = np.random.default_rng(2)
    rows = [generator.integers(1, 101, size).tolist() for size in (5, 30, 17)]
    tokens = token_set([(row, [False, False] + [True] * (len(row) - 2)) for row in rows])
    together = summed_loss(llama, collate(tokens, np.arange(3), LengthBuckets(32)))
    alone = sum(summed_loss(llama, collate(tokens, np.array([index]), LengthBuckets(1))) for index in range(3))
    assert together == pytest.approx(alone, rel=1e-5)
