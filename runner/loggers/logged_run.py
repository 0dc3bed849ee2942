"""What a logger is given: the run with its config, and its rows of metrics with the samples that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.config.labels import NO_LABELS, Labels
from runner.config.serialize import flatten_dict
from runner.runs.directory import RunDirectory
from runner.runs.labels import read_labels
from runner.runs.rows import read_rows
from runner.runs.run_spec import RunSpec
from runner.runs.sweep_manifest import NAME, read_manifest

_DATE = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class LoggedRow:
    """A row of metrics.jsonl, with the rows of samples.jsonl that it scores."""

    metrics: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]] = ()

    @property
    def step(self) -> int:
        """Number of optimizer updates made."""
        return int(self.metrics["step"])

    @property
    def split(self) -> str:
        """`train`, `valid` or `test`."""
        return str(self.metrics.get("split", "run"))

    @property
    def key(self) -> str:
        """What identifies the row in its run, also where a resume makes it again: step, split and first metric."""
        return "-".join([str(self.step), *[name.replace("/", "-") for name in list(self.values())[:1]]])

    @property
    def seconds(self) -> float:
        """When it was logged, in seconds since 1970; 0 where the row does not say."""
        try:
            return datetime.fromisoformat(str(self.metrics.get("time"))).timestamp()
        except ValueError:
            return 0.0

    def values(self) -> dict[str, float]:
        """Return the numbers of the row by name, such as `valid/loss`."""
        return {
            f"{self.split}/{name}": value
            for name, value in self.metrics.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }


@dataclass(frozen=True)
class LoggedRun:
    """A run as loggers show it. Nothing in it holds a value that a setting took from the environment."""

    path: Path
    """The run directory."""
    id: str
    """The run's identity, which a resume keeps; a branch and a repeat have their own."""
    name: str
    """What the run is called, else its folder, such as `2026-11-24/10-00-00`, of a sweep's job
    `2026-11-24/10-00-00/3`."""
    group: str | None
    """Name of the sweep that the run is a job of."""
    tags: tuple[str, ...]
    """The experiment, the tags of the sweep, and those of the run."""
    config: Mapping[str, Any]
    """As config.yaml stores it."""
    rows: Sequence[LoggedRow] = ()
    """Those that metrics.jsonl holds."""
    note: str | None = None

    def with_rows(self) -> LoggedRun:
        """Return the run with the rows that its directory holds now."""
        directory = RunDirectory(self.path)
        return replace(self, rows=pair_rows(read_rows(directory.metrics), read_rows(directory.samples)))

    def settings(self) -> dict[str, Any]:
        """Return the settings by dotted name, those that are null left out."""
        return {name: value for name, value in flatten_dict(self.config).items() if value is not None}


def logged_run(spec: RunSpec) -> LoggedRun:
    """Return the run that `spec` describes, without rows."""
    path = spec.directory.path
    sweep = path.parent if _is_job(path) else None
    labels, sweep_labels = read_labels(path), read_labels(sweep) if sweep else NO_LABELS
    group = (sweep_labels.name or _name(sweep)) if sweep else None
    experiment = Labels(tags=tuple(filter(None, [spec.config.experiment])))
    return LoggedRun(
        path=path,
        id=spec.run_id,
        name=labels.name or (f"{group}/{path.name}" if group else _name(path)),
        group=group,
        tags=experiment.tagged([*sweep_labels.tags, *labels.tags]),
        note=labels.note,
        config=spec.stored,
    )


def pair_rows(metrics: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]]) -> list[LoggedRow]:
    """Return the rows of metrics; one with a score comes with the samples of its step."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    return [LoggedRow(row, by_step.get(row["step"], []) if "score" in row else ()) for row in metrics]


def _is_job(path: Path) -> bool:
    with suppress(ConfigError):
        return (path.parent / NAME).is_file() and read_manifest(path.parent).job_in(path.name) is not None
    return False


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}" if _DATE.fullmatch(path.parent.name) else path.name
