"""The commands that messages tell the user to type; each can be copied into a shell as it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def mlx_lm_command(
    model: str, adapter: str | None, *, chat_template: bool, template_args: Mapping[str, Any] | None
) -> str:
    """Return the command by which mlx-lm answers as a run was trained: with its chat template, or without one.

    Args:
        adapter: an adapter folder; None where `model` contains the adapter.
        chat_template: the setting data.chat_template.
        template_args: the setting data.template_args.
    """
    command = ["mlx_lm.generate", "--model", model]
    command += ["--adapter-path", adapter] if adapter else []
    command += [] if chat_template else ["--ignore-chat-template"]
    command += ["--chat-template-config", json.dumps(dict(template_args))] if template_args else []
    return f'{shlex.join(command)} --prompt "…"'
