"""The parser of the command line of a run or sweep: flags and overrides, checked before Hydra is imported.

A typo is answered at once, with "did you mean". Paths are expanded and quoted for Hydra's grammar, and `+` is dropped
from settings that the schema knows. `resume=`, `repeat=`, `supervise=` and `train.stop_at=` are kept for the invocation
alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner import loggers
from runner.cli.run_argument import resolve_name
from runner.common.errors import ConfigError, did_you_mean
from runner.config import labels, retired, schema, serialize, validation
from runner.config.foreign_names import explain_foreign
from runner.config.groups import CONF_DIR, CONFIG_DIR_FLAGS, config_dirs, group_choices
from runner.config.invocation import INVOCATION_ARGUMENTS, Invocation, Supervision
from runner.config.quoting import quote_text, unquote
from runner.runs import sweep_manifest

_MULTIRUN = ("--multirun", "-m")
_COMPLETION = ("--shell-completion", "-sc")
_PRINTING = ("--cfg", "-c", "--info", "-i", "--hydra-help", *_COMPLETION)
_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp")
_FLAGS = {*CONFIG_DIR_FLAGS, *_MULTIRUN, *_PRINTING, *_WITH_VALUE, "--run", "-r", "--resolve", "--version"}
_HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir")
_OVERRIDE = re.compile(r"(?P<sign>\+{0,2}|~)(?P<key>[A-Za-z_][\w./-]*)(?P<package>@[\w.:@]*)?=(?P<value>.*)", re.DOTALL)
_SWEEP_FUNCTION = re.compile(r"\w+\(.*\)", re.DOTALL)
"""A sweep such as range(1,5) or glob(*), which Hydra expands."""


def parse_arguments(arguments: Sequence[str]) -> Invocation:
    """Parse the command line.

    Raises:
        ConfigError: an argument that is not a flag, setting, group or choice; the message names the nearest.
    """
    names = {argument.partition("=")[0] for argument in arguments}
    invocation = Invocation(multirun=not names.isdisjoint(_MULTIRUN), prints_only=not names.isdisjoint(_PRINTING))
    if not names.isdisjoint(_COMPLETION):
        invocation.flags = list(arguments)  # install=bash and query=bash are no overrides
        return invocation
    recorded = None if config_dirs(arguments) else _recorded_config_dir(arguments)
    folders = [CONF_DIR, *config_dirs(arguments), *([recorded] if recorded else [])]
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("-"):
            invocation.flags += _parse_flag(argument, remaining)
            continue
        try:
            _add_override(argument, invocation, folders)
        except ConfigError as error:
            if recorded is None or recorded.is_dir() or "." in argument.partition("=")[0]:
                raise
            raise ConfigError(
                f"{error}\nThe --config-dir of the sweep, {recorded}, does not exist any more: type --config-dir DIR."
            ) from None
    if {"train.iters", "train.epochs"} <= invocation.settings.keys() and invocation.settings["train.epochs"] != "null":
        raise ConfigError("train.iters and train.epochs both set the length of the run: give one of them.")
    return invocation


def _recorded_config_dir(arguments: Sequence[str]) -> Path | None:
    """Return the --config-dir of the sweep that `resume=` names: recipes and groups are chosen from it again."""
    resumed = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    folder = resolve_name(unquote(resumed[-1])) if resumed else None
    if folder is None or not (folder / sweep_manifest.NAME).is_file():
        return None
    return next(iter(config_dirs(sweep_manifest.read_manifest(folder).arguments)), None)


def _parse_flag(flag: str, remaining: Iterator[str]) -> list[str]:
    """Return the flag for Hydra, with its value from `remaining` if it has one; --config-dir becomes absolute."""
    name, equals, value = flag.partition("=")
    if name not in _FLAGS:
        if explanation := explain_foreign(name):
            raise ConfigError(f"{explanation} Settings are typed without dashes: key=value.")
        raise ConfigError(f"'{name}' is not a flag.{did_you_mean(name, _FLAGS)} python -m runner --help lists them.")
    if name in CONFIG_DIR_FLAGS:
        folder = value if equals else next(remaining, None)
        if not folder:
            raise ConfigError(f"{name} needs a folder: --config-dir DIR.")
        return [f"--config-dir={os.path.abspath(folder)}"]
    if name in _WITH_VALUE and not equals:
        return [flag, *([found] if (found := next(remaining, None)) is not None else [])]
    return [flag]


def _add_override(argument: str, invocation: Invocation, folders: list[Path]) -> None:
    """Check the override and add it to `invocation`, for Hydra in its form; Hydra must not see those of the
    invocation alone."""
    name, equals, _ = argument.partition("=")
    validation.refuse_secrets(argument, where=name if equals else "")
    match = _OVERRIDE.fullmatch(argument)
    if argument.startswith("~") and not argument.startswith(("~hydra.", "~hydra/")):
        raise ConfigError(f"'{argument}' would remove a setting: every setting must be there. Set it to null instead.")
    if match is None:
        if argument in _known_names():
            raise ConfigError(f"'{argument}' needs a value: {argument}=…")
        if explanation := explain_foreign(argument):
            raise ConfigError(explanation)
        hint = did_you_mean(argument, _known_names())
        raise ConfigError(f"'{argument}' is not a command and not a setting (key=value).{hint}")
    sign, key, package, value = match["sign"], match["key"], match["package"] or "", match["value"]
    if key.startswith(("hydra.", "hydra/")):
        invocation.hydra_settings.add(key)
        value = _quote(value, invocation.multirun) if key in _HYDRA_PATHS else value
        invocation.overrides.append(f"{sign}{key}{package}={value}")
    elif key in schema.GROUPS and not value.lstrip().startswith("{"):  # a dict holds settings of the section
        _check_choices(key, value, folders, invocation.multirun)
        invocation.group_choices[key] = value
        invocation.overrides.append(f"{key}{package}={value}")
    elif _is_group_of_a_folder(key, folders[1:]) and sign in ("", "+"):
        _check_choices(key, value, folders, invocation.multirun)
        invocation.group_choices[key] = value
        invocation.overrides.append(f"+{key}{package}={value}")  # no group of the defaults list of conf/config.yaml
    elif key in INVOCATION_ARGUMENTS:
        _set_on_invocation(invocation, key, value)
    elif key in labels.SETTINGS:
        invocation.settings[key] = value
        invocation.overrides.append(f"{key}={labels.quote(key, value)}")
    elif key.startswith(("vars.", "data.template_args.")) or key == "data.template_args":
        invocation.settings[key] = value
        invocation.overrides.append(f"++{key}={value}")
    elif key.startswith("loggers."):
        _check_name(key, value, sign)
        invocation.overrides.append(argument)  # a `+` adds the section of a logger
    else:
        _check_name(key, value, sign)
        invocation.settings[key] = value
        value = _quote(value, invocation.multirun) if key in schema.path_settings() else value
        invocation.overrides.append(f"{key}={value}")


def _set_on_invocation(invocation: Invocation, key: str, value: str) -> None:
    """Set an argument of the invocation alone; null means not set, as for any setting."""
    if value == "null":
        return
    is_count = re.fullmatch(r"\+?[0-9]{1,18}", value) is not None and int(value) >= 1
    if key == "train.stop_at":
        if not is_count:
            raise ConfigError(f"train.stop_at={value} is invalid: must be a whole number, 1 or more.")
        invocation.stop_at = int(value)
    elif key == "ranks":
        if not is_count:
            raise ConfigError(f"ranks={value} is invalid: must be a whole number, 1 or more.")
        invocation.ranks = int(value)
    elif key == "supervise":
        if not is_count and value not in ("true", "false"):
            raise ConfigError(f"supervise={value} is invalid: must be true, false, or a number of updates, 1 or more.")
        invocation.supervise = None if value == "false" else Supervision(int(value) if is_count else None)
    else:
        setattr(invocation, key, Path(os.path.abspath(resolve_name(unquote(value)))))


def _known_names() -> list[str]:
    return [*serialize.default_settings(), *schema.GROUPS, *INVOCATION_ARGUMENTS]


def _check_name(key: str, value: str, sign: str) -> None:
    """Refuse `key` unless it is a setting, a section with a mapping as its value, or a logger with its option."""
    settings = serialize.default_settings()
    if key in ("optimizer.name", "schedule.name"):
        group = key.partition(".")[0]
        raise ConfigError(f"{key} is set by its group: type {group}={value} instead.")
    if key.startswith("loggers."):
        _, name, *option = key.split(".", 2)
        loggers.require_option(name, *option)
        return
    if key in settings:
        return
    if key in schema.section_metadata():
        if value.lstrip().startswith("{"):
            return
        names = [name for name in settings if name.startswith(f"{key}.")]
        raise ConfigError(f"{key} is a section: set one of {', '.join(names)}.")
    if explanation := retired.explain(key) or explain_foreign(key):
        raise ConfigError(explanation)
    note = f" (a {sign} cannot add one)" if sign else ""
    raise ConfigError(validation.unknown_setting(key, _known_names(), note))


def _is_group_of_a_folder(key: str, folders: list[Path]) -> bool:
    """Return whether `key` is a group of one's own, from a folder of --config-dir."""
    return key not in serialize.default_settings() and any(any((folder / key).glob("*.yaml")) for folder in folders)


