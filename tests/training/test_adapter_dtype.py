"""`lora.dtype: model`: the adapter computes in the base model's dtype and is trained in float32."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from runner.config.schema import LoraConfig, ModelConfig
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel

HALF = {"model.dtype": "bfloat16", "train.iters": 12, "lora.dropout": 0.1}


def losses(run: Path, split: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == split]


def test_losses_equal_those_of_a_float32_adapter_within_the_noise_of_bfloat16(tiny, train, tmp_path):
    single = train(tiny(**HALF), tmp_path / "float32")
    half = train(tiny(**HALF, **{"lora.dtype": "model"}), tmp_path / "model")
    for split in ("train", "valid"):
        first, second = losses(single, split), losses(half, split)
        assert second == pytest.approx(first, rel=2e-3)
    assert losses(half, "train") != losses(single, "train")
    assert losses(half, "valid")[-1] < losses(half, "valid")[0] - 0.1
    for name in ("adapters", "optimizer"):
        saved = mx.load(str(half / f"checkpoints/step-0000012/{name}.safetensors"))
        assert {a.dtype for a in saved.values() if a.size > 1} == {mx.float32}


def test_a_resume_is_exact(tiny, train, tmp_path, assert_equal_runs):
    settings = {**HALF, "lora.dtype": "model"}
    whole = train(tiny(**settings), tmp_path / "whole")
    run = train(tiny(**settings), tmp_path / "run", stop_at=5)
    train(tiny(**settings), run, resume=run)
    assert_equal_runs(whole, run)


@pytest.mark.parametrize("bits", [None, 4])
def test_placed_weights_have_the_dtype_of_their_layer_and_float32_gradients(bits):
    settings = ModelConfig(path="builtin:tiny", dtype="bfloat16")
    settings.quantize.bits, settings.quantize.group_size = bits, 32
    adapted = AdaptedModel(load_base_model(settings), LoraConfig(rank=2, dtype="model"), seed=0)
    params = adapted.params()
    assert {a.dtype for a in params.values()} == {mx.float32}

    def loss(params):
        adapted.place(params)
        assert {a.dtype for a in adapted.params().values()} == {mx.bfloat16}
        return adapted.model(mx.array([[1, 2, 3]])).astype(mx.float32).sum()

    grads = mx.grad(loss)(params)
    assert {a.dtype for a in grads.values()} == {mx.float32}
    assert any(mx.abs(a).max().item() > 0 for a in grads.values())


def test_with_a_float32_base_both_dtypes_are_equal(tiny, train, tmp_path, assert_equal_runs):
    short = {"train.iters": 6}
    first = train(tiny(**short), tmp_path / "float32")
    assert_equal_runs(first, train(tiny(**short, **{"lora.dtype": "model"}), tmp_path / "model"))
