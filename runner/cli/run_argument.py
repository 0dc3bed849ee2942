"""The argument RUN|SWEEP of a command: a directory, or the name that a run or a sweep below outputs/ has."""

from __future__ import annotations

from pathlib import Path

from runner.common.errors import ConfigError, did_you_mean
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
    if path.exists():
        return path
    found = runs_named(text)
    if len(found) > 1:
        listed = "\n".join(f"  {relative_path(folder)}" for folder in sorted(found)[:10])
        raise ConfigError(f"{text} is the name of {len(found)} runs: name one by its directory.\n{listed}")
    return found[0] if found else path


def runs_named(name: str) -> list[Path]:
    """Return the runs and sweeps below outputs/ with that name."""
    return [folder for folder, labels in find_labelled(Path(OUTPUTS)) if labels.name == name]


def missing_run(path: Path) -> str:
    """Return the sentences for a person who typed `path`, which is no folder: what is near, and what there is."""
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    names = [labels.name for _, labels in find_labelled(Path(OUTPUTS)) if labels.name]
    if path.exists():
        return f"{path}: it is not a folder."
    near = did_you_mean(path.name, siblings) or did_you_mean(str(path), names)
    listed = "" if near else " What there is: python -m runner ls"
    return f"{path}: there is no such folder, and no run below {OUTPUTS} has that name.{near}{listed}"
