"""The sequence of measurements: gates, a cold run of each row, then rounds in alternating order of the rows."""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import gates, sides
from benchmarks.processes import call_module, run_measured
from benchmarks.report import COLD
from benchmarks.sides import BASE_ROW, OFF_ROW, OPTIMIZATION_ROWS, OURS, ROWS, SHIPPED_ROW, SLOW_ROW, STOCK, Row, Work
from benchmarks.workloads import Statistics

GATE = "gate"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Size:
    """How much one workload trains: every row once, so that both sides train on the same tokens."""

    work: Work
    valid_rows: int

    @property
    def train_rows(self) -> int:
        return self.work.iters * self.work.batch_size


@dataclass(frozen=True)
class Effort:
    """How much the benchmark measures."""

    mode: str
    rounds: int
    sizes: Mapping[str, Size]
    optimizations: Mapping[str, Size]
    """The size for the rows of single optimizations, which are many, and for the rows compared with them."""
    slow: Size
    """The size for row a, which is many times slower."""
    slow_on: tuple[str, ...]
    """The workloads of row a."""
    gate_runs: int
    """Runs of stock mlx-lm without its padding token, to compare adapters; with 0, f may have learned more than b."""
    cold_everywhere: bool
    """Whether each workload has a cold run; otherwise the first one compiles the kernels for all."""
    minutes: float | None
    notes: tuple[str, ...] = ()


QUICK = Effort(
    mode="quick",
    rounds=2,
    sizes={"short": Size(Work(4, 4), 4), "mixed": Size(Work(8, 8, batch_size=2), 4)},
    optimizations={"short": Size(Work(4, 4), 4), "mixed": Size(Work(4, 4), 4)},
    slow=Size(Work(1, 1), 4),
    slow_on=("short",),
    gate_runs=0,
    cold_everywhere=False,
    minutes=9.5,
    notes=("quick: start-up is a large part of such short runs, on both sides",),
)
FULL = Effort(
    mode="full",
    rounds=5,
    sizes={"short": Size(Work(24, 12), 16), "mixed": Size(Work(10, 5), 8)},
    optimizations={"short": Size(Work(4, 2), 8), "mixed": Size(Work(2, 2), 4)},
    slow=Size(Work(2, 2), 4),
    slow_on=("short", "mixed"),
    gate_runs=gates.SEEDS,
    cold_everywhere=True,
    minutes=None,
)


@dataclass(frozen=True)
class Part:
    """Rows that are measured in turn on the same rows of one workload."""

    workload: str
    size: Size
    rows: Sequence[str]

    @property
    def gated(self) -> bool:
        """Whether the two sides are compared here, and so have to do the same."""
        return SHIPPED_ROW in self.rows or self.rows == [BASE_ROW]


