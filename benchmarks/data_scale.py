"""The cost of large data sets: time from the start of the program to its first update, and memory.

    python -m benchmarks.data_scale [--rows 1000 10000 100000] [--characters 2000] [--updates 5] [--json FILE]

Makes JSONL files of prompts and completions (a million rows of 2,000 characters are 2 GB) and starts the tiny model on
each twice: cold, where every row is tokenized, and warm, where the cached tokens of the first start are mapped. The
time to the first update includes the imports, the model and one batch of evaluation; `peak` is the peak resident memory
of the run and, after the plus, of any of its workers (mapped files count as long as they are in memory; the system
frees them when it needs memory); `step` is the median time of the updates after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.processes import run_cli_silently
from runner.common.cores import usable_cores

MAX_LENGTH = 512
"""Maximum tokens of a row: about 2,000 characters in a real model; the tiny one has a token per byte."""


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the files are made and removed again (they take 5 GB a million)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _measure(float(options.one[0]), options.one[1], options.updates)
        return
    results = []
    print(f"load average {os.getloadavg()[0]:.2f}, {usable_cores()} cores")
    print("     rows      JSONL      tokens  start   first update      peak           step")
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = _write(Path(folder) / "data", rows, options.characters)
            for start in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.data_scale", "--updates", str(options.updates)]
                command += ["--one", str(time.time()), folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                result = {"rows": rows, "bytes": size, "start": start, **json.loads(done.stdout.splitlines()[-1])}
                results.append(result)
                print(_table_line(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _table_line(result: dict[str, Any]) -> str:
    workers = f" + {result['worker_gb']:.2f}" if result["worker_gb"] else ""
    return (
        f"{result['rows']:9,}  {result['bytes'] / 1e6:6.1f} MB  {result['tokens'] / 1e6:8.1f} M  {result['start']}    "
        f"{result['first_update_s']:8.2f} s     {result['peak_gb']:5.2f} GB{workers:<8}  {result['step_ms']:6.1f} ms"
    )


def _write(folder: Path, rows: int, characters: int) -> int:
    """Write the data set; return its size in bytes."""
    folder.mkdir()
    draw = random.Random(0)
    letters = "etaoinshrdlucmfw"
    known = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(5000)]
    for name, count in (("train", rows), ("valid", 4)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                text = " ".join(draw.choices(known, k=characters // 6))
                middle = draw.randint(10, min(400, characters // 2))  # so that the answer begins before max_length
                file.write(json.dumps({"prompt": text[:middle], "completion": text[middle:]}) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def _measure(begun: float, folder: str, updates: int) -> None:
    from runner.backends import blas

    blas.load_blas()
    from runner.training.trainer import Trainer

    ends: list[float] = []
    original = Trainer.update

    def timed(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            ends.append(time.time())

    Trainer.update = timed  # type: ignore[method-assign]
    overrides = ["model=tiny", f"data.path={folder}/data", f"data.cache_folder={folder}/cache"]
    overrides += [f"data.max_length={MAX_LENGTH}", f"train.iters={updates}", f"hydra.run.dir={folder}/run-{begun}"]
    run_cli_silently(overrides)
    counted = Path(folder, f"run-{begun}", "run.log").read_text().split("rows, ")[1].split(" tokens")[0]
    scale = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss is in bytes there, in KiB elsewhere
    out = {
        "first_update_s": ends[0] - begun,
        "tokens": int(counted.replace(",", "")),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale,
        "worker_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / scale,
        "step_ms": 1e3 * statistics.median(b - a for a, b in pairwise(ends)),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
