"""The training step: equal to mlx-lm's on equal batches, accumulation weighted by tokens, clipping, finite checks."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss

from runner.backends.mlx.backend import MlxBackend
from runner.common.errors import Diverged
from runner.config import schema, validation
from runner.data.token_set import TokenSet
from runner.models.dropout import dropout_key
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_probe import split
from runner.training import optimizer
from runner.training.dataloader import BatchBuilder
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep

GENERATOR = np.random.default_rng(3)


def token_set(lengths: list[int], prompt: int = 4) -> TokenSet:
    tokens = GENERATOR.integers(3, 250, sum(lengths)).astype(np.int32)
    supervised = np.concatenate([np.arange(n) >= prompt for n in lengths])
    return TokenSet(tokens, supervised, np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths)))


def build_adapted(dropout: float = 0.0, bits: int | None = None) -> AdaptedModel:
    model = schema.ModelConfig(path="builtin:tiny")
    model.quantize.bits = bits
    model.quantize.group_size = 32
    adapted = AdaptedModel(load_base_model(model), schema.LoraConfig(rank=4, num_layers=2, dropout=dropout), seed=5)
    for name, array in adapted.params().items():  # B starts at zero, and with it the gradient of A
        noise = mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.02
        adapted.model.load_weights([(name, array + noise)], strict=False)
    return adapted


def mlx(adapted: AdaptedModel, **options) -> MlxBackend:
    return MlxBackend(adapted, split(adapted.model), chunk=256, **options)


def loss_of(adapted: AdaptedModel, batch) -> float:
    return mlx(adapted).row_losses(adapted.params(), batch).total


def batch_of(rows, indices, pad_to):
    return BatchBuilder(rows, pad_to)(np.asarray(indices))


def train_state(adapted: AdaptedModel, **options) -> TrainState:
    settings = validation.fill_defaults(schema.Config(optimizer=schema.OptimizerConfig(name="adamw", **options)))
    settings.schedule.name = "constant"
    params = adapted.params()
    return TrainState(params, optimizer.build_optimizer(settings, params), seed=0)


@pytest.mark.parametrize("bits", [None, 4])
def test_loss_and_gradients_equal_mlx_lm_default_loss_on_rows_without_padding(bits):
    adapted = build_adapted(bits=bits)
    rows = token_set([17, 17, 17])
    batch = batch_of(rows, np.arange(3), 16)
    backend = mlx(adapted)
    assert backend.split_model.has_separate_head
    # mlx-lm trains positions `offset` to `length`: the first supervised target is token `prompt`.
    tokens = mx.array(rows.tokens.reshape(3, 17))
    lengths = mx.array([[4, 17]] * 3)
    theirs, grads = nn.value_and_grad(adapted.model, lambda m: default_loss(m, tokens, lengths)[0])(adapted.model)
    ntoks = default_loss(adapted.model, tokens, lengths)[1].item()
    assert ntoks == batch.supervised == 39
    ours, our_grads = backend.loss_and_grads(adapted.params(), batch, mx.random.key(0))
    assert ours.item() / batch.supervised == pytest.approx(theirs.item(), abs=1e-5)
    flat = dict(tree_flatten(grads))
    assert set(flat) == set(our_grads)
    largest = max(mx.abs(g).max().item() for g in flat.values())
    assert largest > 1e-3
    for name, grad in flat.items():
        assert mx.abs(our_grads[name] / batch.supervised - grad).max().item() < 1e-5 * max(1, largest)


def test_padding_does_not_change_the_loss():
    adapted = build_adapted()
    rows = token_set([9, 30, 21])
    together = loss_of(adapted, batch_of(rows, np.arange(3), 16))
    alone = sum(loss_of(adapted, batch_of(rows, np.array([i]), 8)) for i in range(3))
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_model_that_cannot_be_split_gives_the_same_logits_whole():
    adapted = build_adapted()
    rows = token_set([20, 20])
    batch = batch_of(rows, np.arange(2), 16)
    backend, whole = mlx(adapted), mlx(adapted)
    whole.split_model.has_separate_head = False
    params = adapted.params()
    whole_losses, losses = whole.row_losses(params, batch), backend.row_losses(params, batch)
    assert whole_losses.total == pytest.approx(losses.total, abs=1e-4)
    assert whole_losses.rows == pytest.approx(losses.rows, abs=1e-4)


def test_the_head_of_a_model_with_capped_logits_caps_them():
    adapted = build_adapted()
    base = type(adapted.model)

    class Capped(base):
        def __call__(self, *args):
            return 0.1 * mx.tanh(base.__call__(self, *args) / 0.1)

    adapted.model.__class__ = Capped
    capped = split(adapted.model)
    assert capped.has_separate_head
    ids = mx.array([[5, 6, 7, 250]])
    logits = capped.head(capped.hidden(ids)[:, [3, 1]])
    assert mx.abs(logits).max().item() < 0.1
    assert mx.allclose(logits, adapted.model(ids)[:, [3, 1]], atol=1e-6).item()


def test_accumulation_weights_micro_batches_by_their_tokens():
    adapted = build_adapted()
    rows = token_set([40, 8, 8, 12])
    step = TrainStep(mlx(adapted), grad_clip=None)
    whole, parts = train_state(adapted), train_state(adapted)
    expected = step.update(whole, [batch_of(rows, np.arange(4), 8)], 1e-3)
    result = step.update(parts, [batch_of(rows, np.array(i), 8) for i in ([0], [1, 2], [3])], 1e-3)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for name in whole.params:
        assert mx.allclose(whole.params[name], parts.params[name], atol=1e-5).item()


def test_clipping_limits_the_norm_and_the_norm_before_is_returned():
    adapted = build_adapted()
    rows = token_set([20, 20])
    batch = [batch_of(rows, np.arange(2), 16)]
    free, clipped = train_state(adapted), train_state(adapted)
    norm = TrainStep(mlx(adapted), grad_clip=None).update(free, batch, 1e-3).grad_norm
    same = TrainStep(mlx(adapted), grad_clip=norm / 10).update(clipped, batch, 1e-3).grad_norm
    assert same == pytest.approx(norm, rel=1e-6)
    moments = [m.optimizer.state() for m in (free, clipped)]
    for name in moments[0]:
        if name.endswith(".m"):
            assert mx.allclose(moments[1][name], moments[0][name] / 10, rtol=1e-3, atol=1e-9).item()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_before_the_update(poison):
    adapted = build_adapted()
    state = train_state(adapted)
    name = next(iter(state.params))
    state.params[name] = mx.full(state.params[name].shape, poison)
    before = state.optimizer.state()
    with pytest.raises(Diverged, match="update 1 "):
        TrainStep(mlx(adapted), grad_clip=1.0).update(state, [batch_of(token_set([20]), np.array([0]), 16)], 1e-3)
    after = state.optimizer.state()
    assert all(mx.array_equal(before[n], after[n]).item() for n in before)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_is_bitwise_equal_and_leaves_the_class_unchanged(dropout, compiled):
    adapted = build_adapted(dropout=dropout)
    batch = [batch_of(token_set([30, 25]), np.arange(2), 16)]
    block, call = type(adapted.model.layers[0]), type(adapted.model.layers[0]).__call__
    plain, recomputed = train_state(adapted), train_state(adapted)
    results = []
    for state, recomputes in ((plain, False), (recomputed, True)):
        step = TrainStep(mlx(adapted, grad_checkpoint=recomputes, compiled=compiled), grad_clip=None)
        results.append([step.update(state, batch, 1e-3), step.update(state, batch, 1e-3)])
    assert results[0] == results[1]
    assert all(mx.array_equal(plain.params[n], recomputed.params[n]).item() for n in plain.params)
    assert type(adapted.model.layers[0]) is block
    assert block.__call__ is call


def test_dropout_depends_on_seed_update_and_micro_batch_alone():
    assert mx.array_equal(dropout_key(1, 2, 3), dropout_key(1, 2, 3)).item()
    keys = [dropout_key(*k).tolist() for k in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert len({tuple(k) for k in keys}) == 4
    adapted = build_adapted(dropout=0.5)
    batch = batch_of(token_set([30]), np.array([0]), 16)
    backend = mlx(adapted)
    losses = [
        backend.loss_and_grads(adapted.params(), batch, dropout_key(*k))[0].item()
        for k in ((1, 1, 0), (1, 1, 0), (1, 2, 0))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_ignores_dropout():
    adapted = build_adapted(dropout=0.5)
    batch = batch_of(token_set([30]), np.array([0]), 16)
    adapted.dropout.set_key(dropout_key(1, 1, 0))
    first = loss_of(adapted, batch)
    adapted.dropout.set_key(None)
    assert loss_of(adapted, batch) == first
