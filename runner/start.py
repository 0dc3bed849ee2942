"""What a run starts from: nothing, the newest checkpoint of its own directory, or one checkpoint of another."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config import Config
from runner.errors import ConfigError
from runner.rundir import RunDirectory


@dataclass(frozen=True)
class Source:
    """Where a resumed run comes from."""

    run: Path
    """The run directory."""
    checkpoint: Path | None = None
    """One checkpoint of it; None means the newest valid one."""

    @property
    def branch(self) -> bool:
        """Whether the run goes on in a new directory: from a single checkpoint, the old path stays as it is."""
        return self.checkpoint is not None


@dataclass
class Start:
    """Everything that training needs to begin."""

    config: Config
    stored: dict[str, Any]
    """The config as config.yaml holds it."""
    directory: RunDirectory
    source: Source | None
    run_id: str
    label: str | None = None
    """Of a job of a sweep, on whose screen there are others: it is shown in one line."""


def find_source(path: Path) -> Source:
    """What a path given to resume= is: a run directory or one of its checkpoints.

    Raises:
        ConfigError: neither; says what it is instead.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"resume={path}: there is no such directory.")
    if re.fullmatch(r"step-\d{7,}", path.name):
        for parent in path.parents:
            if (parent / "config.yaml").is_file():
                return Source(run=parent.absolute(), checkpoint=path.absolute())
        raise ConfigError(f"resume={path}: no run directory (with a config.yaml) lies above this checkpoint.")
    if (path / "config.yaml").is_file():
        return Source(run=path.absolute())
    if (path / "multirun.yaml").is_file():
        raise ConfigError(f"resume={path}: this is a sweep; resume its runs one by one, such as resume={path}/0.")
    raise ConfigError(f"resume={path}: not a run directory (no config.yaml) and not a checkpoint (step-0000100).")


def new_run_id() -> str:
    """An identity for a run: random, so that runs of the same second differ."""
    return secrets.token_hex(8)
