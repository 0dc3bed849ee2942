"""The CPU engine against MLX's differentiation, and the models and settings that fall back to MLX."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, qwen2

from runner.backends.cpu import kernels, native
from runner.backends.cpu.backend import CpuBackend, packed
from runner.backends.cpu.engine import Engine, group_rows
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.linear import as_numpy
from runner.backends.mlx.backend import MlxBackend
from runner.backends.protocol import Backend
from runner.backends.select import select_backend
from runner.common.errors import ModelError
from runner.config import schema
from runner.data.token_set import TokenSet
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_probe import split
from runner.training.dataloader import BatchBuilder
from runner.training.evaluate import evaluate

pytestmark = pytest.mark.cpu("the engine computes on the CPU only")
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
MODELS = {
    "tied": lambda: llama.Model(llama.ModelArgs("llama", **SMALL)),
    "untied head": lambda: llama.Model(llama.ModelArgs("llama", **SMALL, tie_word_embeddings=False)),
    "biases": lambda: llama.Model(llama.ModelArgs("llama", **SMALL, attention_bias=True, mlp_bias=True)),
    "llama3 rope": lambda: llama.Model(llama.ModelArgs("llama", **SMALL, rope_scaling=LLAMA3)),
    "one head each": lambda: llama.Model(llama.ModelArgs("llama", **{**SMALL, "num_key_value_heads": 6})),
    "qwen2": lambda: qwen2.Model(qwen2.ModelArgs("qwen2", **SMALL)),
}


def adapted(model, **lora) -> AdaptedModel:
    mx.random.seed(1)
    model.update(tree_unflatten([(n, mx.random.normal(a.shape) * 0.2) for n, a in tree_flatten(model.parameters())]))
    model.freeze()
    adapted_model = AdaptedModel(
        BaseModel(model, None, {}, "none", "none"), schema.LoraConfig(**{"num_layers": 2, "rank": 4, **lora}), seed=0
    )
    params = {n: mx.random.normal(a.shape) * 0.1 for n, a in adapted_model.params().items()}
    adapted_model.model.update(tree_unflatten(list(params.items())))
    mx.eval(adapted_model.model.parameters())
    return adapted_model


def batch(lengths, hidden=None, prompt=0):
    """Return a batch of random tokens; about 70 % of them are supervised, but none of the first `prompt` ones."""
    random = np.random.default_rng(2)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    tokens, supervised = random.integers(1, 300, offsets[-1]), random.random(offsets[-1]) < 0.7
    supervised &= np.arange(offsets[-1]) >= prompt
    rows = TokenSet(tokens.astype(np.int32), supervised, offsets, np.arange(len(lengths), dtype=np.int64))
    return BatchBuilder(rows, 16, hidden)(np.arange(len(lengths)))


def mlx_loss_and_grads(adapted_model: AdaptedModel, backend_batch):
    """Loss and gradients by MLX's own differentiation."""
    adapted_model.model.eval()
    value, grads = MlxBackend(adapted_model, split(adapted_model.model), chunk=256).loss_and_grads(
        adapted_model.params(), backend_batch, mx.random.key(0)
    )
    mx.eval(value, grads)
    return value.item(), {name: as_numpy(grad) for name, grad in grads.items()}


def numpy_params(adapted_model: AdaptedModel):
    return {name: as_numpy(array) for name, array in adapted_model.params().items()}


def assert_close(adapted_model: AdaptedModel, found, backend_batch) -> None:
    value, grads = mlx_loss_and_grads(adapted_model, backend_batch)
    assert found[0] == pytest.approx(value, rel=1e-5)
    assert set(found[1]) == set(grads)
    for name, grad in grads.items():
        size = np.linalg.norm(grad)
        assert size > 1e-3, name
        assert np.linalg.norm(found[1][name] - grad) < 2e-5 * size, name


@pytest.fixture(params=["numpy", "native"])
def ops(request) -> Ops:
    """The kernels of the engine."""
    if request.param == "numpy":
        return Ops()
    found, reason = native.load()
    if found is None and "compiler" in reason:
        pytest.skip(reason)
    assert found is not None, reason
    return found


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_loss_and_gradients_equal_those_of_mlx(name: str, grad_checkpoint: bool, count: int, ops) -> None:
    adapted_model = adapted(MODELS[name]())
    backend_batch = batch([9, 30, 2, 17])
    engine = Engine(adapted_model.model, threads=count, grad_checkpoint=grad_checkpoint, chunk=16, ops=ops)
    assert_close(
        adapted_model, engine.loss_and_grads(numpy_params(adapted_model), packed(backend_batch)), backend_batch
    )


