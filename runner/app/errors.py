"""Exceptions of Hydra, OmegaConf and YAML as one sentence for the user, with "did you mean"."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from runner.common.device_errors import find_device_error
from runner.common.errors import ConfigError, RunnerError, StorageError, did_you_mean
from runner.common.filesystem import is_apple_double
from runner.common.text import first_line
from runner.config import retired, schema, serialize, validation
from runner.config.search_settings import SearchSettings

_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
"""What OmegaConf calls a type, and what a user calls it."""


def translate_error(error: BaseException, config_dirs: Sequence[Path] = ()) -> RunnerError:
    """Return `error` as a RunnerError: a ConfigError where it is about the config, else a failure with its first line.

    Args:
        error: any exception; a RunnerError in its chain of causes is returned as it is.
        config_dirs: folders of --config-dir, searched for the file and line that made a wrong choice.
    """
    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, RunnerError):
            return cause
    if message := _config_message(chain, config_dirs):
        return ConfigError(message)
    if failure := find_device_error(error):
        return failure
    if isinstance(error, OSError) and error.errno:
        return StorageError(f"{error.filename or 'Writing'}: {os.strerror(error.errno)}.")
    text = first_line(str(error)) or "no message"
    return RunnerError(f"{type(error).__name__}: {text}. RUNNER_TRACEBACK=1 shows where.")


def _config_message(chain: Sequence[BaseException], config_dirs: Sequence[Path]) -> str | None:
    """Return the message of the most specific config error in `chain`, if there is one."""
    for cause in chain:
        if isinstance(cause, MissingConfigException):
            return _missing_config(cause, config_dirs)
        if isinstance(cause, OverrideParseException):
            return (
                f"'{cause.override}' cannot be read: {first_line(cause.message)}. "
                "Quote values with blanks, commas or brackets: 'key=\"a, b\"'."
            )
    for cause in chain:
        if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
            mark = cause.problem_mark
            return f"{mark.name}, line {mark.line + 1}: not readable as YAML: {cause.problem}."
    file = _file_prefix(chain)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException):
            return f"{file}{_omegaconf(cause)}"
    for cause in chain:
        if match := re.search(r"Ambiguous value for argument '([^']*)'", str(cause)):
            return f"{match[1]} lists several values: add -m for a sweep, or put it in brackets or quotes."
        if isinstance(cause, HydraException):
            return f"{file}{first_line(str(cause))}"
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """Return `error` and what it was raised from, the newest first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _file_prefix(chain: Sequence[BaseException]) -> str:
    """Return `file.yaml: ` for the YAML that a message in `chain` names."""
    for cause in chain:
        match = re.search(r"In '([^']+)': |[Ee]rror merging '([^']+)'|'([^']+\.yaml)'", str(cause))
        if match and (name := next(group for group in match.groups() if group)) not in ("config", "schema"):
            return f"{name.removesuffix('.yaml')}.yaml: "
    return ""


def _missing_config(error: MissingConfigException, config_dirs: Sequence[Path]) -> str:
    group, _, choice = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    choices = list(error.options or [])
    if not choices:
        return first_line(str(error))
    location, hint = _location_of_choice(group, choice, config_dirs), did_you_mean(choice, choices)
    return f"{location}{group}={choice} is not a choice: {', '.join(choices)}.{hint}"


def _location_of_choice(group: str, choice: str, config_dirs: Sequence[Path]) -> str:
    """Return `file, line n: ` where a YAML in `config_dirs` chooses `group: choice`; Hydra does not say where."""
    wrong_choice = re.compile(rf"\b{re.escape(group)}\s*:\s*{re.escape(choice)}\b")
    for folder in config_dirs:
        for path in sorted(path for path in folder.rglob("*.yaml") if not is_apple_double(path.name)):
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if wrong_choice.search(line):
                    return f"{path}, line {number}: "
    return ""


def _omegaconf(error: OmegaConfBaseException) -> str:
    name = str(error.full_key or error.key or "")
    text = first_line(error.msg or str(error))
    if isinstance(error, InterpolationResolutionError):
        return f"{name}: {text}."
    if re.search(r"Key '[^']*' (is )?not in|is not in struct", text):
        if explanation := retired.explain(name):
            return explanation
        if name.startswith("hydra.launcher."):
            return f"{name} is not an option of the chosen launcher. hydra.launcher.jobs needs hydra/launcher=process."
        if name.startswith("hydra.sweeper."):
            return _sweeper_option(name)
        known = [*serialize.default_settings(), *schema.section_metadata(), *schema.GROUPS]
        return validation.unknown_setting(name, known)
    # OmegaConf names an item of a list by its number alone; one setting is a list of mappings.
    if name.startswith("data.mix") or (re.fullmatch(r"\d*", name) and "Cannot assign" in text and "Dict[" in text):
        return "data.mix is invalid: must be a list of sources, such as data.mix=[{path: a.jsonl}, {path: b.jsonl}]."
    if name == "experiment" and "DictConfig" in text:
        return "a recipe sets settings of all sections, so its file has to begin with the line '# @package _global_'."
    if "is not Optional" in text:
        return f"{name}=null is invalid: must have a value."
    if match := re.search(r"Value '(?P<value>.*)' of type '\w+' could not be converted to (?P<type>\w+)", text):
        return f"{name}={match['value']} is invalid: must be {_TYPE_NAMES.get(match['type'], match['type'])}."
    return f"{name}: {text}." if name and name not in text else f"{text}."


def _sweeper_option(name: str) -> str:
    """Return the message for an option that the chosen sweeper does not have."""
    option, options = name.removeprefix("hydra.sweeper."), [field.name for field in fields(SearchSettings)]
    if option in options:
        return f"{name} is an option of a search, and a grid has none: type hydra/sweeper=search too, or leave it out."
    return f"{name} is no option of the sweeper.{did_you_mean(option, options)}\nOptions of a search: docs/config.md"
