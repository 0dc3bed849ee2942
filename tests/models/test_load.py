"""Base models load from every kind of model.path; what cannot be loaded is refused with a clear message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models

from runner.common.errors import ModelError
from runner.config.schema import ModelConfig, QuantizeConfig
from runner.export.mlx import write_model_folder
from runner.models.identity import content_hash, weights_fingerprint
from runner.models.load import BaseModel, load_base_model

TINY = "builtin:tiny"


def load(path: str | Path = TINY, **settings: object) -> BaseModel:
    return load_base_model(ModelConfig(path=str(path), **settings))


def quantized_layers(base: BaseModel) -> list[nn.Module]:
    return [module for module in base.model.modules() if isinstance(module, nn.QuantizedLinear)]


def current_content_hash(base: BaseModel) -> str:
    return content_hash(base.model, base.config, base.fingerprint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as a model folder."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_folder(load(), path)
    return path


def test_the_tiny_model_has_the_same_weights_every_time():
    assert load().fingerprint == load().fingerprint


def test_a_folder_loads_the_weights_that_were_written(folder):
    assert load(folder).fingerprint == load().fingerprint


def test_a_hub_id_is_read_from_the_hubs_offline_cache(folder, tmp_path):
    cache = tmp_path / "hub/models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    code = (
        "import json\n"
        "from runner.backends import blas; blas.load_blas()\n"
        "from runner.config.schema import ModelConfig as Model\n"
        "from runner.models.load import load_base_model as load\n"
        "print(json.dumps([load(Model(path='someone/tiny', revision=r)).fingerprint for r in (None, 'main')]))\n"
        "try: load(Model(path='someone/other'))\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    fingerprints, error = done.stdout.splitlines()[-2:]
    assert set(json.loads(fingerprints)) == {load().fingerprint}
    assert error.startswith("ModelError model.path=someone/other cannot be loaded")


def test_quantizing_at_load_keeps_the_layers_quantized_and_changes_the_fingerprint():
    base = load(quantize=QuantizeConfig(bits=4, group_size=32))
    assert quantized_layers(base) and base.config["quantization"]["bits"] == 4
    assert base.fingerprint != load().fingerprint


@pytest.mark.parametrize("bits", [None, 4])
def test_the_content_hash_changes_with_one_weight_and_with_one_config_value(bits):
    quantize = QuantizeConfig(bits=bits, group_size=32)
    base = load(quantize=quantize)
    assert current_content_hash(base) == base.content_hash == load(quantize=quantize).content_hash
    assert content_hash(base.model, {**base.config, "rope_theta": 5e5}, base.fingerprint) != base.content_hash
    layer = base.model.layers[1].mlp.up_proj
    weight = mx.array(layer.weight)
    weight[3, 5] = weight[3, 5] + (1 if bits else 1e-3)
    layer.weight = weight
    assert current_content_hash(base) != base.content_hash
    layer.weight = base.model.layers[2].mlp.up_proj.weight
    before = current_content_hash(base)
    layer.weight = layer.weight * 2
    assert current_content_hash(base) != before
    before, rows = current_content_hash(base), mx.arange(layer.weight.shape[0])
    rows[2], rows[40] = 40, 2
    layer.weight = layer.weight[rows]
    assert current_content_hash(base) != before, "two rows were swapped"
    if not bits:
        layer.weight = weight
        assert weights_fingerprint(base.model, {}) == base.fingerprint, "the sample does not contain the changed weight"
        base.model.set_dtype(mx.bfloat16)
        before = current_content_hash(base)
        layer.weight[3, 5] = layer.weight[3, 5] * 2
        assert current_content_hash(base) != before


@pytest.mark.cpu("a quantized base is expanded by default")
def test_a_quantized_folder_is_dequantized_on_the_cpu_unless_set_otherwise(tmp_path):
    write_model_folder(load(quantize=QuantizeConfig(bits=8, group_size=32)), tmp_path / "q")
    dequantized, quantized = load(tmp_path / "q"), load(tmp_path / "q", dequantize="never")
    assert not quantized_layers(dequantized)
    assert quantized_layers(quantized)
    assert any("is dequantized" in note for note in dequantized.notes)
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.abs(dequantized.model(tokens) - quantized.model(tokens)).max().item() < 1e-3


@pytest.mark.parametrize(("dtype", "expected"), [("float16", mx.float16), ("bfloat16", mx.bfloat16)])
def test_the_dtype_setting_casts_the_base(dtype, expected):
    base = load(dtype=dtype)
    assert base.model.model.layers[0].self_attn.q_proj.weight.dtype == expected
    assert weights_fingerprint(base.model, {}) == base.fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:tinny", "Did you mean 'tiny'"),
        ("/nowhere/model", "no such folder or file"),
        ("nothing", "no such folder or file"),
        ("missing.gguf", "no such file"),
    ],
)
def test_a_path_that_is_not_a_model_is_refused_with_the_reason(path, message):
    with pytest.raises(ModelError) as refused:
        load(path)
    assert message in str(refused.value)


def test_an_incomplete_or_unsupported_folder_is_refused_with_the_reason(folder, tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        load(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="unheard_of"):
        load(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model"):
        load(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "lama"},
            r"model_type 'lama' is not supported: mlx-lm .* has no such architecture\. Did you mean 'llama'\?",
        ),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, r"model_type 'llama'"),
        ({"num_attention_heads": 3}, r"fails on its files \(model_type 'llama'\): "),
        (
            {"model_type": "qwen2", "rms_norm_eps": ...},
            r"lacks what mlx-lm needs for model_type 'qwen2': 'rms_norm_eps'",
        ),
        ({"model_type": ...}, "its config.json has no model_type"),
        ({"model_type": "switch_layers"}, "model_type 'switch_layers' is not supported"),
        ({"model_type": "olmo"}, "code of model_type 'olmo' needs a package"),
        ({"quantization": {"group_size": 64}}, r"model_type 'llama'.*bits.*KeyError"),
    ],
)
def test_what_mlx_lm_raises_names_the_model_type(folder, tmp_path, change, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = {**json.loads((broken / "config.json").read_text()), **change}
    (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(ModelError, match=f"cannot be loaded: .*{message}"):
        load(broken)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_a_base_is_quantized_at_load_in_every_mode(mode, bits, group_size):
    base = load(quantize=QuantizeConfig(bits=bits, group_size=group_size, mode=mode))
    assert {layer.mode for layer in quantized_layers(base)} == {mode}
    assert base.config["quantization"] == {"bits": bits, "group_size": group_size, "mode": mode}


def test_quantizing_in_groups_that_no_layer_is_wide_enough_for_is_refused(tmp_path, monkeypatch):
    narrow = {**tiny_models.CONFIGS["llama"], "intermediate_size": 64, "head_dim": 16}
    monkeypatch.setitem(tiny_models.CONFIGS, "llama", narrow)
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    with pytest.raises(ModelError, match="no layer of .* can be quantized in groups of 128"):
        load(folder, quantize=QuantizeConfig(bits=4, group_size=128))


def test_a_models_own_code_runs_only_if_trusted_and_changes_the_content_hash(folder, tmp_path):
    custom = shutil.copytree(folder, tmp_path / "custom")
    config = json.loads((custom / "config.json").read_text())
    (custom / "config.json").write_text(json.dumps({**config, "model_file": "architecture.py"}))
    (custom / "architecture.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(custom)
    assert not (tmp_path / "ran").exists()
    trusted = load(custom, trust_remote_code=True)
    assert any("may run" in note for note in trusted.notes)
    assert (tmp_path / "ran").exists()
    with (custom / "architecture.py").open("a") as file:
        file.write("# changed\n")
    changed = load(custom, trust_remote_code=True)
    assert changed.fingerprint == trusted.fingerprint
    assert changed.content_hash != trusted.content_hash


@pytest.mark.parametrize(
    ("added", "noted"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 64}, False),
        ({"model_type": "qwen3", "sliding_window": 64}, False),
        ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True}, True),
        ({"model_type": "llama", "sliding_window": 64}, False),
    ],
)
def test_a_window_that_mlx_lm_does_not_compute_is_noted(tmp_path: Path, added: dict[str, object], noted: bool) -> None:
    model_folder = tiny_models.write_model(tmp_path / "model", "qwen3" if added["model_type"] == "qwen3" else "llama")
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, **added}))
    notes = load(model_folder).notes
    assert [note.startswith("the model's attention window of 64 tokens is not computed") for note in notes] == [
        True
    ] * noted
