"""The config groups: their YAML files in conf/ and in the folders that --config-dir adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner.common.filesystem import is_apple_double

CONF_DIR = Path(__file__).parent.parent / "conf"
if not CONF_DIR.is_dir():  # a clone or an editable install: the wheel carries conf/ inside the package
    CONF_DIR = Path(__file__).parent.parent.parent / "conf"

CONFIG_DIR_FLAGS = ("--config-dir", "-cd")


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Return the folders that --config-dir adds: `--config-dir DIR`, `--config-dir=DIR`, `-cd DIR` or `-cd=DIR`."""
    folders = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in CONFIG_DIR_FLAGS and (folder := value if equals else next(remaining, "")):
            folders.append(Path(folder))
    return folders


def group_choices(group: str, folders: Sequence[Path] = (CONF_DIR,)) -> list[str]:
    """Return the choices of `group`, sorted: its YAML files in every config folder."""
    choices = set()
    for folder in folders:
        base = folder / group
        files = (path for path in base.rglob("*.yaml") if not is_apple_double(path.name)) if base.is_dir() else ()
        choices |= {str(path.relative_to(base).with_suffix("")) for path in files}
    return sorted(choices)
