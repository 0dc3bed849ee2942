"""The manifest of a sweep, sweep.jsonl: an append-only file of its jobs, each with the config that it runs.

Lines, one JSON object each. The first of every record says how many lines it has; an incomplete one does not count:

    {"schema": 2, "lines": 3, "arguments": […], "launcher": {…}, "time": …}
    {"job": 0, "id": …, "folder": …, "overrides": […], "choices": {…}, "config": {…}}
    {"job": 1, "id": …, "folder": …, "overrides": […], "choices": {…}, "like": 0, "changes": {"lora.rank": 8}}
    {"set": {"checkpoint.keep_last": 1}}    settings that apply to all jobs above
    {"set": {"checkpoint.keep_last": 5}, "job": 1}    settings that were changed for this job alone
    {"stop_at": {"0": 50, "1": null}}    how far jobs train for now, in updates; null to their end

A job of schema 1, of an earlier version, has overrides alone; a second line of its number adds its config.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.common import layout, safe_json
from runner.common.clock import utc_now
from runner.common.errors import ConfigError
from runner.common.filesystem import open_regular
from runner.common.safe_json import is_count
from runner.common.text import shorten
from runner.config import retired, serialize
from runner.config.invocation import INVOCATION_ARGUMENTS
from runner.config.labels import NO_LABELS, Labels
from runner.config.labels import problems as label_problems
from runner.config.quoting import unquote
from runner.runs.rows import RowFile

NAME = "sweep.jsonl"
SCHEMA = 2
_READABLE_SCHEMAS = (1, 2)
_MAX_BYTES = 20_000_000
_MAX_VALUES_PER_LINE = 100_000
_MAX_OVERRIDE_LENGTH = 20_000
_MAX_REFERENCE_LENGTH = 1000
"""Of an override with a ${…} reference."""
_MAX_BRACKETS = 1000
_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w./@:-]*=.*", re.DOTALL)
_FOLDER = re.compile(r"\w[\w.,=+@-]{0,119}")
_NAME = re.compile(r"[\w./-]{1,100}")
_CHOICE = re.compile(r"[^\x00-\x1f]{1,300}")
_RESERVED_FOLDERS = {"logs", NAME, "results.csv", "curves.svg", layout.REPORT, "multirun.yaml", layout.LABELS}


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep. Its number and its folder never change."""

    number: int
    folder: str
    """Name of its folder below that of the sweep."""
    overrides: tuple[str, ...]
    """What it was composed from, for display and to extend the grid."""
    config: Mapping[str, Any] | None = None
    """The config that it runs, as config.yaml stores it; None in a sweep of an earlier version."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Group to choice, as composed; Hydra's own groups excluded."""
    references: Mapping[str, Any] = field(default_factory=dict)
    """Settings that were composed with references (${…}) to other settings, as written: dotted name to value. `config`
    has what they refer to; a job that is derived from this one with another value follows them again."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that were changed for all jobs after this one was recorded; `config` has them."""
    own_changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that were changed for this job alone, after `changes` of the same name; `config` does not have them, so
    that jobs which are derived from it do not inherit them."""
    labels: Labels = NO_LABELS
    """What its run is called from the start, beside the labels of the sweep."""
    stop_at: int | None = None
    """The update after which the job stops for now, as a search decides it; None trains to the end."""

    @property
    def id(self) -> str:
        """A hash of the config, or of the overrides where there is none."""
        content: Any = sorted(self.overrides) if self.config is None else self.config
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def with_changes(self, changes: Mapping[str, Any]) -> SweepJob:
        """Return the job with these settings changed, by dotted name, as all jobs of the sweep have them now."""
        if self.config is None:
            return self
        config = serialize.change_dict(self.config, changes)
        own = {name: value for name, value in self.own_changes.items() if name not in changes}
        references = {name: value for name, value in self.references.items() if name not in changes}
        changes = {**self.changes, **changes}
        return replace(self, config=config, references=references, changes=changes, own_changes=own)

    @property
    def later_changes(self) -> dict[str, Any]:
        """The settings that a run of the job has to have, whatever it has stored: dotted name to value."""
        return {**self.changes, **self.own_changes}


@dataclass
class SweepManifest:
    """The content of a manifest. It holds no states: these are read from the runs, which is right after a crash too."""

    folder: Path
    arguments: list[str] = field(default_factory=list)
    """The sweep's arguments as last typed, without -m and what belongs to one invocation."""
    launcher: dict[str, Any] = field(default_factory=dict)
    """The launcher of the sweep: `name`, and `jobs` where it runs several at once."""
    jobs: list[SweepJob] = field(default_factory=list)
    """In the order of their numbers."""
    size: int = 0
    """Bytes of complete lines."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Folder to job number."""

    @property
    def repeats(self) -> Path | None:
        """The run, or the sweep for its best job, whose settings the sweep varies."""
        named = [unquote(a.partition("=")[2]) for a in self.arguments if a.startswith("repeat=")]
        return Path(named[-1]) if named and named[-1] and "\0" not in named[-1] else None

    def job_in(self, folder: str) -> SweepJob | None:
        """Return the job of a folder."""
        return self.jobs[self.numbers[folder]] if folder in self.numbers else None

    def record(
        self,
        *,
        arguments: Sequence[str] | None = None,
        launcher: Mapping[str, Any] | None = None,
        jobs: Iterable[SweepJob] = (),
        changes: Mapping[str, Any] | None = None,
        own_changes: Mapping[int, Mapping[str, Any]] | None = None,
        stops: Mapping[int, int | None] | None = None,
    ) -> None:
        """Append what changed, and return once it is on the disk.

        Args:
            arguments: those of this start.
            launcher: its launcher.
            jobs: new jobs, numbered from the end, and jobs of an earlier version whose config is known now.
            changes: settings, by dotted name, that apply to all jobs recorded so far; written before `jobs`.
            own_changes: job number to settings that apply to this job alone.
            stops: job number to the update after which it stops for now, None for its end; written last.
        """
        lines: list[dict[str, Any]] = [{"set": dict(changes)}] if changes else []
        arguments = self.arguments if arguments is None else list(arguments)
        launcher = self.launcher if launcher is None else dict(launcher)
        configs = [(job.with_changes(changes) if changes else job).config for job in self.jobs]
        for job in jobs:
            configs[job.number : job.number + 1] = [job.config]
            lines.append(_job_line(job, configs))
        lines += [{"set": dict(own), "job": number} for number, own in (own_changes or {}).items()]
        if stops:
            lines.append({"stop_at": {str(number): step for number, step in stops.items()}})
        if not lines and (arguments, launcher) == (self.arguments, self.launcher):
            return
        head = {"schema": SCHEMA, "lines": len(lines) + 1, "arguments": arguments, "launcher": launcher}
        lines.insert(0, {**head, "time": utc_now()})
        file = RowFile(self.folder / NAME, self.size)
        try:
            for line in lines:
                file.append(line)
            file.sync()
        finally:
            file.close()
        for line in lines:
            _apply(self, json.loads(json.dumps(line)))
        self.size = file.offset


