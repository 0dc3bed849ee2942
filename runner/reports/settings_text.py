"""Settings as a table shows them: which differ from the defaults, under short names, with paths cut to what tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from runner.common.errors import ConfigError
from runner.common.text import relative_path
from runner.config import schema, validation
from runner.config.resume_policy import is_free_on_resume
from runner.config.schema import OPTIMIZERS, SCHEDULES, Config, format_value
from runner.runs.inspect import RunInfo

PATHS = ("model.path", "data.path", "adapter")
"""Settings that are paths or hub ids."""
_ALWAYS = ("model.path", "data.path")
_MOST_VALUES = 4
_ORDER = ("lora", "optimizer", "schedule", "train", "seed", "model", "data")
_TELLING = ("lora", "optimizer", "train")
"""Sections whose settings are known by their last word."""


def changed_from_defaults(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name to (value, default) of the settings that are not the default of the chosen optimizer and schedule, in the
    schema's order; the paths of model and data in any case, settings of one invocation never (but the experiment)."""
    defaults = schema.flatten(_defaults_for(settings))
    changed = {}
    for name in [*defaults, *(name for name in settings if name not in defaults)]:
        if name in settings and (name in _ALWAYS or settings[name] != defaults.get(name)):
            changed[name] = (settings[name], defaults.get(name))
    return changed


def by_importance(names: Sequence[str]) -> list[str]:
    """`names` with those first that decide what is learned, those last that only decide what is shown and kept."""

    def weight(name: str) -> tuple[bool, int]:
        beside = is_free_on_resume(name) and name not in (*PATHS, "train.iters")
        section = name.partition(".")[0]
        return beside, _ORDER.index(section) if section in _ORDER else len(_ORDER)

    return sorted(names, key=weight)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last word of a name where it is the schema's only setting of that word, and tells alone what it is: ``rank``,
    ``batch_size``, but ``train.iters`` and ``checkpoint.every``."""
    known = [name.rpartition(".")[2] for name in dict.fromkeys([*schema.default_settings(), *names])]

    def called(name: str) -> str:
        section, _, last = name.rpartition(".")
        return last if section in _TELLING and known.count(last) == 1 else name

    return {name: called(name) for name in names}


def value_text(value: Any) -> str:
    """A value as one would type it, short: ``0.0002``, ``[0.9,0.999]``, ``null``; of loggers their names."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(value_text(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"[{','.join(str(key) for key in value)}]"
    return format_value(value)


def texts_of(name: str, values: Sequence[Any]) -> list[str]:
    """The texts of the values that one setting has in several runs; paths are cut from the left to what tells them
    apart."""
    texts = [value_text(value) for value in values]
    return shortened(texts) if name in PATHS else texts


def shortened(paths: Sequence[str]) -> list[str]:
    """Each path by its last parts, as many as keep those that differ different; one that is no absolute path is left
    as it is."""
    parts = {path: PurePosixPath(path).parts for path in dict.fromkeys(paths) if path.startswith("/")}
    tails = {}
    for path, own in parts.items():
        for count in range(1, len(own) + 1):
            tail = own[-count:]
            if all(other == path or found[-count:] != tail for other, found in parts.items()):
                break
        text = "/".join(own[-count:])
        tails[path] = path if count >= len(own) - 1 or len(text) + 2 >= len(path) else f"…/{text}"
    return [tails.get(path, path) for path in paths]


def path_text(name: str, value: Any) -> str:
    """A value for one run's own page: paths below the working directory are relative."""
    if name in PATHS and isinstance(value, str) and value.startswith("/"):
        return relative_path(Path(value))
    return value_text(value)


def pairs(groups: Sequence[Sequence[RunInfo]], names: Sequence[str]) -> list[str]:
    """For each group of runs (a run alone, or a sweep's) its settings as ``rank=8 data.path=…/sql``; of settings that
    vary inside a group the values, ``rank=4,8,16``."""
    called = short_names(names)
    told: list[list[str]] = [[] for _ in groups]
    for name in names:
        default = schema.default_settings().get(name)
        values = [[run.settings.get(name, default) for run in group if run.settings] for group in groups]
        texts = iter(texts_of(name, [value for group in values for value in group]))
        for group, words in zip(values, told, strict=True):
            own = list(dict.fromkeys(next(texts) for _ in group))
            if own:
                listed = ",".join(own[:_MOST_VALUES]) + (",…" if len(own) > _MOST_VALUES else "")
                words.append(f"{called[name]}={listed}")
    return [" ".join(words) for words in told]


def _defaults_for(settings: Mapping[str, Any]) -> Config:
    """The defaults as `checks.complete` fills them in for this run's optimizer, schedule and way to give the scale."""
    defaults = Config()
    optimizer, schedule = settings.get("optimizer.name"), settings.get("schedule.name")
    if optimizer not in OPTIMIZERS or schedule not in SCHEDULES:
        return defaults
    defaults.optimizer.name, defaults.schedule.name = optimizer, schedule
    if settings.get("lora.alpha") is not None:
        defaults.lora.alpha = 1.0  # then the scale follows from alpha, and has no default of its own
    try:
        defaults = validation.fill_defaults(defaults)
    except ConfigError:
        return defaults
    defaults.optimizer.name, defaults.schedule.name = schema.MISSING, schema.MISSING
    defaults.lora.alpha = None
    return defaults
