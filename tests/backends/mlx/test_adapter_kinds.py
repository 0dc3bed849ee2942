"""The step of each kind of adapter: gradients of a head that is trained, in chunks of logits; compiled steps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.backends.mlx.backend import MlxBackend
from runner.backends.mlx.probe import GradientProbe
from runner.backends.protocol import BackendBatch
from runner.backends.select import select_backend
from runner.config.schema import LoraConfig, ModelConfig
from runner.data.batch import Batch
from runner.models.arrays import to_tensors
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_model import Parts, SplitModel

KINDS = {
    "tied embedding": LoraConfig(rank=2, keys=["embed_tokens", "q_proj"], num_layers=1),
    "dora of it": LoraConfig(rank=2, type="dora", keys=["embed_tokens"]),
    "whole": LoraConfig(rank=2, num_layers=1, modules_to_save=["embed_tokens", "norm"]),
    "full": LoraConfig(type="full", num_layers=-1, modules_to_save=["embed_tokens", "norm"]),
}


def batch() -> BackendBatch:
    row = (1 + np.arange(13, dtype=np.int32) * 37 % 300)[None]
    positions = np.arange(12, dtype=np.int32)
    weights = (positions > 2).astype(np.float32)
    return BackendBatch(Batch(row[:, :-1], positions, row[0, 1:], weights, 9, np.array([12]), np.arange(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_gradients_of_all_logits_at_once(kind, tiny):
    adapted = AdaptedModel(load_base_model(ModelConfig(path="builtin:tiny")), KINDS[kind], seed=0)
    probe = GradientProbe(adapted)
    chunked = MlxBackend(adapted, SplitModel(adapted.model, Parts(trunk="model")), chunk=4)
    whole = MlxBackend(adapted, SplitModel(adapted.model, Parts()), chunk=4)
    assert adapted.head_params and probe.agrees(chunked)
    found = [backend.loss_and_grads(adapted.probe_params(), batch(), mx.random.key(0)) for backend in (chunked, whole)]
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    for name, grad in found[1][1].items():
        assert mx.allclose(found[0][1][name], grad, rtol=1e-3, atol=1e-4).item(), name
    settings = tiny(**{"train.cache_probes": False, "train.hidden_cache.enabled": False})
    settings.lora = KINDS[kind]
    backend = select_backend(adapted, settings)
    assert backend.split_model.has_separate_head
    settings.lora.dropout = 0.1
    if settings.lora.type != "full":
        assert not select_backend(adapted, settings).split_model.has_separate_head


@pytest.mark.parametrize("lora", [*KINDS.values(), LoraConfig(rank=2, init="pissa"), LoraConfig(rank=2, type="dora")])
def test_the_step_of_each_kind_of_adapter_can_be_compiled_as_it_starts(lora):
    adapted = AdaptedModel(load_base_model(ModelConfig(path="builtin:tiny")), lora, seed=0)
    params = adapted.start_pissa(adapted.params())
    backend = MlxBackend(adapted, SplitModel(adapted.model, Parts(trunk="model")), chunk=4, compiled=True)
    for _ in range(2):
        grads = backend.loss_and_grads(params, batch(), mx.random.key(0))[1]  # traced, not evaluated
    assert grads.keys() == params.keys()
    restored = {name: mx.array(tensor.array()) for name, tensor in adapted.to_stored(to_tensors(params)).items()}
    backend.loss_and_grads(adapted.from_stored(restored), batch(), mx.random.key(0))
