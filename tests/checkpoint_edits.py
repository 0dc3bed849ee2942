"""Checkpoints with other content and a manifest that fits it: those of other versions, devices and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.checkpoints import manifest
from runner.checkpoints.store import file_records
from runner.checkpoints.verify import load_checkpoint
from runner.common.filesystem import FileSystem


def edit_json(folder: Path, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `edit` to the content of the JSON file `name` in the checkpoint or result `folder`."""
    loaded = load_checkpoint(folder, FileSystem())
    content = json.loads(loaded.files[name])
    edit(content)
    loaded.files[name] = json.dumps(content).encode()
    (folder / name).write_bytes(loaded.files[name])
    sealed = replace(loaded.checkpoint.manifest, files=file_records(loaded.files))
    (folder / manifest.NAME).write_bytes(manifest.write(sealed))
