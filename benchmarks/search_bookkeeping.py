"""The cost of a search beyond its jobs: python -m benchmarks.search_bookkeeping [--trials 500] [--sampler tpe]

Runs a search of tiny jobs of two updates, compared after the first, in a process of its own, and takes the time in
which jobs are launched from the whole. Prints, a trial: what the sampler needs to suggest it, and the rest: planning
and recording its job, deciding, reading and recording its result. It is the CPU time of the process, so that what else
runs on the machine hardly counts, over all trials and over the last hundred: it must not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import ROOT, environment

INSIDE = """
import json, sys, time
from runner.backends import blas; blas.load_blas()
from runner.__main__ import main
from runner.sweeps.search import jobs, search, study
spent = {"launch": 0.0, "ask": 0.0, "run": 0.0}
at_trial = []
def timed(owner, name, part):
    inner = getattr(owner, name)
    def outer(*a, **k):
        begun = time.process_time()
        try: return inner(*a, **k)
        finally:
            spent[part] += time.process_time() - begun
            if part == "ask": at_trial.append([time.process_time() - spent["launch"], spent["ask"]])
    setattr(owner, name, outer)
timed(jobs.TrialJobs, "launch", "launch")
timed(study.Study, "ask", "ask")
timed(search.Search, "run", "run")
rc = main(sys.argv[1:])
print("MARKS" + json.dumps({**spent, "at_trial": at_trial, "rc": rc}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the search and print the cost of a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--sampler", default="tpe")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("-m", "hydra/sweeper=search", f"hydra.sweeper.sampler={options.sampler}"),
            *(f"hydra.sweeper.trials={options.trials}", "hydra.sweeper.eta=10", "hydra.sweeper.min_iters=1"),
            *("model=tiny", "data=tiny", "train.iters=2", "train.eval_every=1", "checkpoint.every=2"),
            *("optimizer.learning_rate=tag(log,interval(1e-5,1e-2))", "lora.rank=interval(1,64)", "lora.dropout=0,0.1"),
            f"hydra.sweep.dir={Path(folder) / 'search'}",
        ]
        done = subprocess.run(
            [sys.executable, "-c", INSIDE, *command], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        marks = [line for line in done.stdout.splitlines() if line.startswith("MARKS")]
        if not marks:
            print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
            return 1
        found = json.loads(marks[0].removeprefix("MARKS"))
    trials, at = len(found["at_trial"]), found["at_trial"]
    own = (found["run"] - found["launch"] - found["ask"]) / trials
    print(f"{trials} trials by {options.sampler}, CPU time a trial:")
    print(f"  suggesting   {1000 * found['ask'] / trials:6.1f} ms")
    print(f"  bookkeeping  {1000 * own:6.1f} ms")
    print(f"  in its job   {1000 * found['launch'] / trials:6.1f} ms")
    if trials > 100:
        whole, asked = (at[-1][i] - at[-101][i] for i in (0, 1))
        print(f"of the last hundred: suggesting {10 * asked:.1f} ms, bookkeeping {10 * (whole - asked):.1f} ms")
    return int(found["rc"] != 0)


if __name__ == "__main__":
    sys.exit(main())
