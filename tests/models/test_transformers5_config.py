"""Folders saved by transformers 5 are the same models as with the older keys; what mlx-lm cannot read is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models

from runner.common.errors import ModelError
from runner.config.schema import LoraConfig, ModelConfig
from runner.export.fused import fuse_adapter
from runner.export.mlx import export_model
from runner.export.verify_export import verify_model_folder
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel

IDS = mx.array([[1 + (37 * i) % 300 for i in range(40)]])
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"original_max_position_embeddings": 16, "long_factor": [1.5] * 6, "short_factor": [1.0] * 6}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": tiny_models.CONFIGS["llama"],
    "phi3": {**tiny_models.CONFIGS["llama"], "head_dim": 16},
    "gemma3_text": {
        **tiny_models.CONFIGS["llama"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "head_dim": 16,
        "num_hidden_layers": 6,
    },
    "gpt_neox": {
        "max_position_embeddings": 512,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "layer_norm_eps": 1e-5,
        "vocab_size": 320,
    },
    "minimax_m2": {
        **tiny_models.CONFIGS["llama"],
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 64,
        "scoring_func": "sigmoid",
        "num_hidden_layers": 2,
    },
    "qwen3_moe": {**tiny_models.CONFIGS["qwen3_moe"], "num_hidden_layers": 2},
}
THETA = {"rope_theta": 400.0, "rope_type": "default"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "base": ("qwen2", {"rope_theta": 400.0}, {"rope_parameters": THETA}),
    "yarn": (
        "qwen2",
        {"rope_theta": 400.0, "rope_scaling": {**YARN, "type": "yarn"}},
        {"rope_parameters": {"rope_theta": 400.0, "rope_type": "yarn", **YARN}},
    ),
    "longrope": (
        "phi3",
        {
            "rope_theta": 400.0,
            "rope_scaling": {**LONGROPE, "type": "longrope"},
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
        },
        {"rope_parameters": {**LONGROPE, **THETA, "rope_type": "longrope", "partial_rotary_factor": 0.75}},
    ),
    "by layer type": (
        "gemma3_text",
        {
            "rope_theta": 400.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
        },
        {
            "rope_parameters": {
                "full_attention": {**THETA, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
            },
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "other names": (
        "gpt_neox",
        {"rotary_emb_base": 400.0, "rotary_pct": 0.25},
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.25}},
    ),
    "rotated width": (
        "minimax_m2",
        {"rope_theta": 400.0, "rotary_dim": 16},
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
    ),
    "experts": (
        "qwen3_moe",
        {"rope_theta": 400.0, "num_experts": 4},
        {"rope_parameters": THETA, "num_local_experts": 4},
    ),
}


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in MODELS.items():
        monkeypatch.setitem(tiny_models.CONFIGS, name, config)


def write(folder: Path, family: str, old: dict[str, Any]) -> Path:
    tiny_models.CONFIGS[family] = {**MODELS[family], **old}
    return tiny_models.write_model(folder, family)


def rewrite(folder: Path, removed: Any, added: dict[str, Any]) -> None:
    """Replace keys of the folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in {*removed, "rope_theta"}}
    (folder / "config.json").write_text(json.dumps({**config, **added}))


def load(folder: Path) -> BaseModel:
    return load_base_model(ModelConfig(path=str(folder)))


def difference(first: mx.array, second: mx.array) -> float:
    return mx.abs(first - second).max().item()


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_transformers_5_is_the_model_with_the_older_keys(tmp_path: Path, case: str) -> None:
    family, old, new = CASES[case]
    folder = write(tmp_path / "model", family, old)
    before = load(folder)
    assert not before.carried_over
    rewrite(folder, old, new)
    after = load(folder)
    assert difference(before.model(IDS), after.model(IDS)) == 0
    assert any("transformers 5" in note for note in after.notes)
    assert after.fingerprint != before.fingerprint, "a run that was trained on the misread model must not be resumed"


@pytest.mark.parametrize("case", ["base", "by layer type"])
def test_an_export_is_the_same_model_in_stock_mlx_lm(tmp_path: Path, case: str) -> None:
    family, old, new = CASES[case]
    folder = write(tmp_path / "model", family, old)
    rewrite(folder, old, new)
    misread = mlx_lm.load(str(folder))[0](IDS)
    adapted = AdaptedModel(load(folder), LoraConfig(rank=2, num_layers=1), seed=0)
    expected = adapted.model(IDS)
    assert difference(misread, expected) > 1e-3
    export_model(fuse_adapter(adapted, dequantize=False), tmp_path / "fused")
    assert difference(mlx_lm.load(str(tmp_path / "fused"))[0](IDS), expected) < 1e-4
    assert not load(tmp_path / "fused").carried_over


@pytest.mark.parametrize(
    ("case", "key"), [("base", "rope_theta"), ("yarn", "rope_scaling"), ("by layer type", "sliding_window_pattern")]
)
def test_an_export_that_stock_mlx_lm_misreads_is_noticed(tmp_path: Path, case: str, key: str) -> None:
    family, old, _ = CASES[case]
    folder = write(tmp_path / "model", family, old)
    base = load(folder)
    verify_model_folder(base, folder, folder)
    rewrite(folder, [key], {})
    with pytest.raises(ModelError, match="would not read the same model"):
        verify_model_folder(base, folder, folder)


def test_what_stock_mlx_lm_reads_is_left_alone(tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "qwen3")
    before = load(folder)
    rewrite(folder, [], {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})
    after = load(folder)
    assert not after.carried_over and not after.notes and after.fingerprint == before.fingerprint
    assert difference(before.model(IDS), after.model(IDS)) == 0


@pytest.mark.parametrize(
    ("family", "added", "reason"),
    [
        ("gemma2", {"rope_parameters": {**THETA, "rope_type": "yarn", **YARN}}, "rope_type=yarn in rope_parameters"),
        ("llama", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_theta": 10.0, "rope_parameters": THETA}, "rope_theta=10.0, but rope_theta=400.0"),
        (
            "llama",
            {"rope_parameters": {"full_attention": THETA, "sliding_attention": {**THETA, "rope_theta": 10.0}}},
            "sliding_attention.rope_theta=10.0",
        ),
        (
            "llama",
            {"rope_parameters": {"a": THETA, "b": {**THETA, "rope_theta": 10.0}}},
            "rope_parameters of a, b that differ",
        ),
        ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 5]}, "layer_types without a fixed"),
    ],
)
def test_what_mlx_lm_has_no_place_for_is_refused(
    tmp_path: Path, family: str, added: dict[str, Any], reason: str
) -> None:
    folder = tiny_models.write_model(tmp_path / "model", family)
    rewrite(folder, [], added)
    with pytest.raises(ModelError, match=reason) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.reference
def test_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    """Every family whose folders stock mlx-lm misreads, as transformers 5 saves it."""
    script = Path(__file__).parent / "reference" / "make_transformers5.py"
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    subprocess.run([python, str(script), str(tmp_path)], check=True, capture_output=True, text=True, timeout=600)
    folders = sorted(path.parent for path in tmp_path.glob("*/config.json"))
    assert len(folders) > 15
    for folder in folders:
        expected = np.load(folder / "logits.npy")
        ids = mx.array(np.load(folder / "ids.npy"))
        logits = np.array(load(folder).model(ids).astype(mx.float32))
        assert np.abs(logits - expected).max() < 2e-4 * np.abs(expected).max(), folder.name
