"""What one command line asks for, before Hydra starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Invocation:
    """What was typed: the words for Hydra, and what the door has to know before Hydra starts."""

    words: list[str] = field(default_factory=list)
    multirun: bool = False
    shows_only: bool = False
    """--cfg, --info, shell completion: nothing runs, nothing is written."""
    sweep: Path | None = None
    """The sweep that resume= finishes."""
    resume: Path | None = None
    repeat: Path | None = None
    hydra: set[str] = field(default_factory=set)
    """Hydra's own settings that were typed, such as hydra.run.dir."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Group to choice, as typed."""
    typed: dict[str, str] = field(default_factory=dict)
    """Setting to value, as typed (groups aside)."""
