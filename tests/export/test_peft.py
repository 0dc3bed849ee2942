"""Adapters carried to PEFT and back compute the same; what PEFT cannot hold, or is no plain LoRA, is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from runner.common.errors import ModelError
from runner.config.schema import Config, LoraConfig, ModelConfig
from runner.export.peft import PeftTarget
from runner.export.trained_adapter import TrainedAdapter
from runner.migrate.peft import import_adapter
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel, Params
from runner.models.peft.config import is_peft_folder, module_names
from runner.models.peft.families import FAMILIES, find_family, split_name
from runner.models.peft.read import fit, read_adapter

IDS = mx.array([[1 + (37 * i) % 300 for i in range(24)]])
REFERENCE = Path(__file__).resolve().parents[1] / "models" / "reference"


def adapt(folder: Path, lora: LoraConfig) -> AdaptedModel:
    """The model of `folder` with an adapter of random factors."""
    adapted = AdaptedModel(load_base_model(ModelConfig(path=str(folder))), lora, seed=0)
    mx.random.seed(5)
    adapted.place({name: 0.2 * mx.random.normal(array.shape) for name, array in adapted.params().items()})
    adapted.model.eval()
    return adapted


def job_of(adapted: AdaptedModel, lora: LoraConfig) -> TrainedAdapter:
    config = Config()
    config.model.path = adapted.base.model_path
    return TrainedAdapter(adapted, adapted.params(), lora, config, {}, print)


def write(folder: Path, adapted: AdaptedModel, lora: LoraConfig) -> dict[str, Any]:
    folder.mkdir()
    PeftTarget().write(job_of(adapted, lora), folder)
    return json.loads((folder / "adapter_config.json").read_text())


def read(folder: Path, adapted: AdaptedModel, lora: LoraConfig) -> Params:
    adapter = read_adapter(folder, find_family(adapted.base.config["model_type"]))
    return fit(adapter, adapted.params(), lora, folder, tied=adapted.is_tied)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe"])
def test_an_adapter_is_read_back_as_it_was(tmp_path: Path, model_type: str) -> None:
    folder = tiny_models.write_model(tmp_path / "model", model_type)
    lora = LoraConfig(rank=3, scale=7.0, num_layers=1)
    adapted = adapt(folder, lora)
    config = write(tmp_path / "peft", adapted, lora)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 21, False)
    last = len(adapted.model.layers) - 1
    assert (config["layers_to_transform"], config["layers_pattern"]) == ([last], "layers")
    assert is_peft_folder(tmp_path / "peft")
    weights = read(tmp_path / "peft", adapted, lora)
    for name, array in adapted.params().items():
        assert mx.array_equal(weights[name], array), name


def test_rslora_keeps_its_alpha(tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    lora = LoraConfig(rank=4, alpha=8.0, rslora=True, num_layers=-1)
    config = write(tmp_path / "peft", adapt(folder, lora), lora)
    assert (config["lora_alpha"], config["use_rslora"], config["layers_to_transform"]) == (8, True, None)


def test_another_scale_and_lower_ranks_compute_the_same(tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    small = LoraConfig(rank=2, scale=3.0, num_layers=-1)
    adapted = adapt(folder, small)
    expected = adapted.model(IDS)
    write(tmp_path / "peft", adapted, small)
    large = LoraConfig(rank=5, scale=20.0, num_layers=-1)
    wide = AdaptedModel(load_base_model(ModelConfig(path=str(folder))), large, seed=1)
    weights = read(tmp_path / "peft", wide, large)
    before = wide.params()
    wide.place(weights)
    assert mx.abs(wide.model(IDS) - expected).max().item() < 1e-4
    name = "model.layers.0.self_attn.q_proj.lora_a"
    assert mx.array_equal(weights[name][:, 2:], before[name][:, 2:])  # or the further factors could never learn
    with pytest.raises(ModelError, match="lora.rank is 1.*runner import"):
        narrow = LoraConfig(rank=1, num_layers=-1)
        read(tmp_path / "peft", AdaptedModel(load_base_model(ModelConfig(path=str(folder))), narrow, seed=1), narrow)


KINDS = {
    "dora": LoraConfig(rank=3, type="dora", scale=2.0, num_layers=2),
    "ranks": LoraConfig(rank=4, alpha=6.0, rslora=True, rank_pattern=["q_proj:2", "layers.1.up_proj:5"], num_layers=-1),
    "ranks and scale": LoraConfig(rank=4, scale=3.0, rank_pattern=["q_proj:2"], num_layers=1),
    "layers by number": LoraConfig(rank=2, scale=2.0, keys=["layers.0-1.self_attn.*", "layers.3.mlp.up_proj"]),
    "embedding and head": LoraConfig(rank=2, scale=2.0, keys=["embed_tokens", "lm_head", "q_proj"], num_layers=2),
    "whole modules": LoraConfig(
        rank=2, num_layers=1, modules_to_save=["embed_tokens", "lm_head", "layers.0.mlp", "norm"]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_is_read_back_as_it_was_by_the_settings_of_its_import(tmp_path: Path, kind: str) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    adapted = adapt(folder, KINDS[kind])
    expected = adapted.model(IDS)
    write(tmp_path / "peft", adapted, KINDS[kind])
    weights = read(tmp_path / "peft", adapted, KINDS[kind])
    assert weights.keys() == adapted.params().keys()
    for name, array in adapted.params().items():
        assert mx.allclose(weights[name], array, rtol=1e-6, atol=0).item(), name
    overrides = {name: value for name, value in import_adapter(tmp_path / "peft").values.items() if "lora." in name}
    imported = LoraConfig(**{name.removeprefix("lora."): value for name, value in overrides.items()})
    again = AdaptedModel(load_base_model(ModelConfig(path=str(folder))), imported, seed=9)
    again.place(read(tmp_path / "peft", again, imported))
    assert mx.abs(again.model(IDS) - expected).max().item() < 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": "lora_only"}, "biases"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialization changed"),
        ({"rank_pattern": {"(a+)+b": 2}}, "is not supported"),
        ({"r": 9}, "rank 9"),
        ({"r": 0}, "not a whole number from 1"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    lora = LoraConfig(rank=2, num_layers=-1)
    adapted = adapt(folder, lora)
    config = write(tmp_path / "peft", adapted, lora)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=reason):
        read(tmp_path / "peft", adapted, lora)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    lora = LoraConfig(rank=2, num_layers=-1)
    adapted = adapt(folder, lora)
    write(tmp_path / "peft", adapted, lora)
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle"):
        read(tmp_path / "peft", adapted, lora)


@pytest.mark.parametrize(("model_type", "reason"), [("mamba", "not known here"), ("gpt_oss", "not known here")])
def test_an_unknown_architecture_is_refused(tmp_path: Path, model_type: str, reason: str) -> None:
    adapted = adapt(tiny_models.write_model(tmp_path / "model", model_type), LoraConfig(rank=2))
    with pytest.raises(ModelError, match=reason):
        write(tmp_path / "peft", adapted, LoraConfig(rank=2))


def test_an_adapter_of_peft_is_a_warm_start(tiny: Callable, train: Callable, tmp_path: Path) -> None:
    settings = tiny(**{"lora.num_layers": -1, "optimizer.learning_rate": 1e-2})
    run = train(settings, tmp_path / "run")
    from runner.cli.commands import export

    assert export.run([str(run), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    second = train(tiny(**{"lora.num_layers": -1, "adapter": str(tmp_path / "peft")}), tmp_path / "second")
    losses = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    end = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    started = next(row["loss"] for row in losses if row["split"] == "valid")
    ended = [row["loss"] for row in end if row["split"] == "valid"][-1]
    assert abs(started - ended) < 1e-5


@pytest.mark.reference
def test_peft_computes_the_same_logits_and_its_adapters_are_read(tmp_path: Path) -> None:
    """Every known family that transformers can save here, both ways, in float32 to 1e-3."""
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    run = {"check": True, "capture_output": True, "text": True, "timeout": 1200}
    subprocess.run([python, str(REFERENCE / "make_transformers5.py"), str(tmp_path)], **run)
    types = {f: json.loads((f / "config.json").read_text())["model_type"] for f in sorted(tmp_path.iterdir())}
    folders = [folder for folder, model_type in types.items() if model_type in FAMILIES]
    lora = LoraConfig(rank=3, scale=2.0, num_layers=1)
    for folder in folders:
        ids = mx.array(np.load(folder / "ids.npy"))
        np.save(folder / "own_base.npy", np.array(load_base_model(ModelConfig(path=str(folder))).model(ids)))
        adapted = adapt(folder, without_refused(folder, lora))
        write(folder / "peft", adapted, lora)
        np.save(folder / "own_logits.npy", np.array(adapted.model(ids)))
    subprocess.run([python, str(REFERENCE / "peft_logits.py"), *map(str, folders)], **run)
    assert len(folders) > 15
    for folder in folders:
        compare(folder, lora)


@pytest.mark.reference
def test_peft_computes_the_same_logits_with_each_kind_of_adapter(tmp_path: Path) -> None:
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    folders = []
    for number, lora in enumerate(KINDS.values()):
        folder = tiny_models.write_model(tmp_path / f"kind{number}", "llama")
        adapted = adapt(folder, lora)
        np.save(folder / "ids.npy", np.array(IDS))
        np.save(folder / "own_logits.npy", np.array(adapted.model(IDS)))
        write(folder / "peft", adapted, lora)
        folders.append(folder)
    command = [python, str(REFERENCE / "peft_logits.py"), *map(str, folders)]
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    for folder, kind in zip(folders, KINDS, strict=True):
        assert not (folder / "warnings.txt").read_text(), kind
        difference = np.abs(np.load(folder / "own_logits.npy") - np.load(folder / "peft_logits.npy")).max()
        assert difference < 5e-4, (kind, difference)


def without_refused(folder: Path, lora: LoraConfig) -> LoraConfig:
    """The same shape, on the layers that PEFT can hold."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    refused = tuple(find_family(model_type).refused)
    if not refused:
        return lora
    keys = AdaptedModel(load_base_model(ModelConfig(path=str(folder))), lora, 0).targets.keys
    return LoraConfig(**{**vars(lora), "keys": [key for key in keys if not key.startswith(refused)]})


