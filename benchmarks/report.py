"""The table and the plot of the results: ``python -m benchmarks.report FOLDER`` writes them again."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.flops import Shape, evaluating, training
from benchmarks.sides import BASE_ROW, OFF_ROW, OPTIMIZATION_ROWS, ROWS, SHIPPED_ROW, SLOW_ROW
from benchmarks.workloads import Statistics

COLD = "cold"
QUIET = 0.1
"""Cores that other processes may keep busy, in the median run, before the report warns."""
Run = dict[str, Any]


def rate(run: Run) -> float:
    """Return the real training tokens per second of wall-clock time, including start-up, evaluation and saving."""
    return run["counted"]["tokens"] / run["seconds"]


def ratios(runs: Sequence[Run], row: str, base: str) -> list[float]:
    """Return the rate of `row` relative to `base` for each round with both, or of the cold runs if there is none."""
    rates = {(run["row"], run["round"]): rate(run) for run in runs}
    both = [n for name, n in rates if name == row and (base, n) in rates]
    chosen = [n for n in both if n != COLD] or both
    return [rates[row, n] / rates[base, n] for n in chosen]


def write(results: dict[str, Any], folder: Path) -> str:
    """Write table.md and plot.svg into `folder`; return the text of the table."""
    text = "\n".join(_lines(results)) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "plot.svg").write_text(plot(results), encoding="utf-8")
    return text


def _lines(results: dict[str, Any]) -> list[str]:
    machine, gemm = results["machine"], results["gemm"]
    blas = gemm["blas"]
    lines = [
        f"# Against mlx_lm.lora ({results['mode']})",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f"; {machine['date']}.",
        f"BLAS of b to f: {blas['version'] or blas['kind']}, {blas['threads'] or 'its own number of'} threads. "
        f"Fastest float32 product in this run: {gemm['gflops']:.0f} GFLOP/s.",
        "",
        "Real tokens: of the training rows, without padding. Seconds: wall-clock of the whole process, from its start "
        "to its end. Medians, with the lowest and highest round. Cold: with empty caches, as the first epoch on a data "
        "set is; the rounds use what the cold run has cached (compiled kernels; ours also hidden states of the frozen "
        "blocks and the loss before training), as later epochs and other jobs do. Of GEMM peak: of the cold run, which "
        "computes everything that is counted.",
        "",
    ]
    names = [name for name in results["workloads"] if any(run["workload"] == name for run in results["runs"])]
    lines += ["## Gates", "", *_gates(results), ""]
    for name in names:
        lines += _workload(results, name)
    return [*lines, *(f"- {note}" for note in results["notes"])]


def _gates(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, gate in results["gates"].items():
        word = {True: "passed", False: "FAILED", None: "not decided"}[gate["passed"]]
        lines.append(f"- **{word}** {name}: {gate['text']}")
    return lines


def _workload(results: dict[str, Any], name: str) -> list[str]:
    runs = [run for run in results["runs"] if run["workload"] == name]
    about = results["workloads"][name]
    lines = [f"## {name}", ""]
    lines += [f"- {split}: {Statistics(**found)}" for split, found in about["statistics"].items()]
    lines += [
        f"- {about['iters']} updates of {about['batch_size']} rows, an evaluation before the first and every "
        f"{about['eval_every']} updates, a save every {about['eval_every']}; rank {about['rank']} on every linear "
        f"layer of the last {about['num_layers']} blocks",
        f"- needed: {_flops_per_token(results, runs):.3g} FLOPs per real training token, without evaluation",
        "",
        f"| row | what | rounds | tokens/s | of {_base(runs)} | cold tokens/s | RSS peak, GB | MLX peak, GB | "
        "positions real | of GEMM peak | load | others busy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_table_row(results, runs, row) for row in ROWS if any(run["row"] == row for run in runs)]
    return [*lines, "", *_headlines(results, runs)]


def _table_row(results: dict[str, Any], runs: Sequence[Run], row: str) -> str:
    own = [run for run in runs if run["row"] == row]
    warm = [run for run in own if run["round"] != COLD]
    cold = [run for run in own if run["round"] == COLD]
    shown = warm or cold
    others = [run["others"] for run in shown if run["others"] is not None]
    mlx = [run["mlx_peak_gb"] for run in shown if run["mlx_peak_gb"] is not None]
    base = _base(runs)
    of_base = ratios(runs, row, base)
    counted = shown[0]["counted"]
    cells = [
        row,
        ROWS[row].about,
        str(len(warm)) if warm else "cold only",
        _spread([rate(run) for run in warm]) if warm else "–",
        f"{statistics.median(of_base):.2f}" if of_base and row not in (base, SLOW_ROW) else "–",
        f"{rate(cold[0]):.1f}" if cold else "–",
        _spread([run["rss_gb"] for run in shown], 2),
        f"{statistics.median(mlx):.2f}" if mlx else "–",
        f"{counted['tokens'] / counted['positions']:.0%}",
        f"{statistics.median(_share(results, run) for run in cold or shown):.1%}",
        f"{statistics.median(run['load'] for run in shown):.1f}",
        f"{statistics.median(others):.1f}" if others else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def _base(runs: Sequence[Run]) -> str:
    """Return the row that the others are compared with: b, or, among single optimizations, the one without any."""
    return OFF_ROW if any(run["row"] in OPTIMIZATION_ROWS for run in runs) else BASE_ROW


def _headlines(results: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    failed = [name for name, gate in results["gates"].items() if gate["passed"] is False]
    if failed:
        return [f"**No headline: {', '.join(failed)} failed.**", ""]
    lines = []
    busy = [run["others"] for run in runs if run["others"] is not None]
    if busy and statistics.median(busy) > QUIET:
        lines.append(
            f"**Not a quiet machine: other processes kept {statistics.median(busy):.1f} cores of "
            f"{results['machine']['cores']} busy. Measure again.**"
        )
    speed = ratios(runs, SHIPPED_ROW, BASE_ROW)
    if speed:
        memory = [_median(runs, row, "rss_gb") for row in (SHIPPED_ROW, BASE_ROW)]
        lines.append(
            f"**f/b: {statistics.median(speed):.2f} times the real tokens per second** (rounds: "
            f"{min(speed):.2f} to {max(speed):.2f}, {len(speed)} of them) **at {memory[0] / memory[1]:.2f} times the "
            f"peak resident memory** ({memory[0]:.2f} GB against {memory[1]:.2f} GB)."
        )
    slow = ratios(runs, SHIPPED_ROW, SLOW_ROW)
    if slow:
        tokens = [next(r["counted"]["tokens"] for r in runs if r["row"] == row) for row in (SLOW_ROW, SHIPPED_ROW)]
        lines += [
            f"f/a, which includes the environment (dtype and BLAS): {statistics.median(slow):.1f}; "
            f"a trained {tokens[0]:,} tokens only, f {tokens[1]:,}, so that start-up weighs more in a.",
        ]
    return [part for line in lines for part in (line, "")]


def _median(runs: Sequence[Run], row: str, field: str) -> float:
    own = [run for run in runs if run["row"] == row]
    return statistics.median(run[field] for run in [r for r in own if r["round"] != COLD] or own)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _shape(results: dict[str, Any], about: dict[str, Any]) -> Shape:
    return Shape.of(results["model"], rank=about["rank"], num_layers=about["num_layers"])


def _trained(results: dict[str, Any], run: Run) -> int:
    counted = run["counted"]
    part = {name: counted[name] for name in ("tokens", "first", "supervised")}
    return training(_shape(results, results["workloads"][run["workload"]]), **part)


def _flops_per_token(results: dict[str, Any], runs: Sequence[Run]) -> float:
    run = next((run for run in runs if run["row"] != SLOW_ROW), runs[0])
    return _trained(results, run) / run["counted"]["tokens"]


def _share(results: dict[str, Any], run: Run) -> float:
    """Return the operations per second that a run's training and evaluations needed, as a share of the GEMM peak."""
    counted = run["counted"]
    held_out = evaluating(
        _shape(results, results["workloads"][run["workload"]]),
        tokens=counted["valid_tokens"],
        supervised=counted["valid_supervised"],
        times=counted["evaluations"],
    )
    return (_trained(results, run) + held_out) / run["seconds"] / (results["gemm"]["gflops"] * 1e9)


