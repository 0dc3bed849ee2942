"""Create a folder that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.common.atomic_io import storage_errors, sync_folder
from runner.common.errors import ConfigError


@contextmanager
def create_folder_atomically(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; when the block ends, sync all of it to the disk and rename it to `target`.

    If the block raises, the new folder is removed and `target` is not created.

    Raises:
        ConfigError: `target` exists by then; nothing is replaced.
        StorageError: the disk fails.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(target, "cannot be created"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        with storage_errors(target, "cannot be written"):
            _sync_tree(temporary)
            if target.exists():
                raise ConfigError(f"{target} was created by another process meanwhile; nothing is replaced.")
            os.rename(temporary, target)
            sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
