"""The words of the command line, read before Hydra sees them.

Paths are expanded and quoted for Hydra's grammar, `+` is taken off known settings, and a wrong word gets a sentence
with "did you mean". Nothing here imports Hydra or MLX, so that a typo is answered at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from runner.common.errors import ConfigError, did_you_mean
from runner.config import retired, schema, validation
from runner.config.groups import CONF_DIR, config_dirs, group_choices
from runner.config.invocation import Invocation
from runner.config.quoting import quote_path, unquote

_HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir")
_FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn"}
_FLAGS_WITH_VALUE |= {"--config-path", "-cp", "--info", "-i"}
_FLAGS = _FLAGS_WITH_VALUE | {"-m", "--multirun", "-r", "--run", "--resolve", "--hydra-help", "--version"}
_FLAGS |= {"--shell-completion", "-sc", "--experimental-rerun"}
_WORD = re.compile(r"(?P<sign>\+{0,2}|~)(?P<key>[A-Za-z_][\w./-]*)(?P<package>@[\w.:@]*)?=(?P<value>.*)", re.DOTALL)
_SWEEP = re.compile(r"\w+\(.*\)", re.DOTALL)


def parse_arguments(argv: Sequence[str]) -> Invocation:
    """Read the command line.

    Raises:
        ConfigError: a word that is no setting, group, choice or flag; names the nearest.
    """
    said = Invocation()
    words = list(argv)
    said.multirun = any(w in ("-m", "--multirun") for w in words)
    said.prints_only = any(
        w in ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help") for w in words
    )
    if any(w in ("--shell-completion", "-sc") for w in words):
        said.arguments = words  # its words are no settings: install=bash, query=bash
        return said
    folders = [CONF_DIR, *config_dirs(words)]
    flags: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        if word in _FLAGS_WITH_VALUE and i + 1 < len(words):
            value = words[i + 1]
            folder = word in ("--config-dir", "-cd")
            flags += [f"--config-dir={os.path.abspath(value)}"] if folder else [word, value]
            i += 2
            continue
        if word.startswith("-"):
            _check_flag(word)
            flags.append(word)
        else:
            override = _read_word(word, said, folders)
            overrides += [override] if override is not None else []
        i += 1
    said.arguments = [*flags, *overrides]  # Hydra's parser refuses a flag between two overrides
    return said


def _read_word(word: str, said: Invocation, folders: list[Path]) -> str | None:
    """Return the override for Hydra, or None for `resume=`, `repeat=` and `train.stop_at=`, which `said` keeps."""
    validation.refuse_secrets({word.partition("=")[0] if "=" in word else "": word})
    match = _WORD.fullmatch(word)
    if match is None:
        if word.startswith("~"):
            raise ConfigError(
                f"'{word}' would remove a setting: every setting has to be there. Set it to null instead."
            )
        if word in _known_words():
            raise ConfigError(f"'{word}' needs a value: {word}=…")
        raise ConfigError(
            f"'{word}' is not a command and not a setting (key=value).{did_you_mean(word, _known_words())}"
        )
    sign, key, package, value = match["sign"], match["key"], match["package"] or "", match["value"]
    if key.startswith(("hydra.", "hydra/")):
        said.hydra_settings.add(key)
        return f"{sign}{key}{package}={_path(value, said.multirun) if key in _HYDRA_PATHS else value}"
    if sign == "~":
        raise ConfigError(f"'{word}' would remove a setting: every setting has to be there. Set it to null instead.")
    if key in schema.GROUPS:
        _check_choices(key, value, folders, said.multirun)
        said.group_choices[key] = value
        return f"{key}{package}={value}"
    if key in retired.OF_THE_INVOCATION:
        _set_field_of_invocation(said, key, value)
        return None
    _check_key(key, value, sign)
    if sign and key.startswith("loggers."):
        return word  # backends take options of their own
    said.settings[key] = value
    if key in schema.path_settings():
        value = _path(value, said.multirun)
    return f"{key}={value}"


def _set_field_of_invocation(said: Invocation, key: str, value: str) -> None:
    """Keep `resume=`, `repeat=` or `train.stop_at=`; null means not set, as for any setting."""
    if value == "null":
        return
    if key == "train.stop_at":
        if not re.fullmatch(r"\+?[0-9]{1,18}", value) or int(value) < 1:
            raise ConfigError(f"train.stop_at={value} is invalid: must be a whole number, 1 or more.")
        said.stop_at = int(value)
    else:
        setattr(said, key, Path.cwd() / os.path.expanduser(unquote(value)))


def _check_flag(word: str) -> None:
    name = word.partition("=")[0]
    if name not in _FLAGS:
        raise ConfigError(f"'{name}' is not a flag.{did_you_mean(name, _FLAGS)} python -m runner --help lists them.")


def _known_words() -> list[str]:
    return [*schema.default_settings(), *schema.GROUPS, *retired.OF_THE_INVOCATION]


def _check_key(key: str, value: str, sign: str) -> None:
    names = schema.default_settings()
    if key in ("optimizer.name", "schedule.name"):
        group = key.split(".")[0]
        raise ConfigError(f"{key} is set by its group: type {group}={value} instead.")
    if key in names or key.startswith("loggers."):
        return
    if key in schema.section_names():
        if value.startswith("{"):
            return
        inside = [n for n in names if n.startswith(f"{key}.")]
        raise ConfigError(f"{key} is a section: set one of {', '.join(inside)}.")
    if renamed := retired.explain(key):
        raise ConfigError(renamed)
    where = f" (a {sign} cannot add one)" if sign else ""
    raise ConfigError(f"There is no setting '{key}'{where}.{did_you_mean(key, _known_words())}")


def _check_choices(group: str, value: str, folders: list[Path], multirun: bool) -> None:
    known = group_choices(group, folders)
    for choice in re.split(r"[,\[\]\s]+", value):
        # Sweeps such as glob(*) and interpolations are Hydra's to expand.
        if choice in ("", "null") or not re.fullmatch(r"[\w./-]+", choice) or (multirun and _SWEEP.fullmatch(value)):
            continue
        if choice.removesuffix(".yaml") not in known:
            raise ConfigError(
                f"{group}={choice} is not a choice: {', '.join(known)}.{did_you_mean(choice, known)}"
                + (f" To train on your own files: data.path={choice}" if group == "data" else "")
                + (f" For a model of your own: model.path={choice}" if group == "model" else "")
            )


def _path(value: str, multirun: bool) -> str:
    """`value`, typed for a path, as Hydra's grammar reads it back; sweeps and interpolations stay as they are."""
    if value == "null" or value[:1] in ("'", '"', "[") or "${" in value or (multirun and _SWEEP.fullmatch(value)):
        return value
    if multirun and "," in value and not os.path.exists(os.path.expanduser(value)):
        return ",".join(_path(part, False) for part in value.split(","))
    return quote_path(os.path.expanduser(value))
