"""Where runs come from: a branch from a checkpoint, a repeat from a run, a warm start from an adapter.

status.json records it at the start, with the path and the identity of the run, so that a moved one is still found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from runner.common import layout
from runner.common.errors import ConfigError
from runner.common.layout import STEP_NAME
from runner.runs.directory import RunDirectory
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo

BRANCH, WARM_START, REPEAT = "branch", "warm start", "repeat"
_HOW = (BRANCH, WARM_START, REPEAT)
"""In order of what says most: a run that repeats another from its weights is a warm start from it."""
_MAX_PATH_LENGTH = 4096
_TAIL = 2
"""Last parts of a path, such as 2026-11-24/10-00-00, by which a run that was moved is found where nothing else is
known of it."""


@dataclass(frozen=True)
class Parent:
    """A run that another began from, as recorded."""

    how: str
    """`branch`, `warm start` or `repeat`."""
    path: Path
    """The checkpoint, adapter or run, at the time."""
    run_id: str | None = None

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, if it was one."""
        checkpoint = self._checkpoint
        return int(checkpoint.name.removeprefix("step-")) if checkpoint else None

    @property
    def run(self) -> Path:
        """The directory of the run that `path` belongs to, by its name."""
        if checkpoint := self._checkpoint:
            return checkpoint.parent.parent
        inner = {layout.RESULT, layout.ADAPTERS}
        return next((p for p in (self.path, *self.path.parents) if p.name not in inner), self.path)

    @property
    def _checkpoint(self) -> Path | None:
        """The checkpoint's folder: `path`, or what holds it where it is a file. Folders above may be named so, too."""
        return next((p for p in (self.path, self.path.parent) if STEP_NAME.fullmatch(p.name)), None)

    @property
    def text(self) -> str:
        """Such as ``branch at 80``."""
        return self.how if self.step is None else f"{self.how} at {self.step}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as status.json records it."""
        return {"how": self.how, "path": str(self.path), "run_id": self.run_id}


def record_parents(*, branch: Path | None, repeat: Path | None, adapter: str | None) -> list[dict[str, Any]]:
    """Return what status.json records of a new run's parents.

    Args:
        branch: the checkpoint that it continues from.
        repeat: the run whose settings it takes.
        adapter: the weights that it starts from; a file that is no part of a run is a parent without an identity.
    """
    sources = {BRANCH: branch, WARM_START: Path(adapter).expanduser().absolute() if adapter else None, REPEAT: repeat}
    return [Parent(how, path, _run_id(path)).to_dict() for how, path in sources.items() if path is not None]


def parents(entry: RunInfo | SweepInfo) -> list[Parent]:
    """Return the parents that the run recorded, what says most first; of a sweep the run that it repeats."""
    if isinstance(entry, SweepInfo):
        return [Parent(REPEAT, entry.repeats)] if entry.repeats else []
    return parents_of(entry.status)


def parents_of(status: Mapping[str, Any]) -> list[Parent]:
    """Return the parents in the content of status.json; earlier versions recorded branches alone."""
    recorded = status.get("parents")
    found = []
    for item in recorded if isinstance(recorded, list) else []:
        if isinstance(item, dict) and item.get("how") in _HOW and _is_path(path := item.get("path")):
            run_id = item.get("run_id")
            found.append(Parent(item["how"], Path(path), run_id if isinstance(run_id, str) else None))
    former = status.get("parent")
    if not any(parent.how == BRANCH for parent in found) and _is_path(former):
        found.append(Parent(BRANCH, Path(former)))
    return sorted(found, key=lambda parent: _HOW.index(parent.how))


class ParentIndex:
    """The runs, jobs and sweeps of a listing, to find parents among."""

    def __init__(self, entries: Sequence[RunInfo | SweepInfo]) -> None:
        self._by_path: dict[Path, RunInfo | SweepInfo] = {}
        for entry in entries:
            jobs = entry.runs if isinstance(entry, SweepInfo) else []
            members: list[RunInfo | SweepInfo] = [entry, *jobs]
            for member in members:
                self._by_path.setdefault(member.path.resolve(), member)
        self._by_id: dict[str, list[RunInfo | SweepInfo]] = {}
        self._by_tail: dict[tuple[str, ...], list[RunInfo | SweepInfo]] = {}
        for path, member in self._by_path.items():
            if isinstance(member, RunInfo) and isinstance(run_id := member.status.get("run_id"), str):
                self._by_id.setdefault(run_id, []).append(member)
            self._by_tail.setdefault(path.parts[-_TAIL:], []).append(member)

    def find(self, parent: Parent) -> RunInfo | SweepInfo | None:
        """Return the run that `parent` is: at its path, else by its identity, else where neither was recorded by the
        last parts of its path. None where it is not among the listed ones."""
        source = parent.path.resolve()
        for path in (source, *source.parents):
            member = self._by_path.get(path)
            if member is not None:
                is_other = (
                    isinstance(member, RunInfo) and parent.run_id and member.status.get("run_id") != parent.run_id
                )
                if not is_other:
                    return member
                break
        if parent.run_id is not None:
            return next(iter(self._by_id.get(parent.run_id, [])), None)
        found = self._by_tail.get(parent.run.parts[-_TAIL:], [])
        return found[0] if len(found) == 1 else None


def _run_id(path: Path) -> str | None:
    """Return the identity of the run that the path lies in."""
    for folder in (path, *path.parents):
        with suppress(OSError, ConfigError):
            if (folder / layout.CONFIG).is_file():
                run_id = RunDirectory(folder).read_status().get("run_id")
                return run_id if isinstance(run_id, str) else None
    return None


def _is_path(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) < _MAX_PATH_LENGTH and "\0" not in value
