"""`runner test --all`: a table of all kept checkpoints of a run, or of the results of all jobs of a sweep."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings, test_rows
from runner.cli.commands.adapter_source import AdapterSource
from runner.cli.run_argument import resolve_name
from runner.common.errors import EXIT_DAMAGED, EXIT_DONE, CheckpointError, ConfigError, RunnerError
from runner.common.text import relative_path
from runner.reports import settings_text
from runner.reports.checkpoint_list import list_checkpoints
from runner.reports.screen import Screen
from runner.reports.tables import Column, TableRow
from runner.runs.find import SweepInfo, is_sweep_folder, looks_like_run, read_sweep
from runner.runs.inspect import RunInfo, differing_settings, read_run
from runner.runs.objective import VALID_LOSS

if TYPE_CHECKING:
    from runner.cli.commands.evaluation import SplitEvaluation
    from runner.cli.commands.load_adapter import LoadedAdapter


@dataclass
class _Entry:
    """A row of the table: an adapter, or why there is none."""

    run: RunInfo
    label: str
    step: int | None = None
    valid_loss: float | None = None
    """As the run recorded it."""
    source: AdapterSource | None = None
    problem: str | None = None
    is_damaged: bool = False
    is_result: bool = False
    fields: dict[str, Any] | None = None
    """What was measured."""

    def to_dict(self) -> dict[str, Any]:
        folder = str(self.source.folder) if self.source else None
        known = {"run": str(self.run.path), "adapter": folder, "step": self.step, "valid_loss": self.valid_loss}
        return {**known, "is_result": self.is_result, "problem": self.problem, **(self.fields or {})}


def test_all(options: Namespace) -> int:
    """Measure every adapter, print the table, and return 0, or 5 where one of them is damaged.

    Raises:
        RunnerError: the path holds no adapters, or a base model or the data cannot be used.
    """
    path = resolve_name(options.run).absolute()
    of_sweep = is_sweep_folder(path)
    sweep = read_sweep(path) if of_sweep else None
    entries = _jobs(sweep) if sweep else _checkpoints(path)
    if not any(entry.source for entry in entries):
        reasons = "".join(f"\n{entry.label}: {entry.problem}" for entry in entries)
        raise ConfigError(f"{relative_path(path)} has no adapter to test.{reasons}")
    blas.load_blas()
    measurements = _Measurements(options)
    for entry in entries:
        if entry.source is None:
            continue
        arguments.print_note(f"testing {entry.label}")
        try:
            entry.fields = measurements.measure(entry.source)
        except CheckpointError as error:
            entry.problem, entry.is_damaged = str(error), True
    marks = _marks(entries, sweep, options.split)
    if options.json:
        rows = [entry.to_dict() | marks.of(entry) for entry in entries]
        document = {"path": str(path), "split": options.split, "best_by": marks.metric, "entries": rows}
        arguments.print_json(document)
    else:
        varied = differing_settings([entry.run for entry in entries]) if of_sweep else []
        _print_table(entries, marks, "job" if of_sweep else "checkpoint", varied)
    return EXIT_DAMAGED if any(entry.is_damaged for entry in entries) else EXIT_DONE


@dataclass(frozen=True)
class _Marks:
    """Which entries stand out, and by what."""

    best: _Entry | None
    """The one that `runner best` names."""
    metric: str
    """By which it is the best."""
    lowest: _Entry | None
    """The one of the lowest loss of what was measured."""
    split: str
    """Of that loss."""

    def of(self, entry: _Entry) -> dict[str, bool]:
        return {"is_best": entry is self.best, "is_lowest": entry is self.lowest}


def _marks(entries: list[_Entry], sweep: SweepInfo | None, split: str) -> _Marks:
    """Return the best checkpoint by its validation loss, or the best job by the sweep's objective, as `runner best`
    does, and the one of the lowest loss."""
    measured = [entry for entry in entries if entry.fields]
    lowest = min(measured, key=lambda entry: (_loss(entry), entry.step or 0), default=None)
    if sweep is not None:
        path = sweep.best.path if sweep.best else None
        best = next((entry for entry in entries if entry.run.path == path), None)
        return _Marks(best, sweep.objective.metric, lowest, split)
    evaluated = [(entry.valid_loss, entry.step or 0, entry) for entry in measured if entry.valid_loss is not None]
    best = min(evaluated, key=lambda found: found[:2])[2] if evaluated else None
    return _Marks(best, VALID_LOSS, lowest, split)


def _checkpoints(path: Path) -> list[_Entry]:
    """Return the run's checkpoints by step and its result, which has no row of its own where it is one of them."""
    if not path.is_dir() or not looks_like_run(entry.name for entry in path.iterdir()):
        raise ConfigError(f"--all tests the checkpoints of a run or the jobs of a sweep, and {path} is neither.")
    run = read_run(path)
    entries = []
    for checkpoint in list_checkpoints(run):
        entry = _Entry(run, checkpoint.path.name, checkpoint.step, checkpoint.valid_loss)
        _read(entry, checkpoint.path)
        if entry.source is not None and checkpoint.problem is not None:  # such as one that another run left
            entry.source, entry.problem = None, checkpoint.problem
        entries.append(entry)
    result = _Entry(run, "result", is_result=True)
    _read(result, path)
    if result.source is None:
        return entries
    for entry in entries:
        if entry.source is not None and entry.source.adapters == result.source.adapters:
            entry.is_result = True
            return entries
    result.step = result.source.step
    result.valid_loss = dict(run.losses("valid")).get(result.step) if result.step is not None else None
    return [*entries, result]


