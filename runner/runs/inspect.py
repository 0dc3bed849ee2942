"""Runs and sweeps as their directories tell them: what ls, show and the summaries of sweeps are made from.

Nothing here raises for a damaged run: what could be read is there, and `problem` says what could not.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.common import safe_yaml
from runner.common.errors import RunnerError
from runner.config import retired, schema
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory
from runner.runs.layout import BEST_METRIC, STATES
from runner.runs.rows import count_or_none, read_rows

SWEEP_FILES = ("multirun.yaml", "sweep.jsonl")
"""Either of them makes a folder a sweep; its runs are its numbered subfolders."""
_RUN_NAMES = {"config.yaml", "status.json", ".lock", "metrics.jsonl", "run.log", "checkpoints", ".hydra"}
_LONGEST_LINE = 1 << 20  # bytes
_LARGEST_STEP = 10**15


@dataclass(kw_only=True)
class RunInfo:
    """One run, read from its directory alone."""

    path: Path
    state: str
    """One of rundir.STATES, or unknown."""
    reason: str | None = None
    """Why it ended, where status.json says so."""
    problem: str | None = None
    """What of the directory could not be read, and why."""
    step: int | None = None
    iters: int | None = None
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name to value, as stored (loggers is one dict); empty where config.yaml cannot be read."""
    updated: float = 0.0
    """When it last wrote something, in seconds since 1970."""
    size_bytes: int = 0
    """Of all files in the directory."""
    status: dict[str, Any] = field(default_factory=dict)
    """All that status.json says."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, read when first asked for; lines that are not rows are left out."""
        return read_rows(self.path / "metrics.jsonl")

    def losses(self, split: str) -> list[tuple[int, float]]:
        """(step, loss) of a split's rows, the finite ones."""
        return [(row["step"], row["loss"]) for row in self.rows if row.get("split") == split and _finite(row, "loss")]


@dataclass(kw_only=True)
class SweepInfo:
    """A sweep: a folder whose numbered subfolders are runs."""

    path: Path
    runs: list[RunInfo]
    """By number."""
    waiting: int = 0
    """Jobs of the manifest that have no folder yet."""
    problem: str | None = None
    """What of the manifest could not be read, and why."""

    @property
    def states(self) -> dict[str, int]:
        """How many runs are in each state, jobs that wait for their turn included."""
        counts = Counter(run.state for run in self.runs)
        counts["waiting"] = self.waiting
        return {state: counts[state] for state in (*STATES, "unknown", "waiting") if counts[state]}

    @property
    def best(self) -> RunInfo | None:
        """The run of the lowest validation loss; of equal ones the first."""
        measured = [run for run in self.runs if run.best_loss is not None]
        return min(measured, key=lambda run: run.best_loss or 0.0) if measured else None

    @property
    def best_loss(self) -> float | None:
        """Of the best run."""
        return self.best.best_loss if self.best else None

    @property
    def step(self) -> int | None:
        """Updates made in all its runs."""
        return sum(run.step or 0 for run in self.runs)

    @property
    def updated(self) -> float:
        """When one of its runs last wrote something, in seconds since 1970."""
        return max((run.updated for run in self.runs), default=_modified(self.path))

    @property
    def size_bytes(self) -> int:
        """Of all its runs."""
        return sum(run.size_bytes for run in self.runs)


def find_runs(root: Path) -> list[RunInfo | SweepInfo]:
    """The runs and sweeps at or below `root`, newest first. Links to folders, hidden folders and what cannot be listed
    are passed over; there are no runs inside a run."""
    found: list[RunInfo | SweepInfo] = []
    waiting = [Path(root)]
    while waiting:
        folder = waiting.pop()
        names, folders = _list(folder)
        if names & set(SWEEP_FILES):
            found.append(read_sweep(folder))
        elif looks_like_run(names):
            found.append(read_run(folder))
        else:
            waiting += [folder / name for name in folders if not name.startswith(".")]
    return sorted(found, key=lambda one: (-one.updated, str(one.path)))


def looks_like_run(names: Iterable[str]) -> bool:
    """Whether a folder with these names in it is a run, or what is left of one: one of a run's files alone is not,
    since other programs write a config.yaml as well."""
    return len(_RUN_NAMES & set(names)) >= 2


def is_sweep(path: Path) -> bool:
    """Whether the folder is a sweep."""
    return any((path / name).is_file() for name in SWEEP_FILES)


