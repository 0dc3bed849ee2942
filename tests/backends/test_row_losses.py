"""The loss of each row is that of the row alone through the plain model, on every path of both backends."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from runner.backends.cpu import native
from runner.backends.cpu.backend import CpuBackend
from runner.backends.cpu.engine import Engine
from runner.backends.cpu.kernels import Ops
from runner.backends.mlx.backend import MlxBackend
from runner.backends.protocol import Backend, BackendBatch
from runner.config import schema
from runner.data.token_set import TokenSet
from runner.models.load import BaseModel
from runner.models.lora import AdaptedModel
from runner.models.split_probe import split
from runner.training.dataloader import BatchBuilder, EvaluationLoader
from runner.training.evaluate import evaluate

LENGTHS = (20, 5, 33, 2, 140, 260, 21)
"""More positions than the CPU engine computes at once."""


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    mx.random.seed(3)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=48,
        num_hidden_layers=3,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=300,
        max_position_embeddings=512,
    )
    model = llama.Model(arguments)
    model.update(tree_unflatten([(n, mx.random.normal(a.shape) * 0.2) for n, a in tree_flatten(model.parameters())]))
    model.freeze()
    made = AdaptedModel(BaseModel(model, None, {}, "none", "none"), schema.LoraConfig(num_layers=2, rank=4), seed=0)
    made.place({n: mx.random.normal(a.shape) * 0.1 for n, a in made.params().items()})
    made.model.eval()
    mx.eval(made.model.parameters())
    return made


@pytest.fixture(scope="module")
def rows() -> TokenSet:
    random = np.random.default_rng(2)
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    supervised = random.random(offsets[-1]) < 0.6
    supervised[offsets[:-1]], supervised[offsets[1:] - 1] = False, True
    return TokenSet(random.integers(1, 300, offsets[-1]).astype(np.int32), supervised, offsets, np.arange(len(LENGTHS)))


@pytest.fixture(scope="module")
def expected(adapted: AdaptedModel, rows: TokenSet) -> list[float]:
    """The loss of each row, by a forward pass of its own."""
    losses = []
    for index in range(len(rows)):
        tokens, supervised = rows.row(index)
        logits = adapted.model(mx.array(tokens[None, :-1]))[0]
        by_token = nn.losses.cross_entropy(logits, mx.array(tokens[1:]))
        losses.append(float(np.array(by_token)[supervised[1:]].sum()))
    return losses


BACKENDS = {
    "MLX": lambda adapted: MlxBackend(adapted, split(adapted.model), chunk=512),
    "MLX in chunks": lambda adapted: MlxBackend(adapted, split(adapted.model), chunk=7),
    "MLX with all positions": lambda adapted: MlxBackend(adapted, split(adapted.model), chunk=64, all_positions=True),
    "MLX above cached states": lambda adapted: MlxBackend(adapted, split(adapted.model, 1), chunk=64),
    "engine": lambda adapted: CpuBackend(Engine(adapted.model, chunk=512, ops=Ops()), split(adapted.model)),
    "engine in chunks": lambda adapted: CpuBackend(
        Engine(adapted.model, chunk=7, threads=2, ops=native.load()[0] or Ops()), split(adapted.model)
    ),
    "engine above cached states": lambda adapted: CpuBackend(
        Engine(adapted.model, chunk=64, threads=3, ops=Ops()), split(adapted.model, 1)
    ),
}
ENGINE = pytest.mark.cpu("the engine computes on the CPU only")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[ENGINE] if name.startswith("engine") else []) for name in BACKENDS]
)
@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4, 5, 6]], [[3, 1], [0, 6, 2], [4], [5]]], ids=["one", "several"])
def test_the_loss_of_each_row_is_that_of_the_row_alone(
    name: str, batches: list[list[int]], adapted: AdaptedModel, rows: TokenSet, expected: list[float]
) -> None:
    backend: Backend = BACKENDS[name](adapted)
    builder = BatchBuilder(rows, 16)

    def batch(indices: list[int]) -> BackendBatch:
        made = builder(np.array(indices))
        if "cached" not in name:
            return made
        return BackendBatch(made.batch, np.array(backend.run_frozen_blocks(made.batch.inputs)))

    result = evaluate(backend, adapted.params(), map(batch, batches))
    assert result.rows.losses == pytest.approx(expected, rel=2e-5)
    assert result.rows.tokens.tolist() == [int(rows.row(index)[1].sum()) for index in range(len(rows))]
    assert result.rows.losses.sum() / result.rows.tokens.sum() == pytest.approx(result.loss, rel=1e-6)


def test_the_fingerprint_is_that_of_the_evaluated_rows_in_the_order_of_the_data(rows: TokenSet) -> None:
    builder = BatchBuilder(rows, 16)

    def fingerprint(*batches: list[int]) -> str:
        return EvaluationLoader(builder, [np.array(indices) for indices in batches]).fingerprint

    assert fingerprint([3, 1], [0, 6, 2], [4], [5]) == fingerprint([0, 1, 2, 3, 4, 5, 6]) == rows.fingerprint
    assert fingerprint([5, 2]) == fingerprint([2], [5]) == rows.subset(np.array([2, 5])).fingerprint
    others = [rows.subset(np.array([5, 2])), rows.subset(np.array([2, 5, 6]))]
    mask = rows.supervised.copy()
    mask[1] ^= True
    others += [TokenSet(rows.tokens.copy(), mask, rows.offsets.copy(), rows.lines.copy()).subset(np.array([0, 5]))]
    found = {fingerprint([2, 5]), fingerprint([0, 5]), *(other.fingerprint for other in others)}
    assert len(found) == 5
