"""Values before the first update: an adapter whose B is zero leaves the base as it is, at any rank.

The loss is kept in the cache folder as well, so that runs on the same base and data compute it once. Nothing that
happens to the folder harms a run: what is not found whole is computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.cache import cache_folder
from runner.training.evaluation import Evaluation
from runner.training.generation import Generation

_MOST_FILES, _LARGEST = 1000, 4096


@dataclass
class Baseline:
    """What is known of a base on some data, empty until a job has computed it."""

    evaluation: Evaluation | None = None
    generation: Generation | None = None
    file: Path | None = None
    """Where the evaluation is kept for other runs; None: nowhere."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take over what was computed, and keep it."""
        self.evaluation = evaluation
        if self.file is not None:
            with suppress(OSError):
                _write(self.file, asdict(evaluation))


def kept(key: Mapping[str, Any]) -> Baseline:
    """What an earlier run has kept under `key`, which names all that the last digit depends on."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    file = cache_folder() / "baselines" / f"{name}.json"
    return Baseline(_read(file), file=file)


def _read(file: Path) -> Evaluation | None:
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                return None
            data = json.loads(opened.read(_LARGEST))
        values = data["evaluation"]
        if data["sha256"] != _sum(values):
            return None
        found = Evaluation(
            loss=float(values["loss"]),
            supervised=int(values["supervised"]),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return found if math.isfinite(found.loss) else None


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".draft-", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as opened:
            json.dump({"evaluation": values, "sha256": _sum(values)}, opened)
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
