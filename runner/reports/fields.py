"""The fields of a run by which listings filter and sort: its metrics, its labels, its state, and every setting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.safe_json import finite_number
from runner.common.text import format_bytes, shorten
from runner.config import serialize
from runner.config.schema import HIGHER_IS_BETTER, OBJECTIVE_METRICS
from runner.reports import settings_text
from runner.reports.cells import format_age
from runner.reports.metric_columns import DECIMALS, metric_text
from runner.runs.inspect import RunInfo
from runner.runs.objective import Objective

NUMBER, TEXT, WORDS, DURATION, SIZE, SETTING = "number", "text", "words", "duration", "size", "setting"


@dataclass(frozen=True)
class Field:
    """One field of every run."""

    name: str
    kind: str
    value: Callable[[RunInfo], Any]
    """Its value in a run; None where the run has none."""
    higher_is_better: bool | None = None
    """Of a metric that ranks runs; None for other fields."""

    def text(self, run: RunInfo) -> str:
        """Return the value as a table shows it."""
        value = self.value(run)
        if value is None or value == ():
            return "-"
        if self.kind == DURATION:
            return format_age(value)
        if self.kind == SIZE:
            return format_bytes(value)
        if self.kind == WORDS:
            return " ".join(value)
        if self.name in DECIMALS:
            return metric_text(self.name, value)
        return settings_text.value_text(value)


def find_field(name: str, runs: Sequence[RunInfo] = (), where: str = "") -> Field:
    """Return the field that a person named: a metric, or a setting by its dotted name or its last part.

    Args:
        name: as typed.
        runs: those that are listed: their own keys of open sections, such as vars.size, are known too.
        where: what was typed, which an error begins with.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name in FIELDS:
        return FIELDS[name]
    setting = _short_names().get(name, name)
    if setting in serialize.default_settings():
        return _setting_field(setting)
    own = {key: key for run in runs for key in serialize.flatten_dict(run.settings)}
    if name in own:
        return _open_setting_field(name)
    known = [*FIELDS, *_short_names(), *serialize.default_settings(), *own]
    listed = ", ".join(field for field in FIELDS if field not in _ALIASES)
    raise ConfigError(
        f"{f'{where}: ' if where else ''}{shorten(name)} is neither a metric nor a setting.{did_you_mean(name, known)} "
        f"Any setting can be named (docs/config.md), and {listed}."
    )


def last_number(run: RunInfo, split: str | None, name: str) -> float | None:
    """Return the last finite `name` of the rows of a split, or of all rows."""
    for row in reversed(run.rows):
        if split is None or row.get("split") == split:
            value = finite_number(row.get(name))
            if value is not None:
                return value
    return None


def _fields() -> Iterable[Field]:
    yield from map(_objective_field, OBJECTIVE_METRICS)
    yield Field("train_loss", NUMBER, lambda run: last_number(run, "train", "loss"), higher_is_better=False)
    yield Field("step", NUMBER, lambda run: run.step)
    yield Field("iters", NUMBER, lambda run: run.iters)
    yield Field("tokens", NUMBER, lambda run: last_number(run, "train", "tokens"))
    yield Field("seconds", NUMBER, lambda run: finite_number(run.status.get("seconds")), higher_is_better=False)
    yield Field("age", DURATION, lambda run: time.time() - run.updated)
    yield Field("size", SIZE, lambda run: run.size_bytes)
    yield Field("state", TEXT, lambda run: run.state)
    yield Field("reason", TEXT, lambda run: run.reason)
    yield Field("name", TEXT, lambda run: run.labels.name)
    yield Field("tag", WORDS, lambda run: run.tags)
    yield Field("note", TEXT, lambda run: run.labels.note)
    yield Field("path", TEXT, lambda run: str(run.path))


def _objective_field(metric: str) -> Field:
    return Field(metric, NUMBER, Objective(metric).value_so_far, metric in HIGHER_IS_BETTER)


_ALIASES = {"best": "valid_loss", "tags": "tag"}
FIELDS = {field.name: field for field in _fields()}
"""By name, those that are no settings."""
FIELDS |= {alias: FIELDS[name] for alias, name in _ALIASES.items()}


def _setting_field(name: str) -> Field:
    return Field(name, SETTING, lambda run: run.setting(name))


def _open_setting_field(name: str) -> Field:
    return Field(name, SETTING, lambda run: serialize.flatten_dict(run.settings).get(name))


@cache
def _short_names() -> dict[str, str]:
    """Return the settings by their last parts, where these are unique and name nothing else.

    The choice of a group is named as on the command line: `optimizer` is `optimizer.name`.
    """
    names = list(serialize.default_settings())
    last_parts = [name.rpartition(".")[2] for name in names]
    groups = {name.removesuffix(".name"): name for name in names if name.endswith(".name")}
    return groups | {
        last: name
        for name, last in zip(names, last_parts, strict=True)
        if last_parts.count(last) == 1 and last not in FIELDS
    }
