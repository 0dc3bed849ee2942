"""The argument RUN|SWEEP of a command: a directory, or the name that a run or a sweep below outputs/ has."""

from __future__ import annotations

from pathlib import Path

from runner.common.errors import ConfigError
from runner.common.text import relative_path
from runner.runs.find import find_labelled

OUTPUTS = "outputs"
"""Where runs are looked for by default."""


def resolve_name(text: str) -> Path:
    """Return the path that `text` is, or else the directory of the one run or sweep below outputs/ with that name.

    Raises:
        ConfigError: several have that name.
    """
    path = Path(text).expanduser()
    if path.exists() or "/" in text:
        return path
    found = [folder for folder, labels in find_labelled(Path(OUTPUTS)) if labels.name == text]
    if len(found) > 1:
        listed = "\n".join(f"  {relative_path(folder)}" for folder in sorted(found)[:10])
        raise ConfigError(f"{text} is the name of {len(found)} runs: name one by its directory.\n{listed}")
    return found[0] if found else path
