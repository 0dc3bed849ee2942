"""What a search did, from its record and its runs: its rungs, how each trial ended and why, its plans and its time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.safe_json import is_count
from runner.common.text import count, format_duration, shorten
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo
from runner.runs.metric_values import VALID_LOSS
from runner.runs.search_record import (
    DIVERGED,
    FAILED,
    FINISHED,
    NAME,
    PAUSED,
    SearchRecord,
    TrialRecord,
    only_repeats,
    read_search,
    value_at_rung,
)

_OPTIONS = ("sampler", "pruner", "eta", "seed")
_FINISHED, _STOPPED, _WAITING, _REPEATS = "finished", "stopped", "waiting", "repeats"
_NOT_STARTED = "not started"
_MOST_IMPOSSIBLE = 5
"""Trials that no run can have, which are listed: the tables of jobs do not have them."""


@dataclass(frozen=True)
class Rung:
    """A step at which the trials of a search are compared, or their end."""

    step: int
    reached: int
    """Trials that were compared there, with those that diverged on the way to it."""
    continued: int
    """Those that were chosen to continue."""
    cut: float | None
    """The highest value of those that continued for their place; None where there are none."""
    best: float | None
    """The lowest value; at the end the lowest validation loss of the whole trial where that is the objective."""
    lost: int
    """Trials that diverged or failed after the rung before, and by this one."""
    is_end: bool


@dataclass(frozen=True)
class Trial:
    """A trial and how it ended."""

    number: int
    job: int | None
    """Number of its job; None where no run can have its settings."""
    params: dict[str, Any]
    state: str
    """finished, stopped, waiting (to be decided on), diverged, failed, repeats, or the state of its run."""
    step: int
    """How far it trained."""
    text: str
    """How it ended and why, as a sentence."""
    short: str
    """The same for a column of a table."""


@dataclass(frozen=True)
class SearchSummary:
    """What a search did."""

    record: SearchRecord
    rungs: list[Rung] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    seeds_missing: bool = False
    """Whether a trial is still to be trained with another seed."""

    gone: list[int] = field(default_factory=list)
    """Trials that were measured and whose folder is not there any more."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left for a resume: every trial ended, or was stopped for good."""
        ended = (_FINISHED, _STOPPED, DIVERGED, FAILED, _REPEATS)
        return bool(self.trials) and not self.seeds_missing and all(trial.state in ended for trial in self.trials)

    @property
    def only_repeats(self) -> bool:
        """Whether the sampler suggested only what was tried before, so that it is asked for no more trials."""
        return only_repeats([trial.state == _REPEATS for trial in self.trials])

    @property
    def judged_by(self) -> str:
        """What compares trials at a rung."""
        return str(self.record.settings.get("judged_by", "valid_loss"))

    @cached_property
    def by_job(self) -> dict[int, Trial]:
        """The first trial of each job, by its number."""
        return {trial.job: trial for trial in reversed(self.trials) if trial.job is not None}

    @property
    def space(self) -> list[str]:
        """The overrides that were searched over, as typed."""
        space = self.record.settings.get("space")
        return list(map(str, space)) if isinstance(space, list) else []

    @property
    def options(self) -> dict[str, Any]:
        """The options of the search as a resume last set them: hydra.sweeper.NAME."""
        options = self.record.settings.get("options")
        found = dict(options) if isinstance(options, dict) else {}
        for line in self.record.extensions:
            found |= line["extended"] if isinstance(line["extended"], dict) else {}
        return found

    @cached_property
    def replicates(self) -> dict[int, tuple[Trial, int]]:
        """The jobs that train a trial with another seed: number to the trial and the seed."""
        return {
            job: (trial, seed)
            for trial, recorded in zip(self.trials, self.record.trials, strict=True)
            for seed, job in recorded.replicates.items()
        }

    def values_at_first_rung(self) -> dict[int, float]:
        """Return the trials, by number, that have a value at the first rung, with it."""
        if not self.rungs or self.rungs[0].is_end:
            return {}
        found = {trial.number: finite_value_at(trial, self.rungs[0].step) for trial in self.record.trials}
        repeated = {trial.number for trial in self.trials if trial.state == _REPEATS}
        return {number: value for number, value in found.items() if value is not None and number not in repeated}


