"""How a run scales with ranks: measured on this machine, and calculated for several Macs.

    python -m benchmarks.distributed [--ranks 1,2] [--updates 20] [--spin] [--json FILE] [WORDS …]
    python -m benchmarks.distributed --calculate

Every rank has one BLAS thread. An update's time is split into what the rank computes, what it waits for the slowest
one, and what the sum itself takes. WORDS are overrides of the run; `--spin` lets ranks wait inside of MLX instead.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.cores import usable_cores
from runner.common.free_ports import free_ports

WORDS = ("model=smollm2_135m", "data=text_to_sql", "train.batch_size=8", "lora.rank=8", "train.eval_every=1000000")
WARM = 3
"""First updates that are left out: shapes are compiled, caches filled."""


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
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spin", action="store_true")
    parser.add_argument("--calculate", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options, words = parser.parse_known_args()
    if options.calculate:
        _print_calculation()
    elif options.one:
        _train_measured(options.one, words, options.spin)
    else:
        _measure([int(ranks) for ranks in options.ranks.split(",")], options, words)


def _measure(counts: Sequence[int], options: argparse.Namespace, words: Sequence[str]) -> None:
    print(f"load average {os.getloadavg()[0]:.2f}, {usable_cores()} cores, one BLAS thread a rank")
    print("ranks  tokens/s  update  computes      CPU   waits    sum   message  final loss")
    results = []
    for ranks in counts:
        result = _measure_one(ranks, options.updates, [*WORDS, *words], options.spin)
        results.append(result)
        print(
            f"{ranks:>5}  {result['tokens_per_second']:>8.0f}  {result['update']:>5.2f}s  {result['compute']:>7.2f}s  "
            f"{result['cpu']:>6.2f}s  {result['wait']:>5.2f}s  {1000 * result['sum']:>3.0f} ms  "
            f"{result['bytes'] / 1e6:>4.1f} MB  {result['loss']:.6f}",
            flush=True,
        )
    print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _measure_one(ranks: int, updates: int, words: Sequence[str], spin: bool) -> dict[str, Any]:
    """Train on so many ranks, and return the means over their updates: seconds by part, bytes, tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
        processes = []
        for rank in range(ranks):
            command = [sys.executable, "-m", "benchmarks.distributed", "--one", f"{folder}/{rank}.json", *words]
            command += ["--spin"] if spin else []
            command += [f"train.iters={updates}", f"train.report_every={updates}", f"hydra.run.dir={folder}/run"]
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            if ranks > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        if any(process.wait() for process in processes):
            raise SystemExit("a rank failed")
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    found = {
        name: statistics.mean(update[name] for updates in by_rank for update in updates[WARM:])
        for name in ("compute", "cpu", "wait", "sum", "update", "bytes")
    }
    tokens = sum(update["tokens"] for update in by_rank[0][WARM:])
    seconds = sum(update["update"] for update in by_rank[0][WARM:])
    return {"ranks": ranks, **found, "tokens_per_second": tokens / seconds, "loss": rows[-1]["loss"]}


def _train_measured(result: Path, words: list[str], spin: bool) -> None:
    """Run the program as one rank, and write the times of its updates."""
    from runner.backends import blas

    blas.load_blas()
    import mlx.core as mx

    from runner.cli.main import main as run_program
    from runner.training.train_step import TrainStep
    from runner.training.world import Ranks, World

    updates: list[dict[str, float]] = []
    began = {"wall": 0.0, "cpu": 0.0}
    waited = {"seconds": 0.0}
    update, meet = TrainStep.update, Ranks.meet

    def measured_update(step: TrainStep, *arguments: Any) -> Any:
        began.update(wall=time.perf_counter(), cpu=time.process_time())
        made = update(step, *arguments)
        updates[-1] |= {"update": time.perf_counter() - began["wall"], "tokens": made.tokens}
        return made

    def measured_meet(world: Ranks) -> None:
        start = time.perf_counter()
        if not spin:
            meet(world)
        waited["seconds"] = time.perf_counter() - start

    def measured(sum_update: Any) -> Any:
        def call(world: World, sums: Any) -> Any:
            mx.eval(sums.arrays)
            computed, cpu = time.perf_counter(), time.process_time()
            waited["seconds"] = 0.0
            added = sum_update(world, sums)
            mx.eval(added.arrays)
            size = sum(array.nbytes for array in sums.arrays.values()) if world.size > 1 else 0
            updates.append(
                {
                    "compute": computed - began["wall"],
                    "cpu": cpu - began["cpu"],
                    "wait": waited["seconds"],
                    "sum": time.perf_counter() - computed - waited["seconds"],
                    "bytes": size,
                }
            )
            return added

        return call

    TrainStep.update = measured_update  # type: ignore[assignment]
    Ranks.meet = measured_meet  # type: ignore[assignment]
    for kind in (World, Ranks):
        kind.sum_update = measured(kind.sum_update)  # type: ignore[method-assign]
    code = run_program(words)
    result.write_text(json.dumps(updates))
    sys.exit(code)


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
