"""The rows of the comparison and the command of each.

An optimization is a setting of `runner` that saves time or memory. To measure a new one, add it to `OPTIMIZATIONS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.models import FLOAT32, HUB
from benchmarks.workloads import MAX_LENGTH

STOCK, OURS = "mlx_lm", "runner"


@dataclass(frozen=True)
class Work:
    """What both sides train; each micro-batch is an update."""

    iters: int
    eval_every: int
    """Updates between evaluations and saves, a divisor of `iters` above 1: stock mlx-lm evaluates before its first
    update and before each that this divides, ours before the first and after those, so equally often."""
    batch_size: int = 4
    num_layers: int = 16
    rank: int = 8
    scale: float = 20.0
    learning_rate: float = 1e-4
    falls_to_zero: bool = False
    """Whether the learning rate falls in a straight line, to 0 at the last update; else it is constant."""


@dataclass(frozen=True)
class Optimization:
    """Settings of `runner` that switch an optimization off, as in stock mlx-lm, and on."""

    about: str
    off: Mapping[str, str]
    on: Mapping[str, str]


OPTIMIZATIONS: dict[str, Optimization] = {
    "near lengths": Optimization("batches of similar lengths", {"data.window": "1"}, {"data.window": "64"}),
    "widths": Optimization("padded to the widths that pad least", {"data.pad_to": "32"}, {"data.pad_to": "null"}),
    "head": Optimization(
        "head and loss at supervised tokens only, in chunks",
        {"train.head": "all", "train.loss_chunk": "65536"},
        {"train.head": "supervised", "train.loss_chunk": "256"},
    ),
    "trunk": Optimization(
        "hidden states of the frozen blocks cached",
        {"train.hidden_cache.enabled": "false"},
        {"train.hidden_cache.enabled": "true"},
    ),
    "engine": Optimization(
        "the CPU engine (which includes the head)",
        {"train.cpu_engine": "false", "train.head": "all", "train.loss_chunk": "65536"},
        {"train.cpu_engine": "true", "train.head": "supervised", "train.loss_chunk": "256"},
    ),
    "native": Optimization(
        "the CPU engine with C code between products",
        {
            "train.cpu_engine": "false",
            "train.head": "all",
            "train.loss_chunk": "65536",
            "train.cpu_native": "false",
        },
        {
            "train.cpu_engine": "true",
            "train.head": "supervised",
            "train.loss_chunk": "256",
            "train.cpu_native": "true",
        },
    ),
    "evaluation": Optimization(
        "evaluation in larger batches, the one before training cached",
        {"train.eval_tokens": "1", "train.cache_baseline": "false"},
        {"train.eval_tokens": "2048", "train.cache_baseline": "true"},
    ),
    "checks": Optimization(
        "cached probes",
        {"train.cache_probes": "false"},
        {"train.cache_probes": "true"},
    ),
    "prefetch": Optimization("the next batch prefetched", {"train.prefetch": "false"}, {"train.prefetch": "true"}),
    "saving": Optimization(
        "saving in the background", {"checkpoint.background": "false"}, {"checkpoint.background": "true"}
    ),
    "compile": Optimization(
        "compiled step (off as shipped on the CPU)", {"train.compile": "never"}, {"train.compile": "always"}
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    side: str
    about: str
    model: str = FLOAT32
    flags: tuple[str, ...] = ()
    """Of stock mlx-lm: flags of stock.py; without any, mlx-lm's own command runs."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Of `runner`."""


def optimizations_off(but: str | None = None) -> dict[str, str]:
    """Return the overrides that switch off every optimization `but` one."""
    settings: dict[str, str] = {}
    for optimization in OPTIMIZATIONS.values():
        settings |= optimization.off
    if but is not None:
        settings |= OPTIMIZATIONS[but].on  # last, since the engine sets the head's settings too
    return settings


ROWS: dict[str, Row] = {
    "a": Row(STOCK, "mlx_lm.lora as installed: bfloat16, its own BLAS", model=HUB),
    "b": Row(STOCK, "mlx_lm.lora in float32 with our BLAS", flags=("--blas",)),
    "c": Row(STOCK, "b with its sort by length repaired", flags=("--blas", "--sort")),
    "d": Row(OURS, "ours, every optimization off", overrides=optimizations_off()),
    **{
        f"e: {name}": Row(OURS, f"d with {optimization.about}", overrides=optimizations_off(but=name))
        for name, optimization in OPTIMIZATIONS.items()
    },
    "f": Row(OURS, "ours as shipped"),
}
GATE = Row(STOCK, "b without its padding token per row", flags=("--blas", "--exact"))
"""Not timed. Stock mlx-lm trains on one padding token per row: only without it can its adapter equal ours."""
SLOW_ROW, BASE_ROW, OFF_ROW, SHIPPED_ROW = "a", "b", "d", "f"
OPTIMIZATION_ROWS = tuple(row for row in ROWS if row.startswith("e: "))
QUICK_ROWS = ("a", "b", "d", "f")


def command(row: Row, work: Work, *, model: str, data: str, seed: int, folder: Path) -> list[str]:
    """Return the command of `row`; its output, and a config file of stock mlx-lm, go to `folder`."""
    if row.side == OURS:
        return [sys.executable, "-m", "runner", *overrides(row, work, model, data, seed, folder)]
    written = folder / "config.yaml"
    written.write_text(json.dumps(stock_config(work, model, data, seed, folder), indent=2))  # JSON is YAML
    stock = [str(Path(__file__).parent / "stock.py"), *row.flags, "--"] if row.flags else ["-m", "mlx_lm"]
    return [sys.executable, *stock, "lora", "-c", str(written)]


def stock_config(work: Work, model: str, data: str, seed: int, folder: Path) -> dict[str, object]:
    """Return the config of stock mlx-lm. Without `keys`, both sides adapt every linear layer of the blocks."""
    schedule = {"name": "linear_schedule", "arguments": [work.learning_rate, 0.0, work.iters - 1]}
    return {
        "model": model,
        "train": True,
        "data": data,
        "seed": seed,
        "fine_tune_type": "lora",
        "num_layers": work.num_layers,
        "lora_parameters": {"rank": work.rank, "scale": work.scale, "dropout": 0.0},
        "batch_size": work.batch_size,
        "iters": work.iters,
        "optimizer": "adam",
        "optimizer_config": {"adam": {"bias_correction": True}},
        "learning_rate": work.learning_rate,
        "lr_schedule": schedule if work.falls_to_zero else None,
        "mask_prompt": True,
        "max_seq_length": MAX_LENGTH,
        "val_batches": -1,
        "steps_per_eval": work.eval_every,
        "save_every": work.eval_every,
        "adapter_path": str(folder / "adapters"),
    }


def overrides(row: Row, work: Work, model: str, data: str, seed: int, folder: Path) -> list[str]:
    settings = {
        "optimizer": "adam",
        "schedule": "linear" if work.falls_to_zero else "constant",
        "data": "folder",
        "model.path": model,
        "data.path": data,
        "data.max_length": MAX_LENGTH,
        "seed": seed,
        "lora.num_layers": work.num_layers,
        "lora.rank": work.rank,
        "lora.scale": work.scale,
        "train.batch_size": work.batch_size,
        "train.iters": work.iters,
        "optimizer.learning_rate": work.learning_rate,
        "train.eval_every": work.eval_every,
        "checkpoint.every": work.eval_every,
        # Stock mlx-lm's result is its last adapter.
        "checkpoint.result": "last",
        "hydra.run.dir": folder / "run",
        **row.overrides,
    }
    return [f"{name}={value}" for name, value in settings.items()]