def _check_choices(group: str, value: str, folders: list[Path], multirun: bool) -> None:
    if multirun and _SWEEP_FUNCTION.fullmatch(value):
        return
    choices = group_choices(group, folders)
    for choice in re.split(r"[,\[\]\s]+", value):
        is_name = re.fullmatch(r"[\w./-]+", choice)  # not an interpolation, which Hydra resolves
        if not is_name or choice == "null" or choice.removesuffix(".yaml") in choices:
            continue
        hint = did_you_mean(choice, choices)
        if group == "data":
            hint += f" To train on your own files: data.path={choice}"
        elif group == "model":
            hint += f" For a model of your own: model.path={choice}"
        raise ConfigError(f"{group}={choice} is not a choice: {', '.join(choices)}.{hint}")


def _quote(path: str, multirun: bool) -> str:
    """Return `path` expanded and quoted for Hydra's grammar; sweeps, interpolations and quoted text stay as typed."""
    is_sweep = multirun and _SWEEP_FUNCTION.fullmatch(path)
    if path == "null" or path[:1] in ("'", '"', "[") or "${" in path or is_sweep:
        return path
    if multirun and "," in path and not os.path.exists(os.path.expanduser(path)):
        return ",".join(_quote(part, False) for part in path.split(","))
    return quote_text(os.path.expanduser(path))