def _jobs(sweep: SweepInfo) -> list[_Entry]:
    entries = []
    for run in sweep.runs:
        entry = _Entry(run, run.path.name, run.best_step, run.best_loss, is_result=True)
        _read(entry, run.path)
        if entry.source is None and not entry.is_damaged:
            entry.problem = f"no result: {run.state}"
        elif entry.source is not None and entry.source.step is not None:
            entry.step = entry.source.step
            entry.valid_loss = dict(run.losses("valid")).get(entry.step, entry.valid_loss)
        entries.append(entry)
    return entries


def _read(entry: _Entry, path: Path) -> None:
    try:
        entry.source = adapter_source.find_adapter(path)
    except RunnerError as error:
        entry.problem, entry.is_damaged = str(error), isinstance(error, CheckpointError)


class _Measurements:
    """Measures adapters one after the other; what the next one shares with the one before is not loaded again."""

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._loaded: LoadedAdapter | None = None
        self._run: Path | None = None
        self._evaluation: SplitEvaluation | None = None

    def measure(self, source: AdapterSource) -> dict[str, Any]:
        """Return what `runner test` measures of one adapter, without the answers."""
        from runner.cli.commands.load_adapter import load_adapter

        options = self._options
        if self._run == source.run and self._loaded is not None and self._evaluation is not None:
            self._loaded.replace(source)
        else:
            settings = stored_settings.read_settings(source.run, options.overrides)
            test_rows.require_split(settings, options.split)
            self._evaluation = None
            self._loaded = load_adapter(
                source, settings, any_base=options.any_base, log=arguments.print_note, previous=self._loaded
            )
            from runner.cli.commands.evaluation import SplitEvaluation

            metric_rows = test_rows.count_metric_rows(options.rows, settings.config)
            self._evaluation = SplitEvaluation(self._loaded, settings.config, options.split, metric_rows)
            self._run = source.run
        return self._evaluation.measure()[0]


def _loss(entry: _Entry) -> float:
    return float(entry.fields["loss"]) if entry.fields else math.inf


_BESIDE_LOSS = ("perplexity", "reward_accuracy", "reward")
"""Fields that are shown beside the loss."""


def _print_table(entries: list[_Entry], marks: _Marks, what: str, varied: list[str]) -> None:
    metric = next((entry.fields["metric"] for entry in entries if entry.fields and "metric" in entry.fields), None)
    columns = [Column(what, right=what == "job"), *[Column(settings_text.short_names(varied)[name]) for name in varied]]
    beside = [name for name in _BESIDE_LOSS if any(name in (entry.fields or {}) for entry in entries)]
    columns += [Column(name, right=True) for name in ("step", "valid loss", f"{marks.split} loss")]
    columns += [Column(name.replace("_", " "), right=True) for name in beside]
    columns += [Column(metric, right=True)] if metric else []
    columns.append(Column("", wrap=True))
    texts = {name: settings_text.texts_of(name, [entry.run.setting(name) for entry in entries]) for name in varied}
    rows = []
    for number, entry in enumerate(entries):
        fields = entry.fields or {}
        cells = [entry.label, *[texts[name][number] for name in varied]]
        cells += ["" if entry.step is None else str(entry.step), _decimal(entry.valid_loss, 4)]
        cells += [_decimal(fields.get("loss"), 4), *(_decimal(fields.get(name), 3) for name in beside)]
        cells += ["" if "score" not in fields else f"{fields['score']:.1%}"] if metric else []
        cells.append(", ".join(_remarks(entry, marks, shows_result=what != "job")))
        rows.append(TableRow(cells, dict.fromkeys(range(len(cells)), "bold") if entry is marks.best else {}))
    Screen().table(columns, rows)


def _remarks(entry: _Entry, marks: _Marks, shows_result: bool) -> Iterator[str]:
    if entry is marks.best:
        yield f"best by {marks.metric}"
    elif entry is marks.lowest:
        yield f"lowest {marks.split} loss"
    if entry.is_result and shows_result and entry.label != "result":
        yield "the run's result"
    if entry.problem:
        yield entry.problem


def _decimal(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
