"""The estimate of a run's peak memory, against runs of child processes that are measured.

MLX's path is measured by MLX's own counter, the CPU engine by the resident memory of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, save_config, save_model

from runner.cli.commands.arguments import compose_run
from runner.models import tiny
from runner.training.memory_estimate import estimate_memory, plan_model
from runner.training.memory_fit import surely_fits
from runner.training.run_plan import load_planned_data

TOLERANCE = 0.15
# On Linux, ru_maxrss of a child process begins with the memory of the process that started it; VmHWM does not.
PEAK_RSS = """
def peak_rss():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """A run: the sizes of its model (None: SmolLM2), the lengths of its rows, and settings."""

    name: str
    model: tuple[str, int, int, int, int, int, int] | None
    """Family, hidden size, blocks, inner size, heads, heads of keys, vocabulary."""
    length: int
    """Bytes of the longest rows; the shortest have half."""
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


MLX = {"train.cpu_engine": False}
SMALL = ("llama", 256, 6, 704, 8, 4, 8_000)
QWEN = ("qwen3", 512, 8, 1536, 8, 4, 32_000)
WIDE = ("qwen3", 1024, 4, 2816, 16, 8, 50_000)
QUICK = [
    Case("llama 256, rows of 128", SMALL, 128, MLX),
    Case("llama 256, CPU engine", SMALL, 512, {"train.batch_size": 8}),
]
LONG = [
    Case("llama 256, rows of 256", SMALL, 256, MLX),
    Case("llama 256, CPU engine, batch of 16", SMALL, 512, {"train.batch_size": 16}),
    Case("llama 256, checkpointing", SMALL, 256, {**MLX, "train.grad_checkpoint": True, "train.batch_size": 8}),
    Case("qwen3 512, no cache", QWEN, 256, {**MLX, "train.hidden_cache.enabled": False, "lora.num_layers": 4}),
    Case("qwen3 512, cache, 4 of 8 blocks", QWEN, 256, {**MLX, "lora.num_layers": 4}),
    Case("qwen3 512, checkpointing", QWEN, 512, {**MLX, "train.grad_checkpoint": True}),
    Case("qwen3 512, full head", QWEN, 128, {**MLX, "train.head": "all"}),
    Case("qwen3 512, batch of 1", QWEN, 512, {**MLX, "train.batch_size": 1}),
    Case("qwen3 512, accumulation", QWEN, 128, {**MLX, "train.batch_size": 2, "train.grad_accumulation": 4}),
    Case("qwen3 1024, rows of 64", WIDE, 64, MLX),
    Case("llama 256, 4 bits", SMALL, 128, {**MLX, "model.quantize.bits": 4}),
    Case("llama 256, bfloat16", SMALL, 128, {**MLX, "model.dtype": "bfloat16"}, "bfloat16"),
    Case("llama 256, rank 512", SMALL, 32, {**MLX, "lora.rank": 512, "train.batch_size": 1}),
    Case(
        "llama 256, rank 512, averaging",
        SMALL,
        32,
        {**MLX, "lora.rank": 512, "train.batch_size": 1, "train.averaging_power": 3},
    ),
    *(
        Case(
            f"llama 256, rank 512, {name}",
            SMALL,
            32,
            {**MLX, "lora.rank": 512, "train.batch_size": 1, "optimizer": name},
        )
        for name in ("adafactor", "muon")
    ),
    Case("SmolLM2-135M on MLX", None, 0, {**MLX, "train.batch_size": 2, "train.eval_batches": 8}),
    Case("SmolLM2-135M, CPU engine", None, 0, {"train.eval_batches": 8}),
    Case("SmolLM2-135M, CPU engine, 4 blocks", None, 0, {"lora.num_layers": 4, "train.eval_batches": 8}),
    Case("SmolLM2-135M, CPU engine, checkpointing", None, 0, {"train.grad_checkpoint": True, "train.eval_batches": 8}),
    Case("SmolLM2-135M, CPU engine, batch of 16", None, 0, {"train.batch_size": 16, "train.eval_batches": 2}),
]


def write_model(folder: Path, sizes: tuple[str, int, int, int, int, int, int], dtype: str) -> Path:
    family, hidden, blocks, inner, heads, kv_heads, vocabulary = sizes
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    arrays = tree_flatten(model.parameters())
    model.update(
        tree_unflatten([(n, (0.02 * mx.random.normal(a.shape)).astype(getattr(mx, dtype))) for n, a in arrays])
    )
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def settings_of(case: Case, folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train.iters": 3,
        "train.report_every": 1,
        "checkpoint.every": None,
        "train.cache_probes": False,
    }
    if case.model is not None:
        settings["model.path"] = str(write_model(folder / "model", case.model, case.dtype))
        settings["data.path"] = str(folder / "data")
        random = np.random.default_rng(0)
        (folder / "data").mkdir()
        for split, rows in (("train", 24), ("valid", 4)):
            lengths = random.integers(case.length // 2, case.length, rows)
            texts = ["".join(map(chr, random.integers(97, 123, n - 2))) for n in lengths]
            (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        settings["data.max_length"] = case.length
    return settings | case.settings


def overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in settings.items()]


def measured(case: Case, arguments: list[str], folder: Path) -> float:
    """Run it and return MLX's peak, or the peak of the process where the CPU engine computes, in bytes."""
    code = (
        f"import sys\n{PEAK_RSS}\nfrom runner.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print('RSS', peak_rss())\nsys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    environment["RUNNER_CACHE"] = str(folder / "cache") if case.model else environment.get("RUNNER_CACHE", "")
    if not environment["RUNNER_CACHE"]:
        del environment["RUNNER_CACHE"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, f"hydra.run.dir={folder}/run"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if case.settings.get("train.cpu_engine") is False:
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        return max(row["peak_memory_gb"] for row in rows) * 1e9
    assert "CPU engine" not in done.stdout, done.stdout  # MLX computed instead of it
    return float(done.stdout.rpartition("RSS ")[2].split()[0])


@pytest.mark.slow
@pytest.mark.cpu("how far MLX runs ahead, and the engine, are those of the CPU")
@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)], ids=lambda case: case.name
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(case, tmp_path):
    arguments = overrides(settings_of(case, tmp_path))
    config = compose_run("plan", arguments)
    planned = plan_model(config)
    data = load_planned_data(config, planned)[0]
    estimate = estimate_memory(config, data, planned)
    peak = measured(case, arguments, tmp_path)
    is_mlx = case.settings.get("train.cpu_engine") is False
    expected = estimate.mlx if is_mlx else estimate.total
    error = expected / peak - 1
    line = f"| {case} | {'MLX' if is_mlx else 'process'} | {expected / 1e6:,.0f} | {peak / 1e6:,.0f} | {error:+.1%} |"
    if table := os.environ.get("RUNNER_MEMORY_TABLE"):
        with open(table, "a") as out:
            out.write(line + "\n")
    assert abs(error) < TOLERANCE, line
    assert not surely_fits(config, data, planned, expected)  # the quick check before a run errs on the safe side