@pytest.mark.parametrize(
    "lora",
    [
        {"num_layers": -1},
        {"num_layers": 1, "rank": 3},
        {"keys": ["self_attn.q_proj", "self_attn.v_proj"]},
        {"keys": ["mlp.down_proj"]},
        {"alpha": 3.0},
    ],
)
def test_adapters_of_any_shape_equal_those_of_mlx(lora: dict, ops) -> None:
    adapted_model = adapted(MODELS["tied"](), **lora)
    backend_batch = batch([20, 33])
    assert_close(
        adapted_model,
        Engine(adapted_model.model, chunk=256, ops=ops).loss_and_grads(
            numpy_params(adapted_model), packed(backend_batch)
        ),
        backend_batch,
    )


def test_rows_longer_than_an_attention_tile_equal_those_of_mlx(ops) -> None:
    adapted_model = adapted(MODELS["tied"]())
    backend_batch = batch([130, 300, 129])
    assert_close(
        adapted_model,
        Engine(adapted_model.model, threads=2, chunk=256, ops=ops).loss_and_grads(
            numpy_params(adapted_model), packed(backend_batch)
        ),
        backend_batch,
    )


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_partition_without_supervised_tokens_contributes_nothing(layers: int, grad_checkpoint: bool, ops) -> None:
    adapted_model = adapted(MODELS["tied"](), num_layers=layers)
    backend_batch = batch([60, 60, 60], prompt=130)
    engine, params = (
        Engine(adapted_model.model, threads=3, grad_checkpoint=grad_checkpoint, chunk=16, ops=ops),
        numpy_params(adapted_model),
    )
    found = engine.loss_and_grads(params, packed(backend_batch))
    assert_close(adapted_model, found, backend_batch)
    assert engine.losses(params, packed(backend_batch))[0] == found[0]


def test_more_threads_than_tokens_in_the_vocabulary_and_a_token_outside_it(ops) -> None:
    small = {**SMALL, "vocab_size": 3}
    adapted_model = adapted(llama.Model(llama.ModelArgs("llama", **small, tie_word_embeddings=False)))
    random = np.random.default_rng(2)
    tokens, offsets = random.integers(0, 3, 80).astype(np.int32), np.array([0, 50, 80])
    rows = TokenSet(tokens, np.arange(80) > 5, offsets, np.arange(2))
    backend_batch = BatchBuilder(rows, 16)(np.arange(2))
    engine, params = Engine(adapted_model.model, threads=4, chunk=16, ops=ops), numpy_params(adapted_model)
    assert_close(adapted_model, engine.loss_and_grads(params, packed(backend_batch)), backend_batch)
    good = packed(backend_batch)
    bad = replace(good, targets=np.where(np.arange(len(good.targets)) == 7, 3, good.targets))
    with pytest.raises(ModelError, match="token 3, but the model's vocabulary has 3"):
        engine.losses(params, bad)
    assert_close(adapted_model, engine.loss_and_grads(params, packed(backend_batch)), backend_batch)


def test_logits_whose_difference_overflows_an_exponential(ops) -> None:
    """Logits of different partitions of the vocabulary differ by hundreds."""
    adapted_model = adapted(MODELS["untied head"]())
    weight = np.array(adapted_model.model.lm_head.weight)
    weight[200:] *= 300
    adapted_model.model.lm_head.weight = mx.array(weight)
    backend_batch = batch([20, 33])
    value, grads = Engine(adapted_model.model, threads=2, chunk=256, ops=ops).loss_and_grads(
        numpy_params(adapted_model), packed(backend_batch)
    )
    expected, expected_grads = mlx_loss_and_grads(adapted_model, backend_batch)
    assert value == pytest.approx(expected, rel=1e-5) and expected > 1000
    for name, grad in expected_grads.items():
        assert np.linalg.norm(grads[name] - grad) < 1e-3 * np.linalg.norm(grad), name


