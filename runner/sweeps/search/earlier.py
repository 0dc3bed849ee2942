"""hydra.sweeper.warm_from: what the jobs of an earlier sweep or search say about points of a search's space.

A job is a point of the space where its config has what values of the space give a trial's config: whether it was typed
as a value, chosen with a group or as a dict, or followed from a variable does not matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.text import count, relative_path, shorten
from runner.config import schema, serialize
from runner.config.labels import NO_LABELS
from runner.config.resume_policy import may_become
from runner.runs import sweep_manifest
from runner.runs.inspect import RunInfo, read_run
from runner.runs.objective import Objective
from runner.runs.search_record import DIVERGED, FINISHED, PAUSED
from runner.runs.sweep_manifest import SweepJob
from runner.sweeps.search.dimensions import Choices, Interval, Value
from runner.sweeps.search.space import Space

_COMPARABLE = ("adapter", "model.", "data.", "method.", "train.eval_batches")
"""Settings that decide what a validation loss is a loss of, and where training starts."""
_WITHOUT_EFFECT = ("data.cache", "data.pad_to", "data.window", "data.template_date", "model.trust_remote_code")
_OF_SCORES = ("data.metric", "data.max_new_tokens")
"""Settings that decide what a score is of, and no loss."""
_NOT_REPORTED = ("seed", "objective.", "checkpoint.", "loggers.", "vars.", "train.report_every", "train.eval_")
"""Settings whose difference needs no word: results are there to be compared over seeds, and the rest moves nothing."""
_MAX_NAMES = 4


@dataclass(frozen=True)
class EarlierResult:
    """What an earlier job was measured to have at a point of the space."""

    params: dict[str, Value]
    state: str
    """FINISHED, PAUSED (trained to a part of its length) or DIVERGED."""
    values: tuple[float, ...]
    """Of one that finished: one for each metric. Of one that stopped: its last validation loss. Else none."""
    step: int
    """How far it trained, as a step of this search: the same part of the length."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as the record has it."""
        return {"params": self.params, "values": list(self.values), "state": self.state, "step": self.step}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> EarlierResult:
        """Return what `to_dict` made; raises KeyError, TypeError or ValueError where it did not."""
        values = tuple(float(value) for value in line["values"])
        found = cls(dict(line["params"]), str(line.get("state", FINISHED)), values, int(line.get("step", 0)))
        if not all(map(math.isfinite, values)) or (found.state != DIVERGED) != bool(values):
            raise ValueError("an earlier result has other values than its state")
        return found


@dataclass
class EarlierResults:
    """The results of an earlier sweep that a search begins with."""

    results: list[EarlierResult] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    """Settings that are no part of the space and that used jobs have otherwise than this search."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why jobs were left out: the reason to what each of them has, empty where the reason says all."""

    def lines(self) -> list[str]:
        """Return what is printed of them."""
        states = Counter(result.state for result in self.results)
        names = {FINISHED: "finished", PAUSED: "stopped before their end", DIVERGED: "diverged"}
        parts = ", ".join(f"{states[state]} {name}" for state, name in names.items() if states[state])
        lines = [f"warm start: {count(len(self.results), 'result')}: {parts}"]
        if self.differing:
            more = f" and {len(self.differing) - _MAX_NAMES} more" if len(self.differing) > _MAX_NAMES else ""
            lines.append(f"  they differ from this search in {', '.join(self.differing[:_MAX_NAMES])}{more}")
        return lines + [f"  left out: {self.left_out_text()}"] * bool(self.left_out)

    def left_out_text(self) -> str:
        """Return why jobs were left out: ``2 jobs outside of the space of lora.rank (8, 16)``."""
        texts = []
        for reason, values in sorted(self.left_out.items(), key=lambda item: -len(item[1])):
            unique = [value for value in dict.fromkeys(values) if value]
            listed = ", ".join(unique[:_MAX_NAMES]) + (", …" if len(unique) > _MAX_NAMES else "")
            texts.append(f"{count(len(values), 'job')} {reason}" + (f" ({listed})" if unique else ""))
        return ", ".join(texts)


def find_earlier(
    folder: Path,
    space: Space,
    config_of: Callable[[Mapping[str, Value]], Mapping[str, Any]],
    objective: Objective,
    end: int,
) -> EarlierResults:
    """Return what the jobs of the sweep in `folder` say about points of the space.

    Args:
        folder: directory of the earlier sweep or search.
        space: of this search.
        config_of: returns the config of a trial with these values, as it is stored.
        objective: of this search.
        end: the length of its trials, in updates.

    Raises:
        ConfigError: there is no such sweep, or nothing of it can be used; says why.
    """
    folder = folder.expanduser()
    manifest = sweep_manifest.read_manifest(folder)
    if not manifest.jobs:
        raise ConfigError(f"hydra.sweeper.warm_from={folder}: there is no sweep.")
    recognizer = _Recognizer(space, config_of)
    found = EarlierResults()
    differing: dict[str, None] = {}
    for job in manifest.jobs:
        run = read_run(folder / job.folder, NO_LABELS)
        settings = _settings_of(job, run)
        try:
            params = recognizer.params_of(settings)
            others = _differences(settings, _leaves(config_of(params)), objective)
            result = _result(params, run, objective, end, settings["train.iters"])
        except _LeftOut as left_out:
            found.left_out.setdefault(left_out.reason, []).append(left_out.value)
            continue
        found.results.append(result)
        differing |= dict.fromkeys(name for name in others if not name.startswith(_NOT_REPORTED))
    found.differing = list(differing)
    if not found.results:
        raise ConfigError(
            f"hydra.sweeper.warm_from={relative_path(folder)}: none of its jobs can be used: {found.left_out_text()}."
        )
    return found


