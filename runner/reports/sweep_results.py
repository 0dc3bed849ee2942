"""The results of a sweep, from its run directories: a table ranked by the objective, results.csv and curves.svg."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.atomic_io import write_atomically
from runner.common.layout import REPORT
from runner.common.text import shell_path
from runner.reports import settings_text, svg
from runner.reports.cells import STATE_STYLES, run_notes
from runner.reports.job_settings import varied_settings
from runner.reports.metric_columns import front_note, objective_columns
from runner.reports.next_commands import Command, after_search, after_sweep, command_lines
from runner.reports.screen import Screen
from runner.reports.search_summary import SearchSummary, read_summary
from runner.reports.search_table import endings, print_search
from runner.reports.seed_groups import print_seed_groups, seed_groups
from runner.reports.sweep_page import print_sweep_verdict
from runner.reports.tables import Column, TableRow
from runner.runs.find import mark_seeds
from runner.runs.inspect import RunInfo, read_run
from runner.runs.objective import Objective, objective_of
from runner.runs.search_record import read_rungs
from runner.runs.sweep_manifest import SweepJob, SweepManifest

_FILES = ("results.csv", "curves.svg", REPORT)
_MAX_TABLE_ROWS = 40
_MAX_CURVES = 16
_MAX_CURVE_NAME = 60
CSV_COLUMNS = ("job", "state", "objective", "valid_loss", "best_step", "step", "iters", "seconds", "reason", "folder")
SEARCH_COLUMNS = ("trial", "trial_state", "trial_reason")
"""Of a search, after those and the further metrics of the objective."""


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
    search: SearchSummary | None = None
    """What the search did; None where the sweep is none."""
    search_problem: str | None = None
    """Why that cannot be read."""

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
    paths, rungs = {job.number: manifest.folder / job.folder for job in jobs}, read_rungs(manifest.folder)
    runs = {number: known.get(path) or _read_job(path, rungs) for number, path in paths.items()}
    for number, error in errors.items():
        run = runs[number]
        if run.state not in ("failed", "diverged"):
            run.state, run.reason = "failed", error
        run.reason = run.reason or error
    mark_seeds(manifest.folder, runs)
    objective = objective_of(list(runs.values()))
    varied = varied_settings(jobs, runs)
    results = {
        run.path: JobResult(job, run, objective.value(run), varied[job.number])
        for job, run in zip(jobs, runs.values(), strict=True)
    }
    ranked = [results[run.path] for run in objective.rank(runs.values())]
    search, problem = read_summary(manifest.folder, runs)
    return SweepResults(manifest.folder, objective, ranked, search, problem)


def write_sweep_results(results: SweepResults) -> None:
    """Write results.csv and curves.svg into the sweep's folder."""
    write_atomically(results.folder / "results.csv", results_csv(results))
    write_atomically(results.folder / "curves.svg", results_svg(results))


def results_csv(results: SweepResults) -> str:
    """Return the results as CSV: `CSV_COLUMNS`, further metrics, `SEARCH_COLUMNS`, and the settings that differ."""
    names, others, search = results.varied_names, results.objective.others, results.search
    front = {id(run) for run in results.objective.front(result.run for result in results.jobs)} if others else set()
    out = io.StringIO()
    writer = csv.writer(out)
    further = [*[other.metric for other in others], *(["pareto_front"] if others else [])]
    writer.writerow([*CSV_COLUMNS, *further, *(SEARCH_COLUMNS if search is not None else ()), *names])
    for result in results.jobs:
        run = result.run
        cells: list[Any] = [result.job.number, run.state, result.objective, run.best_loss, run.best_step, run.step]
        cells += [run.iters, run.status.get("seconds"), run.reason, result.job.folder]
        cells += [other.value(run) for other in others] + ([int(id(run) in front)] if others else [])
        if search is not None:
            cells += _trial_cells(search, result)
        writer.writerow(["" if c is None else c for c in cells] + [_text(result.varied[name]) for name in names])
    return out.getvalue()


def _trial_cells(search: SearchSummary, result: JobResult) -> list[Any]:
    """Return what a job's row has in `SEARCH_COLUMNS`; one with another seed is of the trial that it repeats."""
    number = result.job.number
    if (trial := search.by_job.get(number)) is not None:
        return [trial.number, trial.state, trial.text]
    if (replicate := search.replicates.get(number)) is not None:
        return [replicate[0].number, result.run.state, f"with seed {replicate[1]}"]
    return [None, None, None]


def results_svg(results: SweepResults) -> str:
    """Return the validation curves of the best jobs as an SVG image."""
    curves = []
    for result in results.jobs[:_MAX_CURVES]:
        settings = " ".join(f"{name.split('.')[-1]}={_text(value)}" for name, value in result.varied.items())
        curves.append((f"{result.job.number}: {settings}"[:_MAX_CURVE_NAME], result.run.losses("valid")))
    suffix = f", the best {_MAX_CURVES}" if len(results.jobs) > _MAX_CURVES else ""
    rungs = results.search.record.rungs[:-1] if results.search is not None else []
    return svg.plot(f"{results.folder.name}: validation loss{suffix}", curves, rungs)


def print_sweep_results(results: SweepResults, screen: Screen) -> None:
    """Print the table, the paths and the command to type next."""
    names = results.varied_names
    if results.search is not None:
        print_search(results.search, screen)
    elif results.search_problem:
        screen.line(f"damaged  {results.search_problem}")
    screen.line("")
    texts = [settings_text.texts_of(name, [result.varied[name] for result in results.jobs]) for name in names]
    values = list(zip(*texts, strict=True)) if texts else [()] * len(results.jobs)
    columns, rows = _table(results, [Column(name) for name in names], values)
    screen.table(columns, rows[:_MAX_TABLE_ROWS])
    if note := front_note(results.objective):
        screen.line((note, "dim"))
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
    for line in command_lines(_next_commands(results)):
        screen.line(line)


def _next_commands(results: SweepResults) -> list[Command]:
    if results.search is not None:
        best = results.objective.best(result.run for result in results.jobs)
        return after_search(results.folder, results.search, best)
    finished = all(result.run.state in ("finished", "diverged") for result in results.jobs)
    return after_sweep(results.folder, finished=finished, varied=results.varied_names)


def _table(
    results: SweepResults, names: Sequence[Column], values: Sequence[Sequence[str]]
) -> tuple[list[Column], list[TableRow]]:
    """Return the table of jobs with the columns `names` of their settings, whose texts are `values`."""
    runs = [result.run for result in results.jobs]
    metrics, metric_cells = objective_columns(results.objective, runs)
    columns = [Column("job", right=True), *names, Column("state"), *metrics, Column("at step", right=True)]
    rows = []
    for result, texts, measured in zip(results.jobs, values, metric_cells, strict=True):
        run = result.run
        cells = [str(result.job.number), *texts, run.state, *measured]
        cells.append("" if run.best_step is None else str(run.best_step))
        rows.append(TableRow(cells, {len(names) + 1: STATE_STYLES.get(run.state, "")}, run_notes(run)))
    if results.search is not None:
        columns.append(Column("in the search"))
        ended = endings(results.search, [result.job.number for result in results.jobs])
        for row, text in zip(rows, ended, strict=True):
            row.cells.append(text)
    return columns, rows


def _text(value: Any) -> str:
    return "" if value is None else settings_text.value_text(value)


def _read_job(folder: Path, rungs: Sequence[int]) -> RunInfo:
    if (folder / "config.yaml").exists():
        return read_run(folder, rungs=rungs)
    return RunInfo(path=folder, state="not started")
