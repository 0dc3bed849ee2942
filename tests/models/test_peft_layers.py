"""Outputs and gradients of adapter layers equal those that PEFT computed with torch, in float32 to 1e-4."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from runner.config.schema import LoraConfig
from runner.config.validation import lora_scale
from runner.models.adapter_layers import PissaLinear
from runner.models.adapter_targets import Target, adapter_for
from runner.models.pissa import set_start

REFERENCE = Path(__file__).parent / "reference"
RECORDED = json.loads((REFERENCE / "peft_layers.json").read_text())
KINDS = {
    "lora": LoraConfig(rank=2, alpha=3.0),
    "rslora": LoraConfig(rank=2, alpha=3.0, rslora=True),
    "dora": LoraConfig(rank=2, alpha=3.0, type="dora"),
    "pissa": LoraConfig(rank=2, alpha=3.0, init="pissa"),
}


def close(ours: mx.array, theirs: object) -> bool:
    return np.allclose(np.array(ours), np.array(theirs, np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_peft_computes_and_has_its_gradients(kind):
    values, lora = RECORDED[kind], KINDS[kind]
    linear = nn.Linear(8, 6)
    linear.weight, linear.bias = mx.array(values["weight"]), mx.array(values["bias"])
    linear.freeze()
    layer = adapter_for(Target("layer", linear, lora.rank), lora, lora_scale(lora), has_values=True)
    if isinstance(layer, PissaLinear):
        set_start(layer)
        # Singular vectors are unique up to their sign.
        assert close(layer.lora_a @ layer.lora_b, (np.array(values["start B"]) @ np.array(values["start A"])).T)
        layer.set_start(mx.array(values["start A"]).T, mx.array(values["start B"]).T)
    layer.lora_a, layer.lora_b = mx.array(values["A"]).T, mx.array(values["B"]).T
    if kind == "dora":
        layer.m = mx.array(values["magnitude_vector"])
    x = mx.array(values["x"])
    assert close(layer(x), values["y"])
    grads = nn.value_and_grad(layer, lambda layer: mx.sin(layer(x)).sum())(layer)[1]
    assert close(grads["lora_a"].T, values["grad A"]) and close(grads["lora_b"].T, values["grad B"])
    if kind == "dora":
        assert close(grads["m"], values["grad magnitude_vector"])


@pytest.mark.reference
def test_the_recorded_values_are_those_of_peft(tmp_path):
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    subprocess.run([python, str(REFERENCE / "peft_layers.py"), str(tmp_path / "new.json")], check=True, timeout=600)
    again = json.loads((tmp_path / "new.json").read_text())
    assert again.keys() == RECORDED.keys()
    for kind, values in RECORDED.items():
        for name, recorded in values.items():
            assert np.allclose(again[kind][name], recorded, rtol=1e-5, atol=1e-6), (kind, name)
