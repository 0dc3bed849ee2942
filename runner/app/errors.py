"""Hydra's and OmegaConf's exceptions as sentences for a person, with "did you mean"."""

from __future__ import annotations

import os
import re
import sys

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from runner.common.errors import ConfigError, RunnerError, StorageError, did_you_mean
from runner.config import retired, schema
from runner.config.groups import config_dirs


def translate_error(error: BaseException) -> RunnerError:
    """`error` as one of ours; a RunnerError stays as it is, what is not about the config becomes a failure."""
    if isinstance(error, RunnerError):
        return error
    chain = _chain(error)
    for link in chain:
        if isinstance(link, RunnerError):
            return link
    file = _file_named_in(chain)
    for link in chain:
        if isinstance(link, MissingConfigException):
            return ConfigError(_missing(link))
        if isinstance(link, OverrideParseException):
            return ConfigError(
                f"'{link.override}' cannot be read: {_first_line(link.message)}. "
                "Quote values with blanks, commas or brackets: 'key=\"a, b\"'."
            )
    for link in chain:
        if isinstance(link, yaml.MarkedYAMLError) and link.problem_mark is not None:
            mark = link.problem_mark
            return ConfigError(f"{mark.name}, line {mark.line + 1}: not readable as YAML: {link.problem}.")
    for link in chain:
        if isinstance(link, OmegaConfBaseException):
            return ConfigError(f"{file}{_omegaconf(link)}")
    for link in chain:
        if found := re.search(r"Ambiguous value for argument '([^']*)'", str(link)):
            return ConfigError(f"{found[1]} lists several values: add -m for a sweep, or put it in brackets or quotes.")
        if isinstance(link, HydraException):
            return ConfigError(f"{file}{_first_line(str(link))}")
    if isinstance(error, OSError) and error.errno:
        return StorageError(f"{error.filename or 'Writing'}: {os.strerror(error.errno)}.")
    name = type(error).__name__
    return RunnerError(f"{name}: {_first_line(str(error)) or 'no message'}. RUNNER_TRACEBACK=1 shows where.")


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in links:
        links.append(seen)
        seen = seen.__cause__ or seen.__context__
    return links


def _file_named_in(chain: list[BaseException]) -> str:
    for link in chain:
        found = re.search(r"In '([^']+)': |[Ee]rror merging '([^']+)'|'([^']+\.yaml)'", str(link))
        if found and (name := next(g for g in found.groups() if g)) not in ("config", "schema"):
            return f"{name}: " if name.endswith(".yaml") else f"{name}.yaml: "
    return ""


def _missing(error: MissingConfigException) -> str:
    wanted = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, choice = wanted.rpartition("/")
    options = list(error.options or [])
    if options:
        where, hint = _line_with(group, choice), did_you_mean(choice, options)
        return f"{where}{group}={choice} is not a choice: {', '.join(options)}.{hint}"
    return _first_line(str(error))


def _line_with(group: str, choice: str) -> str:
    """Where a YAML of one's own chooses `choice` for `group`; Hydra does not tell."""
    for folder in config_dirs(sys.argv):
        for path in sorted(folder.rglob("*.yaml")):
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if re.search(rf"\b{re.escape(group)}\s*:\s*{re.escape(choice)}\b", line):
                    return f"{path}, line {number}: "
    return ""


def _omegaconf(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key or "")
    text = _first_line(error.msg or str(error))
    if isinstance(error, InterpolationResolutionError):
        return f"{key}: {text}."
    if re.search(r"Key '[^']*' (is )?not in|is not in struct", text):
        if explanation := retired.explain(key):
            return explanation
        return f"There is no setting '{key}'.{did_you_mean(key, [*schema.default_settings(), *schema.section_names(), *schema.GROUPS])}"
    if "is not Optional" in text:
        return f"{key}=null cannot be: it needs a value."
    wanted = re.search(r"Value '(?P<value>.*)' of type '\w+' could not be converted to (?P<type>\w+)", text)
    if wanted:
        kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
        return f"{key}={wanted['value']} cannot be: it has to be {kinds.get(wanted['type'], wanted['type'])}."
    return f"{key}: {text}." if key and key not in text else f"{text}."


def _first_line(text: str) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""