def is_valid_folder(name: str) -> bool:
    """Return whether a job's folder may have this name: a plain name of at most 120 characters."""
    return _FOLDER.fullmatch(name) is not None and name not in _RESERVED_FOLDERS


def unusable_reason(name: str) -> str:
    """Return why a job's folder cannot have this name, which may be valid but taken."""
    if is_valid_folder(name):
        return "which another job has"
    if name in _RESERVED_FOLDERS:
        return "which the sweep needs itself"
    return "which is no plain name of at most 120 letters, digits and . , = + @ - _"


def has_sweep_manifest(folder: Path) -> bool:
    """Return whether `folder` is the directory of a sweep that recorded its jobs."""
    return (folder / NAME).is_file()


def read_manifest(folder: Path) -> SweepManifest:
    """Read the manifest of the sweep in `folder`: empty where there is none, without an incomplete last record.

    Raises:
        ConfigError: it is damaged, or of a version that is not supported.
    """
    manifest = SweepManifest(folder)
    path = folder / NAME
    lines = [line for line in io.BytesIO(_read_bytes(path)) if line.endswith(b"\n")]
    end = 0
    for number, line in enumerate(lines, 1):
        try:
            content = safe_json.parse(line, max_values=_MAX_VALUES_PER_LINE)
            if "lines" in content:
                if not is_count(content["lines"]) or number <= end:
                    raise ValueError("a record begins inside another")
                end = number + content["lines"] - 1
                if end > len(lines):  # its writer was killed, before anything was started
                    break
            _apply(manifest, content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} cannot be understood: {_reason(error)}.") from None
        manifest.size += len(line)
    return manifest


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{shorten(error.args[0])} is missing"
    return shorten(error) if isinstance(error, ValueError) else "a value has the wrong type"


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


