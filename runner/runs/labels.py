"""The labels of a run or a sweep on disk: labels.json, which is written at the start and may be edited at any time.

config.yaml does not hold them: they are no part of what is computed, and a training process never overwrites an edit.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.common import layout, safe_json
from runner.common.atomic_io import write_atomically
from runner.common.errors import ConfigError, StorageError
from runner.common.filesystem import open_regular
from runner.common.text import first_line, relative_path
from runner.config.labels import MAX_NAME_LENGTH, MAX_NOTE_LENGTH, MAX_TAGS, NO_LABELS, Labels, is_tag

_MAX_BYTES = 100_000
_MAX_VALUES = 1000
_SWEEP_MANIFEST = "sweep.jsonl"
_ATTEMPTS = 3


def read_labels(folder: Path) -> Labels:
    """Return the labels of the run or sweep in `folder`: none where it has none, or they cannot be read."""
    try:
        return _read(folder)
    except (OSError, ValueError):
        return NO_LABELS


def _read(folder: Path) -> Labels:
    """Return the labels in `folder`. Raises OSError or ValueError where the file is missing or damaged."""
    with open(open_regular(folder / layout.LABELS, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        content = safe_json.parse_object(file.read(_MAX_BYTES), max_values=_MAX_VALUES)
    tags = content.get("tags")
    return Labels(
        _text(content.get("name"), MAX_NAME_LENGTH),
        tuple(tag for tag in tags if is_tag(tag))[:MAX_TAGS] if isinstance(tags, list) else (),
        _text(content.get("note"), MAX_NOTE_LENGTH),
    )


def labels_of_sweep_above(run: Path) -> Labels:
    """Return the labels of the sweep that `run` is a job of; none where it is a run of its own."""
    labels = read_labels(run.parent)
    return labels if labels == NO_LABELS or (run.parent / _SWEEP_MANIFEST).is_file() else NO_LABELS


def write_labels(folder: Path, labels: Labels) -> None:
    """Write the labels of the run or sweep in `folder` atomically. Raises StorageError."""
    write_atomically(folder / layout.LABELS, json.dumps(labels.to_dict(), indent=1, ensure_ascii=False) + "\n")


def edit_labels(folder: Path, change: Callable[[Labels], Labels]) -> Labels:
    """Replace the labels by what `change` makes of them, and return these. A run may train there meanwhile.

    Raises:
        ConfigError: the file is there, but cannot be read: what it holds is not overwritten.
        StorageError: they cannot be written.
    """
    with _lock(folder):
        try:
            present = _read(folder)
        except FileNotFoundError:
            present = NO_LABELS
        except (OSError, ValueError) as error:
            path = relative_path(folder / layout.LABELS)
            raise ConfigError(
                f"{path} cannot be read, so it is not changed: {first_line(str(error))}\n"
                "Mend it, or remove it to start with new labels."
            ) from None
        labels = change(present)
        for attempt in range(_ATTEMPTS):
            try:
                write_labels(folder, labels)
                break
            except StorageError:  # a run that starts removes the drafts of killed processes, and may have taken ours
                if attempt == _ATTEMPTS - 1:
                    raise
    return labels


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time edit; the lock of the run itself belongs to the process that trains it."""
    handle = None
    with suppress(OSError):  # a file system without locks: two edits in the same moment may lose one
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _text(value: object, limit: int) -> str | None:
    return value[:limit] if isinstance(value, str) and value.strip() else None
