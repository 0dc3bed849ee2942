"""How a run scales with ranks: measured on this machine, and calculated for several Macs.

    python -m benchmarks.distributed [--ranks 1,2] [--rounds 8] [--updates 4] [--spin] [--json FILE] [WORDS …]
    python -m benchmarks.distributed --calculate

The runs are all started, and then take turns: a few updates of one, the same updates of the next, so that what else the
machine does is shared among them. Every rank has one BLAS thread. The time of an update is split into what the rank
computes, what it waits for the slowest one, and the sum itself; the same sum is timed alone at the end, between ranks
that are idle. WORDS are overrides of the run; `--spin` lets ranks wait inside of MLX instead of asleep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from runner.common.cores import usable_cores
from runner.common.free_ports import free_ports

WORDS = (
    *("model=smollm2_135m", "data=text_to_sql", "train.batch_size=8", "lora.rank=8"),
    *("train.eval_every=1000000", "checkpoint.every=1000000"),
    # A row's cached states would be computed by the run that has it first. One batch is enough of an evaluation.
    *("train.hidden_cache.enabled=false", "train.eval_batches=1"),
)
_QUIET = 0.3
"""Load average up to which wall times are believed."""
PARTS = ("update", "cpu", "compute", "compute_cpu", "wait", "transfer", "sum_cpu", "messages", "bytes")


@dataclass(frozen=True)
class Link:
    """A network between neighbours of a ring, with what is assumed of it."""

    name: str
    bytes_per_second: float
    """In each direction."""
    seconds: float
    """From the start of a message to its first byte at the neighbour, through MLX's ring."""


LINKS = (
    Link("10 GbE, TCP", 1.1e9, 300e-6),
    Link("Thunderbolt 4 bridge, TCP", 2.5e9, 200e-6),
    Link("Thunderbolt 5, RDMA (jaccl)", 6.0e9, 20e-6),
)
"""Assumptions, none of them measured here: nominal rates less a tenth for 10 GbE; TCP over Thunderbolt reaches part of
its 40 Gbit/s, and RDMA over Thunderbolt 5 part of its 80."""
MESSAGES = {
    "LoRA, rank 8, 16 blocks of a 0.6B model": 5e6,
    "LoRA, rank 16, all blocks of an 8B model": 170e6,
    "all weights of a 0.6B model": 2.4e9,
}
"""Bytes of the gradients, in float32."""


def sum_seconds(size: float, ranks: int, link: Link) -> float:
    """Return how long a ring adds up `size` bytes (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).

    Each rank sends 2 (n - 1) / n of the bytes, in 2 (n - 1) steps. MLX sends in both directions of the ring at once,
    which would double the rate where the link is full duplex and its sockets keep up: not counted.
    """
    return 2 * (ranks - 1) / ranks * size / link.bytes_per_second + 2 * (ranks - 1) * link.seconds


def speedup(compute: float, size: float, ranks: int, link: Link) -> float:
    """Return the calculated speed relative to one machine that computes an update in `compute` seconds."""
    return compute / (compute / ranks + sum_seconds(size, ranks, link))