def read_sweep(path: Path) -> SweepInfo:
    """The sweep in `path`."""
    _, folders = _list(path)
    numbers = sorted((name for name in folders if name.isascii() and name.isdigit()), key=lambda n: (int(n[:18]), n))
    sweep = SweepInfo(path=path, runs=[read_run(path / name) for name in numbers])
    try:
        jobs = sweep_manifest.read_manifest(path).jobs.values()
        sweep.waiting = sum(job.folder not in numbers for job in jobs)
    except (RunnerError, OSError) as error:
        sweep.problem = str(error)
    return sweep


def read_run(path: Path) -> RunInfo:
    """The run in `path`."""
    problems = []
    settings: dict[str, Any] = {}
    try:
        settings = _flat(retired.upgrade_config(safe_yaml.read_mapping(path / "config.yaml")))
    except FileNotFoundError:
        problems.append("config.yaml is missing")
    except OSError as error:
        problems.append(f"config.yaml cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.append(f"config.yaml cannot be read: {' '.join(str(error).split())[:300]}")
    try:
        status = RunDirectory(path).read_status()
    except RecursionError:
        status = {"state": "unknown"}
    if len(status) == 1:  # the state is a guess: nothing could be read
        missing = not os.path.lexists(path / "status.json")
        problems.append("status.json is missing" if missing else "status.json cannot be understood")
    raw = status.get("best")
    best: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    run = RunInfo(
        path=path,
        state=status["state"],
        reason=_text(status.get("reason")),
        problem="; ".join(problems) or None,
        step=count_or_none(status.get("step")),
        iters=count_or_none(status.get("iters", settings.get("train.iters"))),
        best_loss=best[BEST_METRIC] if _finite(best, BEST_METRIC) else None,
        best_step=count_or_none(best.get("step")),
        settings=settings,
        size_bytes=folder_size(path),
        status=status,
    )
    run.updated = _updated(run)
    if run.step is None and run.rows:  # status.json is lost: the rows know
        run.step = max(row["step"] for row in run.rows)
        if measured := run.losses("valid"):
            run.best_step, run.best_loss = min(measured, key=lambda point: (point[1], point[0]))
    return run


def differing_settings(runs: Sequence[RunInfo]) -> list[str]:
    """Names of the settings that are not the same in all of `runs`, in the schema's order. Settings of one invocation
    do not count, nor runs whose config cannot be read; a setting that an older run did not store has its default."""
    readable = [run.settings for run in runs if run.settings]
    defaults = schema.default_settings()
    known = dict.fromkeys([*defaults, *(name for settings in readable for name in settings)])
    names = []
    for name in known:
        values = [settings.get(name, defaults.get(name)) for settings in readable]
        if name not in schema.provenance_settings() and any(value != values[0] for value in values[1:]):
            names.append(name)
    return names


def objective_value(rows: Sequence[Mapping[str, Any]], best_loss: float | None, metric: str) -> float | None:
    """What a run is compared by (objective.metric): its best validation loss, or the last test loss or score."""
    if metric == "valid_loss":
        return best_loss
    if metric == "test_loss":
        found = [row["loss"] for row in rows if row.get("split") == "test" and _finite(row, "loss")]
    else:
        found = [row["score"] for row in rows if row.get("step") and _finite(row, "score")]
    return float(found[-1]) if found else None


def folder_size(path: Path) -> int:
    """Bytes of the files below `path`; links are not followed."""
    size, waiting = 0, [os.fspath(path)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return size


def _list(folder: Path) -> tuple[set[str], list[str]]:
    names, folders = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.add(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
    except OSError:
        pass
    return names, folders


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """As config.flatten does it: the free dict of loggers is one leaf."""
    flat = schema.flatten_dict({key: value for key, value in data.items() if key != "loggers"})
    return flat | ({"loggers": data["loggers"]} if "loggers" in data else {})


def _updated(run: RunInfo) -> float:
    """What status.json says; of a run that is writing rows, or says nothing, when its files were last written."""
    told = 0.0
    with suppress(ValueError, OverflowError):
        told = datetime.fromisoformat(str(run.status.get("updated"))).replace(tzinfo=UTC).timestamp()
    if told and run.state != "running":
        return told
    written = max(_modified(run.path / name) for name in ("metrics.jsonl", "status.json", "config.yaml"))
    return max(told, written) or _modified(run.path)


def _modified(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _finite(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if type(value) is int:
        return abs(value) < _LARGEST_STEP
    return isinstance(value, float) and math.isfinite(value)
