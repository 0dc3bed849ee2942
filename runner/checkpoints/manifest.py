"""The manifest of a checkpoint: what it is, and size and SHA-256 of each of its files.

It is sealed JSON (see `runner.common.sealed_json`), so a flipped bit in the manifest itself is found too::

    {"schema": 1, "run_id": …, "step": …, "created": …, "why": […], "metrics": {…},
     "files": {name: {"size": …, "sha256": …}, …}, "sha256": …}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from runner.common.layout import BEST_METRIC
from runner.common.safe_json import is_count, quoted
from runner.common.sealed_json import seal, unseal

NAME = "manifest.json"
MAX_BYTES = 1 << 20
_SCHEMA = 1
_MAX_VALUES = 20_000
_MAX_FILES = 100
_MAX_TEXT_LENGTH = 500
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Letters and digits first: no hidden file, no "..", no option of a shell tool.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_KEYS = {"schema", "run_id", "step", "created", "why", "metrics", "files"}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (lower-case hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """The content of one manifest. A metric that was not finite is NaN here."""

    run_id: str
    step: int
    created: str
    """When it was saved (UTC); only informs."""
    save_reasons: tuple[str, ...]
    """Why it was saved ("why" in the file): see `save_policy.SavePolicy.due`."""
    metrics: Mapping[str, float]
    files: Mapping[str, FileRecord]

    def __post_init__(self) -> None:
        """Raises ValueError where a field is not what a manifest may hold."""
        _require(is_count(self.step), f"the step {quoted(self.step)} is not a whole number from 0")
        _require(_is_text(self.run_id) and self.run_id != "", "the run id is not a short text")
        _require(_is_text(self.created), "'created' is not a short text")
        _require(all(_is_text(reason) for reason in self.save_reasons), "'why' is not a list of short texts")
        for name, value in self.metrics.items():
            _require(_is_text(name) and isinstance(value, float), f"the metric {quoted(name)} is not a number")
        _require(len(self.files) > 0, "it lists no files")
        _require(len(self.files) <= _MAX_FILES, f"it lists more than {_MAX_FILES} files")
        # On a file system that ignores case, two such names would be one file.
        folded = {str(name).lower() for name in self.files}
        _require(len(folded) == len(self.files), "two file names differ only in case")
        for name, record in self.files.items():
            _require(
                isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None and name.lower() != NAME,
                f"the file name {quoted(name)} is not allowed (letters, digits, '.', '_' and '-' are)",
            )
            _require(is_count(record.size), f"the size of {name} is not a whole number from 0")
            is_digest = isinstance(record.sha256, str) and _DIGEST.fullmatch(record.sha256) is not None
            _require(is_digest, f"the SHA-256 of {name} is not 64 hexadecimal digits")

    @property
    def valid_loss(self) -> float | None:
        """The validation loss at its step; None if it was not evaluated there, or is not finite."""
        loss = self.metrics.get(BEST_METRIC, math.nan)
        return loss if math.isfinite(loss) else None


def write(manifest: CheckpointManifest) -> bytes:
    """Return the bytes of ``manifest.json``. Raises ValueError where `read` would refuse them as too long."""
    data = seal(
        {
            "schema": _SCHEMA,
            "run_id": manifest.run_id,
            "step": manifest.step,
            "created": manifest.created,
            "why": list(manifest.save_reasons),
            "metrics": {key: value if math.isfinite(value) else None for key, value in manifest.metrics.items()},
            "files": {name: asdict(record) for name, record in manifest.files.items()},
        }
    )
    read(data)
    return data


def read(data: bytes) -> CheckpointManifest:
    """Return the manifest in `data`. Raises ValueError with the reason where it is damaged or not a manifest."""
    _require(len(data) <= MAX_BYTES, f"it is larger than {MAX_BYTES:,} bytes")
    record = unseal(data, max_values=_MAX_VALUES)
    if record.get("schema") != _SCHEMA or isinstance(record["schema"], bool):
        raise ValueError(f"its schema is {quoted(record.get('schema'))}; this version reads {_SCHEMA}")
    _require(record.keys() == _KEYS, f"its keys are not {', '.join(sorted(_KEYS))}")
    _require(isinstance(record["why"], list), "'why' is not a list")
    _require(isinstance(record["metrics"], dict), "'metrics' is not an object")
    _require(isinstance(record["files"], dict), "'files' is not an object")
    return CheckpointManifest(
        run_id=record["run_id"],
        step=record["step"],
        created=record["created"],
        save_reasons=tuple(record["why"]),
        metrics={name: _metric(name, value) for name, value in record["metrics"].items()},
        files={name: _file_record(name, value) for name, value in record["files"].items()},
    )


def _metric(name: str, value: object) -> float:
    if value is None:
        return math.nan
    _require(type(value) in (int, float), f"the metric {quoted(name)} is not a number")
    return float(value)  # type: ignore[arg-type]


def _file_record(name: str, value: object) -> FileRecord:
    is_record = isinstance(value, dict) and value.keys() == {"size", "sha256"}
    _require(is_record, f"the record of {quoted(name)} is not a size and a SHA-256")
    return FileRecord(size=value["size"], sha256=value["sha256"])  # type: ignore[index]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT_LENGTH


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)
