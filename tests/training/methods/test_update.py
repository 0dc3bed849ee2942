"""Updates of the methods: gradients as MLX differentiates the loss as a whole, on both backends."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from runner.backends.cpu.backend import CpuBackend
from runner.backends.cpu.engine import Engine
from runner.backends.mlx.backend import MlxBackend
from runner.backends.protocol import Backend, BackendBatch
from runner.config.schema import Config, LoraConfig, MethodConfig, ModelConfig
from runner.config.validation import fill_defaults
from runner.data.token_set import TokenSet
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_probe import split
from runner.training.dataloader import BatchBuilder
from runner.training.methods.answer_losses import ANSWER_LOSSES, Answers
from runner.training.methods.preference import PreferenceMethod
from runner.training.optimizer import build_optimizer
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep

GENERATOR = np.random.default_rng(7)
LENGTHS = [17, 12, 9, 21, 14, 14, 30, 8]
PROMPT = 4
ROWS = TokenSet(
    GENERATOR.integers(3, 250, sum(LENGTHS)).astype(np.int32),
    np.concatenate([np.arange(n) >= PROMPT for n in LENGTHS]),
    np.concatenate([[0], np.cumsum(LENGTHS)]),
    np.arange(len(LENGTHS)),
    unwanted=np.array([False, False, True, True, False, False, True, True]),
    rows_per_example=2,
)
REFERENCE = GENERATOR.normal(-90, 10, len(LENGTHS))


def adapted_model(dropout: float = 0.0) -> AdaptedModel:
    lora = LoraConfig(rank=4, num_layers=2, dropout=dropout)
    adapted = AdaptedModel(load_base_model(ModelConfig(path="builtin:tiny")), lora, seed=5)
    for name, array in adapted.params().items():  # B starts at zero, and with it the gradient of A
        noise = mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.02
        adapted.model.load_weights([(name, array + noise)], strict=False)
    return adapted


def backends(adapted: AdaptedModel) -> dict[str, Backend]:
    found: dict[str, Backend] = {"mlx": MlxBackend(adapted, split(adapted.model), chunk=256)}
    if mx.default_device() == mx.cpu:
        found["engine"] = CpuBackend(Engine(adapted.model, chunk=256), split(adapted.model))
    return found


def options(name: str) -> MethodConfig:
    return fill_defaults(Config(method=MethodConfig(name=name))).method


def method(backend: Backend, name: str, *, has_dropout: bool = False) -> PreferenceMethod:
    return PreferenceMethod(backend, options(name), {"train": ROWS}, lambda split: REFERENCE, has_dropout=has_dropout)


def batches(*parts: list[int]) -> list[BackendBatch]:
    builder = BatchBuilder(ROWS, 16)
    return [builder(np.array(part)) for part in parts]


def gradients(adapted: AdaptedModel, backend: Backend, name: str, *parts: list[int], **rest: Any) -> dict[str, Any]:
    """The gradient of one update, by the difference that plain SGD at rate 1 makes."""
    params = adapted.params()
    config = fill_defaults(Config())
    config.optimizer.name = "sgd"
    config = fill_defaults(config)
    state = TrainState(params, build_optimizer(config, params), seed=0)
    step = TrainStep(backend, grad_clip=None, method=method(backend, name, **rest))
    result = step.update(state, batches(*parts), 1.0)
    found = {key: np.array(params[key] - state.params[key]) for key in params}
    return {"loss": result.loss, **found}


def whole_loss(adapted: AdaptedModel, name: str) -> dict[str, Any]:
    """The loss of all rows and its gradient, differentiated by MLX through the model row by row."""

    def loss(params: dict[str, mx.array]) -> mx.array:
        adapted.place(params)
        sums = []
        for row in range(len(ROWS)):
            tokens, mask = ROWS.row(row)
            ids = mx.array(tokens)[None]
            losses = nn.losses.cross_entropy(adapted.model(ids[:, :-1]), ids[:, 1:])[0]
            sums.append(-(losses * mx.array(mask[1:].astype(np.float32))).sum())
        counts = mx.array(np.array(LENGTHS, np.float32) - PROMPT).reshape(-1, 2)
        answers = Answers(
            counts, mx.array(REFERENCE.astype(np.float32)).reshape(-1, 2), mx.array(ROWS.unwanted).reshape(-1, 2)
        )
        return ANSWER_LOSSES[name](mx.stack(sums).reshape(-1, 2), answers, options(name))[0].mean()

    params = adapted.params()
    adapted.model.eval()
    value, grads = mx.value_and_grad(loss)(params)
    adapted.place(params)
    return {"loss": float(value), **{key: np.array(grad) for key, grad in grads.items()}}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    arrays = [key for key in expected if key != "loss"]
    largest = max(float(np.abs(expected[key]).max()) for key in arrays)
    assert largest > 1e-4  # the parameters are of size 0.02: a smaller one would drown in their rounding
    for key in arrays:
        assert np.abs(found[key] - expected[key]).max() < 1e-4 * largest + 1e-7, key


@pytest.mark.parametrize("name", ANSWER_LOSSES)
def test_the_gradient_of_an_update_is_that_of_the_whole_loss(name):
    adapted = adapted_model()
    expected = whole_loss(adapted, name)
    for backend in backends(adapted).values():
        assert_close(gradients(adapted, backend, name, [0, 1, 2, 3]), expected)


@pytest.mark.parametrize("name", ["orpo", "kto"])
def test_micro_batches_and_their_parts_leave_the_loss_of_an_update_as_it_is(name):
    adapted = adapted_model()
    backend = backends(adapted)["mlx"]
    whole = gradients(adapted, backend, name, [0, 1, 2, 3])
    assert_close(gradients(adapted, backend, name, [0, 2], [1], [3]), whole)


def test_dropout_masks_of_both_passes_are_the_same():
    adapted = adapted_model(dropout=0.3)
    backend = backends(adapted)["mlx"]
    state = TrainState(adapted.params(), None, seed=3)
    [batch] = batches([0, 1])
    key = mx.random.key(11)
    by_token = backend.token_losses(state.params, batch, key)
    total, _ = backend.loss_and_grads(state.params, batch, key)
    assert by_token.sum() == pytest.approx(float(total), rel=1e-5)
    assert abs(backend.row_losses(state.params, batch).total - float(total)) > 1e-3


def test_answers_that_count_nothing_are_not_computed_again():
    """Of KTO the mismatched answers; with dropout they stay, since its masks depend on the shape of the batch."""
    adapted = adapted_model()
    backend = backends(adapted)["mlx"]
    state = TrainState(adapted.params(), None, seed=0)
    for has_dropout, rows in ((False, 2), (True, 4)):
        weighed = method(backend, "kto", has_dropout=has_dropout).weigh(state, batches([0, 2]))
        assert [batch.row_count for batch in weighed.batches] == [rows]
    assert weighed.examples == 2
    assert weighed.supervised == sum(LENGTHS[row] - PROMPT for row in (0, 1, 4, 5))


def test_rows_of_a_batch_are_selected_with_their_targets_and_weights():
    [batch] = batches([0, 1, 2])
    weights = np.zeros(batch.supervised)
    weights[np.isin(batch.batch.target_rows, [1, 4])] = GENERATOR.random(np.isin(batch.batch.target_rows, [1, 4]).sum())
    kept = batch.weighted(weights).without_unweighted_rows()
    assert kept is not None and kept.batch.rows.tolist() == [1, 4]
    adapted = adapted_model()
    for backend in backends(adapted).values():
        key = mx.random.key(0)
        whole = backend.loss_and_grads(adapted.params(), batch.weighted(weights), key)
        part = backend.loss_and_grads(adapted.params(), kept, key)
        assert float(part[0]) == pytest.approx(float(whole[0]), rel=1e-5)
        for name, grad in whole[1].items():
            assert np.allclose(np.array(part[1][name]), np.array(grad), atol=1e-5 * float(np.abs(np.array(grad)).max()))
    assert batch.weighted(np.zeros(batch.supervised)).without_unweighted_rows() is None