class Bench:
    """One execution of the benchmark; results.json is written after each run."""

    def __init__(
        self,
        folder: Path,
        effort: Effort,
        rows: Sequence[str],
        workloads: Sequence[str],
        rounds: int | None = None,
        minutes: float | None = None,
    ) -> None:
        """`rounds` and `minutes` replace those of the effort."""
        self.folder, self.effort = folder, effort
        self.parts = parts_of(effort, [row for row in ROWS if row in rows], workloads)
        self.rounds = effort.rounds if rounds is None else rounds
        self._limit = effort.minutes if minutes is None else minutes
        self._started = time.monotonic()
        self._models: dict[str, str] = {}
        self._data: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._jobs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.results: dict[str, Any] = {"mode": effort.mode, "gates": {}, "workloads": {}, "runs": []}
        self.results["notes"] = list(effort.notes)

    def run(self) -> None:
        """Measure everything. Raises ProcessFailed if a process fails; results.json has what was measured before."""
        self._models = call_module("models")
        self.results["machine"] = _machine()
        self.results["model"] = json.loads((Path(self._models["float32"]) / "config.json").read_text())
        self.results["gemm"] = call_module("flops")
        for name in self.parts:
            self._prepare(name)
        for name in self.parts:
            self._measure_rounds(name)
        again = call_module("flops")
        self.results["gemm"]["gflops"] = max(self.results["gemm"]["gflops"], again["gflops"])
        self._check_token_counts()
        for name in self.parts:
            self._compare_adapters(name)
        shutil.rmtree(self.folder / "caches", ignore_errors=True)
        self._write_results()

    def _prepare(self, name: str) -> None:
        size = self.parts[name].size
        made = self._dataset(name, size)
        self.results["workloads"][name] = {"statistics": made["statistics"], **asdict(size.work)}
        for split, found in made["statistics"].items():
            self._print(f"{name} {split}: {Statistics(**found)}")
        if not self.parts[name].gated:
            return
        found = call_module("gates", "equal", self._models["float32"], made["folder"])
        text = (
            f"{found['rows_that_differ']} rows tokenized differently; losses of equal batches differ by "
            f"{found['loss']:.1e} (at most {gates.LOSS:g}), gradients by {found['gradient']:.1e} of their norm "
            f"(at most {gates.GRADIENT:g}); {found['zero_gradients']} of {found['arrays']} arrays without a gradient"
        )
        self.results["gates"][f"{name}, equal batches"] = {**found, "text": text}
        self._print(f"{name}, equal batches: {'passed' if found['passed'] else 'FAILED'}: {text}")

    def _dataset(self, name: str, size: Size) -> dict[str, Any]:
        workload = self.parts[name].workload
        key = (workload, size.train_rows, size.valid_rows)
        if key not in self._data:
            self._data[key] = call_module("workloads", self._models["float32"], workload, *map(str, key[1:]))
        return self._data[key]

    def _measure_rounds(self, name: str) -> None:
        part = self.parts[name]
        for seed in range(self.effort.gate_runs if SHIPPED_ROW in part.rows else 0):
            self._run_row(name, GATE, GATE, seed)
        rows = [row for row in part.rows if row != SLOW_ROW]
        if self.effort.cold_everywhere or name == next(iter(self.parts)):
            for row in rows:
                shutil.rmtree(self._cache(row), ignore_errors=True)
                self._run_row(name, row, COLD, seed=0)
        if SLOW_ROW in part.rows and name in self.effort.slow_on:
            shutil.rmtree(self._cache(SLOW_ROW), ignore_errors=True)
            for which in (COLD, 1) if self.effort.cold_everywhere else (COLD,):
                self._run_row(name, SLOW_ROW, which, seed=0)
        longest = 0.0
        for number in range(1, self.rounds + 1):
            left = self._seconds_left()
            if number > 1 and left < longest:
                self.results["notes"].append(f"{name}: {number - 1} of {self.rounds} rounds, for lack of time")
                break
            begun = time.monotonic()
            for row in rows if number % 2 else reversed(rows):
                self._run_row(name, row, number, seed=number)
            longest = max(longest, time.monotonic() - begun)

    def _run_row(self, name: str, label: str, which: str | int, seed: int) -> None:
        """Run one row once, and keep what is needed to count what it did."""
        row = sides.GATE if label == GATE else ROWS[label]
        size = self.effort.slow if label == SLOW_ROW else self.parts[name].size
        data = self._dataset(name, size)["folder"]
        folder = (
            self.folder
            / "runs"
            / f"{name.replace(', ', '-')}-{label.replace(': ', '-').replace(' ', '_')}-{which}-{seed}"
        )
        folder.mkdir(parents=True)
        cache = self._cache(label)
        cache.mkdir(parents=True, exist_ok=True)
        command = sides.command(row, size.work, model=self._models[row.model], data=data, seed=seed, folder=folder)
        # MLX keeps the kernels that it compiles below TMPDIR.
        own_caches = {"TMPDIR": str(cache), "RUNNER_CACHE": str(cache / "runner")}
        measurement = run_measured(command, extra=own_caches, log=folder / "log", limit=4 * 3600)
        run = {"workload": name, "row": label, "round": which, "seed": seed, **asdict(measurement)}
        own, job = (_ours if row.side == OURS else _stock)(row, size.work, self._models[row.model], data, seed, folder)
        self._jobs.append((run | own, job))
        others = "" if measurement.others is None else f", others {measurement.others:.1f} cores"
        round_ = f"of seed {seed}" if label == GATE else which
        self._print(
            f"{name} {label} {round_}: {measurement.seconds:.1f} s, {measurement.rss_gb:.2f} GB, "
            f"load {measurement.load:.1f}{others}"
        )
        self._write_results()

    def _cache(self, label: str) -> Path:
        return self.folder / "caches" / label.replace(": ", "-").replace(" ", "_")

    def _check_token_counts(self) -> None:
        """Replay every run outside of the timing, and compare the counts with those that the program reported."""
        jobs = self.folder / "jobs.json"
        jobs.write_text(json.dumps([job for _, job in self._jobs]))
        wrong = []
        for (run, _), counted in zip(self._jobs, call_module("replay", str(jobs)), strict=True):
            run["counted"] = counted
            reported = run["said_tokens"]
            # Stock mlx-lm prints supervised tokens in hundreds, one of padding a row among them.
            padding = 0 if run["row"] == GATE else counted["padded_rows"]
            own = counted["tokens"] if run["exact"] else counted["supervised"] + padding
            if reported is None or abs(reported - own) > (0 if run["exact"] else 50.001):
                wrong.append(f"{run['workload']} {run['row']} {run['round']}: {reported} reported, {own} counted")
            if run["said_evaluations"] != counted["evaluations"]:
                wrong.append(f"{run['workload']} {run['row']}: {run['said_evaluations']} evaluations")
            if run["row"] != GATE:
                self.results["runs"].append(run)
        text = (
            "; ".join(wrong)
            or f"{len(self._jobs)} runs trained and evaluated as often and on as many tokens as counted"
        )
        self.results["gates"]["tokens"] = {"passed": not wrong, "text": text}

    def _compare_adapters(self, name: str) -> None:
        """The gate of the adapters: equal validation loss after equal updates, as far as the seeds' spread tells."""
        if not self.parts[name].gated:
            return
        theirs = GATE if self.effort.gate_runs else BASE_ROW
        found = {
            label: [run["adapters"] for run, _ in self._jobs if (run["workload"], run["row"]) == (name, label)]
            for label in (SHIPPED_ROW, theirs)
        }
        title = f"{name}, adapters"
        if min(len(each) for each in found.values()) < gates.SEEDS:
            text = f"needs {gates.SEEDS} runs of {SHIPPED_ROW} and of {sides.GATE.about if theirs == GATE else theirs}"
            self.results["gates"][title] = {"passed": None, "text": text}
            return
        job = self.folder / "adapters.json"
        data = self._dataset(name, self.parts[name].size)["folder"]
        both = found[SHIPPED_ROW] + found[theirs]
        job.write_text(json.dumps({"model": self._models["float32"], "data": data, "folders": both}))
        measured_losses = call_module("gates", "adapters", str(job))
        losses = (
            measured_losses["losses"][: len(found[SHIPPED_ROW])],
            measured_losses["losses"][len(found[SHIPPED_ROW]) :],
        )
        gate = gates.compare_means(*losses, measured_losses["before"], same=theirs == GATE)
        against = sides.GATE.about if theirs == GATE else "b, where ours may be lower: b learns padding as well"
        text = (
            f"validation loss {gate['before']:.4f} before, {gate['ours']:.4f} ours, {gate['theirs']:.4f} theirs "
            f"(margin {gate['margin']:.4f} from {len(losses[0])} and {len(losses[1])} seeds; against {against})"
        )
        self.results["gates"][title] = {**gate, "losses": losses, "text": text}
        self._print(f"{title}: {'passed' if gate['passed'] else 'FAILED'}: {text}")

    def _seconds_left(self) -> float:
        """Seconds until the limit."""
        return float("inf") if self._limit is None else self._limit * 60 - (time.monotonic() - self._started)

    def _write_results(self) -> None:
        runs = self.results["runs"] or [run for run, _ in self._jobs]
        (self.folder / "results.json").write_text(json.dumps({**self.results, "runs": runs}, indent=1))

    def _print(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        print(f"{minutes:3d}:{seconds:02d}  {line}", flush=True)


def parts_of(effort: Effort, rows: Sequence[str], workloads: Sequence[str]) -> dict[str, Part]:
    """Return the parts of the benchmark by their names in the results.

    Rows of single optimizations are a part of their own, of a smaller size, with the rows they are compared with.
    """
    optimizations = [row for row in rows if row in OPTIMIZATION_ROWS]
    beside = [row for row in (BASE_ROW, OFF_ROW) if row in rows] if optimizations else []
    whole = [row for row in rows if row not in optimizations and not (optimizations and row == OFF_ROW)]
    if set(whole) <= set(beside):
        whole = []
    parts = {}
    for name in workloads:
        if whole:
            parts[name] = Part(name, effort.sizes[name], whole)
        if optimizations:
            parts[f"{name}, optimizations"] = Part(name, effort.optimizations[name], [*beside, *optimizations])
    return parts


def _stock(row: Row, work: Work, model: str, data: str, seed: int, folder: Path) -> tuple[dict, dict]:
    """Return what stock mlx-lm reported, and the job for its replay."""
    log = _COLOUR.sub("", (folder / "log").read_text(errors="replace"))
    trained = re.findall(r"^ +\d+ +[\d.]+ [▼▲] +[\d,]+ +([\d.]+)k", log, re.MULTILINE)
    evaluated = re.findall(r"^ +\d+ +val +[\d.]+ ", log, re.MULTILINE)
    peak = re.search(r"^mlx peak memory ([\d.]+) GB", log, re.MULTILINE)
    for file in (folder / "adapters").glob("0*_adapters.safetensors"):
        file.unlink()
    own = {
        "adapters": str(folder / "adapters"),
        "mlx_peak_gb": float(peak[1]) if peak else None,
        "said_tokens": float(trained[-1]) * 1000 if trained else None,
        "said_evaluations": len(evaluated),
        "exact": False,
    }
    config = sides.stock_config(work, model, data, seed, folder)
    return own, {"side": STOCK, "config": config, "sorted": "--sort" in row.flags}


def _ours(row: Row, work: Work, model: str, data: str, seed: int, folder: Path) -> tuple[dict, dict]:
    """What our run's directory says, of which only the adapter and the rows stay, and the job for its replay."""
    from runner.runs.directory import RunDirectory

    run = folder / "run"
    settings = RunDirectory(run).read_config()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = max((run / "checkpoints").glob("step-*")) / "train_state.json"
    saved = json.loads(state.read_text())
    (run / "adapters").rename(folder / "adapters")
    (run / "metrics.jsonl").rename(folder / "metrics.jsonl")
    shutil.rmtree(run)
    trained = [line["tokens"] for line in rows if line["split"] == "train"]
    own = {
        "adapters": str(folder / "adapters"),
        "mlx_peak_gb": max(line["peak_memory_gb"] for line in rows if "peak_memory_gb" in line),
        "said_tokens": trained[-1] if trained else None,
        "said_evaluations": sum(line["split"] == "valid" for line in rows),
        "exact": True,
    }
    job = {"side": OURS, "model": model, "data": data, "seed": seed, "iters": work.iters, "eval_every": work.eval_every}
    job |= {"batch_size": work.batch_size, "window": saved["position"]["window"], "pad_to": settings["data"]["pad_to"]}
    job |= {"packed": bool(saved["environment"]["engine"])}
    return own, job


def _machine() -> dict[str, Any]:
    from runner import __version__
    from runner.common.cores import usable_cores

    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"runner": __version__, **{name: version(name) for name in ("mlx", "mlx-lm")}},
        "date": time.strftime("%Y-%m-%d"),
    }
