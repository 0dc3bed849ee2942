"""DoRA on every base that MLX quantizes, PiSSA's start, whole modules, and what stock mlx-lm reads of them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.tuner import dora as stock_dora
from mlx_lm.tuner.utils import load_adapters

from runner.checkpoints.safetensors_file import pack
from runner.common.errors import ModelError
from runner.config.schema import LoraConfig, ModelConfig
from runner.models import quantization
from runner.models.adapter_layers import DoraEmbedding, DoraLinear
from runner.models.arrays import to_tensors
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel, stored_lora
from runner.models.pissa import principal_factors
from runner.models.stock_mlx_lm import stock_problem

IDS = mx.array([[1 + (37 * i) % 300 for i in range(12)]])
MODES = [(None, None), *((bits, "affine") for bits in (2, 3, 4, 5, 6, 8)), (4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")]


def base(bits=None, mode="affine", group_size=32, **changes):
    model = ModelConfig(path="builtin:tiny", **changes)
    model.quantize.bits, model.quantize.mode, model.quantize.group_size = bits, mode, group_size
    return load_base_model(model)


def randomize(adapted: AdaptedModel, seed: int = 3) -> dict[str, mx.array]:
    mx.random.seed(seed)
    params = {n: a + 0.1 * mx.random.normal(a.shape) for n, a in adapted.params().items()}
    adapted.place(params)
    return params


def quantized(layer: nn.Module, bits: int | None, mode: str | None) -> nn.Module:
    group_size = 16 if mode == "nvfp4" else 32
    return layer if bits is None else layer.to_quantized(group_size=group_size, bits=bits, mode=mode)


def whole_weight(layer: nn.Module) -> np.ndarray:
    weight = quantization.expand_weight(layer, mx.float32) if "scales" in layer else layer.weight
    return np.array(weight, np.float64)


def factors(adapter: nn.Module) -> tuple[np.ndarray, ...]:
    mx.random.seed(1)
    for name in ("lora_a", "lora_b", "m"):
        adapter[name] = adapter[name] + 0.1 * mx.random.normal(adapter[name].shape)
    return tuple(np.array(adapter[name], np.float64) for name in ("lora_a", "lora_b", "m"))


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_dora_computes_the_formula_of_the_paper_on_every_quantization(bits, mode):
    mx.random.seed(0)
    linear = quantized(nn.Linear(64, 48), bits, mode)
    x = mx.random.normal((5, 64))
    adapter = DoraLinear(linear, 4, 1.5)
    assert mx.abs(adapter(x) - linear(x)).max().item() < 1e-5  # at its start it changes nothing
    a, b, m = factors(adapter)
    weight = whole_weight(linear) + 1.5 * (a @ b).T
    weight *= (m / np.linalg.norm(weight, axis=1))[:, None]
    expected = np.array(x, np.float64) @ weight.T + np.array(linear.bias, np.float64)
    assert np.abs(np.array(adapter(x)) - expected).max() < 2e-4
    if bits is None:
        assert mx.abs(adapter.fuse()(x) - adapter(x)).max().item() < 1e-4


@pytest.mark.parametrize(("bits", "mode"), [(None, None), (4, "affine"), (6, "affine"), (4, "mxfp4")])
def test_dora_of_an_embedding_scales_its_rows_and_its_logits(bits, mode):
    mx.random.seed(0)
    embedding = quantized(nn.Embedding(40, 64), bits, mode)
    adapter = DoraEmbedding(embedding, 3, 2.0)
    ids, x = mx.array([[3, 0, 39]]), mx.random.normal((2, 64))
    assert mx.abs(adapter(ids) - embedding(ids)).max().item() < 1e-5
    a, b, m = factors(adapter)
    weight = whole_weight(embedding) + 2.0 * (a @ b)
    weight *= (m / np.linalg.norm(weight, axis=1))[:, None]
    rows = adapter(ids)
    tolerance = 2e-4 if rows.dtype == mx.float32 else 2e-2  # these modes give rows of 16 bits
    assert np.abs(np.array(rows.astype(mx.float32)) - weight[np.array(ids)]).max() < tolerance
    assert np.abs(np.array(adapter.as_linear(x)) - np.array(x, np.float64) @ weight.T).max() < 2e-3


def test_gradients_of_dora_are_those_of_mlx_lm_where_that_reads_the_layer():
    mx.random.seed(0)
    linear = nn.Linear(64, 48)
    x = mx.random.normal((5, 64))
    ours, theirs = DoraLinear(linear, 4, 1.5), stock_dora.DoRALinear.from_base(linear, r=4, scale=1.5)
    factors(ours)
    for name in ("lora_a", "lora_b", "m"):
        theirs[name] = ours[name]
    linear.freeze()
    losses = [nn.value_and_grad(layer, lambda layer: mx.sin(layer(x)).sum())(layer) for layer in (ours, theirs)]
    grads = [dict(tree_flatten(found[1])) for found in losses]
    for name in ("lora_a", "lora_b", "m"):
        assert mx.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-4).item(), name


SHAPES = {
    "lora": LoraConfig(rank=2, num_layers=2),
    "by number": LoraConfig(rank=2, keys=["layers.0-1.self_attn.*", "layers.3.mlp.up_proj"]),
    "embedding": LoraConfig(rank=2, keys=["embed_tokens", "q_proj"], num_layers=1),
    "dora": LoraConfig(rank=2, type="dora", num_layers=2),
    "dora of an embedding": LoraConfig(rank=2, type="dora", keys=["embed_tokens"]),
    "pissa": LoraConfig(rank=3, init="pissa", alpha=6.0, num_layers=2),
    "full": LoraConfig(type="full", num_layers=2),
    "full with more": LoraConfig(type="full", num_layers=1, modules_to_save=["embed_tokens", "norm"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_stock_mlx_lm_loads_what_is_stored_and_computes_the_same(tmp_path, name):
    made = base()
    untouched, before = made.model(IDS), made.fingerprint
    adapted = AdaptedModel(made, SHAPES[name], seed=0)
    params = adapted.start_pissa(adapted.params())
    adapted.place(params)
    assert mx.array_equal(adapted.model(IDS), untouched).item()  # nothing is changed before the first update
    params = randomize(adapted)
    expected = adapted.model(IDS)
    assert mx.abs(expected - untouched).max().item() > 0.05
    adapted.place(adapted.without_effect(params))
    assert mx.abs(adapted.model(IDS) - untouched).max().item() < 1e-5
    adapted.place(params)
    stored, config = adapted.to_stored(to_tensors(params)), adapted.adapter_config()
    assert stock_problem(adapted) is None
    write(tmp_path, stored, config)
    loaded = load_adapters(base().model, str(tmp_path))
    assert mx.abs(loaded(IDS) - expected).max().item() < 1e-4
    # As our own commands load it, and the base as it was.
    adapted.remove()
    assert mx.array_equal(made.model(IDS), untouched).item() and made.fingerprint == before
    again = AdaptedModel(made, stored_lora(SHAPES[name]), seed=1)
    assert again.adapter_config() == config
    again.place(mx.load(str(tmp_path / "adapters.safetensors")))
    assert mx.abs(again.model(IDS) - expected).max().item() < 1e-4
    again.place(again.without_effect(again.params()))
    assert mx.abs(again.model(IDS) - untouched).max().item() < 1e-5


def write(folder: Path, tensors, config) -> None:
    (folder / "adapters.safetensors").write_bytes(pack(tensors, {"format": "mlx"}))
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("lora", "quantize", "reason"),
    [
        (LoraConfig(rank=2, modules_to_save=["norm"]), {}, "lora.modules_to_save"),
        (LoraConfig(rank=2, rank_pattern=["q_proj:4"]), {}, "lora.rank_pattern"),
        (LoraConfig(rank=2, type="dora"), {"bits": 6}, "weights of 6 bits"),
        (LoraConfig(rank=2, type="dora", keys=["embed_tokens"]), {"bits": 4}, "a quantized embedding"),
    ],
)
def test_stock_mlx_lm_refuses_what_is_said_to_be_beyond_it(tmp_path, lora, quantize, reason):
    adapted = AdaptedModel(base(**quantize), lora, seed=0)
    problem = stock_problem(adapted)
    assert problem is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(problem.reason)
    write(tmp_path, to_tensors(adapted.params()), adapted.adapter_config())
    with pytest.raises((ValueError, AttributeError, TypeError)):
        model = load_adapters(base(**quantize).model, str(tmp_path))
        mx.eval(model(IDS))


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_dora_of_four_bits_is_read_by_stock_mlx_lm(tmp_path, mode):
    adapted = AdaptedModel(base(4, mode), LoraConfig(rank=2, type="dora", num_layers=1), seed=0)
    assert stock_problem(adapted) is None
    write(tmp_path, to_tensors(randomize(adapted)), adapted.adapter_config())
    loaded = load_adapters(base(4, mode).model, str(tmp_path))
    assert mx.abs(loaded(IDS) - adapted.model(IDS)).max().item() < 1e-3


@pytest.mark.parametrize("shape", [(48, 64), (1100, 1060)])
def test_pissa_starts_with_the_best_approximation_of_the_weight(shape):
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.normal(size=(n, 40)))[0] for n in shape)
    spectrum = 0.8 ** np.arange(40)
    weight = ((left * spectrum) @ right.T).astype(np.float32)
    a, b = principal_factors(weight, 5, 2.0)
    best = (left[:, :5] * spectrum[:5]) @ right[:, :5].T
    assert np.abs(2.0 * (a @ b).T - best).max() < 1e-4 * np.abs(best).max()
    assert np.allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4)
    more = principal_factors(weight[:3], 5, 2.0)
    assert not more[0][:, 3:].any() and not more[1][3:].any()


def test_pissa_is_stored_as_a_lora_of_twice_the_rank_and_read_back_exactly():
    adapted = AdaptedModel(base(), LoraConfig(rank=2, init="pissa", num_layers=1), seed=0)
    adapted.place(adapted.start_pissa(adapted.params()))
    params = randomize(adapted)
    stored = {name: mx.array(t.array()) for name, t in adapted.to_stored(to_tensors(params)).items()}
    expected = adapted.model(IDS)
    adapted.remove()
    again = AdaptedModel(adapted.base, LoraConfig(rank=2, init="pissa", num_layers=1), seed=7)
    restored = again.from_stored(stored)
    again.place(restored)
    assert all(mx.array_equal(restored[name], params[name]).item() for name in params)
    assert mx.array_equal(again.model(IDS), expected).item()


def test_what_cannot_be_trained_so_is_refused_by_name():
    for lora, quantize, message in (
        (LoraConfig(type="full", num_layers=1), {"bits": 4}, "is quantized.*model.dequantize=always"),
        (LoraConfig(modules_to_save=["embed_tokens"]), {"bits": 4}, "model.embed_tokens is quantized"),
        (
            LoraConfig(init="pissa", keys=["embed_tokens"]),
            {},
            "model.embed_tokens is of type Embedding",
        ),
        (LoraConfig(keys=["norm"]), {}, "no block has 'norm'"),
        (LoraConfig(keys=["q_proj"], modules_to_save=["layers.3"]), {}, "both name model.layers.3.self_attn.q_proj"),
    ):
        with pytest.raises(ModelError, match=message):
            AdaptedModel(base(**quantize), lora, seed=0)


@pytest.mark.parametrize(
    ("lora", "frozen", "head"),
    [
        (LoraConfig(num_layers=1), 3, False),
        (LoraConfig(keys=["layers.1.q_proj"]), 1, False),
        (LoraConfig(keys=["q_proj", "embed_tokens"], num_layers=1), 0, True),
        (LoraConfig(keys=["layers.2.q_proj"], modules_to_save=["norm"]), 2, False),
        (LoraConfig(modules_to_save=["embed_tokens"], num_layers=1), 0, True),
        (LoraConfig(type="full", num_layers=1), 3, False),
        (LoraConfig(type="full", num_layers=-1), 0, False),
    ],
)
def test_blocks_below_everything_that_is_trained_are_frozen(lora, frozen, head):
    adapted = AdaptedModel(base(), lora, seed=0)
    assert (adapted.frozen_blocks, adapted.trains_head) == (frozen, head)


def test_the_bias_that_balances_experts_is_not_trained_whole():
    model, config = tiny_models.build_model("deepseek_v3")
    model.freeze()
    adapted = AdaptedModel(BaseModel(model, None, config, "deepseek"), LoraConfig(type="full"), seed=0)
    assert any("correction_bias" in name for name, _ in tree_flatten(model.parameters()))
    assert not any("correction_bias" in name for name in adapted.params())
    assert "model.layers.1.mlp.gate.weight" in adapted.params()
