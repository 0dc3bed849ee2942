"""A search with halving against the same configurations one by one: python -m benchmarks.search [--parts …]

16 configurations (4 ranks by 4 learning rates) of SmolLM2-135M on the default data, the same rows, float32 and BLAS on
both sides. The parts, each a process or several in turn:

    stock     mlx_lm.lora, a process for each configuration; --stock N measures that many and counts their mean 16 times
    single    ours, a process for each configuration; likewise
    sweep     ours, all 16 to their end in one process: they share base model, tokens and hidden states
    averaged  that with weight averaging, which mlx_lm.lora does not have: the same updates
    search    ours, hydra/sweeper=search with halving and weight averaging, in one process

Printed are the seconds of each, how much faster each is than the one before (but for `averaged`), and for every seed
the validation loss at its end of the winner of the search beside the best of the 16 full runs without and with
averaging. Leave the machine alone for the times; losses do not depend on it. results.json and the logs go to FOLDER;
parts that it has already are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import sides
from benchmarks.models import FLOAT32
from benchmarks.processes import call_module, run_measured

RANKS, RATES = (4, 8, 16, 32), (1e-4, 3e-4, 1e-3, 3e-3)
PARTS = ("stock", "single", "sweep", "averaged", "search")
TIMED = ("stock", "single", "sweep", "search")
VALID_ROWS = 64
_STOCK, _OURS = sides.ROWS[sides.BASE_ROW], sides.ROWS[sides.SHIPPED_ROW]


def main(arguments: list[str] | None = None) -> int:
    """Measure the parts that are asked for, and print all that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seeds", default="0", help="for sweep, averaged and search: 0,1,2")
    parser.add_argument("--iters", type=int, default=48, help="updates of a full run")
    parser.add_argument(
        "--schedule", choices=("constant", "linear"), default="constant", help="of the learning rate; linear falls to 0"
    )
    parser.add_argument("--averaging", default="3", help="train.averaging_power of averaged and search; null: none")
    parser.add_argument("--eta", type=int, default=4, help="of the search: the best 1/eta of a rung continue")
    parser.add_argument(
        "--eval-at",
        default="",
        help="updates, 12,48: jobs of a sweep evaluate there too, which shows what other rungs would choose",
    )
    parser.add_argument("--stock", type=int, default=2, help="configurations measured one by one")
    parser.add_argument("--limit", type=float, default=7200, help="seconds that one process may take")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="(outputs/benchmarks/search-TIME)")
    options = parser.parse_args(arguments)
    out = (options.out or Path("outputs/benchmarks") / time.strftime("search-%Y-%m-%d_%H-%M-%S")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(options, name) for name in ("iters", "schedule", "averaging", "eta")}
    measured = out / "options.json"
    if measured.exists() and json.loads(measured.read_text()) != asked:
        parser.error(f"{out} was measured with {measured.read_text()}: take another --out")
    measured.write_text(json.dumps(asked))
    model = call_module("models")[FLOAT32]
    data = call_module("workloads", model, "short", "3000", str(VALID_ROWS))["folder"]
    work = sides.Work(iters=options.iters, eval_every=options.iters, falls_to_zero=options.schedule == "linear")
    measure = _Measure(out, work, model, data, options)
    for part in options.parts.split(","):
        if part in ("stock", "single"):
            for rank, rate in _spread(options.stock):
                measure.one_by_one(part, rank, rate)
        else:
            for seed in map(int, options.seeds.split(",")):
                measure.together(part, seed)
    print(_table(measure.results))
    print(f"written: {out}")
    return 0