def compare(folder: Path, lora: LoraConfig) -> None:
    """Compare the logits of our adapter in PEFT, and those of PEFT's adapter here."""
    theirs, ours = np.load(folder / "peft_logits.npy"), np.load(folder / "own_logits.npy")
    base = np.load(folder / "logits.npy")
    # mlx-lm's Gemma 1 computes another GELU than transformers, with and without an adapter.
    tolerance = 1e-3 + np.abs(np.load(folder / "own_base.npy") - base).max() * (folder.name == "gemma")
    assert np.abs(ours - base).max() > 0.05, folder.name
    assert np.abs(ours - theirs).max() < tolerance, (folder.name, np.abs(ours - theirs).max())
    names = module_names(folder / "from_peft")
    family = find_family(json.loads((folder / "config.json").read_text())["model_type"])
    layers = read_adapter(folder / "from_peft", family).layers
    assert names and layers
    keys = sorted({split_name(name, family.own_blocks)[1] for name in layers})
    wide = LoraConfig(rank=8, scale=2.0, num_layers=-1, keys=keys)
    adapted = adapt(folder, wide)
    adapted.place(read(folder / "from_peft", adapted, wide))
    ours = np.array(adapted.model(mx.array(np.load(folder / "ids.npy"))))
    theirs = np.load(folder / "from_peft_logits.npy")
    assert np.abs(ours - base).max() > 0.05, folder.name
    assert np.abs(ours - theirs).max() < tolerance, (folder.name, np.abs(ours - theirs).max())
