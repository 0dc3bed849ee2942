"""The commands that messages tell the user to type; each can be copied into a shell as it is."""

from __future__ import annotations

from pathlib import Path

from runner.common.text import shell_path

PROGRAM = "python -m runner"


def resume_command(path: Path) -> str:
    """Return the command that resumes a run, a checkpoint, a sweep or a backup."""
    return f"{PROGRAM} resume={shell_path(path)}"


def repeat_command(run: Path, *overrides: str) -> str:
    """Return the command that starts a new run with the settings of `run`, changed by `overrides`."""
    return " ".join([f"{PROGRAM} repeat={shell_path(run)}", *overrides])


def warm_start_command(run: Path, adapter: Path) -> str:
    """Return the command that starts a new run with the settings of `run` from the weights of `adapter`."""
    return repeat_command(run, f"adapter={shell_path(adapter)}")