def plot(results: dict[str, Any]) -> str:
    """Return an SVG with a bar for each median rate and the spread of its rounds, grouped by workload."""
    groups = []
    for name in results["workloads"]:
        bars = []
        for row in ROWS:
            own = [run for run in results["runs"] if (run["workload"], run["row"]) == (name, row)]
            shown = [rate(run) for run in own if run["round"] != COLD] or [rate(run) for run in own]
            if shown:
                bars.append((f"{row}  {ROWS[row].about}", shown))
        if bars:
            groups.append((name, bars))
    left, wide, line = 400, 420, 24
    most = max((max(values) for _, bars in groups for _, values in bars), default=1.0)
    height = 40 + sum(34 + line * len(bars) for _, bars in groups)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 90} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{left + wide + 90}" height="{height}" fill="white"/>',
        '<text x="12" y="24" font-size="15" fill="#111">real tokens per second of wall-clock time</text>',
    ]
    y = 40
    for name, bars in groups:
        out.append(f'<text x="12" y="{y + 18}" font-size="13" fill="#555">{escape(name)}</text>')
        y += 28
        for label, values in bars:
            colour = "#2563eb" if label.startswith(("d", "e", "f")) else "#9ca3af"
            middle, low, high = (left + wide * v / most for v in (statistics.median(values), min(values), max(values)))
            out.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" fill="#111">{escape(label)}</text>')
            out.append(f'<rect x="{left}" y="{y + 3}" width="{middle - left:.1f}" height="15" fill="{colour}"/>')
            if low < high:
                out.append(f'<path d="M{low:.1f} {y + 10.5}H{high:.1f}" stroke="#111"/>')
            out.append(f'<text x="{high + 6:.1f}" y="{y + 15}" fill="#111">{statistics.median(values):.1f}</text>')
            y += line
        y += 6
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print(write(json.loads((where / "results.json").read_text()), where))