def _job_line(job: SweepJob, configs: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return the line of `job`: its config in full, or as its differences from the first job that has one."""
    assert job.config is not None
    line = {"job": job.number, "id": job.id, "folder": job.folder, "overrides": job.overrides, "choices": job.choices}
    if job.references:
        line["references"] = job.references
    if job.labels != NO_LABELS:
        line["labels"] = job.labels.to_dict()
    like = next(number for number, config in enumerate(configs) if config is not None)
    if like == job.number:
        return {**line, "config": job.config}
    base, config = serialize.flatten_stored(configs[like] or {}), serialize.flatten_stored(job.config)
    if base.keys() != config.keys():
        return {**line, "config": job.config}
    return {**line, "like": like, "changes": {name: value for name, value in config.items() if value != base[name]}}


def _apply(manifest: SweepManifest, line: dict[str, Any]) -> None:
    """Add one line of the file to `manifest`; raises ValueError, KeyError or TypeError where it is invalid."""
    if "schema" in line:
        if line["schema"] not in _READABLE_SCHEMAS:
            raise ValueError(f"schema {line['schema']}, this version reads {SCHEMA}")
        texts = _texts(line["words" if line["schema"] == 1 else "arguments"])
        manifest.arguments = retired.upgrade_overrides(texts)
        manifest.launcher = _launcher(line.get("launcher", {}))
    elif "stop_at" in line:
        for text, step in _settings(line["stop_at"]).items():
            if not text.isdecimal() or int(text) >= len(manifest.jobs):
                raise ValueError(f"job {shorten(text)} is not recorded")
            if step is not None and (not is_count(step) or step < 1):
                raise ValueError("a step to stop at has to be 1 or more")
            manifest.jobs[int(text)] = replace(manifest.jobs[int(text)], stop_at=step)
    elif "set" in line:
        changes = _settings(line["set"])
        if "job" in line:
            if not is_count(number := line["job"]) or number >= len(manifest.jobs):
                raise ValueError(f"job {number} is not recorded")
            job = manifest.jobs[number]
            serialize.change_dict(job.config or {}, changes)  # raises where they do not fit the config
            manifest.jobs[number] = replace(job, own_changes={**job.own_changes, **changes})
        else:
            manifest.jobs = [job.with_changes(changes) for job in manifest.jobs]
    else:
        job = _job(manifest, line)
        if job.number == len(manifest.jobs):
            manifest.jobs.append(job)
            manifest.numbers[job.folder] = job.number
        elif manifest.jobs[job.number].config is None and job.config is not None:
            manifest.jobs[job.number] = job
        else:
            raise ValueError(f"job {job.number} has two configs")


def _job(manifest: SweepManifest, line: dict[str, Any]) -> SweepJob:
    number = line["job"]
    if not is_count(number) or number > len(manifest.jobs):
        raise ValueError(f"job {number} is out of order")
    if not isinstance(line["id"], str):
        raise ValueError(f"job {number} has an id that is no text")
    stored = retired.upgrade_overrides(_texts(line["overrides"]))
    overrides = tuple(o for o in stored if o.lstrip("+").partition("=")[0] not in INVOCATION_ARGUMENTS)
    for override in overrides:
        if not _OVERRIDE.fullmatch(override) or override.lstrip("+").startswith("hydra"):
            raise ValueError(f"{override} is no setting of a job")
    folder = line.get("folder", str(number))
    if not isinstance(folder, str) or not is_valid_folder(folder):
        raise ValueError(f"{folder} is no name of a folder")
    if manifest.numbers.get(folder, number) != number:
        raise ValueError(f"job {number} has the folder of another job")
    config = line.get("config")
    if "like" in line:
        like = line["like"]
        base = manifest.jobs[like].config if is_count(like) and like < number else None
        if base is None:
            raise ValueError(f"job {number} refers to a job without a config")
        config = serialize.change_dict(base, _settings(line["changes"]))
    if config is not None:
        config = retired.upgrade_config(_settings(config))
        # Trust in a model's code is given for one invocation.
        if isinstance(model := config.get("model"), dict):
            model.pop("trust_remote_code", None)
    choices = _settings(line.get("choices", {}))
    if not all(isinstance(text, str) and _CHOICE.fullmatch(text) for pair in choices.items() for text in pair):
        raise ValueError("choices of groups are expected")
    references, labels = _settings(line.get("references", {})), _labels(_settings(line.get("labels", {})))
    return SweepJob(number, folder, overrides, config, choices, references, labels=labels)


def _labels(stored: dict[str, Any]) -> Labels:
    name, tags, note = stored.get("name"), stored.get("tags") or [], stored.get("note")
    texts = isinstance(name, str | None) and isinstance(tags, list) and isinstance(note, str | None)
    if not texts or list(label_problems(name, tags, note)):
        raise ValueError("the labels of a job are invalid")
    return Labels.of(stored)


def _settings(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("settings are expected")
    return value


def _launcher(value: object) -> dict[str, Any]:
    """Return the launcher of a line: its name, and how many jobs run at once."""
    launcher = _settings(value)
    if not launcher:
        return {}
    jobs = launcher.get("jobs")
    if jobs is not None and (not is_count(jobs) or jobs < 1):
        raise ValueError("jobs of a launcher have to be 1 or more")
    if not isinstance(launcher["name"], str) or not _NAME.fullmatch(launcher["name"]):
        raise ValueError(f"{shorten(repr(launcher['name']))} is no name of a launcher")
    return {"name": launcher["name"], "jobs": jobs}


def _texts(value: object) -> tuple[str, ...]:
    """Return a list of overrides that is safe to parse: Hydra's parser needs time and memory for nested ones."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of texts is expected")
    for text in value:
        limit = _MAX_REFERENCE_LENGTH if "${" in text else _MAX_OVERRIDE_LENGTH
        if len(text) > limit or sum(text.count(bracket) for bracket in "[{(") > _MAX_BRACKETS:
            raise ValueError("a text is too long for an override")
    return tuple(value)
