"""What one command line asks for, known before Hydra starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

INVOCATION_ARGUMENTS = {"resume": "DIR", "repeat": "DIR", "train.stop_at": "N"}
"""Arguments that are typed like settings but stored in no config, with a placeholder for their values."""


@dataclass
class Invocation:
    """One command line: the arguments for Hydra, and what belongs to this invocation alone.

    `resume`, `repeat` and `stop_at` are typed like settings (`resume=DIR`, `repeat=DIR`, `train.stop_at=200`) but are
    no part of the config: a run's config.yaml does not hold them, so that no later resume or repeat inherits them.
    """

    flags: list[str] = field(default_factory=list)
    """Flags for Hydra, such as -m and --config-dir=DIR."""
    overrides: list[str] = field(default_factory=list)
    """Overrides for Hydra, without `resume`, `repeat` and `stop_at`."""
    multirun: bool = False
    """Whether -m or --multirun was typed."""
    prints_only: bool = False
    """Whether --cfg, --info or shell completion was typed: nothing runs and nothing is written."""
    resume: Path | None = None
    """Run directory, checkpoint, sweep or backup to continue from; an absolute path."""
    repeat: Path | None = None
    """Run directory, or sweep (its best job), whose stored config a new run or sweep starts from; an absolute path."""
    stop_at: int | None = None
    """Update after which every run of this invocation stops, resumable."""
    sweep: Path | None = None
    """Directory of the sweep to finish, where `resume` named a sweep."""
    sweep_overrides: list[str] = field(default_factory=list)
    """Overrides typed with `sweep`: they extend it or change its jobs."""
    hydra_settings: set[str] = field(default_factory=set)
    """Names of Hydra's own settings that were typed, such as hydra.run.dir."""
    group_choices: dict[str, str] = field(default_factory=dict)
    """Group to choice, as typed."""
    settings: dict[str, str] = field(default_factory=dict)
    """Setting to value, as typed; groups and Hydra's settings excluded."""

    @property
    def arguments(self) -> list[str]:
        """Flags and overrides; Hydra's parser refuses a flag between two overrides."""
        return [*self.flags, *self.overrides]