class _Measure:
    def __init__(self, out: Path, work: sides.Work, model: str, data: str, options: argparse.Namespace) -> None:
        self._out, self._work, self._model, self._data, self._options = out, work, model, data, options
        self._file = out / "results.json"
        self.results: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def one_by_one(self, part: str, rank: int, rate: float) -> None:
        """Train one configuration in a process of its own."""
        name = f"{part} rank {rank} rate {rate:g}"
        folder = self._out / name.replace(" ", "-")
        if name in self.results:
            return
        folder.mkdir()
        row = _STOCK if part == "stock" else _OURS
        work = replace(self._work, rank=rank, learning_rate=rate)
        command = sides.command(row, work, model=self._model, data=self._data, seed=0, folder=folder)
        self._record(name, command, folder, {})

    def together(self, part: str, seed: int) -> None:
        """Train all configurations in one process, as a sweep or a search."""
        name = f"{part} seed {seed}"
        folder = self._out / name.replace(" ", "-")
        if name in self.results:
            return
        folder.mkdir()
        texts = sides.overrides(_OURS, self._work, self._model, self._data, seed, folder)
        varied = ("lora.rank=", "optimizer.learning_rate=", "hydra.run.dir=", "train.eval_every=", "checkpoint.every=")
        fixed = [text for text in texts if not text.startswith(varied)]
        command = [
            *(sys.executable, "-m", "runner", "-m", *fixed, f"hydra.sweep.dir={folder / 'sweep'}"),
            f"lora.rank={','.join(map(str, RANKS))}",
            f"optimizer.learning_rate={','.join(f'{rate:g}' for rate in RATES)}",
            *(f"train.eval_every={self._work.iters}", f"checkpoint.every={self._work.iters}"),
        ]
        if part != "sweep":
            command.append(f"train.averaging_power={self._options.averaging}")
        if part == "search":
            command += ["hydra/sweeper=search", f"hydra.sweeper.eta={self._options.eta}", "hydra.sweeper.trials=16"]
        elif self._options.eval_at:
            command.append(f"train.eval_at=[{self._options.eval_at}]")
        self._record(name, command, folder, {})
        losses = {job.name: _last_loss(job) for job in sorted((folder / "sweep").glob("[0-9]*"))}
        ended = {job: loss for job, (step, loss) in losses.items() if step == self._work.iters}
        self.results[name]["losses"] = ended
        self._write()

    def _record(self, name: str, command: Sequence[str], folder: Path, extra: dict[str, str]) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        measured = run_measured(command, extra=extra, log=folder / "log", limit=self._options.limit)
        self.results[name] = asdict(measured)
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self.results, indent=1))


def _spread(count: int) -> list[tuple[int, float]]:
    """Return `count` of the configurations, evenly spaced."""
    everything = [(rank, rate) for rank in RANKS for rate in RATES]
    return [everything[(2 * i + 1) * len(everything) // (2 * count)] for i in range(count)]


def _last_loss(job: Path) -> tuple[int, float]:
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "valid"][-1]
    return last["step"], last["loss"]


def _table(results: dict[str, Any]) -> str:
    """Return what is known as text."""
    seconds: dict[str, float] = {}
    lines = []
    for part in PARTS:
        found = [result["seconds"] for name, result in results.items() if name.startswith(f"{part} ")]
        if not found:
            continue
        count = len(RANKS) * len(RATES) if part in ("stock", "single") else 1
        seconds[part] = count * sum(found) / len(found)
        measured = f"{len(found)} of 16 measured" if count > 1 else f"{len(found)} seeds"
        lines.append(f"{part:<9} {seconds[part]:8.0f} s  ({measured})")
    for part, following in itertools.pairwise(TIMED):
        if part in seconds and following in seconds:
            lines.append(f"{part} / {following}: {seconds[part] / seconds[following]:.2f}")
    if "stock" in seconds and "search" in seconds:
        lines.append(f"stock / search, in all: {seconds['stock'] / seconds['search']:.1f}")
    for name, result in results.items():
        part, _, seed = name.partition(" ")
        if part != "search":
            continue
        winner = min(result["losses"].values())
        lines.append(f"{name}: winner {winner:.4f}")
        for full, averaging in (("sweep", "without"), ("averaged", "with")):
            if f"{full} {seed}" in results:
                best = min(results[f"{full} {seed}"]["losses"].values())
                lines.append(f"  best of 16 full runs {averaging} averaging {best:.4f}: {winner / best - 1:+.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
