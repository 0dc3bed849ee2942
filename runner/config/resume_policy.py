"""What a resumed run may change: a pure function of the stored config, the new one and the step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.common.commands import repeat_command, warm_start_command
from runner.common.errors import ConfigError
from runner.config import schema
from runner.config.schema import Config
from runner.config.serialize import flatten, format_value
from runner.config.setting import OnResume
from runner.config.validation import decay_updates


def iters_may_change(settings: Mapping[str, Any]) -> bool:
    """Return whether train.iters may change on resume: if the learning rates of past updates do not depend on it.

    `settings` are those of the run: dotted name to value.
    """
    return settings.get("schedule.name") in schema.ENDLESS_SCHEDULES or settings.get("schedule.iters") is not None


def last_update_at_peak(config: Config) -> int:
    """Return the last update before the decay of a wsd schedule; the rates up to it do not depend on the end."""
    schedule, iters = config.schedule, config.schedule.iters or config.train.iters
    decay = schedule.decay or schema.choice_options("schedule", "wsd")["decay"]
    return max(iters - decay_updates(decay, iters), schedule.warmup + 1)


def is_free_on_resume(name: str) -> bool:
    """Return whether a resume may change the setting; a name that the schema does not have is frozen."""
    section = next((open_name for open_name in schema.OPEN_SECTIONS if name.startswith(f"{open_name}.")), name)
    metadata = schema.metadata().get(section)
    return metadata is not None and metadata.on_resume is not OnResume.FROZEN


def is_set_by(name: str, keys: Iterable[str]) -> bool:
    """Return whether one of the typed `keys` sets the setting: itself, its section, or a part of an open section."""
    return any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for key in keys)


def may_become(name: str, old: Any, new: Any) -> bool:
    """Return whether a resume may change the frozen setting `name` from `old` to `new`.

    Naming the format that auto found changes no row, and rows that fit several formats need it.
    """
    return old == new or (name == "data.format" and old == "auto")


def frozen_fingerprint(config: Config) -> str:
    """Return the SHA-256 (hex) of the frozen settings, without those added later that have their default."""
    defaults = flatten(Config())
    frozen = {
        name: value
        for name, value in flatten(config).items()
        if not is_free_on_resume(name) and not (schema.metadata()[name].added_later and value == defaults[name])
    }
    return hashlib.sha256(json.dumps(frozen, sort_keys=True, default=str).encode()).hexdigest()


def _is_before_decay(stored: Config, config: Config, step: int) -> bool:
    """Return whether both configs have a wsd schedule whose decay begins after `step`."""
    names = {stored.schedule.name, config.schedule.name}
    return names == {"wsd"} and step <= min(last_update_at_peak(stored), last_update_at_peak(config))


def changed_settings(stored: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that `config` changes of the `stored` one: name to (stored value, new value)."""
    before, after, metadata = flatten(stored), flatten(config), schema.metadata()
    return {
        name: (before[name], after[name])
        for name in after
        if before[name] != after[name] and metadata[name].on_resume not in (OnResume.PROVENANCE, OnResume.LABEL)
    }


def refuse_frozen_changes(stored: Config, config: Config, run: Path, step: int = 0) -> None:
    """Refuse a `config` that changes what the `run` stored at `step` may not change on resume.

    Raises:
        ConfigError: a frozen setting changed; shows the difference.
    """
    changed = changed_settings(stored, config)
    problems = [
        f"{name} was {format_value(old)} and cannot become {format_value(new)} on resume."
        for name, (old, new) in changed.items()
        if not is_free_on_resume(name) and not may_become(name, old, new)
    ]
    if "train.epochs" in changed and "train.iters" not in changed and not iters_may_change(flatten(stored)):
        old, new = changed["train.epochs"]
        problems.append(
            f"train.epochs was {format_value(old)} and cannot become {format_value(new)}: the {stored.schedule.name} "
            "schedule ends with the run, so the updates already made would have had other learning rates."
        )
    if "train.iters" in changed:
        old, new = changed["train.iters"]
        if not iters_may_change(flatten(stored)) and not _is_before_decay(stored, config, step):
            problems.append(
                f"train.iters was {old} and cannot become {new}: the {stored.schedule.name} schedule ends at "
                "train.iters, so the updates already made would have had other learning rates."
            )
            if stored.schedule.name == "wsd":
                last = min(last_update_at_peak(stored), last_update_at_peak(config))
                problems.append(f"A checkpoint of before the decay, up to step {last}, can be resumed with it.")
        elif new < step:
            problems.append(f"train.iters={new} is before update {step}, which the run has reached.")
    if problems:
        problems += [
            f"For a new run, add the changed settings to: {repeat_command(run)}",
            f"To start it from these weights: {warm_start_command(run, run / 'adapters')}",
        ]
        raise ConfigError("\n".join(problems))
