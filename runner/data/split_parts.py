"""The files of a split, each with the settings of its source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.data.formats import EncodeOptions
from runner.data.holdout import Holdout


@dataclass(frozen=True, slots=True)
class SplitPart:
    """One file of a split."""

    file: Path
    options: EncodeOptions
    source: int = 0
    """The number of its source in data.mix."""
    holdout: Holdout | None = None
    """Which of its rows belong to the split; None for all."""


def split_content(parts: Sequence[SplitPart], contents: Sequence[str]) -> str:
    """Return the identity of a split whose files have the SHA-256 hashes `contents`; of one plain file, its hash."""
    if len(parts) == 1 and parts[0].holdout is None:
        return contents[0] if not _is_converted_by_name(parts[0].file) else _hash([contents[0], parts[0].file.suffix])
    described: list[Any] = [
        [
            content,
            part.file.suffix,
            part.options.format,
            asdict(part.options.keys),
            None if part.holdout is None else asdict(part.holdout),
        ]
        for part, content in zip(parts, contents, strict=True)
    ]
    return _hash(described)


def _is_converted_by_name(file: Path) -> bool:
    return file.suffix != ".jsonl"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