def test_reused_buffers_do_not_change_results(ops) -> None:
    adapted_model = adapted(MODELS["biases"]())
    engine, params = Engine(adapted_model.model, chunk=256, ops=ops), numpy_params(adapted_model)
    backend_batch = batch([20, 9])
    first = engine.loss_and_grads(params, packed(backend_batch))
    engine.loss_and_grads(params, packed(batch([200, 40, 3])))
    assert engine.losses(params, packed(backend_batch))[0] == first[0]
    again = engine.loss_and_grads(params, packed(backend_batch))
    assert first[0] == again[0]
    assert all(np.array_equal(first[1][name], again[1][name]) for name in first[1])


def test_results_are_bitwise_reproducible_for_each_number_of_threads_and_nearly_equal_between_them(ops) -> None:
    adapted_model = adapted(MODELS["tied"]())
    params, found = numpy_params(adapted_model), []
    batches = [batch(lengths) for lengths in ([150, 40, 90], [33], [20, 20, 21, 22])]
    for count in (1, 2, 3):
        engine = Engine(adapted_model.model, threads=count, chunk=256, ops=ops)
        found.append([engine.loss_and_grads(params, packed(backend_batch)) for backend_batch in batches])
        for _ in range(20):  # in any order of the threads
            for backend_batch, (loss, grads) in zip(batches, found[-1], strict=True):
                again = engine.loss_and_grads(params, packed(backend_batch))
                assert again[0] == loss
                assert all(np.array_equal(again[1][name], grad) for name, grad in grads.items())
    for several in found[1:]:
        for (loss, grads), (one_loss, one_grads) in zip(several, found[0], strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-6)
            for name, grad in one_grads.items():
                assert np.linalg.norm(grads[name] - grad) < 1e-5 * np.linalg.norm(grad)


def test_an_error_in_one_thread_ends_all_threads_and_the_next_batch_is_unaffected(monkeypatch) -> None:
    adapted_model = adapted(MODELS["tied"]())
    engine, params, backend_batch = (
        Engine(adapted_model.model, threads=3, chunk=256),
        numpy_params(adapted_model),
        batch([150, 40, 90]),
    )
    before = engine.loss_and_grads(params, packed(backend_batch))
    swiglu, calls = kernels.swiglu, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no room")
        swiglu(*args)

    monkeypatch.setattr(Ops, "swiglu", staticmethod(fails))
    with pytest.raises(MemoryError, match="no room"):
        engine.loss_and_grads(params, packed(backend_batch))
    monkeypatch.undo()
    after = engine.loss_and_grads(params, packed(backend_batch))
    assert before[0] == after[0] and all(np.array_equal(before[1][name], after[1][name]) for name in before[1])


def test_hidden_states_at_the_cut_give_bitwise_the_same_gradients_as_token_ids(ops) -> None:
    adapted_model = adapted(MODELS["tied"]())
    engine, params = Engine(adapted_model.model, chunk=256, ops=ops), numpy_params(adapted_model)
    with_ids = packed(batch([60, 60]))
    states = engine.run_frozen_blocks(with_ids.inputs.reshape(2, -1)).reshape(len(with_ids.inputs), -1).copy()
    assert engine.frozen_blocks == 1
    whole, part = (
        engine.loss_and_grads(params, with_ids),
        engine.loss_and_grads(params, replace(with_ids, inputs=states)),
    )
    assert whole[0] == part[0]
    assert all(np.array_equal(whole[1][name], part[1][name]) for name in whole[1])


def test_validation_loss_equals_that_of_mlx(ops) -> None:
    adapted_model = adapted(MODELS["tied"]())
    forward, batches = split(adapted_model.model), [batch([20, 40]), batch([9])]
    expected = evaluate(MlxBackend(adapted_model, forward, chunk=256), adapted_model.params(), batches)
    engine = Engine(adapted_model.model, chunk=256, ops=ops)
    result = evaluate(CpuBackend(engine, forward), adapted_model.params(), batches)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (result.tokens, result.supervised) == (expected.tokens, expected.supervised)


def test_validation_loss_of_more_rows_than_are_computed_at_once_equals_that_of_mlx(ops) -> None:
    adapted_model = adapted(MODELS["tied"]())
    forward, batches = split(adapted_model.model), [batch([150, 40, 260, 90, 500, 3, 381, 4], prompt=30)]
    expected = evaluate(MlxBackend(adapted_model, forward, chunk=256), adapted_model.params(), batches)
    engine = Engine(adapted_model.model, threads=2, chunk=256, ops=ops)
    result = evaluate(CpuBackend(engine, forward), adapted_model.params(), batches)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    groups = group_rows([150, 40, 260, 90, 500, 3, 381, 4], 384)
    assert [(g.start, g.stop) for g in groups] == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]


