"""The config groups: their YAML files in conf/ and in the folders that --config-dir adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONF_DIR = Path(__file__).parent.parent / "conf"
if not CONF_DIR.is_dir():  # a clone or an editable install: the wheel carries conf/ inside the package
    CONF_DIR = Path(__file__).parent.parent.parent / "conf"


def config_dirs(words: Sequence[str]) -> list[Path]:
    """The folders that --config-dir names."""
    found = []
    for i, word in enumerate(words):
        if word in ("--config-dir", "-cd") and i + 1 < len(words):
            found.append(Path(words[i + 1]))
        elif word.startswith("--config-dir="):
            found.append(Path(word.partition("=")[2]))
    return found


def group_choices(group: str, folders: Sequence[Path] = (CONF_DIR,)) -> list[str]:
    """The names that `group` can be set to: its YAML files in every config folder, sorted."""
    found = set()
    for folder in folders:
        base = folder / group
        found |= {str(p.relative_to(base).with_suffix("")) for p in base.rglob("*.yaml")} if base.is_dir() else set()
    return sorted(found)
