"""The manifest of a sweep: an append-only file of which job has which folder, and the words that were typed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common import safe_json
from runner.common.atomic_io import is_draft
from runner.common.clock import utc_now
from runner.common.errors import ConfigError
from runner.common.text import shorten
from runner.config import retired
from runner.runs.directory import RunDirectory
from runner.runs.rows import RowFile

NAME = "sweep.jsonl"
SCHEMA = 1
_LARGEST = 20_000_000
_MOST_VALUES = 100_000  # of a line: the words of a sweep, or the overrides of a job
_LONGEST_WORD = 20_000
_LONGEST_REFERENCE = 1000
_MOST_NESTING = 1000
_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w./@:-]*=.*", re.DOTALL)


def job_id(overrides: Sequence[str]) -> str:
    """Return the identity of a job: a hash of the set of its settings, whatever their order.

    Hydra's own settings, and the group that holds the config of a repeated run, do not count.
    """
    settings = sorted(o for o in overrides if not o.lstrip("+").startswith(("hydra.", "hydra/", "stored=")))
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class SweepJob:
    """One job: its number and folder follow from the order of arrival and never change."""

    number: int
    identity: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its folder below the sweep's."""
        return str(self.number)


@dataclass
class SweepManifest:
    """What the file says. States are not in it: they are read from the runs, so that they are true after a crash."""

    folder: Path
    words: list[str] = field(default_factory=list)
    """The sweep's words as last typed, with -m and what belongs to one invocation left out."""
    jobs: dict[str, SweepJob] = field(default_factory=dict)
    """Identity to job, in the order of arrival."""
    size: int = 0
    """Bytes of whole lines."""

    def add(self, words: Sequence[str], wanted: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        """Record the words of a launch, and every job of `wanted` (identity, overrides) that is new."""
        lines: list[dict[str, Any]] = []
        if list(words) != self.words:
            self.words = list(words)
            lines.append({"schema": SCHEMA, "words": self.words, "time": utc_now()})
        for identity, overrides in wanted:
            if identity not in self.jobs:
                job = SweepJob(len(self.jobs), identity, tuple(overrides))
                self.jobs[identity] = job
                lines.append({"job": job.number, "id": identity, "overrides": list(overrides)})
        if not lines:
            return
        out = RowFile(self.folder / NAME, self.size)
        try:
            for line in lines:
                out.append(line)
            out.sync()
            self.size = out.offset
        finally:
            out.close()


def was_cut_off(folder: Path) -> bool:
    """Whether all that lies in `folder` is what a sweep leaves that ended before it recorded a job.

    Raises:
        DirectoryInUse: a process holds it: the sweep has only just begun.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir() if not is_draft(p.name)}
    if names - {".lock", "multirun.yaml", NAME} or read_manifest(folder).jobs:
        return False
    directory = RunDirectory(folder)
    directory.lock()
    directory.unlock()
    return True


def read_manifest(folder: Path) -> SweepManifest:
    """The manifest of the sweep in `folder`, empty where there is none; a torn last line is left out.

    Raises:
        ConfigError: it is not a manifest that this version understands.
    """
    manifest = SweepManifest(folder)
    path = folder / NAME
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path} is not a regular file.")
            data = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return manifest
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > _LARGEST:
        raise ConfigError(f"{path} is larger than {_LARGEST:,} bytes: not a manifest of ours.")
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.endswith(b"\n"):
            break
        try:
            _take(manifest, safe_json.parse(line, most_values=_MOST_VALUES))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} cannot be understood: {shorten(repr(error))}.") from None
        manifest.size += len(line)
    return manifest


def _take(manifest: SweepManifest, line: dict[str, Any]) -> None:
    if "words" in line:
        if line["schema"] != SCHEMA:
            raise ValueError(f"schema {line['schema']}, this version reads {SCHEMA}")
        manifest.words = retired.upgrade_overrides(_texts(line["words"]))
        return
    stored = _texts(line["overrides"])
    overrides = tuple(o for o in retired.upgrade_overrides(stored) if not _is_of_the_invocation(o))
    # Settings may have been renamed since: the identity is that of the present names.
    identity = line["id"] if overrides == stored else job_id(overrides)
    job = SweepJob(line["job"], line["id"] if identity in manifest.jobs else identity, overrides)
    if type(job.number) is not int or job.number != len(manifest.jobs):
        raise ValueError(f"job {job.number} out of order")
    if not isinstance(job.identity, str) or job.identity in manifest.jobs:
        raise ValueError(f"job {job.number} has the identity of another")
    for word in job.overrides:
        if not _OVERRIDE.fullmatch(word) or word.lstrip("+").startswith("hydra"):
            raise ValueError(f"{word} is no setting of a job")
    manifest.jobs[job.identity] = job


def _is_of_the_invocation(override: str) -> bool:
    return override.lstrip("+").partition("=")[0] in retired.OF_THE_INVOCATION


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("a list of words is expected")
    for word in value:
        if len(word) > (_LONGEST_REFERENCE if "${" in word else _LONGEST_WORD) or _nesting(word) > _MOST_NESTING:
            raise ValueError("a word is too long for a setting")
    return tuple(value)


def _nesting(word: str) -> int:
    return sum(word.count(bracket) for bracket in "[{(")
