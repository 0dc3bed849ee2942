"""The cost of a sweep beyond its runs: python benchmarks/sweep_bookkeeping.py [--sizes 125,250,500]

Runs sweeps of tiny jobs of two updates, each sweep in a process of its own, and subtracts the time inside each run and
inside Hydra's composing. Prints the bookkeeping per job for several sizes (it must not grow with them), the time to
compose a job compared with stock Hydra, and the time from `resume=` of the finished sweep to its first new job. All
times are CPU times of the process, so that what else runs on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

INSIDE = """
import json, sys, time
begun = time.process_time()
from runner.backends import blas; blas.load_blas()
from runner.__main__ import main
from runner.sweeps import job_composer, sweep
from runner.training import run as training
marks = {"run": 0.0, "runs": 0, "compose": 0.0, "composed": 0, "first": None, "launch": None}
train_run = training.train_run
def timed_run(*a, **k):
    t = time.process_time()
    if marks["first"] is None: marks["first"] = t - begun
    try: return train_run(*a, **k)
    finally: marks["run"] += time.process_time() - t; marks["runs"] += 1
training.train_run = timed_run
compose = job_composer.JobComposer.compose
def timed_compose(*a, **k):
    t = time.process_time()
    try: return compose(*a, **k)
    finally: marks["compose"] += time.process_time() - t; marks["composed"] += 1
job_composer.JobComposer.compose = timed_compose
run_sweep = sweep.run_sweep
def timed_sweep(*a, **k):
    t = time.process_time()
    try: return run_sweep(*a, **k)
    finally: marks["sweep"] = time.process_time() - t
sweep.run_sweep = timed_sweep
rc = main(sys.argv[1:])
print("MARKS" + json.dumps({**marks, "rc": rc}))
"""

STOCK = """
import json, time
from hydra import compose, initialize_config_dir
from runner.app.compose import register_schema
from runner.config.groups import CONF_DIR as CONF
register_schema()
with initialize_config_dir(str(CONF), version_base="1.3"):
    compose("config", overrides=["model=tiny"])
    t = time.process_time()
    for seed in range(20):
        compose("config", overrides=["model=tiny", "data=tiny", "train.iters=2", f"seed={seed}"])
    print("MARKS" + json.dumps({"stock": (time.process_time() - t) / 20}))
"""


def run(code: str, *arguments: str, folder: Path) -> dict:
    """Run `code` in a new process and return the times that it prints."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "MARKS" not in done.stdout:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.split("MARKS")[1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="125,250,500", help="numbers of jobs; the sweep of the last one is resumed too"
    )
    sizes = [int(size) for size in parser.parse_args().sizes.split(",")]
    print(f"{'jobs':>5}  {'bookkeeping':>12}  {'composing':>10}  {'run':>8}   CPU ms per job")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arguments = ["-m", "model=tiny", "data=tiny", "train.iters=2"]
        for size in sizes:
            m = run(INSIDE, *arguments, f"seed=range({size})", f"hydra.sweep.dir=s{size}", folder=folder)
            assert m["rc"] == 0 and m["runs"] == size, m
            beyond = (m["sweep"] - m["run"] - m["compose"]) / size
            compose = m["compose"] / m["composed"]
            inside = m["run"] / size
            print(f"{size:>5}  {beyond * 1e3:>12.2f}  {compose * 1e3:>10.2f}  {inside * 1e3:>8.1f}", flush=True)
        stock = run(STOCK, folder=folder)["stock"]
        print(f"composing once: stock Hydra {stock * 1e3:.1f} ms, here {compose * 1e3:.2f} ms")
        m = run(INSIDE, f"resume=s{sizes[-1]}", f"seed=range({sizes[-1] + 1})", folder=folder)
        assert m["rc"] == 0 and m["runs"] == 1, m
        print(f"resume= of {sizes[-1]} finished jobs to its first new one: {m['first']:.2f} s, imports included")


if __name__ == "__main__":
    main()
