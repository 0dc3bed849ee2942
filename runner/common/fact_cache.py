"""Small facts in the cache folder, so that a later run need not compute them again. No MLX.

Nothing that happens to the folder harms a run: a fact that is not found whole is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.common.cache_dir import cache_dir

_MOST_FILES, _LARGEST = 1000, 4096


def fact_file(kind: str, key: Mapping[str, Any]) -> Path:
    """The file of the fact of a `kind` under `key`, which names all that it depends on."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / kind / f"{name}.json"


def load_fact(file: Path) -> dict[str, Any] | None:
    """The values that `write` has put there; None where there are none, or not whole."""
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                return None
            data = json.loads(opened.read(_LARGEST))
        values = data["values"]
        return dict(values) if data["sha256"] == _sum(values) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def store_fact(file: Path, values: Mapping[str, Any]) -> None:
    """Put `values` there, where the folder can be written."""
    with suppress(OSError):
        _write(file, values)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".draft-", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as opened:
            json.dump({"values": dict(values), "sha256": _sum(values)}, opened)
        os.replace(draft, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
    _make_room(file.parent)


def _make_room(folder: Path) -> None:
    """Remove the oldest, drafts of killed runs among them, where there are very many."""
    found = [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    if len(found) > _MOST_FILES:
        found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)
        for entry in found[: len(found) - _MOST_FILES // 2]:
            with suppress(OSError):
                os.unlink(entry.path)


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
