"""The results of a sweep, from its run directories: a table ranked by the objective, results.csv and curves.svg."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from runner.common.atomic_io import write_atomically
from runner.common.layout import REPORT
from runner.common.text import shell_path
from runner.reports import settings_text, svg
from runner.reports.cells import STATE_STYLES, run_notes
from runner.reports.job_settings import varied_settings
from runner.reports.next_commands import after_sweep, command_lines
from runner.reports.screen import Screen
from runner.reports.seed_groups import print_seed_groups, seed_groups
from runner.reports.sweep_page import print_sweep_verdict
from runner.reports.tables import Column, TableRow
from runner.runs.inspect import RunInfo, read_run
from runner.runs.objective import Objective, objective_of
from runner.runs.sweep_manifest import SweepJob, SweepManifest

_FILES = ("results.csv", "curves.svg", REPORT)
_MAX_TABLE_ROWS = 40
_MAX_CURVES = 16
_MAX_CURVE_NAME = 60
CSV_COLUMNS = ("job", "state", "objective", "valid_loss", "best_step", "step", "iters", "seconds", "reason", "folder")


@dataclass(frozen=True)
class JobResult:
    """What a job of a sweep reached."""

    job: SweepJob
    run: RunInfo
    objective: float | None
    varied: dict[str, Any]
    """Its values of the settings that the sweep varies."""


@dataclass(frozen=True)
class SweepResults:
    """The results of all jobs of a sweep, the best objective first."""

    folder: Path
    objective: Objective
    jobs: list[JobResult]

    @property
    def varied_names(self) -> list[str]:
        """The settings that differ between jobs."""
        return list(dict.fromkeys(name for result in self.jobs for name in result.varied))

    @property
    def failed(self) -> int:
        """How many jobs failed or diverged."""
        return sum(result.run.state in ("failed", "diverged") for result in self.jobs)


def read_sweep_results(
    manifest: SweepManifest, errors: Mapping[int, str], known: Mapping[Path, RunInfo] | None = None
) -> SweepResults:
    """Read the runs of the sweep's jobs.

    Args:
        errors: what the jobs of this launch raised, by number: the reason of a job that failed before it had a status.
        known: runs that were read already, by path.
    """
    jobs, known = manifest.jobs, known or {}
    paths = {job.number: manifest.folder / job.folder for job in jobs}
    runs = {number: known.get(path) or _read_job(path) for number, path in paths.items()}
    for number, error in errors.items():
        run = runs[number]
        if run.state not in ("failed", "diverged"):
            run.state, run.reason = "failed", error
        run.reason = run.reason or error
    objective = objective_of(list(runs.values()))
    varied = varied_settings(jobs, runs)
    results = {
        run.path: JobResult(job, run, objective.value(run), varied[job.number])
        for job, run in zip(jobs, runs.values(), strict=True)
    }
    ranked = [results[run.path] for run in objective.rank(runs.values())]
    return SweepResults(manifest.folder, objective, ranked)


def write_sweep_results(results: SweepResults) -> None:
    """Write results.csv and curves.svg into the sweep's folder."""
    write_atomically(results.folder / "results.csv", results_csv(results))
    write_atomically(results.folder / "curves.svg", results_svg(results))


def results_csv(results: SweepResults) -> str:
    """Return the results as CSV: `CSV_COLUMNS`, then the settings that differ between jobs."""
    names = results.varied_names
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*CSV_COLUMNS, *names])
    for result in results.jobs:
        run = result.run
        cells: list[Any] = [result.job.number, run.state, result.objective, run.best_loss, run.best_step, run.step]
        cells += [run.iters, run.status.get("seconds"), run.reason, result.job.folder]
        writer.writerow(["" if c is None else c for c in cells] + [_text(result.varied[name]) for name in names])
    return out.getvalue()


def results_svg(results: SweepResults) -> str:
    """Return the validation curves of the best jobs as an SVG image."""
    curves = []
    for result in results.jobs[:_MAX_CURVES]:
        settings = " ".join(f"{name.split('.')[-1]}={_text(value)}" for name, value in result.varied.items())
        curves.append((f"{result.job.number}: {settings}"[:_MAX_CURVE_NAME], result.run.losses("valid")))
    suffix = f", the best {_MAX_CURVES}" if len(results.jobs) > _MAX_CURVES else ""
    return svg.plot(f"{results.folder.name}: validation loss{suffix}", curves)


def print_sweep_results(results: SweepResults, screen: Screen) -> None:
    """Print the table, the paths and the command to type next."""
    names = results.varied_names
    columns = [Column("job", right=True), *[Column(name) for name in names], Column("state")]
    columns += [Column(results.objective.metric, right=True), Column("at step", right=True)]
    screen.line("")
    texts = [settings_text.texts_of(name, [result.varied[name] for result in results.jobs]) for name in names]
    rows = zip(results.jobs, zip(*texts, strict=True) if texts else repeat(()), strict=False)
    screen.table(columns, [_table_row(result, list(values)) for result, values in islice(rows, _MAX_TABLE_ROWS)])
    if len(results.jobs) > _MAX_TABLE_ROWS:
        screen.line(f"… and {len(results.jobs) - _MAX_TABLE_ROWS} more in results.csv")
    varied = {result.run.path: result.varied for result in results.jobs}
    if groups := seed_groups([result.run for result in results.jobs], results.objective, varied):
        print_seed_groups(groups, results.objective.metric, screen)
    print_sweep_verdict([result.run for result in results.jobs], results.objective, screen)
    screen.line("")
    screen.line(f"sweep       {shell_path(results.folder)}")
    paths = [shell_path(path) for name in _FILES if (path := results.folder / name).is_file()]
    screen.line(f"results     {', '.join(paths)}")
    finished = all(result.run.state in ("finished", "diverged") for result in results.jobs)
    for line in command_lines(after_sweep(results.folder, finished=finished, varied=names)):
        screen.line(line)


def _table_row(result: JobResult, values: Sequence[str]) -> TableRow:
    run = result.run
    cells = [str(result.job.number), *values, run.state]
    cells.append("" if result.objective is None else f"{result.objective:.4f}")
    cells.append("" if run.best_step is None else str(run.best_step))
    return TableRow(cells, {len(values) + 1: STATE_STYLES.get(run.state, "")}, run_notes(run))


def _text(value: Any) -> str:
    return "" if value is None else settings_text.value_text(value)


def _read_job(folder: Path) -> RunInfo:
    return read_run(folder) if (folder / "config.yaml").exists() else RunInfo(path=folder, state="not started")