def selected(adapted_model: AdaptedModel) -> Backend:
    """The backend that is chosen for `adapted_model`, with NumPy's kernels."""
    config = schema.Config()
    config.train.cache_probes = config.train.cpu_native = False
    return select_backend(adapted_model, config, longest_row=64)


def test_a_supported_model_gets_the_engine_and_keeps_its_adapter() -> None:
    adapted_model = adapted(MODELS["tied"]())
    before = {name: array + 0 for name, array in adapted_model.params().items()}
    backend = selected(adapted_model)
    assert isinstance(backend, CpuBackend) and backend.fallback_reason is None
    assert all(mx.array_equal(array, before[name]) for name, array in adapted_model.params().items())


@pytest.mark.parametrize("kernel", ["rms_norm", "swiglu", "rope"])
def test_an_engine_with_another_loss_than_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    original = getattr(kernels, kernel)

    def wrong(x, *args, **kwargs):
        original(x, *args, **kwargs)
        (x if kernel == "rope" else args[-1] if kernel == "swiglu" else args[2])[...] *= 1.01

    monkeypatch.setattr(Ops, kernel, staticmethod(wrong))
    backend = selected(adapted(MODELS["tied"]()))
    assert (
        isinstance(backend, MlxBackend) and "its gradients differ from MLX's for this model" in backend.fallback_reason
    )


@pytest.mark.parametrize("kernel", ["rms_norm_backward", "swiglu_backward"])
def test_an_engine_with_other_gradients_than_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    original = getattr(kernels, kernel)

    def wrong(x, *args, **kwargs):
        original(x, *args, **kwargs)
        (x if kernel == "swiglu_backward" else args[-1])[...] *= 1.01

    monkeypatch.setattr(Ops, kernel, staticmethod(wrong))
    assert isinstance(selected(adapted(MODELS["tied"]())), MlxBackend)


def test_a_model_with_unsupported_parts_falls_back_to_mlx_and_the_reason_names_them() -> None:
    from mlx_lm.models import gemma

    other = gemma.Model(gemma.ModelArgs("gemma", **{k: v for k, v in SMALL.items() if k[0] != "m"}, head_dim=8))
    assert "gemma" in selected(adapted(other)).fallback_reason
    half = adapted(MODELS["tied"]())
    half.model.set_dtype(mx.bfloat16)
    assert isinstance(selected(half), MlxBackend)
    quantized = load_base_model(
        schema.ModelConfig(
            path="builtin:tiny", quantize=schema.QuantizeConfig(bits=4, group_size=32), dequantize="never"
        )
    )
    assert isinstance(selected(AdaptedModel(quantized, schema.LoraConfig(num_layers=2), seed=0)), MlxBackend)


def test_a_model_with_a_sliding_window_falls_back_to_mlx() -> None:
    args = llama.ModelArgs(
        "llama", **SMALL, layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=16
    )
    backend = selected(adapted(llama.Model(args)))
    assert isinstance(backend, MlxBackend) and "sliding" in backend.fallback_reason


@pytest.mark.parametrize(
    ("section", "name", "value", "reason"),
    [
        ("lora", "dropout", 0.1, "lora.dropout"),
        ("train", "compile", "always", "train.compile=always"),
        ("train", "head", "all", "train.head=all"),
        ("train", "cpu_engine", False, None),
        ("train", "cpu_engine", True, None),
    ],
)
def test_a_setting_that_the_engine_does_not_support_falls_back_to_mlx_with_the_reason(
    section, name, value, reason
) -> None:
    settings = schema.Config()
    settings.model.path = "builtin:tiny"
    setattr(getattr(settings, section), name, value)
    adapted_model = AdaptedModel(load_base_model(settings.model), settings.lora, seed=0)
    backend = select_backend(adapted_model, settings, longest_row=64)
    assert isinstance(backend, CpuBackend if value is True else MlxBackend)
    if reason is None:
        assert backend.fallback_reason is None
    else:
        assert f"using MLX instead of the CPU engine: {reason}" in backend.fallback_reason
