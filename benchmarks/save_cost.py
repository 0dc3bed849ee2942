"""The cost of saving: how long training waits for a save, in the foreground and in the background.

    python -m benchmarks.save_cost [--updates 60] [--every 5] [--json FILE]

Runs the default model with adapters of about 1, 10 and 100 MB (a checkpoint holds Adam's two moments as well: three
times that), with and without ``checkpoint.background``. Saves are frequent, to measure many; the share of a run's time
is that of one save every 100 updates, the default.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import run_cli_silently
from runner.common.cores import usable_cores

RANKS = {1: 2, 10: 14, 100: 143}
"""Size of the adapter in MB (32 bits a number, SmolLM2-135M, all linear layers of 16 blocks) to its rank."""
EVERY = 100
"""Updates between saves for which the share is computed."""


def main() -> None:
    """Measure every size and mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _measure(int(options.one[0]), options.one[1] == "background", options.updates, options.every)
        return
    results = []
    print(f"load average {os.getloadavg()[0]:.2f}, {usable_cores()} cores")
    print("adapter  checkpoint  mode          update   waits for a save (ms)   whole save (ms)  later update  share at")
    print(
        "                                   p50 ms   p50    p95    most      p50     p95      slower by ms  every 100"
    )
    for size in RANKS:
        for mode in ("foreground", "background"):
            command = [sys.executable, "-m", "benchmarks.save_cost", "--one", str(size), mode]
            command += ["--updates", str(options.updates), "--every", str(options.every)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            print(_table_line(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _table_line(result: dict[str, Any]) -> str:
    return (
        f"{result['adapter_mb']:5.1f} MB  {result['checkpoint_mb']:7.1f} MB  {result['mode']:<12} "
        f"{result['update_ms']:7.0f}  "
        f"{result['wait_p50']:6.1f} {result['wait_p95']:6.1f} {result['wait_most']:6.1f}   {result['save_p50']:7.1f} "
        f"{result['save_p95']:7.1f}   {result['later_ms']:9.1f}     {result['share']:8.3%}"
    )


def _measure(size: int, background: bool, updates: int, every: int) -> None:
    from runner.backends import blas

    blas.load_blas()
    from runner.checkpoints.store import CheckpointStore
    from runner.training.trainer import Trainer

    waits: list[float] = []
    saves: list[float] = []
    steps: list[float] = []
    bytes_of: dict[str, int] = {}
    _record_durations(Trainer, Trainer.save_if_due.__name__, waits)
    _record_durations(Trainer, Trainer.update.__name__, steps)
    commit, rotate = CheckpointStore.commit, CheckpointStore.rotate

    def timed_commit(self: CheckpointStore, step: int, files: Any, **rest: Any) -> Any:
        saves.append(time.perf_counter())
        checkpoint = commit(self, step, files, **rest)
        bytes_of.update({path.name: path.stat().st_size for path in checkpoint.path.iterdir()})
        return checkpoint

    def timed_rotate(self: CheckpointStore, keep: set[int]) -> list[int]:
        removed = rotate(self, keep)
        saves[-1] = time.perf_counter() - saves[-1]
        return removed

    CheckpointStore.commit, CheckpointStore.rotate = timed_commit, timed_rotate  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        overrides = [f"lora.rank={RANKS[size]}", f"train.iters={updates}", f"checkpoint.every={every}"]
        overrides += [
            f"checkpoint.background={str(background).lower()}",
            "train.eval_batches=1",
            "train.eval_every=100000",
        ]
        run_cli_silently([*overrides, f"hydra.run.dir={folder}/run"])
    waited = sorted(wait for step, wait in enumerate(waits[:-1], 1) if step % every == 0)
    later = [step for number, step in enumerate(steps) if number % every == 0 and number > 0]
    others = [step for number, step in enumerate(steps) if number % every not in (0, 1) and number > 1]
    usual = statistics.median(others)
    slower = statistics.median(later) - usual
    cost = statistics.median(waited) + max(0.0, slower if background else 0.0)
    out = {
        "adapter_mb": bytes_of["adapters.safetensors"] / 1e6,
        "checkpoint_mb": sum(bytes_of.values()) / 1e6,
        "mode": "background" if background else "foreground",
        "update_ms": 1e3 * usual,
        "wait_p50": 1e3 * statistics.median(waited),
        "wait_p95": 1e3 * waited[min(len(waited) - 1, int(0.95 * len(waited)))],
        "wait_most": 1e3 * waited[-1],
        "save_p50": 1e3 * statistics.median(saves),
        "save_p95": 1e3 * sorted(saves)[min(len(saves) - 1, int(0.95 * len(saves)))],
        "later_ms": 1e3 * slower,
        "share": cost / (EVERY * usual),
        "saves": len(waited),
    }
    print(json.dumps(out))


def _record_durations(owner: Any, name: str, into: list[float]) -> None:
    """Append the seconds of each call of the method `name` of `owner` to `into`."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - begun)

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
