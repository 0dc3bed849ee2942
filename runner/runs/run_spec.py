"""What a run starts from: nothing, the newest checkpoint of its own directory, or one checkpoint of another."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.config.schema import Config, to_dict
from runner.runs.directory import RunDirectory

_SHORTEST = 4  # a shorter text is no secret, and would be found in other words


@dataclass(frozen=True)
class ResumeSource:
    """Where a resumed run comes from."""

    run: Path
    """The run directory."""
    checkpoint: Path | None = None
    """One checkpoint of it; None means the newest valid one."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The stored config of the run, read once.

        Raises:
            ConfigError: config.yaml is missing or cannot be read.
        """
        return RunDirectory(self.run).read_config()

    @property
    def branch(self) -> bool:
        """Whether the run goes on in a new directory: from a single checkpoint, the old path stays as it is."""
        return self.checkpoint is not None


@dataclass
class RunSpec:
    """Everything that training needs to begin."""

    config: Config
    stored: dict[str, Any]
    """The config as config.yaml holds it."""
    directory: RunDirectory
    source: ResumeSource | None
    run_id: str
    stop_at: int | None = None
    """Update after which this invocation stops the run, resumable."""
    label: str | None = None
    """Of a job of a sweep, on whose screen there are others: it is shown in one line."""

    def redacted(self, text: str) -> str:
        """`text` with ${oc.env:NAME} in place of a value that a setting took from the environment."""
        for value, written in sorted(_from_environment(to_dict(self.config), self.stored), key=lambda p: -len(p[0])):
            text = text.replace(value, written)
        return text


def find_resume_source(path: Path) -> ResumeSource:
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
                return ResumeSource(run=parent.absolute(), checkpoint=path.absolute())
        raise ConfigError(f"resume={path}: no run directory (with a config.yaml) lies above this checkpoint.")
    if (path / "config.yaml").is_file():
        return ResumeSource(run=path.absolute())
    if (path / "multirun.yaml").is_file():
        raise ConfigError(f"resume={path}: this is a sweep; resume its runs one by one, such as resume={path}/0.")
    raise ConfigError(f"resume={path}: not a run directory (no config.yaml) and not a checkpoint (step-0000100).")


def _from_environment(values: Any, written: Any) -> Iterator[tuple[str, str]]:
    """Each text of the settings `values` that stands as ${oc.env:…} in `written`, with what is written there."""
    if isinstance(values, Mapping) and isinstance(written, Mapping):
        for key, value in values.items():
            yield from _from_environment(value, written.get(key))
    elif isinstance(values, str) and isinstance(written, str) and "${oc.env:" in written and len(values) >= _SHORTEST:
        yield values, written


def new_run_id() -> str:
    """An identity for a run: random, so that runs of the same second differ."""
    return secrets.token_hex(8)
