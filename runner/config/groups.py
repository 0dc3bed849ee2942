"""The config groups: their YAML files in conf/ and in the folders that --config-dir adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONF_DIR = Path(__file__).parent.parent / "conf"
if not CONF_DIR.is_dir():  # a clone or an editable install: the wheel carries conf/ inside the package
    CONF_DIR = Path(__file__).parent.parent.parent / "conf"


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Return the folders that --config-dir adds."""
    folders = []
    for i, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd") and i + 1 < len(arguments):
            folders.append(Path(arguments[i + 1]))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.partition("=")[2]))
    return folders


def group_choices(group: str, folders: Sequence[Path] = (CONF_DIR,)) -> list[str]:
    """Return the choices of `group`, sorted: its YAML files in every config folder."""
    choices = set()
    for folder in folders:
        base = folder / group
        choices |= {str(p.relative_to(base).with_suffix("")) for p in base.rglob("*.yaml")} if base.is_dir() else set()
    return sorted(choices)