def summarize(record: SearchRecord, runs: Mapping[int, RunInfo]) -> SearchSummary:
    """Return what the search did; `runs` are those of its jobs, by number.

    Raises:
        LookupError, TypeError or ValueError: the record was edited into one that cannot be.
    """
    if not all(map(is_count, record.rungs)):
        raise ValueError("rungs are whole numbers")
    metric = str(record.settings.get("judged_by", "valid_loss")).replace("_", " ")
    first: dict[int, int] = {}
    for trial in record.trials:
        if trial.job is not None:
            first.setdefault(trial.job, trial.number)
    counted = [trial for trial in record.trials if trial.job is None or first[trial.job] == trial.number]
    rungs = [_rung(record, counted, i) for i in range(len(record.rungs))]
    cuts = {rung.step: rung.cut for rung in rungs}
    places = {rung.step: _places(counted, rung.step) for rung in rungs if not rung.is_end}
    trials = []
    for trial in record.trials:
        run = None if trial.job is None else runs.get(trial.job)
        earlier = trial.number if trial.job is None else first[trial.job]
        repeats = earlier if earlier != trial.number else None
        state, step, text, short = _ending(trial, repeats, run, cuts, places, metric, record.rungs)
        params = {name.lstrip("+"): value for name, value in trial.params.items()}
        trials.append(Trial(trial.number, trial.job, params, state, step, text, short))
    jobs = [job for trial in record.trials for job in trial.replicates.values()]
    missing = any(job not in runs or runs[job].state not in (_FINISHED, DIVERGED) for job in jobs)
    present = {number for number, run in runs.items() if run.state != _NOT_STARTED}
    measured = [trial for trial in record.trials if trial.job is not None and trial.results]
    gone = [trial.number for trial in measured if trial.job not in present and first[trial.job or 0] == trial.number]
    return SearchSummary(record, rungs, trials, missing, gone)


def read_summary(folder: Path, runs: Mapping[int, RunInfo]) -> tuple[SearchSummary | None, str | None]:
    """Return what the search in the directory of a sweep did, None where it is none, and why that cannot be read.

    `runs` are those of its jobs, by number.
    """
    try:
        record = read_search(folder)
        return None if record is None else summarize(record, runs), None
    except ConfigError as error:
        return None, str(error)
    except (LookupError, TypeError, ValueError):
        return None, f"{folder / NAME} cannot be understood."


def summarize_sweep(sweep: SweepInfo) -> tuple[SearchSummary | None, str | None]:
    """Return what `read_summary` does of the search that the sweep is."""
    numbers = sweep.manifest.numbers if sweep.manifest else {}
    return read_summary(sweep.path, {numbers[r.path.name]: r for r in sweep.runs if r.path.name in numbers})


def finite_value_at(trial: TrialRecord, step: int) -> float | None:
    """Return the value of a trial at a rung; None where it has not reached it, diverged or failed."""
    value = value_at_rung(trial.results, trial.stop_at, step)
    return value if value is not None and math.isfinite(value) else None


def header_lines(summary: SearchSummary) -> list[tuple[str, str]]:
    """Return what the search was, as labels and texts: options, space, plans, extensions, seeds and time."""
    settings, record = summary.record.settings, summary.record
    options = [f"{name}={settings[name]}" for name in _OPTIONS if settings.get(name) is not None]
    lines = [("options", " ".join([*options, f"judged by {summary.judged_by}"]))]
    lines += [("space", text) for text in summary.space]
    earlier = settings.get("earlier")
    if isinstance(earlier, list) and earlier:
        lines.append(("began with", f"{count(len(earlier), 'result')} of an earlier sweep (warm_from)"))
    if summary.gone:
        names = ", ".join(map(str, summary.gone))
        noun = "trials" if len(summary.gone) > 1 else "trial"
        lines.append(("gone", f"the folders of {noun} {names} are gone: what is recorded of them stays"))
    lines += [("plan", shorten(line.get("reason", ""), 200)) for line in record.planned]
    for line in record.extensions:
        changed = line["extended"]
        if isinstance(changed, dict):
            texts = " ".join(f"{name}={shorten(value)}" for name, value in changed.items())
            lines.append(("extended", f"to {texts} before wave {line.get('wave')}"))
    if record.missed:
        lines.append(("left out", f"for lack of time: {shorten('; '.join(record.missed), 200)}"))
    lines += [("to the end", text) for text in _beyond_their_place(record)]
    impossible = [trial for trial in summary.trials if trial.job is None]
    for trial in impossible[:_MOST_IMPOSSIBLE]:
        reason = record.trials[trial.number].results[-1].reason if record.trials[trial.number].results else ""
        lines.append(("cannot run", f"trial {trial.number}: {shorten(reason, 200)}"))
    if len(impossible) > _MOST_IMPOSSIBLE:
        lines.append(("cannot run", f"and {count(len(impossible) - _MOST_IMPOSSIBLE, 'further trial')}"))
    if record.updates:
        spent, training = format_duration(record.spent_seconds), format_duration(record.job_seconds)
        lines.append(("time", f"{spent}, of it {training} in jobs: {record.updates:,} updates"))
    return lines


def tried_text(summary: SearchSummary) -> str:
    """Return how many trials there were and how they ended: ``27 trials: 3 finished, 23 stopped, 1 diverged``."""
    states = [trial.state for trial in summary.trials]
    parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states, key=_order))]
    return f"{count(len(states), 'trial')}: {', '.join(parts)}" if states else "no trials"


