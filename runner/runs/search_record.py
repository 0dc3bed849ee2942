"""The record of a search, search.jsonl beside the manifest of its sweep: what was suggested, measured and decided.

Append-only, one JSON object a line, in the order in which things happened. A search is a function of this file: one
that was killed makes the same decisions again, and the results that are recorded here are not measured again.

    {"schema": 1, "sampler": "tpe", "pruner": "halving", "rungs": [25, 75, 200], "metrics": ["valid_loss"], …}
    {"wave": 0, "asked": 2, "time": …}
    {"trial": 0, "job": 0, "params": {"optimizer.learning_rate": 0.0003, "lora.rank": 8}}
    {"result": 0, "step": 25, "values": [0.53], "state": "paused"}
    {"wave": 5, "asked": 0, "continued": [{"trials": [2, 3], "from": 25, "to": 75, "of": 9}]}
    {"stopped": 0, "step": 25, "place": 4, "of": 9, "value": 0.53}
    {"wave": 9, "asked": 0, "replicates": [{"trial": 3, "seed": 1}]}
    {"replicate": 3, "job": 12, "seed": 1}
    {"planned": {"trials": 17}, "wave": 1, "reason": "the budget holds 17 trials at 1.2 s an update"}
    {"extended": {"trials": 60, "budget": "16h"}, "wave": 10}
    {"missed": ["13 of 30 trials", "seeds 1, 2 of trial 3"]}
    {"spent": 3600.0, "jobs": 3100.0, "updates": 2833, "beside": 210.0, "starts": 42, "time": …}

A wave is what is decided at once and launched together: how many trials the sampler is asked for, which trials continue
from a step to another, and which are trained with another seed. `trial` counts from 0; `job` is the number of its job
in sweep.jsonl: two trials of equal settings share one. `result`, `stopped` and `replicate` name a trial by its number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.safe_json import is_count
from runner.common.text import relative_path
from runner.config.search_settings import MAX_TRIALS
from runner.runs.rows import RowFile, scan_rows
from runner.runs.sweep_manifest import SweepManifest

NAME = "search.jsonl"
JOURNAL = "optuna-journal.log"
"""The study beside it, written for optuna-dashboard."""
SCHEMA = 1
PAUSED, FINISHED, DIVERGED, FAILED = "paused", "finished", "diverged", "failed"
"""States of a result: the trial waits at a rung, trained to its end, diverged, or could not be measured."""
MAX_REPEATS = 20
"""Suggestions in a row that were tried before, after which a search asks for no more."""


@dataclass(frozen=True)
class Result:
    """What a trial was measured to have at a rung or at its end."""

    step: int
    values: tuple[float, ...]
    """One for each metric of the search, in its order; none where the trial diverged or failed."""
    state: str
    """PAUSED, FINISHED, DIVERGED or FAILED."""
    rung_value: float | None = None
    """What compares it with other trials at a rung: the validation loss at its step, which is its first value unless
    the line has another."""
    reason: str = ""
    """Why it failed or diverged."""


def value_at_rung(results: Sequence[Result], stop_at: int, step: int) -> float | None:
    """Return what compares a trial with others at a rung; None where it has not reached it, or failed on the way.

    One that ended before the rung, as by early stopping, has what it had at its end. One that diverged on the way to it
    is worse than any other: infinity.

    Args:
        results: of the trial, in the order of their steps.
        stop_at: the step that it was last sent to.
        step: the rung, in updates.
    """
    for result in results:
        if result.state == DIVERGED and stop_at == step:
            return math.inf
        if result.step == step or (result.state == FINISHED and result.step <= step):
            return result.rung_value
    return None


def only_repeats(are_repeats: Sequence[bool]) -> bool:
    """Return whether a search asks for no more trials.

    Args:
        are_repeats: of each suggestion so far, whether it was tried before.
    """
    last = are_repeats[-MAX_REPEATS:]
    return len(last) == MAX_REPEATS and all(last)


@dataclass
class TrialRecord:
    """One trial of a search."""

    number: int
    job: int | None
    """Number of its job in the manifest of the sweep; None where no run can have these settings."""
    params: dict[str, Any]
    """Searched setting to the suggested value."""
    results: list[Result] = field(default_factory=list)
    """In the order of their steps."""
    stop_at: int = 0
    """The step that it was last sent to."""
    stopped: dict[str, Any] | None = None
    """Where and why it was not continued: `step`, `place` among the `of` trials of that rung, and `value`."""
    replicates: dict[int, int] = field(default_factory=dict)
    """Seed to the number of the job that trains the same settings with it."""


@dataclass
class SearchRecord:
    """The content of search.jsonl."""

    settings: dict[str, Any] = field(default_factory=dict)
    """The first line: sampler, pruner, eta, rungs (steps), metrics, maximize, judged_by, space, seed, seeds, …"""
    trials: list[TrialRecord] = field(default_factory=list)
    waves: list[dict[str, Any]] = field(default_factory=list)
    """What was decided, in order: `asked`, `continued` and `replicates` of each."""
    extensions: list[dict[str, Any]] = field(default_factory=list)
    """Options that a resume changed, each with the `wave` from which they apply."""
    planned: list[dict[str, Any]] = field(default_factory=list)
    """How many trials were planned, in order, with the reason; resumes and budgets change it."""
    affordable_trials: int | None = None
    """How many trials the budget holds, where that is decided for the present options."""
    missed: list[str] = field(default_factory=list)
    """What the budget left out of the search where it ended, as phrases."""
    spent_seconds: float = 0.0
    """Time that the search has taken, all its processes together."""
    job_seconds: float = 0.0
    """Time of the jobs, those side by side added up."""
    updates: int = 0
    """Updates that they made in it."""
    beside_seconds: float = 0.0
    """Time that jobs took beside that, as to be started, without what a process loads at its first launch."""
    starts: int = 0
    """Starts of jobs in which that time was spent."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """All lines, as written."""
    size: int = 0
    """Bytes of complete lines."""

    @property
    def rungs(self) -> list[int]:
        """Steps at which trials are compared, ascending; the last is their end."""
        return list(self.settings.get("rungs", []))

    @property
    def metrics(self) -> list[str]:
        """What is searched for: one metric, or several."""
        return list(self.settings.get("metrics", []))

    @property
    def continued(self) -> list[dict[str, Any]]:
        """The decisions of rungs, in order: the `trials` that continued `from` a step `to` another, `of` so many."""
        return [decision for wave in self.waves for decision in wave.get("continued", [])]


def read_search(folder: Path) -> SearchRecord | None:
    """Read the record of the search in the directory of a sweep; None where the sweep is no search.

    An incomplete last line does not count.

    Raises:
        ConfigError: the file is damaged or of a version that is not supported.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    record = SearchRecord()
    try:
        for line in scan_rows(path):
            if line.torn:
                break
            try:
                if line.row is None:
                    raise ValueError("it is no JSON object")
                _apply(record, line.row)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                raise ConfigError(f"{path}, line {line.number} cannot be understood.") from None
        record.size = _complete_bytes(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    return record


def lost_record(manifest: SweepManifest) -> str | None:
    """Return a sentence where a sweep was a search whose record is gone, as its other files tell."""
    path = manifest.folder / NAME
    if os.path.lexists(path) or not manifest.jobs:
        return None
    was_chosen = any(text.lstrip("+") == "hydra/sweeper=search" for text in manifest.arguments)
    if not (
        was_chosen or (manifest.folder / JOURNAL).exists() or any(job.stop_at is not None for job in manifest.jobs)
    ):
        return None
    problem = f"{path} is missing, which says what this search tried and decided"
    return f"{problem}. {without_record(manifest.folder)}"


def without_record(folder: Path) -> str:
    """Return what is left of a search whose record is missing or damaged, and what can be done, as sentences."""
    return (
        "Only a backup of it can continue the search. The jobs are whole, and a new search can begin with their "
        f"results: hydra.sweeper.warm_from={relative_path(folder)}"
    )


def replicated_jobs(folder: Path) -> dict[int, int]:
    """Return the jobs of a search that train a trial with another seed: number to that of the trial's own job.

    There are none where the sweep is no search, or its record is damaged.
    """
    try:
        record = read_search(folder)
    except ConfigError:
        record = None
    trials = record.trials if record is not None else []
    return {job: trial.job for trial in trials if trial.job is not None for job in trial.replicates.values()}


def read_rungs(folder: Path) -> list[int]:
    """Return the rungs of the search in the directory of a sweep, from the first line of its record alone.

    There are none where the sweep is no search, or its record is damaged.
    """
    with suppress(OSError):
        line = next(scan_rows(folder / NAME), None)
        rungs = line.row.get("rungs") if line is not None and line.row is not None else None
        if isinstance(rungs, list) and all(map(is_count, rungs)):
            return rungs
    return []


class SearchRecordWriter:
    """Appends lines to search.jsonl."""

    def __init__(self, folder: Path, record: SearchRecord) -> None:
        self._file = RowFile(folder / NAME, record.size)
        self._record = record

    def append(self, line: Mapping[str, Any]) -> None:
        """Append `line` and apply it to the record."""
        self._file.append(line)
        self._record.size = self._file.offset
        _apply(self._record, dict(line))

    def sync(self) -> None:
        """Return once all lines are on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file, once all lines are on the disk."""
        try:
            self._file.sync()
        finally:
            self._file.close()


def _complete_bytes(path: Path) -> int:
    data = path.read_bytes()
    return data.rfind(b"\n") + 1


def _apply(record: SearchRecord, line: dict[str, Any]) -> None:
    """Add one line to `record`; raises ValueError, KeyError, TypeError or IndexError where it is invalid."""
    if "schema" in line:
        if line["schema"] != SCHEMA:
            raise ValueError("another schema")
        record.settings = line
    elif "trial" in line:
        if line["trial"] != len(record.trials):
            raise ValueError("a trial is out of order")
        job = None if line["job"] is None else _count(line["job"])
        first = record.rungs[0] if record.rungs else 0
        record.trials.append(TrialRecord(int(line["trial"]), job, dict(line["params"]), stop_at=first))
    elif "result" in line:
        trial = _trial(record, line["result"])
        values = tuple(float(value) for value in line["values"])
        if line["state"] not in (PAUSED, FINISHED, DIVERGED, FAILED):
            raise ValueError("a result has a state that there is not")
        if not all(map(math.isfinite, values)) or (line["state"] in (PAUSED, FINISHED)) != bool(values):
            raise ValueError("a result has other values than its state")
        rung_value = line.get("judged", values[0] if values else None)
        result = Result(
            _count(line["step"]),
            values,
            str(line["state"]),
            None if rung_value is None else float(rung_value),
            str(line.get("reason", "")),
        )
        trial.results.append(result)
    elif "stopped" in line:
        _trial(record, line["stopped"]).stopped = line
    elif "wave" in line and "asked" in line:
        if line["wave"] != len(record.waves):
            raise ValueError("a wave is out of order")
        if _count(line["asked"]) > MAX_TRIALS:
            raise ValueError("a wave asks for more trials than a search may have")
        for decision in line.get("continued", []):
            if record.rungs and not decision["from"] < decision["to"] <= record.rungs[-1]:
                raise ValueError("trials continue to a step that is no rung")
            for number in decision["trials"]:
                trial = _trial(record, number)
                trial.stopped, trial.stop_at = None, _count(decision["to"])
        for pair in line.get("replicates", []):
            _trial(record, pair["trial"])
            _count(pair["seed"])
        record.waves.append(line)
        record.missed = []
    elif "extended" in line:
        record.extensions.append(line)
        record.missed, record.affordable_trials = [], None
    elif "replicate" in line:
        _trial(record, line["replicate"]).replicates[_count(line["seed"])] = _count(line["job"])
    elif "planned" in line:
        record.planned.append(line)
        record.affordable_trials = _count(line["planned"]["trials"])
    elif "missed" in line:
        record.missed = [str(text) for text in line["missed"]]
    elif "spent" in line:
        record.spent_seconds, record.job_seconds = float(line["spent"]), float(line["jobs"])
        record.updates, record.beside_seconds = int(line["updates"]), float(line["beside"])
        record.starts = int(line["starts"])
    record.lines.append(line)


def _trial(record: SearchRecord, number: object) -> TrialRecord:
    return record.trials[_count(number)]


def _count(value: object) -> int:
    if not is_count(value):
        raise ValueError("a number from 0 is expected")
    return value
