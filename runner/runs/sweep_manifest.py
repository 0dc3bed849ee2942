"""The manifest of a sweep, sweep.jsonl: an append-only file of its jobs and of the arguments that started it."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common import safe_json
from runner.common.clock import utc_now
from runner.common.errors import ConfigError
from runner.common.filesystem import open_regular
from runner.common.text import shorten
from runner.config import retired
from runner.config.invocation import INVOCATION_ARGUMENTS
from runner.runs.directory import RunDirectory, unexpected_names
from runner.runs.rows import RowFile

NAME = "sweep.jsonl"
SCHEMA = 1
_MAX_BYTES = 20_000_000
_MAX_VALUES_PER_LINE = 100_000
_MAX_OVERRIDE_LENGTH = 20_000
_MAX_REFERENCE_LENGTH = 1000
"""Of an override with a ${…} reference."""
_MAX_BRACKETS = 1000
_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w./@:-]*=.*", re.DOTALL)


def job_id(overrides: Sequence[str]) -> str:
    """Return the identity of a job: a hash of the set of its settings, whatever their order.

    Hydra's own settings, and the group that holds the config of a repeated run, do not count.
    """
    settings = sorted(o for o in overrides if not o.lstrip("+").startswith(("hydra.", "hydra/", "stored=")))
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class SweepJob:
    """One job. Its number, which also names its folder, follows from the order of addition and never changes."""

    number: int
    identity: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of its folder below that of the sweep."""
        return str(self.number)


@dataclass
class SweepManifest:
    """The content of a manifest. It holds no states: these are read from the runs, which is right after a crash too."""

    folder: Path
    arguments: list[str] = field(default_factory=list)
    """The sweep's arguments as last typed, without -m and what belongs to one invocation."""
    jobs: dict[str, SweepJob] = field(default_factory=dict)
    """Identity to job, in the order of addition."""
    size: int = 0
    """Bytes of complete lines."""

    def add(self, arguments: Sequence[str], overrides_of_jobs: Iterable[Sequence[str]]) -> None:
        """Append the arguments of a launch where they changed, and every job that is new."""
        lines: list[dict[str, Any]] = []
        if list(arguments) != self.arguments:
            self.arguments = list(arguments)
            # The key "words" is part of the format of every sweep made so far.
            lines.append({"schema": SCHEMA, "words": self.arguments, "time": utc_now()})
        for overrides in overrides_of_jobs:
            identity = job_id(overrides)
            if identity not in self.jobs:
                job = SweepJob(len(self.jobs), identity, tuple(overrides))
                self.jobs[identity] = job
                lines.append({"job": job.number, "id": identity, "overrides": list(overrides)})
        if not lines:
            return
        file = RowFile(self.folder / NAME, self.size)
        try:
            for line in lines:
                file.append(line)
            file.sync()
            self.size = file.offset
        finally:
            file.close()


def is_abandoned(folder: Path) -> bool:
    """Return whether `folder` holds nothing but the remains of a sweep that ended before it recorded a job.

    Raises:
        DirectoryInUse: a process holds it: the sweep has only just begun.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    if unexpected_names(folder, {".lock", "multirun.yaml", NAME}) or read_manifest(folder).jobs:
        return False
    directory = RunDirectory(folder)
    directory.lock()
    directory.unlock()
    return True


def read_manifest(folder: Path) -> SweepManifest:
    """Read the manifest of the sweep in `folder`: empty where there is none, without a torn last line.

    Raises:
        ConfigError: it is damaged, or of a version that is not supported.
    """
    manifest = SweepManifest(folder)
    path = folder / NAME
    for number, line in enumerate(io.BytesIO(_read_bytes(path)), 1):
        if not line.endswith(b"\n"):
            break
        try:
            _apply(manifest, safe_json.parse(line, max_values=_MAX_VALUES_PER_LINE))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} cannot be understood: {shorten(repr(error))}.") from None
        manifest.size += len(line)
    return manifest


def _read_bytes(path: Path) -> bytes:
    """Return the content of a manifest; nothing where there is none."""
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES:,} bytes, so it is no manifest.")
    return data


def _apply(manifest: SweepManifest, line: dict[str, Any]) -> None:
    """Add one line of the file to `manifest`; raises ValueError, KeyError or TypeError where it is invalid."""
    if "words" in line:
        if line["schema"] != SCHEMA:
            raise ValueError(f"schema {line['schema']}, this version reads {SCHEMA}")
        manifest.arguments = retired.upgrade_overrides(_texts(line["words"]))
        return
    stored = _texts(line["overrides"])
    overrides = tuple(o for o in retired.upgrade_overrides(stored) if not _belongs_to_invocation(o))
    # Settings may have been renamed since: the identity is that of the present names.
    identity = line["id"] if overrides == stored else job_id(overrides)
    job = SweepJob(line["job"], line["id"] if identity in manifest.jobs else identity, overrides)
    if type(job.number) is not int or job.number != len(manifest.jobs):
        raise ValueError(f"job {job.number} is out of order")
    if not isinstance(job.identity, str) or job.identity in manifest.jobs:
        raise ValueError(f"job {job.number} has the identity of another job")
    for override in job.overrides:
        if not _OVERRIDE.fullmatch(override) or override.lstrip("+").startswith("hydra"):
            raise ValueError(f"{override} is no setting of a job")
    manifest.jobs[job.identity] = job


def _belongs_to_invocation(override: str) -> bool:
    return override.lstrip("+").partition("=")[0] in INVOCATION_ARGUMENTS


def _texts(value: object) -> tuple[str, ...]:
    """Return a list of overrides that is safe to parse: Hydra's parser needs time and memory for nested ones."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of texts is expected")
    for text in value:
        limit = _MAX_REFERENCE_LENGTH if "${" in text else _MAX_OVERRIDE_LENGTH
        if len(text) > limit or sum(text.count(bracket) for bracket in "[{(") > _MAX_BRACKETS:
            raise ValueError("a text is too long for an override")
    return tuple(value)