def search_fields(summary: SearchSummary) -> dict[str, Any]:
    """Return the search as data for a JSON document."""
    record = summary.record
    return {
        "settings": {name: value for name, value in record.settings.items() if name != "schema"},
        "complete": summary.is_complete,
        "rungs": [vars(rung) for rung in summary.rungs],
        "trials": [
            {
                "trial": trial.number,
                "job": trial.job,
                "params": trial.params,
                "state": trial.state,
                "step": trial.step,
                "reason": trial.text,
                "seeds": record.trials[trial.number].replicates,
            }
            for trial in summary.trials
        ],
        "planned": [{"trials": line["planned"]["trials"], "reason": line.get("reason")} for line in record.planned],
        "spent_seconds": record.spent_seconds,
        "job_seconds": record.job_seconds,
        "updates": record.updates,
    }


def _rung(record: SearchRecord, trials: Sequence[TrialRecord], place: int) -> Rung:
    """Return what happened at a rung to those `trials` that repeat no other."""
    step, before = record.rungs[place], record.rungs[place - 1] if place else -1
    values = {number: value for value, number in _places(trials, step)}
    known = [value for value in values.values() if math.isfinite(value)]
    is_end = place == len(record.rungs) - 1
    lowest = [t.results[-1].values[0] for t in trials if t.results and t.results[-1].state == FINISHED]
    best = min(lowest if is_end and record.metrics[:1] == [VALID_LOSS] else known, default=None)
    decisions = [decision for decision in record.continued if decision["from"] == step]
    chosen = {number for decision in decisions for number in decision["trials"]}
    by_place = {number for decision in decisions if "cut" in decision for number in decision["trials"]}
    cuts = [value for number in by_place if (value := values.get(number)) is not None]
    ends = [trial.results[-1] for trial in trials if trial.results]
    lost = sum(result.state in (DIVERGED, FAILED) and before < result.step <= step for result in ends)
    return Rung(
        step=step,
        reached=len(values),
        continued=len(chosen),
        cut=max(cuts, default=None),
        best=best,
        lost=lost,
        is_end=is_end,
    )


def _ending(
    trial: TrialRecord,
    repeats: int | None,
    run: RunInfo | None,
    cuts: Mapping[int, float | None],
    places: Mapping[int, Sequence[tuple[float, int]]],
    metric: str,
    rungs: list[int],
) -> tuple[str, int, str, str]:
    """Return the state of a trial, how far it trained, and how it ended as a sentence and in short."""
    if repeats is not None:
        return _REPEATS, 0, f"has the settings of trial {repeats}", f"as trial {repeats}"
    result = trial.results[-1] if trial.results else None
    if result is None or (result.state == PAUSED and run is not None and (run.step or 0) > result.step):
        state, step = (_NOT_STARTED, 0) if run is None else (run.state, run.step or 0)
        is_unrecorded = state in (_STOPPED, _FINISHED, DIVERGED, FAILED)  # a resume goes on from there
        return (_WAITING if is_unrecorded else state), step, f"{state} at step {step}", ""
    step = result.step
    if result.state == FINISHED:
        early = " by early stopping" if rungs and step < rungs[-1] else ""
        return _FINISHED, step, f"trained to its end at step {step}{early}", f"to its end at {step}{early}"
    if result.state in (DIVERGED, FAILED):
        reason = shorten(result.reason, 200) if result.reason else ""
        short = f"{result.state} at {step}"
        return result.state, step, f"{result.state} at step {step}" + (f": {reason}" if reason else ""), short
    stopped, cut = trial.stopped, cuts.get(step)
    if stopped is not None:
        value, place, of = float(stopped["value"]), stopped["place"], stopped["of"]
    else:
        ranked = places.get(step, ())
        value = next((value for value, number in ranked if number == trial.number), result.rung_value or 0.0)
        place, of = 1 + sum(pair < (value, trial.number) for pair in ranked), len(ranked)
    if stopped is None and cut is None:
        return _WAITING, step, f"waits at step {step}, where nothing is decided yet", f"waits at {step}"
    state, verb = (_WAITING, "waits") if stopped is None else (_STOPPED, "stopped")
    limit = "none continued" if cut is None else f"those up to {cut:.4f} continued"
    short = f"place {place} of {of} at {step}" + ("" if cut is None else f", cut {cut:.4f}")
    return state, step, f"{verb} at {step}: place {place} of {of}, {metric} {value:.4f}; {limit}", short


def _places(trials: Sequence[TrialRecord], step: int) -> list[tuple[float, int]]:
    """Return the values at a rung with the numbers of their trials, the best first."""
    values = [(value_at_rung(trial.results, trial.stop_at, step), trial.number) for trial in trials]
    return sorted((value, number) for value, number in values if value is not None)


def _beyond_their_place(record: SearchRecord) -> Iterator[str]:
    """Yield which trials continued for another reason than their place in a rung."""
    for decision in record.continued:
        if "cut" not in decision:
            numbers = ", ".join(map(str, decision["trials"]))
            noun = "trial" if len(decision["trials"]) == 1 else "trials"
            reason = shorten(decision.get("reason", ""), 200)
            yield f"{noun} {numbers} from {decision['from']}" + (f": {reason}" if reason else "")


def _order(state: str) -> int:
    order = (_FINISHED, "running", _WAITING, _STOPPED, DIVERGED, FAILED)
    return order.index(state) if state in order else len(order)
