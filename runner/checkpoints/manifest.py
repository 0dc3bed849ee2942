"""The manifest that seals a checkpoint: what it is, and the size and SHA-256 of each of its files.

It is JSON whose last member, ``sha256``, is the SHA-256 of all bytes before its value, so a flipped bit in
the manifest itself is found too::

    {"schema": 1, "run_id": …, "step": …, "created": …, "why": […], "metrics": {…},
     "files": {name: {"size": …, "sha256": …}, …}, "sha256": …}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from runner.common.safe_json import quoted
from runner.common.sealed_json import seal, unseal

NAME = "manifest.json"
MAX_BYTES = 1 << 20
_SCHEMA = 1
_MOST_VALUES = 20_000
_MOST_FILES = 100
_LARGEST = 10**18
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Letters and digits first: no hidden file, no "..", no option of a shell tool.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_KEYS = {"schema", "run_id", "step", "created", "why", "metrics", "files"}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file; `size` in bytes, `sha256` in lower-case hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """One checkpoint's manifest. A metric that was not finite is NaN here; `created` (UTC) only informs."""

    run_id: str
    step: int
    created: str
    why: tuple[str, ...]
    metrics: Mapping[str, float]
    files: Mapping[str, FileRecord]

    def __post_init__(self) -> None:
        """Raises ValueError where a field is not what a manifest may hold."""
        _check(_is_count(self.step), f"the step {quoted(self.step)} is not a whole number from 0")
        _check(_is_text(self.run_id) and self.run_id != "", "the run id is not a short text")
        _check(_is_text(self.created), "'created' is not a short text")
        _check(all(_is_text(reason) for reason in self.why), "'why' is not a list of short texts")
        for name, value in self.metrics.items():
            _check(_is_text(name) and isinstance(value, float), f"the metric {quoted(name)} is not a number")
        _check(len(self.files) > 0, "it lists no files")
        _check(len(self.files) <= _MOST_FILES, f"it lists more than {_MOST_FILES} files")
        # File systems that fold case would make one file of two.
        folded = {str(name).lower() for name in self.files}
        _check(len(folded) == len(self.files), "two file names differ only in case")
        for name, record in self.files.items():
            _check(
                isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None and name.lower() != NAME,
                f"the file name {quoted(name)} is not allowed (letters, digits, '.', '_' and '-' are)",
            )
            _check(_is_count(record.size), f"the size of {name} is not a whole number from 0")
            sealed = isinstance(record.sha256, str) and _DIGEST.fullmatch(record.sha256) is not None
            _check(sealed, f"the SHA-256 of {name} is not 64 hexadecimal digits")


def write(manifest: CheckpointManifest) -> bytes:
    """The bytes of ``manifest.json``. Raises ValueError where `read` would refuse them (too long)."""
    record = {
        "schema": _SCHEMA,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "created": manifest.created,
        "why": list(manifest.why),
        "metrics": {key: value if math.isfinite(value) else None for key, value in manifest.metrics.items()},
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()},
    }
    data = seal(record)
    read(data)
    return data


def read(data: bytes) -> CheckpointManifest:
    """The manifest in `data`. Raises ValueError with the reason where it is damaged or not a manifest."""
    _check(len(data) <= MAX_BYTES, f"it is larger than {MAX_BYTES:,} bytes")
    record = unseal(data, most_values=_MOST_VALUES)
    if record.get("schema") != _SCHEMA or isinstance(record["schema"], bool):
        raise ValueError(f"its schema is {quoted(record.get('schema'))}; this version reads {_SCHEMA}")
    _check(record.keys() == _KEYS, f"its keys are not {', '.join(sorted(_KEYS))}")
    _check(isinstance(record["why"], list), "'why' is not a list")
    _check(isinstance(record["metrics"], dict), "'metrics' is not an object")
    _check(isinstance(record["files"], dict), "'files' is not an object")
    return CheckpointManifest(
        run_id=record["run_id"],
        step=record["step"],
        created=record["created"],
        why=tuple(record["why"]),
        metrics={name: _metric(name, value) for name, value in record["metrics"].items()},
        files={name: _file(name, value) for name, value in record["files"].items()},
    )


def _metric(name: str, value: object) -> float:
    if value is None:
        return math.nan
    _check(type(value) in (int, float), f"the metric {quoted(name)} is not a number")
    return float(value)  # type: ignore[arg-type]


def _file(name: str, value: object) -> FileRecord:
    right = isinstance(value, dict) and value.keys() == {"size", "sha256"}
    _check(right, f"the record of {quoted(name)} is not a size and a SHA-256")
    return FileRecord(size=value["size"], sha256=value["sha256"])  # type: ignore[index]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 500


def _check(right: bool, reason: str) -> None:
    if not right:
        raise ValueError(reason)