class _LeftOut(Exception):
    """Raised where a job says nothing about a point of the space."""

    def __init__(self, reason: str, value: str = "") -> None:
        super().__init__(reason, value)
        self.reason, self.value = reason, value


def _settings_of(job: SweepJob, run: RunInfo) -> dict[str, Any]:
    """Return the settings of a job as planned, by dotted name; its run has stored what was chosen for it since."""
    if job.config is None:  # a sweep of an earlier version
        return _leaves(run.settings)
    return _leaves(serialize.change_dict(job.config, job.own_changes))


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config by dotted name, and the defaults of what an earlier version did not store."""
    return {**serialize.default_settings(), **serialize.flatten_dict(config)}


def _result(params: dict[str, Value], run: RunInfo, objective: Objective, end: int, iters: object) -> EarlierResult:
    """Return what a job has at its point; raises _LeftOut where that is nothing."""
    length = iters if isinstance(iters, int) and iters > 0 else end

    def step_here(step: int) -> int:
        return max(1, round(step * end / length))

    if run.state == "finished":
        values = objective.values(run)
        for name, value in zip(objective.metrics, values, strict=True):
            if value is None:
                raise _LeftOut(f"without {name}")
        return EarlierResult(params, FINISHED, tuple(value for value in values if value is not None), end)
    if objective.others:
        raise _LeftOut("not at its end, where several metrics are compared")
    if run.state == "diverged":
        return EarlierResult(params, DIVERGED, (), step_here(run.step or 0))
    losses = [(step, loss) for step, loss in run.losses("valid") if step > 0]
    if run.state not in ("stopped", "interrupted") or not losses:
        raise _LeftOut("without a result", run.state)
    step, loss = losses[-1]
    return EarlierResult(params, PAUSED, (loss,), step_here(step))


def _differences(job: Mapping[str, Any], trial: Mapping[str, Any], objective: Objective) -> list[str]:
    """Return the settings in which the job and the trial at its point differ, beside those that compare results.

    Raises:
        _LeftOut: their results are of something else.
    """
    without_effect = _WITHOUT_EFFECT + (() if "score" in objective.metrics else _OF_SCORES)
    left_out = {*schema.provenance_settings(), *schema.label_settings()}
    names = []
    for name in dict.fromkeys([*trial, *job]):
        there, here = job.get(name), trial.get(name)
        if name in left_out or may_become(name, there, here) or may_become(name, here, there):
            continue
        if name.startswith(_COMPARABLE) and not name.startswith(without_effect):
            raise _LeftOut(f"with another {name} than {shorten(here, 60)}", shorten(there, 60))
        names.append(name)
    return names


@dataclass(frozen=True)
class _Effect:
    """What a dimension decides in the config of a trial."""

    names: list[str]
    """The settings."""
    configs: list[dict[str, Any]]
    """Configs that have them, one for each choice, or for both ends of an interval."""

    def choice(self, settings: Mapping[str, Any]) -> int | None:
        """Return which of the configs the settings agree with."""
        agree = (i for i, c in enumerate(self.configs) if all(c.get(n) == settings.get(n) for n in self.names))
        return next(agree, None)

    def number(self, dimension: Interval, settings: Mapping[str, Any]) -> Any:
        """Return the number that the settings show: a setting shows it that has each end at that end."""
        low, high = self.configs[0], self.configs[-1]
        ends = (dimension.low, dimension.high)
        return next((settings.get(n) for n in self.names if (low.get(n), high.get(n)) == ends), None)


class _Recognizer:
    """Finds the point of a space that a config is at."""

    def __init__(self, space: Space, config_of: Callable[[Mapping[str, Value]], Mapping[str, Any]]) -> None:
        self._space = space
        first = {key: dimension.ends()[0] for key, dimension in space.dimensions.items()}
        self._effects: dict[str, _Effect] = {}
        for key, dimension in space.dimensions.items():
            configs = [_leaves(config_of({**first, key: value})) for value in dimension.ends()]
            names = dict.fromkeys(name for config in configs for name in config)
            decided = [name for name in names if any(c.get(name) != configs[0].get(name) for c in configs)]
            decided = [name for name in decided if name not in schema.provenance_settings()]
            # A variable has no meaning by itself.
            names_that_count = [name for name in decided if not name.startswith("vars.")] or decided
            self._effects[key] = _Effect(names_that_count or [key.lstrip("+")], configs)

    def params_of(self, settings: Mapping[str, Any]) -> dict[str, Value]:
        """Return the point that these settings, by dotted name, are at; raises _LeftOut where they are at none."""
        params: dict[str, Value] = {}
        for key, dimension in self._space.dimensions.items():
            effect = self._effects[key]
            if isinstance(dimension, Choices):
                place = effect.choice(settings)
                is_inside = place is not None
                value: Value = dimension.choices[place or 0]
            else:
                number = effect.number(dimension, settings)
                is_inside = dimension.contains(number)
                value = int(number) if is_inside and dimension.is_int else number
            if not is_inside:
                shown = next((name for name in (key.lstrip("+"), *effect.names) if name in settings), key)
                raise _LeftOut(f"outside of the space of {shown}", shorten(settings.get(shown), 60))
            params[key] = value
        return params
