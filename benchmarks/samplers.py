"""Suggestions by TPE against random ones at an equal budget: python -m benchmarks.samplers [--seeds 0,1,2,3,4]

Searches of SmolLM2-135M on the default data over learning rate, rank and scale, each with the same number of trials,
which are all trained to their end (no rungs, so that the samplers alone differ). Printed are, for every seed, the
validation loss of the best trial of each, and how it fell with the number of trials. The losses do not depend on the
load of the machine. results.json and the logs go to FOLDER; searches that it has already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path

from benchmarks.processes import run_measured
from runner.runs.search_record import read_search

SAMPLERS = ("tpe", "random")
SPACE = (
    "optimizer.learning_rate=tag(log,interval(1e-5,1e-1))",
    "lora.rank=interval(1,64)",
    "lora.scale=interval(1,40)",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the searches and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--iters", type=int, default=12, help="updates of a trial")
    parser.add_argument("--limit", type=float, default=7200, help="seconds that one search may take")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="(outputs/benchmarks/samplers-TIME)")
    options = parser.parse_args(arguments)
    out = (options.out or Path("outputs/benchmarks") / time.strftime("samplers-%Y-%m-%d_%H-%M-%S")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: dict[str, list[float | None]] = json.loads(file.read_text()) if file.exists() else {}
    for seed in options.seeds.split(","):
        for sampler in SAMPLERS:
            name = f"{sampler} {seed}"
            if name in results:
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            folder = out / name.replace(" ", "-")
            folder.mkdir()
            command = [
                *(sys.executable, "-m", "runner", "-m", "hydra/sweeper=search", "hydra.sweeper.pruner=none"),
                *(f"hydra.sweeper.sampler={sampler}", f"hydra.sweeper.seed={seed}"),
                *(f"hydra.sweeper.trials={options.trials}", f"hydra.sweep.dir={folder / 'search'}"),
                *("model=smollm2_135m", "data=text_to_sql", "data.chat_template=false", "data.metric_rows=0"),
                *(f"train.iters={options.iters}", f"train.eval_every={options.iters}", "train.eval_batches=16"),
                *("lora.num_layers=8", "checkpoint.every=1000", *SPACE),
            ]
            run_measured(command, extra={}, log=folder / "log", limit=options.limit)
            record = read_search(folder / "search")
            assert record is not None
            ends = [trial.results[-1].values for trial in record.trials if trial.results]
            results[name] = [values[0] if values else None for values in ends]
            file.write_text(json.dumps(results, indent=1))
    print(_table(results))
    print(f"written: {out}")
    return 0


def _table(results: dict[str, list[float | None]]) -> str:
    lines = ["seed   best: tpe  random   after 12: tpe  random"]
    differences = []
    for seed in sorted({name.split()[1] for name in results}):
        found = [results.get(f"{sampler} {seed}") for sampler in SAMPLERS]
        if None in found:
            continue
        so_far = [list(accumulate((float("inf") if x is None else x for x in one or []), min)) for one in found]
        tpe, random = (one[-1] for one in so_far)
        half = [one[min(11, len(one) - 1)] for one in so_far]
        lines.append(f"{seed:<4}   {tpe:9.4f}  {random:6.4f}   {half[0]:13.4f}  {half[1]:6.4f}")
        differences.append(tpe / random - 1)
    if differences:
        better = sum(difference < 0 for difference in differences)
        lines.append(
            f"tpe is better in {better} of {len(differences)}, by a median of {-statistics.median(differences):+.2%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
