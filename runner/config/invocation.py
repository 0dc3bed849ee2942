"""What one command line asks for, known before Hydra starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runner.distributed.launch import Launch

INVOCATION_ARGUMENTS = {"resume": "DIR", "repeat": "DIR", "train.stop_at": "N", "supervise": "true", "ranks": "N"}
"""Arguments that are typed like settings but stored in no config, with a placeholder for their values."""


@dataclass(frozen=True)
class Supervision:
    """What `supervise=` asks for."""

    replace_every: int | None = None
    """Updates after which the process of a run is replaced by a new one, at a checkpoint; None: by default."""


@dataclass
class Invocation:
    """One command line: the arguments for Hydra, and what belongs to this invocation alone.

    `resume`, `repeat`, `stop_at`, `supervise` and `ranks` are typed like settings (`resume=DIR`, `repeat=DIR`,
    `train.stop_at=200`, `supervise=true`, `ranks=2`) but are no part of the config: a run's config.yaml does not hold
    them, so that no later resume or repeat inherits them.
    """

    flags: list[str] = field(default_factory=list)
    """Flags for Hydra, such as -m and --config-dir=DIR."""
    overrides: list[str] = field(default_factory=list)
    """Overrides for Hydra, without those of `INVOCATION_ARGUMENTS`."""
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
    supervise: Supervision | None = None
    """Start a run again from its last checkpoint where its process is killed or its GPU or memory fails; with a number
    instead of true, also replace the process after that many updates (default: 10,000 on a GPU)."""
    ranks: int | None = None
    """Train each run on this number of processes of this machine, which share every batch (see docs/distributed.md)."""
    report_run: Callable[[Path], None] | None = None
    """Tells the supervising process the directory of the run; None where there is none."""
    launch: Launch | None = None
    """Where this process is one of several ranks of a run: which one."""
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
