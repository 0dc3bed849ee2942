"""Head and loss in pieces: the loss and the gradients of the whole, on every path."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from runner.backends.cpu import cross_entropy, threads
from runner.config import schema
from runner.models.forward import Forward
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.training.loss import loss_and_grads, loss_sum

N = 192


@pytest.fixture(scope="module")
def base():
    return load_base_model(schema.ModelConfig(path="builtin:tiny"))


@pytest.fixture(params=["numpy", "two threads", "mlx", "traced", "everywhere", "whole"])
def path(request, base):
    """A forward pass and whether it may evaluate on the way."""
    cross_entropy.configure(on=request.param in ("numpy", "two threads"))
    threads.configure(1 + (request.param == "two threads"))
    forward = Forward(base.model, everywhere=request.param == "everywhere")
    forward.split = request.param != "whole"
    yield forward, request.param != "traced"
    cross_entropy.configure(on=True)
    threads.configure(1)


def batch():
    numbers = np.random.default_rng(1)
    ids = mx.array(numbers.integers(3, 300, (4, 64)).astype(np.int32))
    positions = mx.array(np.sort(numbers.choice(256, N, replace=False)).astype(np.int32))
    targets = mx.array(numbers.integers(3, 300, N).astype(np.int32))
    weights = mx.array((np.arange(N) < N - 20).astype(np.float32))
    return ids, positions, targets, weights


def expected(base, factor):
    """The loss in one piece, as written in a textbook, by a factor on the hidden states before the head."""
    ids, positions, targets, weights = batch()

    def loss(f):
        hidden = (base.model.model(ids) * f).reshape(256, -1)[positions]
        logits = base.model.model.embed_tokens.as_linear(hidden)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    return mx.value_and_grad(loss)(factor)


@pytest.mark.parametrize("piece", [1000, 192, 64, 50])
def test_loss_and_gradient_are_those_of_one_piece(base, path, piece):
    forward, eager = path
    forward.piece = piece
    factor = mx.random.uniform(0.5, 1.5, (base.model.model.embed_tokens.weight.shape[1],), key=mx.random.key(0))
    value, gradient = expected(base, factor)
    args = batch()
    own = type(base.model.model)

    class Scaled(own):  # a factor before the head stands for all that is trained below it
        def __call__(self, *a, **k):
            return own.__call__(self, *a, **k) * Scaled.factor

    base.model.model.__class__ = Scaled
    try:

        def place(params):
            Scaled.factor = params["factor"]

        def step(params):
            return loss_and_grads(forward, place, params, *args, eager=eager)

        loss, grads = (step if eager else mx.compile(step))({"factor": factor})
        ours = grads["factor"]
        Scaled.factor = factor
        evaluated = loss_sum(forward, *args, eager=eager)
    finally:
        base.model.model.__class__ = own
    assert loss.item() == pytest.approx(value.item(), rel=1e-6)
    assert evaluated.item() == pytest.approx(value.item(), rel=1e-6)
    scale = mx.abs(gradient).max().item()
    assert scale > 1
    assert mx.abs(ours - gradient).max().item() < 2e-6 * scale


def test_a_row_s_bits_depend_on_no_thread_and_no_neighbour():
    logits = mx.random.normal((37, 1000), key=mx.random.key(3)) * 8
    targets, weights = mx.arange(37), mx.ones(37)
    results = []
    for count in (1, 2, 3):
        threads.configure(count)
        results.append(cross_entropy.cross_entropy(logits + 0, targets, weights)[1])
    cross_entropy.configure(on=True)
    threads.configure(1)
    one = cross_entropy.cross_entropy(logits[5:6] + 0, targets[5:6], weights[5:6])[1]
    assert all(mx.array_equal(results[0], other) for other in results[1:])
    assert mx.array_equal(results[0][5:6], one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_loss(bad, recwarn):
    logits = mx.zeros((8, 50)).at[3, 7].add(bad)
    loss, _ = cross_entropy.cross_entropy(logits, mx.zeros(8, mx.int32), mx.ones(8))
    assert not np.isfinite(loss.item())
    assert not recwarn.list


def test_large_logits_do_not_overflow():
    logits = mx.array([[1e4, 0.0, -1e4]])
    loss, gradient = cross_entropy.cross_entropy(logits, mx.array([0]), mx.ones(1))
    assert loss.item() == 0.0
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]


def test_pieces_on_the_way_hold_no_more_memory_than_the_whole_at_once(base):
    """What is evaluated within a differentiation is kept until its end: before, this took 1.8 times as much."""
    adapted = AdaptedModel(base, schema.LoraConfig(rank=4, num_layers=2), seed=5)
    numbers = np.random.default_rng(0)
    ids = mx.array(numbers.integers(3, 300, (8, 256)).astype(np.int32))
    positions = mx.array(np.sort(numbers.choice(2048, 1024, replace=False)).astype(np.int32))
    args = ids, positions, mx.array(numbers.integers(3, 300, 1024).astype(np.int32)), mx.ones(1024)
    forward, params = Forward(base.model, piece=64), adapted.params()

    def peak(eager):
        mx.eval(params, args)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(loss_and_grads(forward, adapted.place, params, *args, eager=eager))
        adapted.place(params)
        return mx.get_peak_memory() - before

    try:
        base.model.train()
        assert peak(eager=True) < 1.2 * peak(eager=False)
    finally:
        adapted.remove()