def main() -> None:
    """Measure, or calculate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rounds", type=int, default=8, help="turns that are counted; one more comes before them")
    parser.add_argument("--updates", type=int, default=4, help="updates of a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spin", action="store_true")
    parser.add_argument("--calculate", action="store_true")
    options, words = parser.parse_known_args()
    if options.calculate:
        _print_calculation()
    else:
        _measure([int(ranks) for ranks in options.ranks.split(",")], options, words)


class MeasuredRun:
    """A run on some ranks, which makes updates when it is told to."""

    def __init__(self, ranks: int, folder: Path, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.ranks, self._folder = ranks, folder
        folder.mkdir()
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
        iters = (options.rounds + 1) * options.updates
        words = [*WORDS, *words, f"train.iters={iters}", f"train.report_every={iters}", f"hydra.run.dir={folder}/run"]
        self._updates = options.updates
        self._processes = []
        for rank in range(ranks):
            command = [sys.executable, "-m", "benchmarks.distributed_rank", f"{folder}/{rank}.json", f"{self._updates}"]
            command += ["--spin"] if options.spin else []
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            if ranks > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._processes.append(subprocess.Popen([*command, *words], env=environment, **pipes))  # type: ignore[call-overload]

    def wait(self) -> None:
        """Wait until each rank is ready for its next updates, or has made its last."""
        for rank, process in enumerate(self._processes):
            if not process.stdout.readline():
                raise SystemExit(f"rank {rank} of {self.ranks} ended with exit code {process.wait()}")

    def make_updates(self) -> None:
        """Have each rank make the updates of a turn."""
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()
        self.wait()

    def finish(self) -> dict[str, Any]:
        """Wait for the end, and return means over the updates and ranks, and the seconds and tokens of each turn."""
        if any(process.wait() for process in self._processes):
            raise SystemExit(f"a rank of {self.ranks} failed")
        by_rank = [json.loads((self._folder / f"{rank}.json").read_text()) for rank in range(self.ranks)]
        counted = [told["updates"][self._updates :] for told in by_rank]
        turns = [counted[0][i : i + self._updates] for i in range(0, len(counted[0]), self._updates)]
        rows = [json.loads(line) for line in (self._folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return {
            "ranks": self.ranks,
            **{name: mean(update[name] for updates in counted for update in updates) for name in PARTS},
            "seconds": [sum(update["update"] for update in turn) for turn in turns],
            "tokens": [sum(update["tokens"] for update in turn) for turn in turns],
            "bare_sums": [seconds for told in by_rank for seconds in told["bare_sums"]],
            "loss": next(row["loss"] for row in rows if row.get("split") == "train"),
        }

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()


def _measure(counts: Sequence[int], options: argparse.Namespace, words: Sequence[str]) -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = []
        for ranks in counts:
            runs.append(MeasuredRun(ranks, Path(folder, f"on{ranks}"), options, words))
            stack.callback(runs[-1].close)
        for run in runs:
            run.wait()
        for turn in range(options.rounds + 1):
            for run in runs if turn % 2 else reversed(runs):
                run.make_updates()
        results = [run.finish() for run in runs]
    _print_results(results)
    print(
        f"\n{options.rounds} turns of {options.updates} updates each; {usable_cores()} cores, one BLAS thread a rank."
    )
    print(
        f"Load average {load:.2f} before and {os.getloadavg()[0]:.2f} at the end, of which the ranks make", max(counts)
    )
    if load > _QUIET:
        print("The machine was busy before: wall times say little.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _print_results(results: Sequence[dict[str, Any]]) -> None:
    """Print two Markdown tables: what a run achieves, and what an update of a rank is made of."""
    achieved, parts = [], []
    for result in results:
        rates = [tokens / seconds for tokens, seconds in zip(result["tokens"], result["seconds"], strict=True)]
        ratios = [first / own for first, own in zip(results[0]["seconds"], result["seconds"], strict=True)]
        rate = f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        achieved.append([result["ranks"], rate, f"{median(ratios):.2f}", f"{result['loss']:.6f}"])
        seconds = {name: f"{result[name]:.3f} s" for name in ("update", "cpu", "compute", "compute_cpu")}
        short = {name: f"{1000 * result[name]:.1f} ms" for name in ("wait", "transfer", "sum_cpu")}
        alone = f"{1000 * median(result['bare_sums']):.1f} ms" if result["bare_sums"] else ""
        parts.append([result["ranks"], seconds["update"], seconds["compute"], short["wait"], short["transfer"], alone])
        parts[-1] += [seconds["cpu"], seconds["compute_cpu"], short["sum_cpu"]]
        parts[-1] += [f"{result['messages']:.0f} of {result['bytes'] / 1e6:.2f} MB"]
    _print_table(["ranks", "tokens/s: median turn (lowest to highest)", "speed: median turn", "last loss"], achieved)
    print("\nMeans over updates and ranks:\n")
    columns = ["ranks", "update", "computes", "waits for others", "sum", "sum alone"]
    _print_table([*columns, "CPU time", "to compute", "to sum", "messages"], parts)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for row in (columns, ["---:"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |")


def _print_calculation() -> None:
    print(
        "A calculation, not a measurement: seconds that the sum of an update takes, and the speed relative to one Mac"
    )
    print("whose update takes 1 s and 10 s. Assumed, in each direction between neighbours:")
    for link in LINKS:
        print(f"  {link.name}: {link.bytes_per_second / 1e9:.1f} GB/s, {link.seconds * 1e6:.0f} µs a step")
    for name, size in MESSAGES.items():
        print(f"\n{name}: {size / 1e6:,.0f} MB")
        print(f"{'':<30}" + "".join(f"{f'{ranks} Macs':>22}" for ranks in (2, 4, 8)))
        for link in LINKS:
            cells = [
                f"{sum_seconds(size, ranks, link):>8.3f} s {speedup(1, size, ranks, link):>5.2f}x "
                f"{speedup(10, size, ranks, link):>4.2f}x"
                for ranks in (2, 4, 8)
            ]
            print(f"{link.name:<30}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
