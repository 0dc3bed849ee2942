"""What came of a sweep: a table sorted by the objective, results.csv and a plot of the curves, from the runs alone."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from runner.common.atomic_io import write_atomically
from runner.common.text import shell_path
from runner.reports import next_commands, svg
from runner.reports.run_summary import command_lines
from runner.reports.tables import Column, Screen, TableRow, table
from runner.runs.inspect import RunInfo, objective_value, read_run
from runner.runs.sweep_manifest import SweepJob, SweepManifest

_SHOWN = 40
"""Rows of the table on the screen; all are in results.csv."""
_CURVES = 16
_STYLES = {"finished": "green", "stopped": "yellow", "interrupted": "yellow", "failed": "red", "diverged": "red"}
COLUMNS = ("job", "state", "objective", "valid_loss", "best_step", "step", "iters", "seconds", "reason", "folder")


def summarise(folder: Path, known: SweepManifest, errors: dict[int, str]) -> int:
    """Print the table, write results.csv and curves.svg; returns how many jobs failed or diverged.

    `errors` are what this launch's jobs raised, by number: the reason of one that ended before it had a status.
    """
    jobs = list(known.jobs.values())
    infos = {job.number: _read(folder / job.folder) for job in jobs}
    for number, error in errors.items():
        if infos[number].state not in ("failed", "diverged"):  # refused before it wrote a status
            infos[number].state, infos[number].reason = "failed", error
        infos[number].reason = infos[number].reason or error
    varied = _varied(jobs)
    metric, direction = _objective(list(infos.values()))
    values = {
        number: None if info.state == "diverged" else objective_value(info.rows, info.best_loss, metric)
        for number, info in infos.items()
    }
    sign = -1.0 if direction == "maximize" else 1.0

    def rank(job: SweepJob) -> tuple[float, int]:
        value = values[job.number]
        return (sign * value if value is not None else math.inf, job.number)

    ranked = sorted(jobs, key=rank)
    _write_csv(folder, ranked, infos, values, varied)
    _write_curves(folder, ranked, infos, varied)
    _print(folder, ranked, infos, values, varied, metric)
    return sum(info.state in ("failed", "diverged") for info in infos.values())


def _read(folder: Path) -> RunInfo:
    return read_run(folder) if (folder / "config.yaml").exists() else RunInfo(path=folder, state="not started")


def _varied(jobs: list[SweepJob]) -> dict[int, dict[str, str]]:
    """Of each job the overrides that not all jobs share."""
    own = {job.number: dict(word.lstrip("+").split("=", 1) for word in job.overrides) for job in jobs}
    keys = {key for words in own.values() for key in words}
    differs = {key for key in keys if len({words.get(key) for words in own.values()}) > 1}
    return {number: {k: v for k, v in words.items() if k in differs} for number, words in own.items()}


def _objective(infos: list[RunInfo]) -> tuple[str, str]:
    for info in infos:
        if "objective.metric" in info.settings:
            return str(info.settings["objective.metric"]), str(info.settings["objective.direction"])
    return "valid_loss", "minimize"


def _write_csv(
    folder: Path, ranked: list[SweepJob], infos: dict[int, RunInfo], values: dict[int, float | None], varied: dict
) -> None:
    keys = list(dict.fromkeys(key for words in varied.values() for key in words))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*COLUMNS, *keys])
    for job in ranked:
        info = infos[job.number]
        cells: list[Any] = [job.number, info.state, values[job.number], info.best_loss, info.best_step, info.step]
        cells += [info.iters, info.status.get("seconds"), info.reason, job.folder]
        writer.writerow(["" if c is None else c for c in cells] + [varied[job.number].get(k, "") for k in keys])
    write_atomically(folder / "results.csv", out.getvalue())


def _write_curves(folder: Path, ranked: list[SweepJob], infos: dict[int, RunInfo], varied: dict) -> None:
    series = []
    for job in ranked[:_CURVES]:
        name = " ".join(f"{key.split('.')[-1]}={value}" for key, value in varied[job.number].items())
        series.append((f"{job.number}: {name}"[:60], infos[job.number].losses("valid")))
    title = f"{folder.name}: validation loss" + (f", the best {_CURVES}" if len(ranked) > _CURVES else "")
    write_atomically(folder / "curves.svg", svg.curves(title, series))


def _print(
    folder: Path,
    ranked: list[SweepJob],
    infos: dict[int, RunInfo],
    values: dict[int, float | None],
    varied: dict[int, dict[str, str]],
    metric: str,
) -> None:
    keys = list(dict.fromkeys(key for words in varied.values() for key in words))
    columns = [Column("job", right=True), *[Column(key) for key in keys], Column("state"), Column(metric, right=True)]
    columns += [Column("at step", right=True), Column("reason", cut=True)]
    rows = []
    for job in ranked[:_SHOWN]:
        info, value = infos[job.number], values[job.number]
        cells = [str(job.number), *[varied[job.number].get(key, "") for key in keys], info.state]
        cells += ["" if value is None else f"{value:.4f}", "" if info.best_step is None else str(info.best_step)]
        reason = (info.reason or "").splitlines() or [""]
        rows.append(TableRow([*cells, reason[0]], {len(keys) + 1: _STYLES.get(info.state, "")}))
    screen = Screen()
    screen.line("")
    screen.lines(table(columns, rows, screen.width))
    if len(ranked) > _SHOWN:
        screen.line(f"… and {len(ranked) - _SHOWN} more in results.csv")
    screen.line("")
    screen.line(f"sweep       {shell_path(folder)}")
    screen.line(f"results     {shell_path(folder / 'results.csv')}, {shell_path(folder / 'curves.svg')}")
    finished = all(info.state in ("finished", "diverged") for info in infos.values())
    for line in command_lines(next_commands.after_sweep(folder, finished=finished, varied=keys)):
        screen.line(line)
