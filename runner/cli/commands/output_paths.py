"""Which kind of output directory a path is, for the commands that take a run or a sweep."""

from __future__ import annotations

from pathlib import Path

from runner.cli.run_argument import missing_run, runs_named
from runner.common.errors import ConfigError
from runner.common.layout import STEP_NAME
from runner.common.text import relative_path
from runner.runs.find import find_runs, is_sweep_folder, looks_like_run


def holds_sweep(path: Path, command: str) -> bool:
    """Return whether `path` holds a sweep, and not a run; `command` is what an error suggests for the right path.

    Raises:
        ConfigError: it holds neither; the message says what it holds.
    """
    if not path.is_dir():
        raise ConfigError(missing_run(path))
    if is_sweep_folder(path):
        return True
    try:
        names = [p.name for p in path.iterdir()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be listed: {error.strerror}.") from None
    if looks_like_run(names) or "config.yaml" in names or "status.json" in names:
        return False
    if STEP_NAME.fullmatch(path.name) and (path.parent.parent / "config.yaml").is_file():
        run = relative_path(path.parent.parent)
        raise ConfigError(f"{path} is a checkpoint. Its run: python -m runner {command} {run}")
    named = runs_named(str(path))  # a folder comes before a name
    hint = f" The run of that name is {relative_path(named[0])}." if named else ""
    hint += f" Runs lie below it: python -m runner ls {relative_path(path)}" if find_runs(path) else ""
    raise ConfigError(f"{path} is neither a run (no config.yaml) nor a sweep (no multirun.yaml).{hint}")
