"""Settings as tables show them: which differ from the defaults, under short names, with paths cut to what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from runner.common.text import relative_path
from runner.config import schema, serialize, validation
from runner.config.resume_policy import is_free_on_resume
from runner.config.schema import Config
from runner.config.serialize import format_value
from runner.config.setting import Setting
from runner.runs.inspect import RunInfo

_MAX_VALUES = 4


def changed_from_defaults(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return name to (value, default) of the settings that differ from the defaults, in the schema's order.

    The defaults are those of the run's optimizer and schedule; settings that are always shown are included.
    """
    defaults, metadata = serialize.flatten(_defaults_for(settings)), schema.metadata()
    names = [*defaults, *(name for name in settings if name not in defaults)]
    return {
        name: (settings[name], defaults.get(name))
        for name in names
        if name in settings and (metadata.get(name, Setting()).always_shown or settings[name] != defaults.get(name))
    }


def by_importance(names: Sequence[str]) -> list[str]:
    """Return `names` sorted: first what decides the result, by section; last what only decides display and storage."""

    def key(name: str) -> tuple[bool, int]:
        metadata = schema.metadata().get(name, Setting())
        decides_result = metadata.shown_as_result_setting or not is_free_on_resume(name)
        return not decides_result, _report_order(name)

    return sorted(names, key=key)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return each name with a short form: its last part where that is unique in the schema and clear by itself.

    `lora.rank` becomes `rank` and `train.batch_size` `batch_size`, but `train.iters` and `checkpoint.every` stay.
    """
    last_parts = [name.rpartition(".")[2] for name in dict.fromkeys([*serialize.default_settings(), *names])]

    def short(name: str) -> str:
        section, _, last = name.rpartition(".")
        metadata = schema.section_metadata().get(section)
        return last if metadata and metadata.short_names and last_parts.count(last) == 1 else name

    return {name: short(name) for name in names}


def value_text(value: Any) -> str:
    """Return a value in short form as one would type it: `0.0002`, `[0.9,0.999]`, `null`; of a mapping of mappings, as
    loggers is, the names."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(value_text(item) for item in value)}]"
    if isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in value.values()):
        return f"[{','.join(str(key) for key in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {value_text(item)}' for key, item in value.items())}}}"
    return format_value(value)


def texts_of(name: str, values: Sequence[Any]) -> list[str]:
    """Return the texts of the values of one setting in several runs; of paths, the last parts that differ."""
    texts = [value_text(value) for value in values]
    return shortened(texts) if name in schema.path_settings() else texts


def shortened(paths: Sequence[str]) -> list[str]:
    """Return each absolute path by as many last parts as tell it from the others; other texts are unchanged."""
    parts = {path: PurePosixPath(path).parts for path in dict.fromkeys(paths) if path.startswith("/")}
    tails = {}
    for path, path_parts in parts.items():
        for count in range(1, len(path_parts) + 1):
            tail = path_parts[-count:]
            if all(other == path or other_parts[-count:] != tail for other, other_parts in parts.items()):
                break
        text = "/".join(path_parts[-count:])
        tails[path] = path if count >= len(path_parts) - 1 or len(text) + 2 >= len(path) else f"…/{text}"
    return [tails.get(path, path) for path in paths]


def path_text(name: str, value: Any) -> str:
    """Return a value for the page of its run: a path below the working directory is relative."""
    if name in schema.path_settings() and isinstance(value, str) and value.startswith("/"):
        return relative_path(Path(value))
    return value_text(value)


def pairs(groups: Sequence[Sequence[RunInfo]], names: Sequence[str]) -> list[str]:
    """Return the settings `names` of each group of runs (one run, or those of a sweep) as `rank=8 data.path=…/sql`.

    Where a setting varies inside a group, its values are listed: `rank=4,8,16`.
    """
    labels = short_names(names)
    texts_by_group: list[list[str]] = [[] for _ in groups]
    for name in names:
        values = [[run.setting(name) for run in group if run.settings] for group in groups]
        texts = iter(texts_of(name, [value for group in values for value in group]))
        for group, pair_texts in zip(values, texts_by_group, strict=True):
            unique = list(dict.fromkeys(next(texts) for _ in group))
            if unique:
                listed = ",".join(unique[:_MAX_VALUES]) + (",…" if len(unique) > _MAX_VALUES else "")
                pair_texts.append(f"{labels[name]}={listed}")
    return [" ".join(pair_texts) for pair_texts in texts_by_group]


def _report_order(name: str) -> int:
    """Return the place in reports of a top-level setting, or of the section that holds the setting."""
    top = name.partition(".")[0]
    return (schema.section_metadata().get(top) or schema.metadata().get(top) or Setting()).report_order


def _defaults_for(settings: Mapping[str, Any]) -> Config:
    """Return the defaults that hold with this run's optimizer, schedule, method and way to set the LoRA factor."""
    defaults = Config()
    optimizer, schedule = settings.get("optimizer.name"), settings.get("schedule.name")
    choices = schema.metadata()
    if optimizer not in choices["optimizer.name"].choices or schedule not in choices["schedule.name"].choices:
        return defaults
    defaults.optimizer.name, defaults.schedule.name = optimizer, schedule
    if settings.get("method.name") in choices["method.name"].choices:
        defaults.method.name = settings["method.name"]
    if settings.get("lora.alpha") is not None:
        defaults.lora.alpha = 1.0  # then the factor follows from alpha, and scale has no default
    if settings.get("lora.type") == "full":
        defaults.lora.type = "full"  # which has no factor
    defaults = validation.fill_defaults(defaults)
    defaults.lora.type = Config().lora.type
    defaults.optimizer.name, defaults.schedule.name = schema.MISSING, schema.MISSING
    defaults.method.name = Config().method.name
    defaults.lora.alpha = None
    return defaults
