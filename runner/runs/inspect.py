"""One run as its directory describes it: the source of `ls`, `show`, `verify` and the results of sweeps.

Nothing here raises for a damaged run: what can be read is read, and `RunInfo.problem` names what cannot.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from runner.common import layout, safe_yaml
from runner.common.layout import BEST_METRIC
from runner.common.safe_json import finite_number
from runner.config import retired, schema, serialize
from runner.config.labels import NO_LABELS, Labels
from runner.config.objectives import directions_of, metrics_of
from runner.runs.directory import RunDirectory
from runner.runs.earlier_window import WINDOW, recorded_window
from runner.runs.labels import labels_of_sweep_above, read_labels
from runner.runs.rows import count_or_none, read_rows
from runner.runs.search_record import read_rungs


@dataclass(kw_only=True)
class RunInfo:
    """One run, read from its directory alone."""

    path: Path
    state: str
    """One of `layout.STATES`, or unknown."""
    reason: str | None = None
    """Why it ended, where status.json says so."""
    problem: str | None = None
    """Which files of the directory cannot be read, and why."""
    step: int | None = None
    iters: int | None = None
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name to value, as stored (loggers is one dict); empty where config.yaml cannot be read.
    A window of batches that was left to the backend is the one that was used, where a checkpoint records it."""
    updated: float = 0.0
    """When it last wrote a file, in seconds since 1970."""
    size_bytes: int = 0
    """Size of all files in the directory."""
    status: dict[str, Any] = field(default_factory=dict)
    """The content of status.json."""
    labels: Labels = NO_LABELS
    """Its own labels."""
    sweep_labels: Labels = NO_LABELS
    """Those of the sweep that it is a job of."""
    seed_of: Path | None = None
    """Of a job of a search that trains a trial with another seed: the job that the trial has."""
    rung: int | None = None
    """Of a job of a search that has not trained to its end: the last rung that it reached, in updates, 0 for none."""

    def setting(self, name: str) -> Any:
        """Return the value of a setting, by its dotted name.

        One that an older run did not store has the default that it has with the run's choice of its section, such as
        its optimizer; of a run whose config cannot be read every setting is None.
        """
        if name in self.settings or not self.settings:
            return self.settings.get(name)
        choice, found = self.settings.get(f"{name.partition('.')[0]}.name"), schema.metadata().get(name)
        own = found.defaults_by if found else {}
        return own.get(str(choice), _defaults().get(name))

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags, with those of its sweep."""
        return self.sweep_labels.tagged(self.labels.tags)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, read at first use; damaged lines are left out."""
        return read_rows(self.path / layout.METRICS)

    def losses(self, split: str) -> list[tuple[int, float]]:
        """Return (step, loss) of the rows of a split, where the loss is finite."""
        losses = [(row["step"], finite_number(row.get("loss"))) for row in self.rows if row.get("split") == split]
        return [(step, loss) for step, loss in losses if loss is not None]


def read_run(path: Path, sweep_labels: Labels | None = None, rungs: Sequence[int] | None = None) -> RunInfo:
    """Read the run in `path`.

    Args:
        sweep_labels: those of the sweep that it is a job of, where the caller has read them.
        rungs: those of the search that it is a job of, empty for none, where the caller has read them.
    """
    settings, config_problem = _read_settings(path)
    status, status_problem = _read_status(path)
    raw = status.get("best")
    best: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    run = RunInfo(
        path=path,
        state=status["state"],
        reason=_text(status.get("reason")),
        problem="; ".join(filter(None, (config_problem, status_problem))) or None,
        step=count_or_none(status.get("step")),
        iters=count_or_none(status.get("iters", settings.get("train.iters"))),
        best_loss=finite_number(best.get(BEST_METRIC)),
        best_step=count_or_none(best.get("step")),
        settings=settings,
        size_bytes=folder_size(path),
        status=status,
        labels=read_labels(path),
        sweep_labels=labels_of_sweep_above(path) if sweep_labels is None else sweep_labels,
    )
    run.updated = _last_update(run)
    if run.step is None and run.rows:  # status.json is lost or damaged: the rows have the same facts
        run.step = max(row["step"] for row in run.rows)
        if measured := run.losses("valid"):
            run.best_step, run.best_loss = min(measured, key=lambda point: (point[1], point[0]))
    rungs = read_rungs(path.parent) if rungs is None else rungs
    if rungs and run.state != "finished":
        run.rung = max((rung for rung in rungs if rung <= (run.step or 0)), default=0)
    return run


def differing_settings(runs: Sequence[RunInfo]) -> list[str]:
    """Return the names of the settings that differ between `runs`, in the schema's order.

    Runs whose config cannot be read are left out; a setting that an older run did not store has its default. Values of
    objective.direction that mean the same do not differ: earlier versions stored minimize where null is stored now.
    """
    readable = [run for run in runs if run.settings]
    names = []
    for name in dict.fromkeys([*_defaults(), *(name for run in readable for name in run.settings)]):
        values: list[Any] = [run.setting(name) for run in readable]
        if name == "objective.direction":
            values = [_directions(run.settings) for run in readable]
        if name not in schema.provenance_settings() and any(value != values[0] for value in values[1:]):
            names.append(name)
    return names


@cache
def _defaults() -> Mapping[str, Any]:
    return serialize.default_settings()


def _directions(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Return for each metric of the objective in the settings whether a higher value is better."""
    metric = settings.get("objective.metric")
    return dict(zip(metrics_of(metric), directions_of(metric, settings.get("objective.direction")), strict=True))


def folder_size(path: Path) -> int:
    """Return the size in bytes of the files below `path`; links are not followed."""
    size, pending = 0, [os.fspath(path)]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
    return size


def modified_time(path: Path) -> float:
    """Return when `path` was last written, in seconds since 1970; 0 where it is missing."""
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _read_settings(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the stored settings by dotted name, or none and why config.yaml cannot be read."""
    try:
        config = retired.upgrade_config(safe_yaml.read_mapping(path / layout.CONFIG))
        settings = serialize.group_open_sections(serialize.flatten_dict(config))
        if settings.get(WINDOW, 0) is None:
            settings[WINDOW] = recorded_window(path)
        return settings, None
    except FileNotFoundError:
        return {}, "config.yaml is missing"
    except OSError as error:
        return {}, f"config.yaml cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"config.yaml cannot be read: {' '.join(str(error).split())[:300]}"


def _read_status(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the status, or a guess of its state and why status.json cannot be read."""
    status = RunDirectory(path).read_status()
    if len(status) > 1:
        return status, None
    missing = not os.path.lexists(path / layout.STATUS)
    return status, "status.json is missing" if missing else "status.json cannot be understood"


def _last_update(run: RunInfo) -> float:
    """Return the time in status.json; of a running run, or without that time, the newest time of its files."""
    recorded = 0.0
    with suppress(ValueError, OverflowError):
        recorded = datetime.fromisoformat(str(run.status.get("updated"))).replace(tzinfo=UTC).timestamp()
    if recorded and run.state != "running":
        return recorded
    written = max(modified_time(run.path / name) for name in (layout.METRICS, layout.STATUS, layout.CONFIG))
    return max(recorded, written) or modified_time(run.path)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
