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
        evaluated, by_position = loss(*args)
    finally:
        base.model.model.__class__ = trunk
    assert value_found.item() == pytest.approx(value.item(), rel=1e-6)
    assert evaluated.item() == pytest.approx(value.item(), rel=1e-6)
    assert by_position.shape == (N,) and by_position.sum().item() == pytest.approx(value.item(), rel=1e-6)
    assert not np.array(by_position)[-20:].any()
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


CHUNK, VOCABULARY = 64, 4_000


def chunks_at_once(positions: int, *, compiled: bool = False, grads: bool = True) -> tuple[float, float]:
    """The peak of MLX's counter for the loss at `positions` in chunks of 64, in logits of one chunk; and the loss."""
    hidden_size = 16
    weight, key = mx.random.normal((VOCABULARY, hidden_size), key=mx.random.key(0)), mx.random.key(1)
    split_model = SimpleNamespace(
        has_separate_head=True, hidden=lambda x, states: x * split_model.factor, head=lambda h: h @ weight.T
    )
    split_model.factor = mx.array(1.0)
    loss = ChunkedLoss(split_model=split_model, chunk=CHUNK, all_positions=False)
    inputs = mx.random.normal((positions, hidden_size), key=key)[None]
    args = None, mx.arange(positions), mx.arange(positions), mx.ones(positions)

    def step(factor, inputs):
        if not grads:
            return loss(inputs, *args)[0]
        return loss.loss_and_grads(
            lambda params: setattr(split_model, "factor", params["factor"]), {"factor": factor}, inputs, *args
        )

    call = mx.compile(step) if compiled else step
    mx.eval(inputs, weight, args[1:])
    for factor in (1.0, 2.0):  # the second call of a compiled step does not trace
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = call(mx.array(factor), inputs)
        mx.eval(result)
        peak = mx.get_peak_memory() - before
    return peak / (4 * VOCABULARY * CHUNK), (result[0] if grads else result).item()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_peak_of_the_logits_does_not_depend_on_the_number_of_chunks(compiled, monkeypatch):
    """MLX allocates some operations ahead: in a chain of chunks, of which each waits for the one before it, that is as
    much as 6 chunks take, compiled 8; without the chain it grows with their number, for 32 of them to 24 and 33."""
    chained = {n: chunks_at_once(n, compiled=compiled) for n in (512, 2048)}
    assert chained[2048][0] < 10
    assert chained[2048][0] < 1.25 * chained[512][0]
    monkeypatch.setattr(mx, "depends", lambda inputs, dependencies: inputs)
    unchained = {n: chunks_at_once(n, compiled=compiled) for n in (512, 2048)}
    assert unchained[2048][0] > 13
    assert [loss for _, loss in chained.values()] == [loss for _, loss in unchained.values()]


def test_an_evaluation_holds_the_logits_of_one_chunk():
    """Evaluated as one graph they take those of 9 chunks."""
    assert chunks_at_once(2048, grads=False)[0] < 3
