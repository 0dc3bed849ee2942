"""The time from the command to the first batch computed: ``python -m benchmarks.startup`` (three minutes on two cores).

In turn: a process that imports mlx_lm, loads the small model in float32 and reads its weights; runner with its
caches filled, until metrics.jsonl has its first line, the loss of one batch of 4 rows before training; and stock
mlx_lm.lora, until it has printed the same. What runner takes beyond the first process is its own: the config, the data,
the adapter, one batch.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import sides
from benchmarks.processes import ProcessFailed, call_module, environment
from benchmarks.sides import ROWS, Work

LOAD = """
import sys
from runner.backends import blas
blas.load_blas()
import mlx.core as mx, mlx_lm
model, _ = mlx_lm.load(sys.argv[1])
mx.eval(model.parameters())
"""
WORK = Work(2, 2)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def until(command: Sequence[str], folder: Path, done: Callable[[], bool] | None) -> float:
    """Return the seconds from the start of `command` until `done`, or to its end. Raises ProcessFailed."""
    begun, found = time.perf_counter(), None
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=out)
        while process.poll() is None:
            if found is None and done is not None and done():
                found = time.perf_counter() - begun
            time.sleep(0.002)
    if process.returncode or (done is not None and found is None):
        raise ProcessFailed(
            f"{' '.join(command)}\nended with {process.returncode}\n{(folder / 'log').read_text()[-2000:]}"
        )
    return time.perf_counter() - begun if found is None else found


def holds(file: Path, text: str) -> Callable[[], bool]:
    """Return a function that tells whether `file` exists and contains `text`."""
    return lambda: file.exists() and text in _COLOUR.sub("", file.read_text(errors="replace"))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the table; return 1 if a process failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    try:
        model = call_module("models")["float32"]
        data = call_module("workloads", model, "short", "8", "4")["folder"]
        took: dict[str, list[float]] = {"load": [], "runner": [], "mlx_lm.lora": []}
        with tempfile.TemporaryDirectory() as scratch:
            for number in range(rounds + 1):
                for name in took:
                    folder = Path(scratch) / f"{name}-{number}"
                    folder.mkdir()
                    row = ROWS["f" if name == "runner" else "b"]
                    command, done = [sys.executable, "-c", LOAD, model], None
                    if name != "load":
                        command = sides.command(row, WORK, model=model, data=data, seed=0, folder=folder)
                        # The value is to be computed, not taken from an earlier run.
                        command = [*command, "train.cache_baseline=false"] if name == "runner" else command
                        ours = folder / "run" / "metrics.jsonl", '"valid"'
                        done = holds(*(ours if name == "runner" else (folder / "log", " val ")))
                    seconds = until(command, folder, done)
                    if number:  # the first round fills the caches
                        took[name].append(seconds)
    except ProcessFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    medians = {name: statistics.median(each) for name, each in took.items()}
    print("| process | seconds (lowest to highest) | of the first |\n|---|---:|---:|")
    about = {
        "load": "import mlx_lm, load the weights, to its end",
        "runner": "runner, to the value of the first batch",
        "mlx_lm.lora": "mlx_lm.lora, the same",
    }
    for name, each in took.items():
        spread = f"{medians[name]:.2f} ({min(each):.2f} to {max(each):.2f})"
        print(f"| {about[name]} | {spread} | {medians[name] / medians['load']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
