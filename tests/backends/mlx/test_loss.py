"""Head and loss in pieces: the loss and the gradients of the whole, on every path."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from runner.backends.mlx.loss import ChunkedLoss, cross_entropy
from runner.config import schema
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_probe import split

N = 192


@pytest.fixture(scope="module")
def base():
    return load_base_model(schema.ModelConfig(path="builtin:tiny"))


@pytest.fixture(params=["chunks", "compiled", "all positions", "unsplit model"])
def path(request):
    return request.param


def batch():
    numbers = np.random.default_rng(1)
    ids = mx.array(numbers.integers(3, 300, (4, 64)).astype(np.int32))
    positions = mx.array(np.sort(numbers.choice(256, N, replace=False)).astype(np.int32))
    targets = mx.array(numbers.integers(3, 300, N).astype(np.int32))
    weights = mx.array((np.arange(N) < N - 20).astype(np.float32))
    return ids, None, positions, targets, weights


def expected(base, factor):
    """The loss in one piece, as written in a textbook, by a factor on the hidden states before the head."""
    ids, _, positions, targets, weights = batch()

    def loss(f):
        hidden = (base.model.model(ids) * f).reshape(256, -1)[positions]
        logits = base.model.model.embed_tokens.as_linear(hidden)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    return mx.value_and_grad(loss)(factor)


def chunked_loss(base, path: str, chunk: int) -> ChunkedLoss:
    split_model = split(base.model)
    split_model.has_separate_head = path != "unsplit model"
    return ChunkedLoss(split_model=split_model, chunk=chunk, all_positions=path == "all positions")


@pytest.mark.parametrize("chunk", [1000, 192, 64, 50])
def test_loss_and_gradient_are_those_of_the_textbook(base, path, chunk):
    factor = mx.array(1.7)
    value, gradient = expected(base, factor)
    loss, args = chunked_loss(base, path, chunk), batch()
    trunk = type(base.model.model)

    class Scaled(trunk):
        factor = mx.array(1.0)

        def __call__(self, *a, **k):
            return trunk.__call__(self, *a, **k) * Scaled.factor

    base.model.model.__class__ = Scaled
    try:

        def place(params):
            Scaled.factor = params["factor"]

        def step(params):
            return loss.loss_and_grads(place, params, *args)

        value_found, grads = (mx.compile(step) if path == "compiled" else step)({"factor": factor})
        gradient_found = grads["factor"]
        Scaled.factor = factor
        evaluated = loss(*args)
    finally:
        base.model.model.__class__ = trunk
    assert value_found.item() == pytest.approx(value.item(), rel=1e-6)
    assert evaluated.item() == pytest.approx(value.item(), rel=1e-6)
    scale = mx.abs(gradient).max().item()
    assert scale > 1
    assert mx.abs(gradient_found - gradient).max().item() < 2e-6 * scale


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad):
    logits = mx.zeros((8, 50)).at[3, 7].add(bad)
    assert not np.isfinite(cross_entropy(logits, mx.zeros(8, mx.int32), mx.ones(8)).item())


def test_large_logits_do_not_overflow():
    logits = mx.array([[1e4, 0.0, -1e4]])
    loss, gradient = mx.value_and_grad(lambda x: cross_entropy(x, mx.array([0]), mx.ones(1)))(logits)
    assert loss.item() == 0.0
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]


def peak_memory(loss: ChunkedLoss, adapted: AdaptedModel, *, compiled: bool = False) -> int:
    """Peak bytes of MLX that loss and gradients of 1,024 supervised of 2,048 positions take."""
    numbers = np.random.default_rng(0)
    ids = mx.array(numbers.integers(3, 300, (8, 256)).astype(np.int32))
    positions = mx.array(np.sort(numbers.choice(2048, 1024, replace=False)).astype(np.int32))
    args = ids, None, positions, mx.array(numbers.integers(3, 300, 1024).astype(np.int32)), mx.ones(1024)
    params = adapted.params()

    def step(params, *args):
        return loss.loss_and_grads(adapted.place, params, *args)

    mx.eval(params, args[0], args[2:])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval((mx.compile(step) if compiled else step)(params, *args))
    adapted.place(params)
    return mx.get_peak_memory() - before


@pytest.fixture
def training(base):
    made = AdaptedModel(base, schema.LoraConfig(rank=4, num_layers=2), seed=5)
    base.model.train()
    yield made
    made.remove()


def test_chunks_take_no_more_memory_than_the_whole_at_once(base, training):
    """Arrays evaluated within a differentiation live until its end: evaluated chunks took 1.8 times as much."""
    whole = peak_memory(chunked_loss(base, "chunks", 1024), training)
    for compiled in (False, True):
        assert peak_memory(chunked_loss(base, "chunks", 64), training, compiled=compiled) < 1.1 * whole


@pytest.mark.parametrize(("compiled", "share"), [(False, 0.5), (True, 0.65)])
def test_logits_of_all_chunks_never_exist_at_once(compiled, share):
    """Without dependencies between the chunks, these take 0.9 and 1.5 times the size of all logits."""
    vocabulary, count, hidden_size = 20_000, 1024, 16
    weight, key = mx.random.normal((vocabulary, hidden_size), key=mx.random.key(0)), mx.random.key(1)
    split_model = SimpleNamespace(
        has_separate_head=True, hidden=lambda x, states: x * split_model.factor, head=lambda h: h @ weight.T
    )
    loss = ChunkedLoss(split_model=split_model, chunk=64, all_positions=False)
    inputs = mx.random.normal((count, hidden_size), key=key)[None]
    args = None, mx.arange(count), mx.arange(count), mx.ones(count)

    def step(factor, inputs):
        return loss.loss_and_grads(
            lambda params: setattr(split_model, "factor", params["factor"]), {"factor": factor}, inputs, *args
        )

    call = mx.compile(step) if compiled else step
    mx.eval(inputs, weight, args[1:])
    for factor in (1.0, 2.0):  # the second call of a compiled step does not trace
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call(mx.array(factor), inputs))
        peak = mx.get_peak_memory() - before
    assert peak < share * 4 * vocabulary * count
