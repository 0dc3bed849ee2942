"""Compare runner with stock mlx_lm.lora, side by side.

    python -m benchmarks.against_mlx_lm --quick | --full    (--quick: ten minutes on two cores)

Both sides run as processes, in turn (a b, b a, …), on the same rows, model, rank, layers, dtype and BLAS. Measured are
the real tokens per second of wall-clock time of the whole process, and its peak memory. results.json, table.md,
plot.svg and the log of each run are written to FOLDER. Leave the machine alone meanwhile: its load and the
cores that other processes kept busy are recorded with each run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.bench import FULL, QUICK, Bench
from benchmarks.processes import ProcessFailed
from benchmarks.sides import QUICK_ROWS, ROWS
from benchmarks.workloads import NAMES


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results and print the table; return 1 if a gate or a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="small work, rows a (once), b, d and f (the default)")
    effort.add_argument("--full", action="store_true", help="all rows, five rounds: hours")
    parser.add_argument("--rows", metavar="ROW,…", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--workloads", metavar="NAME,…", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, help="rounds with a warm compile cache, after the cold one")
    parser.add_argument("--minutes", type=float, help="start no round that would end later (quick: 9.5)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="a new folder (outputs/benchmarks/TIME)")
    options = parser.parse_args(arguments)
    rows = options.rows.split(",") if options.rows else list(ROWS if options.full else QUICK_ROWS)
    workloads = options.workloads.split(",")
    for name, known in [*((row, ROWS) for row in rows), *((name, NAMES) for name in workloads)]:
        if name not in known:
            parser.error(f"there is no '{name}' in: {', '.join(known)}")
    folder = (options.out or Path("outputs/benchmarks") / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{folder} exists already: choose another --out")
    chosen = FULL if options.full else QUICK
    bench = Bench(folder, chosen, rows, workloads, rounds=options.rounds, minutes=options.minutes)
    try:
        bench.run()
    except ProcessFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    print(report.write(bench.results, folder))
    print(f"written: {folder}")
    return int(any(gate["passed"] is False for gate in bench.results["gates"].values()))


if __name__ == "__main__":
    sys.exit(main())
