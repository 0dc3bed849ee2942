"""A quantized base of every mode goes the whole way: training, exact resume, its adapter and its fused model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from tiny_models import MIXED, write_model

from runner.cli.commands import adapter_source, export, stored_settings
from runner.cli.commands.load_adapter import load_adapter
from runner.config.schema import Config
from runner.models import load
from runner.models.device import on_cpu

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])
MODES = {
    "affine": {"bits": 4, "group_size": 32},
    "mxfp4": {},
    "mxfp8": {},
    "nvfp4": {},
    MIXED: {"bits": 4, "group_size": 32},
}
SAMPLE = [("llama", "mxfp4", "never"), ("qwen3_moe", "affine", "auto"), ("deepseek_v3", MIXED, "auto")]
FAMILIES = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "mamba")
ALL = [
    (family, mode, dequantize)
    for family in FAMILIES
    for mode in MODES
    for dequantize in ("auto", "never")
    if (family, mode, dequantize) not in SAMPLE
]


def logits_of(run: Path, *overrides: str) -> mx.array:
    settings = stored_settings.read_settings(run, overrides)
    return load_adapter(adapter_source.find_adapter(run), settings, log=print).base.model(IDS)


@pytest.mark.parametrize(
    ("family", "mode", "dequantize"), [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL)]
)
def test_a_quantized_base_goes_the_whole_way(
    tmp_path: Path,
    tiny: Callable[..., Config],
    train: Callable[..., Path],
    assert_equal_runs: Callable[[Path, Path], None],
    family: str,
    mode: str,
    dequantize: str,
) -> None:
    folder = write_model(tmp_path / "base", family, dtype=mx.bfloat16, mode=mode, **MODES[mode])
    config = tiny(
        **{
            "model.path": str(folder),
            "model.dequantize": dequantize,
            "model.dtype": "float32",  # what auto is on the CPU: bfloat16 rounds by more than is compared here
            "data.max_length": 32,
            "lora.rank": 2,
            "lora.num_layers": 1,
            "optimizer.learning_rate": 1e-2,
            "train.iters": 2,
            "train.batch_size": 2,
            "train.eval_batches": 1,
            "checkpoint.every": 1,
        }
    )
    whole = train(config, tmp_path / "whole")
    stopped = train(config, tmp_path / "stopped", stop_at=1)
    assert_equal_runs(whole, train(config, stopped, resume=stopped))
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").open() if '"valid"' in line]
    assert losses[-1] != losses[0]
    # Stock mlx-lm computes in bfloat16: with what is not quantized in float32, its activations are ours.
    stock = mlx_lm.load(str(folder), adapter_path=str(whole / "adapters"))[0]
    expected = logits_of(whole)
    if dequantize == "never" or not on_cpu():
        load._cast(stock, mx.float32)
    else:
        stock.set_dtype(mx.float32, lambda dtype: dtype == mx.bfloat16)
    assert mx.abs(stock(IDS) - expected).max().item() < 1e-3
    assert export.run([str(whole), "--to", "fused", "--dequantize"]) == 0
    fused = mlx_lm.load(str(whole / "export-fused"))[0]
    assert mx.abs(fused(IDS) - logits_of(whole, "model.dequantize=always")).max().item() < 1e-3
    # Two updates of a random model have no effect that a quantization would have to keep: --force.
    assert export.run([str(whole), "--to", "fused", "--force", "--out", str(tmp_path / "kept")]) == 0
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["quantization"]
    mlx_lm.load(str(tmp_path / "kept"))
