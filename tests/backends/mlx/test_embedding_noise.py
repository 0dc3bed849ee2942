"""NEFTune's noise has the size of the paper, depends on the key alone, and is there in training only."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from runner.backends.mlx.backend import MlxBackend
from runner.backends.mlx.embedding_noise import EmbeddingNoise
from runner.backends.protocol import BackendBatch
from runner.common.errors import ConfigError
from runner.config import schema
from runner.data.batch import collate
from runner.data.length_buckets import LengthBuckets
from runner.data.token_set import TokenSet
from runner.models.dropout import DropoutKeys
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_probe import split

KEY = mx.random.key(7)


@pytest.fixture(scope="module")
def adapted():
    lora = schema.LoraConfig(rank=4, num_layers=2, dropout=0.1)
    return AdaptedModel(load_base_model(schema.ModelConfig(path="builtin:tiny")), lora, seed=5)


@pytest.fixture(scope="module")
def batch():
    """Rows of 9 and 30 tokens."""
    tokens = TokenSet(np.arange(3, 42, dtype=np.int32), np.ones(39, bool), np.array([0, 9, 39]), np.arange(2))
    return BackendBatch(collate(tokens, np.arange(2), LengthBuckets.from_lengths(tokens.lengths, 32)))


def embedded(adapted, noise, ids, key, lengths=None, read=None):
    """What the embedding returns inside the context for `read`, by default the token ids."""
    adapted.dropout.set_key(key)
    try:
        with noise.applied(ids, lengths):
            return np.array(adapted.model.model.embed_tokens(ids if read is None else read))
    finally:
        adapted.dropout.set_key(None)


def test_the_noise_of_a_row_has_the_bound_of_its_own_tokens(adapted):
    noise = EmbeddingNoise(adapted, 5.0)
    ids, lengths = mx.zeros((2, 40), mx.int32), mx.array([10.0, 40.0])
    clean = np.array(adapted.model.model.embed_tokens(ids))
    added = embedded(adapted, noise, ids, KEY, lengths) - clean
    size = clean.shape[-1]
    for row, tokens in enumerate((10, 40)):
        bound = 5.0 / np.sqrt(tokens * size)
        assert 0.98 * bound < np.abs(added[row]).max() <= bound * (1 + 1e-5)
        assert abs(added[row].mean()) < 0.05 * bound
    assert np.array_equal(embedded(adapted, noise, ids, KEY, lengths), clean + added)
    assert not np.array_equal(embedded(adapted, noise, ids, mx.random.key(8), lengths), clean + added)
    assert np.abs(embedded(adapted, noise, ids, KEY) - clean)[0].max() <= 5.0 / np.sqrt(40 * size) * (1 + 1e-5)
    assert np.array_equal(embedded(adapted, noise, ids, None, lengths), clean)
    assert np.array_equal(embedded(adapted, noise, ids, KEY, lengths, read=mx.zeros((2, 40), mx.int32)), clean)


def test_training_has_noise_that_depends_on_the_key_alone_and_an_evaluation_has_none(adapted, batch):
    model, params = split(adapted.model), adapted.probe_params()
    noise = EmbeddingNoise(adapted, 5.0)
    plain = MlxBackend(adapted, model, chunk=256)
    noisy = MlxBackend(adapted, model, chunk=256, embedding_noise=noise)
    checkpointed = MlxBackend(adapted, model, chunk=256, embedding_noise=noise, grad_checkpoint=True)
    losses = {}
    for name, backend in (("plain", plain), ("noisy", noisy), ("again", noisy), ("checkpointed", checkpointed)):
        losses[name] = backend.loss_and_grads(params, batch, KEY)
        mx.eval(losses[name])
    assert float(losses["noisy"][0]) != float(losses["plain"][0])
    for other in ("again", "checkpointed"):
        assert float(losses[other][0]) == float(losses["noisy"][0])
        assert all(mx.array_equal(losses[other][1][n], grad).item() for n, grad in losses["noisy"][1].items())
    assert noisy.row_losses(params, batch).total == plain.row_losses(params, batch).total
    assert noisy.update_memory(params, batch).total > 0


def test_padding_does_not_change_the_size_of_the_noise(adapted, batch, monkeypatch):
    seen = []
    noise = EmbeddingNoise(adapted, 5.0)
    applied = noise.applied
    monkeypatch.setattr(noise, "applied", lambda ids, lengths: seen.append(lengths) or applied(ids, lengths))
    MlxBackend(adapted, split(adapted.model), chunk=256, embedding_noise=noise).loss_and_grads(
        adapted.params(), batch, KEY
    )
    assert batch.batch.inputs.shape[1] > 29 and seen[0].tolist() == [8.0, 29.0]


class TwoEmbeddings(nn.Module):
    """A model with a second embedding; without `passes_ids`, neither is called with the token ids themselves."""

    def __init__(self, first: str, passes_ids: bool = True) -> None:
        super().__init__()
        self._first, self._passes_ids = first, passes_ids
        self[first] = nn.Embedding(8, 4)
        self.embed_tokens_per_layer = nn.Embedding(8, 4)

    def __call__(self, token_ids):
        token_ids = token_ids if self._passes_ids else token_ids + 0
        return self.embed_tokens_per_layer(token_ids) + self[self._first](token_ids)


def test_of_several_embeddings_the_noise_is_on_embed_tokens():
    model = TwoEmbeddings("embed_tokens")
    noise = EmbeddingNoise(SimpleNamespace(model=model, dropout=DropoutKeys()), 5.0)
    assert noise._embedding is model.embed_tokens


@pytest.mark.parametrize("model", [TwoEmbeddings("other"), TwoEmbeddings("embed_tokens", passes_ids=False)])
def test_a_model_whose_token_embedding_is_not_found_is_refused(model):
    with pytest.raises(ConfigError, match="train.neftune_alpha is not possible with this model: .* is not found"):
        EmbeddingNoise(SimpleNamespace(model=model), 5.0)
