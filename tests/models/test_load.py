"""Base models from wherever model.path points, and sentences for what cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from runner.common.errors import ModelError
from runner.config.schema import ModelConfig
from runner.export.mlx import write_model_folder
from runner.models.identity import content_hash, weights_fingerprint
from runner.models.load import load_base_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), path)
    return path


def test_tiny_is_the_same_model_every_time():
    assert (
        load_base_model(ModelConfig(path="builtin:tiny")).fingerprint
        == load_base_model(ModelConfig(path="builtin:tiny")).fingerprint
    )


def test_a_folder_gives_the_weights_that_were_written(folder):
    assert (
        load_base_model(ModelConfig(path=str(folder))).fingerprint
        == load_base_model(ModelConfig(path="builtin:tiny")).fingerprint
    )


def test_a_hub_id_is_read_from_the_hubs_offline_cache(folder, tmp_path):
    cache = tmp_path / "hub/models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    code = (
        "import json; from runner.backends.cpu import blas; blas.load_blas(); from runner.config.schema import ModelConfig as Model\n"
        "from runner.models.load import load_base_model as load\n"
        "print(json.dumps([load(Model(path='someone/tiny', revision=r)).fingerprint for r in (None, 'main')]))\n"
        "try: load(Model(path='someone/other'))\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, refused = done.stdout.splitlines()[-2:]
    assert set(json.loads(found)) == {load_base_model(ModelConfig(path="builtin:tiny")).fingerprint}
    assert refused.startswith("ModelError model.path=someone/other cannot be loaded")


def test_quantizing_at_load_keeps_the_layers_quantized_and_changes_the_fingerprint():
    model = ModelConfig(path="builtin:tiny")
    model.quantize.bits, model.quantize.group_size = 4, 32
    made = load_base_model(model)
    kinds = [m for _, m in made.model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert kinds and made.config["quantization"]["bits"] == 4
    assert made.fingerprint != load_base_model(ModelConfig(path="builtin:tiny")).fingerprint


@pytest.mark.parametrize("bits", [None, 4])
def test_the_contents_notice_one_weight_and_one_word_of_the_config(bits):
    settings = ModelConfig(path="builtin:tiny")
    settings.quantize.bits, settings.quantize.group_size = bits, 32
    base = load_base_model(settings)
    assert (
        content_hash(base.model, base.config, base.fingerprint)
        == base.content_hash
        == load_base_model(settings).content_hash
    )
    assert content_hash(base.model, {**base.config, "rope_theta": 5e5}, base.fingerprint) != base.content_hash
    layer = base.model.layers[1].mlp.up_proj
    weight = mx.array(layer.weight)
    weight[3, 5] = weight[3, 5] + (1 if bits else 1e-3)
    layer.weight = weight
    assert content_hash(base.model, base.config, base.fingerprint) != base.content_hash
    layer.weight = base.model.layers[2].mlp.up_proj.weight
    before = content_hash(base.model, base.config, base.fingerprint)
    layer.weight = layer.weight * 2
    assert content_hash(base.model, base.config, base.fingerprint) != before
    before, rows = content_hash(base.model, base.config, base.fingerprint), mx.arange(layer.weight.shape[0])
    rows[2], rows[40] = 40, 2
    layer.weight = layer.weight[rows]
    assert content_hash(base.model, base.config, base.fingerprint) != before, "lines that changed places"
    if not bits:
        layer.weight = weight
        assert weights_fingerprint(base.model) == base.fingerprint, "a sample does not see it"
        base.model.set_dtype(mx.bfloat16)
        half = content_hash(base.model, base.config, base.fingerprint)
        layer.weight[3, 5] = layer.weight[3, 5] * 2
        assert content_hash(base.model, base.config, base.fingerprint) != half


def test_a_quantized_folder_is_expanded_on_the_cpu_and_kept_where_asked(tmp_path):
    model = ModelConfig(path="builtin:tiny")
    model.quantize.bits, model.quantize.group_size = 8, 32
    path = tmp_path / "q"
    write_model_folder(load_base_model(model), path)
    expanded, kept = (
        load_base_model(ModelConfig(path=str(path))),
        load_base_model(ModelConfig(path=str(path), dequantize="never")),
    )
    assert not [m for _, m in expanded.model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert [m for _, m in kept.model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert any("is dequantized" in note for note in expanded.notes)
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.abs(expanded.model(tokens) - kept.model(tokens)).max().item() < 1e-3


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", mx.float16), ("bfloat16", mx.bfloat16)])
def test_dtype_casts_the_base(dtype, wanted):
    made = load_base_model(ModelConfig(path="builtin:tiny", dtype=dtype))
    assert made.model.model.layers[0].self_attn.q_proj.weight.dtype == wanted
    assert weights_fingerprint(made.model) == made.fingerprint


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("builtin:tinny", "Did you mean 'tiny'"),
        ("/nowhere/model", "no such folder or file"),
        ("nothing", "no such folder or file"),
        ("missing.gguf", "no such file"),
    ],
)
def test_a_path_that_is_no_model_gets_a_sentence(path, says):
    with pytest.raises(ModelError) as refused:
        load_base_model(ModelConfig(path=path))
    assert says in str(refused.value)


def test_broken_folders_get_a_sentence(folder, tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        load_base_model(ModelConfig(path=str(tmp_path)))
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="unheard_of"):
        load_base_model(ModelConfig(path=str(broken)))
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model"):
        load_base_model(ModelConfig(path=str(broken)))


def test_code_that_comes_with_a_model_does_not_run_unless_it_is_trusted_and_then_it_is_said(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_file": "mine.py"}))
    (own / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_base_model(ModelConfig(path=str(own)))
    assert not (tmp_path / "ran").exists()
    trusted = load_base_model(ModelConfig(path=str(own), trust_remote_code=True))
    assert any("may run" in note for note in trusted.notes)
    assert (tmp_path / "ran").exists()
    with (own / "mine.py").open("a") as file:
        file.write("# another\n")
    again = load_base_model(ModelConfig(path=str(own), trust_remote_code=True))
    assert again.fingerprint == trusted.fingerprint
    assert again.content_hash != trusted.content_hash, "what caches know the model by does not see its code"
