"""Directories of runs and sweeps as training writes them, made without training, at any size."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.config import serialize
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepJob, SweepManifest


def stored_config(**settings: Any) -> dict[str, Any]:
    """The config of a run of the tiny model, with dotted settings changed."""
    config = Config()
    small = {"model.path": "builtin:tiny", "data.path": "builtin:tiny", "optimizer.name": "adamw"}
    stored = serialize.change_dict(serialize.to_dict(config), {**small, "schedule.name": "cosine", **settings})
    return stored


def make_run(
    folder: Path,
    *,
    state: str = "finished",
    iters: int = 40,
    every: int = 1,
    final: float = 0.5,
    number: int = 0,
    status: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> Path:
    """Write the directory of a run whose loss falls from 2 to `final` over `iters` updates."""
    folder.mkdir(parents=True, exist_ok=True)
    RunDirectory(folder).write_config(stored_config(**{"train.iters": iters, **settings}))
    noise = random.Random(number)
    rows: list[dict[str, Any]] = []
    best = (math.inf, 0)
    for step in range(0, iters + 1, every):
        loss = final + (2 - final) * math.exp(-4 * step / iters)
        if step:
            rows.append({
                "step": step, "split": "train", "loss": loss + noise.gauss(0, 0.05),
                "learning_rate": 1e-3 * (1 - step / iters), "grad_norm": 1 + noise.random(),
                "epoch": 0.1, "tokens": 100 * step, "supervised_tokens": 50,
                "tokens_per_second": 900 + noise.random() * 50, "peak_memory_gb": 1.1, "active_memory_gb": 0.8,
                "cache_memory_gb": 0.1, "time": "2026-11-29T10:00:00Z",
            })  # fmt: skip
        if step % max(every, iters // 8 // every * every or every) == 0:
            rows.append({"step": step, "split": "valid", "loss": loss, "tokens": 100 * step})
            best = min(best, (loss, step))
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if samples:
        with (folder / "samples.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in samples)
    written = {
        "run_id": f"{number:016x}", "state": state, "step": iters, "iters": iters, "started": "2026-11-29T10:00:00Z",
        "updated": "2026-11-29T10:03:00Z", "ended": "2026-11-29T10:03:00Z", "seconds": 183.2, "host": "alices-laptop",
        "pid": 4711, "best": {"valid_loss": best[0], "step": best[1]}, "result_step": best[1], **(status or {}),
    }  # fmt: skip
    (folder / "status.json").write_text(json.dumps(written))
    (folder / "run.log").write_text("")
    return folder


def make_sweep(folder: Path, grid: Mapping[str, Sequence[Any]], *, iters: int = 40, every: int = 1) -> Path:
    """Write the directory of a sweep over `grid`, in which the learning rate decides and the rank hardly does."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(1)
    jobs = []
    for number, values in enumerate(itertools.product(*grid.values())):
        settings = dict(zip(grid, values, strict=True))
        rate = settings.get("optimizer.learning_rate", 1e-3)
        diverged = rate >= 1
        final = 0.5 + 0.2 * abs(math.log10(rate) + 3) + noise.gauss(0, 0.01) if not diverged else 2.0
        reason = {"reason": "The loss at step 7 is not finite."} if diverged else {}
        state = "diverged" if diverged else "finished"
        made = {"train.iters": iters, **settings}
        make_run(
            folder / str(number),
            state=state,
            iters=iters,
            every=every,
            final=final,
            number=number,
            status=reason,
            **made,
        )
        overrides = tuple(f"{name}={value}" for name, value in settings.items())
        jobs.append(SweepJob(number, str(number), overrides, stored_config(**made)))
    SweepManifest(folder).record(arguments=["-m"], launcher={"name": "serial", "jobs": None}, jobs=jobs)
    (folder / "multirun.yaml").write_text("{}\n")
    return folder


GRID = {"lora.rank": (2, 4, 8, 16), "optimizer.learning_rate": (3e-4, 1e-3, 3e-3, 10.0)}


def answers(count: int = 6) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: answers before training, all wrong, and after it, half of them right."""
    rows = []
    for step, row in itertools.product((0, 40), range(count)):
        is_right = step > 0 and row % 2 == 0
        rows.append({
            "step": step, "row": row, "prompt": f"Table ship(id, name)\nQuestion: how many ships? ({row})\nSQL:",
            "expected": "SELECT count(*) FROM ship", "text": "SELECT count(*) FROM ship" if is_right else "SELECT *",
            "score": float(is_right),
        })  # fmt: skip
    return rows
