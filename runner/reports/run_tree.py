"""Lineage as a tree: each run below the run that it comes from, with what changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runner.reports import settings_text
from runner.reports.run_table import Entry, ListedRow, runs_of
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.lineage import Parent, ParentIndex, parents

_MAX_CHANGES = 6
GONE, NOT_LISTED = "gone", "not listed"
"""States of a parent that is not among the listed runs."""


def tree_rows(
    entries: Sequence[Entry], totals: Mapping[Path, int], *, limit: int | None = None, ascii_only: bool = False
) -> list[ListedRow]:
    """Return the rows of a tree. Roots and the children of one run keep the order of `entries`.

    Jobs stand below their sweep where other runs come from them. A parent that is not among `entries` has a row of its
    own, with its recorded path.

    Args:
        entries: the runs and sweeps.
        totals: as in `settings_rows`.
        limit: number of roots that are shown, with all below them; None shows all.
        ascii_only: whether the screen shows no other characters.
    """
    return list(_Tree(entries, totals, ascii_only).rows(limit))


def parent_text(parent: Parent, child: Entry, found: Entry | None) -> str:
    """Return how a run comes from its parent and what it changed: ``branch at 80: learning_rate 0.001 -> 0.0001``."""
    changes = _changes(runs_of(found), runs_of(child)) if found else []
    more = f" and {len(changes) - _MAX_CHANGES} more" if len(changes) > _MAX_CHANGES else ""
    listed = f"{', '.join(changes[:_MAX_CHANGES])}{more}"
    return f"{parent.text}: {listed}" if listed else parent.text


class _Tree:
    """Entries by `id`: a directory that another run has taken since has two of them."""

    def __init__(self, entries: Sequence[Entry], totals: Mapping[Path, int], ascii_only: bool) -> None:
        self._entries, self._totals, self._ascii = entries, totals, ascii_only
        self._sweeps = {id(run): entry for entry in entries if isinstance(entry, SweepInfo) for run in entry.runs}
        self._children: dict[int, list[Entry]] = {}
        self._parent: dict[int, Entry] = {}
        self._text: dict[int, str] = {}
        self._missing: dict[Path, Entry] = {}
        index = ParentIndex(entries)
        for entry in entries:
            self._place(entry, index)

    def rows(self, limit: int | None) -> Iterator[ListedRow]:
        roots = [entry for entry in self._entries if id(entry) not in self._parent]
        for root in [*self._missing.values(), *roots][:limit]:
            yield from self._below(root, "", "")

    def _place(self, entry: Entry, index: ParentIndex) -> None:
        """Put `entry` below its first parent, unless it would become its own ancestor."""
        for parent in parents(entry)[:1]:
            found = index.find(parent)
            above = found or self._missing.setdefault(parent.run, _missing(parent))
            if self._is_ancestor(entry, above):
                continue
            if id(above) in self._sweeps:  # a job stands below its sweep
                self._add(above, self._sweeps[id(above)])
            self._add(entry, above)
            self._text[id(entry)] = parent_text(parent, entry, found)

    def _add(self, child: Entry, parent: Entry) -> None:
        if id(child) not in self._parent:
            self._parent[id(child)] = parent
            self._children.setdefault(id(parent), []).append(child)

    def _is_ancestor(self, entry: Entry, of: Entry) -> bool:
        current: Entry | None = of
        while current is not None:
            if current is entry:
                return True
            current = self._parent.get(id(current)) or self._sweeps.get(id(current))
        return False

    def _below(self, entry: Entry, prefix: str, below: str) -> Iterator[ListedRow]:
        short = entry.path.name if self._parent.get(id(entry)) is self._sweeps.get(id(entry), entry) else None
        total = self._totals.get(entry.path)
        yield ListedRow(entry, self._text.get(id(entry), ""), prefix=prefix, short=short, total=total)
        children = self._children.get(id(entry), [])
        branch, last, line = ("|- ", "`- ", "|  ") if self._ascii else ("├─ ", "└─ ", "│  ")
        for child in children:
            is_last = child is children[-1]
            yield from self._below(child, below + (last if is_last else branch), below + ("   " if is_last else line))


def _missing(parent: Parent) -> RunInfo:
    state = NOT_LISTED if parent.run.exists() else GONE
    return RunInfo(path=parent.run, state=state)


def _changes(before: Sequence[RunInfo], after: Sequence[RunInfo]) -> list[str]:
    """Return what differs between a run and what came from it, as ``rank 8 -> 32``; of a sweep all values."""
    names = [n for n in settings_text.by_importance(differing_settings([*before, *after])) if n != "adapter"]
    labels = settings_text.short_names(names)
    texts = []
    for name in names:
        sides = []
        for runs in (before, after):
            values = [run.setting(name) for run in runs if run.settings]
            sides.append(",".join(dict.fromkeys(settings_text.texts_of(name, values))))
        if sides[0] != sides[1]:
            texts.append(f"{labels[name]} {sides[0]} -> {sides[1]}")
    return texts
