"""Run directories with what an evaluation leaves in them, written by hand: for reports, which need no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from runner.config import serialize
from runner.config.schema import Config
from runner.runs.row_losses import RowLossWriter

ROWS = "ab" * 32
"""Fingerprint of the rows, unless a test asks for others."""
TOKENS = np.random.default_rng(0).integers(3, 30, 60)


def row_losses(level: float, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Return losses of rows whose mean over tokens is `level`; those of all runs have the same hard and easy rows."""
    hardness = np.random.default_rng(1).gamma(2, 0.5, len(TOKENS))
    losses = (hardness + np.random.default_rng([2, seed]).normal(0, noise, len(TOKENS))) * TOKENS
    return losses + (level - losses.sum() / TOKENS.sum()) * TOKENS


def write_run(
    folder: Path,
    evaluations: Mapping[int, np.ndarray],
    *,
    rows: str | None = ROWS,
    state: str = "finished",
    seconds_per_update: float = 1.0,
    status: Mapping[str, Any] | None = None,
    scores: Sequence[float] = (),
    **settings: Any,
) -> Path:
    """Write a run with the row losses of its evaluations by step; without `rows` as an earlier version did.

    An update takes 100 tokens. `settings` have dots as two underscores: `lora__rank=4`.
    """
    folder.mkdir(parents=True)
    config = serialize.to_dict(Config())
    config["model"]["path"] = config["data"]["path"] = "builtin:tiny"
    for name, value in settings.items():
        *path, last = name.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    losses = {step: float(found.sum() / TOKENS[: len(found)].sum()) for step, found in evaluations.items()}
    metrics, file = [], RowLossWriter(folder / "row_losses.jsonl", 0) if rows else None
    for step, loss in losses.items():
        if step:
            rate = round(100 / seconds_per_update, 1)
            metrics.append(
                {"step": step, "split": "train", "loss": loss, "tokens": 100 * step, "tokens_per_second": rate}
            )
        metrics.append({"step": step, "split": "valid", "loss": loss, "tokens": 100 * step, "peak_memory_gb": 0.5})
        if file:
            file.append(step, "valid", rows or "", evaluations[step], TOKENS[: len(evaluations[step])])
    last = max(losses)
    if scores:
        metrics.append({"step": last, "split": "valid", "metric": "exact_match", "score": float(np.mean(scores))})
        samples = [
            {
                "step": step,
                "row": row,
                "prompt": f"{row}?",
                "expected": "yes",
                "text": "no",
                "score": score * (step > 0),
            }
            for step in (0, last)
            for row, score in enumerate(scores)
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    measured = {step: loss for step, loss in losses.items() if step}
    best = min(measured, key=lambda step: measured[step], default=None)
    document = {"state": state, "step": last, "iters": last, "seconds": 3.0 + last * seconds_per_update}
    document |= {} if best is None else {"best": {"step": best, "valid_loss": measured[best]}}
    (folder / "status.json").write_text(json.dumps(document | dict(status or {})))
    return folder


def write_sweep(folder: Path, jobs: int) -> Path:
    """Make `folder`, which holds runs `0` to `jobs` - 1, a sweep."""
    assert all((folder / str(number)).is_dir() for number in range(jobs))
    (folder / "multirun.yaml").write_text("{}\n")
    return folder
