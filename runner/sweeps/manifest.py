"""The manifest of a sweep: an append-only file of which job has which folder, and the words that were typed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import ConfigError
from runner.rundir import Rows, now

NAME = "sweep.jsonl"
SCHEMA = 1
_LARGEST = 50_000_000


@dataclass(frozen=True)
class Job:
    """One job: its number and folder follow from the order of arrival and never change."""

    number: int
    identity: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its folder below the sweep's."""
        return str(self.number)


@dataclass
class Manifest:
    """What the file says. States are not in it: they are read from the runs, so that they are true after a crash."""

    folder: Path
    words: list[str] = field(default_factory=list)
    """The sweep's words as last typed, with -m and what belongs to one invocation left out."""
    jobs: dict[str, Job] = field(default_factory=dict)
    """Identity to job, in the order of arrival."""
    size: int = 0
    """Bytes of whole lines."""

    def add(self, words: Sequence[str], wanted: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        """Record the words of a launch, and every job of `wanted` (identity, overrides) that is new."""
        lines: list[dict[str, Any]] = []
        if list(words) != self.words:
            self.words = list(words)
            lines.append({"schema": SCHEMA, "words": self.words, "time": now()})
        for identity, overrides in wanted:
            if identity not in self.jobs:
                job = Job(len(self.jobs), identity, tuple(overrides))
                self.jobs[identity] = job
                lines.append({"job": job.number, "id": identity, "overrides": list(overrides)})
        if not lines:
            return
        out = Rows(self.folder / NAME, self.size)
        try:
            for line in lines:
                out.append(line)
            out.sync()
            self.size = out.offset
        finally:
            out.close()


def read(folder: Path) -> Manifest:
    """The manifest of the sweep in `folder`, empty where there is none; a torn last line is left out.

    Raises:
        ConfigError: it is not a manifest that this version understands.
    """
    manifest = Manifest(folder)
    path = folder / NAME
    if not path.exists():
        return manifest
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"{path} is larger than {_LARGEST} bytes: not a manifest of ours.")
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            _take(manifest, json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} cannot be understood: {error!r}.") from None
        manifest.size += len(line)
    return manifest


def _take(manifest: Manifest, line: dict[str, Any]) -> None:
    if "words" in line:
        if line["schema"] != SCHEMA:
            raise ValueError(f"schema {line['schema']}, this version reads {SCHEMA}")
        manifest.words = [str(word) for word in line["words"]]
        return
    job = Job(int(line["job"]), str(line["id"]), tuple(str(o) for o in line["overrides"]))
    if job.number != len(manifest.jobs) or job.identity in manifest.jobs:
        raise ValueError(f"job {job.number} out of order")
    manifest.jobs[job.identity] = job
